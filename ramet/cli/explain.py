"""`ramet explain program.py`: what the programs of a file will cost, without running them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ramet.cli.program import add_program, from_json, given_arguments, load_program
from ramet.errors import ConfigError

if TYPE_CHECKING:
    from ramet.lang.passes.target import Target
    from ramet.lang.program.function import Function


def add_explain(parser: argparse.ArgumentParser) -> None:
    add_program(parser)
    parser.add_argument("--rows", help="a JSON list of rows: explain a batch")
    whose = parser.add_mutually_exclusive_group()
    whose.add_argument(
        "--model", help="whose tokenizer and chat template (weights are not read); default: MockBackend's"
    )
    whose.add_argument(
        "--mock", action="store_true", help="plan for MockBackend, whose tokenizer is a small one: the default"
    )
    parser.add_argument("--json", action="store_true", help="print plain data")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="draw the graph as well: .html, .svg or .mmd")


def run_explain(arguments: argparse.Namespace) -> int:
    """Print the explanation. Exit status 1 where the file, its program or the arguments are wrong."""
    names, program = load_program(arguments)
    given = given_arguments(names, program, arguments)
    rows = from_json(arguments.rows, "--rows") if arguments.rows else None
    found = program.plan((), {} if rows else given, rows=rows, target=_target(arguments.model))
    if arguments.draw is not None:
        _draw(program, given, _target(arguments.model), arguments.draw)
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
    else:
        Console(highlight=False).print(found)
    return 0


def _draw(program: Function, given: dict[str, Any], target: Target, path: Path) -> None:  # Any: the program's own
    try:
        program.draw(given, target=target).save(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error


def _target(model: str | None) -> Target:
    from ramet.runtime.programs.model import ProgramModel

    if model is None:
        from ramet.runtime.testing.byte_tokenizer import small_subword_tokenizer

        return ProgramModel(small_subword_tokenizer(), name="MockBackend")
    from ramet.runtime.engine.config import DEFAULT_PAGE_SIZE
    from ramet.runtime.models.catalog import resolve_model
    from ramet.runtime.models.description import describe_model

    described = describe_model(resolve_model(model))
    return ProgramModel(
        described.tokenizer,
        name=model,
        context_length=described.config.max_position_embeddings,
        page_size=DEFAULT_PAGE_SIZE,
    )
