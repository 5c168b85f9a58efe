"""`ramet explain program.py`: what the programs of a file will cost, without running them."""

from __future__ import annotations

import argparse
import json
import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ramet.errors import InvalidRequest

if TYPE_CHECKING:
    from ramet.lang.function import Function
    from ramet.lang.passes.target import Target


def add_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a Python file with one program or several")
    parser.add_argument("--program", help="which one; needed where the file has several")
    parser.add_argument("--arguments", help="its arguments as a JSON object; default: the file's EXAMPLE, if any")
    parser.add_argument("--rows", help="a JSON list of rows: explain a batch")
    parser.add_argument("--model", help="whose tokenizer and chat template (weights are not read); default: bytes")
    parser.add_argument("--json", action="store_true", help="print plain data")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="draw the graph as well: .html, .svg or .mmd")


def run_explain(arguments: argparse.Namespace) -> int:
    """Print the explanation. Exit status 1 where the file, its program or the arguments are wrong."""
    from ramet.lang.explain import explain_program

    names = _load(arguments.file)
    program = _choose(names, arguments.program, arguments.file)
    given = _json(arguments.arguments, "--arguments") if arguments.arguments else _example(names, program)
    rows = _json(arguments.rows, "--rows") if arguments.rows else None
    found = explain_program(program, (), {} if rows else given, rows=rows, target=_target(arguments.model))
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
    else:
        Console(highlight=False).print(found)
    if arguments.draw is not None:
        from ramet.lang.draw import draw_program

        draw_program(program, given, target=_target(arguments.model)).save(arguments.draw)
    return 0


def _load(file: Path) -> dict[str, Any]:  # Any: whatever the file defines
    if not file.is_file():
        raise InvalidRequest(f"{file} is no file", param="file")
    return runpy.run_path(str(file), run_name="ramet_explained")


def _choose(names: dict[str, Any], wanted: str | None, file: Path) -> Function:
    from ramet.lang.function import Function

    found = {name: value for name, value in names.items() if isinstance(value, Function)}
    if wanted is not None:
        if wanted not in found:
            raise InvalidRequest(
                f"{file} has no program {wanted!r}; it has {', '.join(found) or 'none'}", param="program"
            )
        return found[wanted]
    if isinstance(names.get("EXAMPLE"), dict):
        fitting = [f for f in found.values() if {p.name for p in f.parameters} == set(names["EXAMPLE"])]
        if len(fitting) == 1:
            return fitting[0]
    if len(found) != 1:
        have = ", ".join(found) or "none"
        raise InvalidRequest(f"{file} has {len(found)} programs ({have}); choose one with --program", param="program")
    return next(iter(found.values()))


def _example(names: dict[str, Any], program: Function) -> dict[str, Any]:
    example = names.get("EXAMPLE")
    fits = isinstance(example, dict) and {p.name for p in program.parameters} >= set(example)
    return dict(example) if fits and isinstance(example, dict) else {}


def _json(text: str, flag: str) -> Any:  # Any: JSON
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"{flag} is not JSON: {error}", param=flag.lstrip("-")) from error


def _target(model: str | None) -> Target:
    from ramet.lang.passes.target import TokenizerTarget

    if model is None:
        from ramet.runtime.byte_tokenizer import ByteTokenizer

        return TokenizerTarget(ByteTokenizer(), name="bytes")
    from ramet.runtime.models.catalog import resolve_model
    from ramet.runtime.models.load import open_model

    files = open_model(resolve_model(model))
    return TokenizerTarget(files.tokenizer, name=model, context_length=files.config.max_position_embeddings)
