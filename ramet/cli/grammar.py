"""`ramet grammar check`: report what a schema or grammar enforces, what it costs, and where it refuses an instance."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ramet.errors import InvalidRequest, UnsupportedSchema
from ramet.lang.graph.json_form import KNOWN

_KINDS = {".json": "json_schema", ".lark": "cfg", ".regex": "regex"}
_CONTEXT = 60
_NAME = 40  # characters of an instance that stand for it


def add_grammar(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)
    summary = "Say what a schema or grammar enforces, and where instances are refused."
    check = actions.add_parser("check", help=summary, description=summary)
    check.add_argument(
        "source",
        metavar="SCHEMA",
        help="a file; or the text itself, if it is a JSON object or --kind is given; - reads standard input",
    )
    check.add_argument("instances", metavar="INSTANCE", nargs="*", help="a file, or the text itself")
    check.add_argument(
        "--kind",
        choices=("json_schema", "regex", "cfg", "choice", "substring", "tools"),
        help="what SCHEMA is (default: by its ending, .json, .lark or .regex; else json_schema)",
    )
    form = check.add_argument_group("JSON schemas", "The defaults are those of programs and of the server.")
    form.add_argument(
        "--whitespace",
        choices=KNOWN["whitespace"],
        default="model",
        metavar="LAYOUT",
        help="model (a space after each comma and colon), compact, any, or indent=0 to indent=8 [model]",
    )
    form.add_argument("--order", choices=KNOWN["order"], default="declared", help="of properties [declared]")
    form.add_argument(
        "--additional-properties",
        choices=KNOWN["additional_properties"],
        default="closed",
        help="schema: an object whose schema has `properties` and says nothing of others may have others [closed]",
    )
    form.add_argument("--strict", action="store_true", help="the schema must keep OpenAI's rules")
    check.add_argument(
        "--on-unsupported",
        choices=("error", "validate"),
        default="error",
        help="validate: compile JSON schemas without the parts that cannot be enforced",
    )
    check.set_defaults(further="instances")
    check.add_argument("--raw", action="store_true", help="walk JSON instances as they are written, not re-serialised")


def run_grammar(arguments: argparse.Namespace) -> int:
    """Report on a constraint and its instances. Exit status 1 when one is refused, or the schema cannot be enforced."""
    from ramet.grammar.ir import AS_MODELS_WRITE
    from ramet.grammar.service.check import byte_vocabulary, walk
    from ramet.grammar.service.sources import compile_constraint

    console = Console(highlight=False, soft_wrap=True)
    is_text = arguments.source.lstrip().startswith("{")
    kind = arguments.kind or ("json_schema" if is_text else _KINDS.get(Path(arguments.source).suffix, "json_schema"))
    source = _read(arguments.source, arguments.kind)
    options: dict[str, Any] = {}
    if kind == "json_schema":
        names = ("whitespace", "order", "additional_properties", "strict", "on_unsupported")
        options = {**AS_MODELS_WRITE, **{name: getattr(arguments, name) for name in names}}
        _print_coverage(console, source, options)
    elif kind in ("regex", "choice"):
        source = source.rstrip("\n")
    vocabulary = byte_vocabulary()
    compile_constraint("json_schema", True, vocabulary)  # so that loading the engine is not counted
    begin = time.perf_counter()
    try:
        grammar = compile_constraint(kind, source, vocabulary, **options)
    except UnsupportedSchema:
        console.print("[bold red]not compiled:[/] parts of the schema cannot be enforced")
        return 1
    seconds = time.perf_counter() - begin
    closed = grammar.close(limit=5_000)
    machine = grammar.machine
    size = f"{grammar.num_states:,} states" if closed else "states are made as they are visited"
    console.print(f"[bold]{'compiled':<14}[/]{seconds * 1e3:.1f} ms for a byte vocabulary")
    console.print(f"[bold]{'size':<14}[/]{size}; tables of {machine.pool_used * 4 / 1024:,.0f} KiB")
    literal: Any = None  # the letter of the schema, compiled where an instance is refused
    is_fine = True
    for given in arguments.instances:
        text = _print_instance(console, grammar, kind, given, arguments)
        if text is None:
            continue
        is_fine = False
        if kind == "json_schema" and text:
            if literal is None:
                loose = {"order": "any", "additional_properties": "schema", "integers": "any"}
                literal = compile_constraint(kind, source, vocabulary, **{**options, **loose})
            if walk(literal, text).is_accepted:
                console.print("    the schema allows it: see --order any, --additional-properties schema")
    return 0 if is_fine else 1


def _print_coverage(console: Console, source: str, options: dict[str, Any]) -> None:
    from ramet.grammar.ir import JsonOptions
    from ramet.grammar.service.check import coverage

    try:
        schema = json.loads(source)
    except (ValueError, RecursionError):
        return  # compiling says what is wrong
    found = coverage(schema, JsonOptions(**options))
    enforced = ", ".join(f"{k} × {n}" if n > 1 else k for k, n in sorted(found.enforced.items()))
    console.print(f"[bold]{'enforced':<14}[/]", end="")
    console.print(enforced or "nothing: any JSON value", markup=False)
    for title, places in (
        ("annotations", [f"{k} at {p}" for p, k in found.annotations]),
        ("ignored", [f"unknown keyword {k!r} at {p}" for p, k in found.unknown]),
        ("ignored", [f"{k} beside $ref at {p}, as drafts up to 7 ask" for p, k in found.hidden]),
        ("ignored", [f"unknown format {f!r} at {p}" for p, f in found.unknown_formats]),
    ):
        if places:
            shown = "; ".join(places[:8]) + (f"; and {len(places) - 8} more" if len(places) > 8 else "")
            console.print(f"[bold]{title:<14}[/]", end="")
            console.print(shown, markup=False)
    if found.closed:
        shown = ", ".join(found.closed[:8]) + (f", and {len(found.closed) - 8} more" if len(found.closed) > 8 else "")
        console.print("[bold]closed        [/]", end="")
        console.print(
            f"only declared properties at {shown}; --additional-properties schema allows others", markup=False
        )
    if found.problems:
        table = Table("at", "keyword", "why it cannot be enforced", title="not enforced", title_justify="left")
        for pointer, keyword, reason in found.problems:
            table.add_row(Text(pointer or "/"), Text(keyword), Text(reason))
        console.print(table)


def _print_instance(console: Console, grammar: Any, kind: str, given: str, arguments: argparse.Namespace) -> str | None:
    """Report on an instance. Returns the text that is refused, "" if it is no JSON; None if it is accepted."""
    from ramet.grammar.service.check import walk

    is_file = len(given) < 4096 and "\0" not in given and Path(given).is_file()
    text = _read(given, None) if is_file else given
    name = given if is_file else "the instance"
    if not is_file and len(arguments.instances) > 1:
        name = given if len(given) <= _NAME else given[: _NAME - 3] + "..."
    name = escape(name)
    if kind == "json_schema" and not arguments.raw:
        try:
            value, layout = json.loads(text), _layout(arguments.whitespace)
            text = json.dumps(value, ensure_ascii=False, **layout)
            if any("\ud800" <= c <= "\udfff" for c in text):  # only an escape can write them
                text = json.dumps(value, **layout)
        except (ValueError, RecursionError) as error:
            console.print(f"[bold red]refused[/]       {name}: not JSON: {error}")
            return ""
    elif is_file:
        text = text.removesuffix("\n")
    found = walk(grammar, text)
    if found.is_accepted:
        console.print(f"[bold green]accepted[/]      {name}")
        return None
    at = len(found.text[: found.num_bytes].decode())
    where = "it ends too early" if at == len(text) else f"character {at}"
    console.print(f"[bold red]refused[/]       {name}: {where}")
    before, after = text[max(0, at - _CONTEXT) : at], text[at : at + _CONTEXT]
    line = f"{before}{after}".replace("\n", "⏎").replace("\t", "→")
    console.print(Text(f"    {line}"), soft_wrap=True)
    console.print(Text(f"    {' ' * len(before)}^", style="bold red"), soft_wrap=True)
    console.print("    allowed there: ", end="")
    console.print(" or ".join(found.allowed) or "nothing", markup=False)
    return text


def _layout(whitespace: str) -> dict[str, Any]:  # Any: arguments of json.dumps
    """Return the arguments with which json.dumps writes in a layout."""
    if whitespace.startswith("indent="):
        return {"indent": int(whitespace.removeprefix("indent="))}
    return {"separators": (",", ":") if whitespace == "compact" else (", ", ": ")}


def _read(source: str, kind: str | None) -> str:
    """Return the text of a file, or `source` itself: where it can be no path, or where its `kind` says what it is."""
    if source == "-":
        return sys.stdin.read()
    if source.lstrip().startswith("{"):
        return source
    try:
        is_file = Path(source).is_file()
        if is_file:
            return Path(source).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if kind is None:
            raise InvalidRequest(f"cannot read {source}: {error}") from error
        is_file = False
    if kind is None:
        raise InvalidRequest(
            f"cannot read {source}: it is no file; if it is the text itself, say what it is: --kind regex"
        )
    return source
