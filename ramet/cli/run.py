"""`ramet run program.py`: run a file's program, and show its text as it is written."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from ramet.cli.program import add_program, check_complete, given_arguments, load_program
from ramet.errors import InvalidRequest
from ramet.lang.graph.options import MAX_TIMEOUT_S

if TYPE_CHECKING:
    from ramet.lang.graph import ir
    from ramet.lang.recording.state import State

KEY_VARIABLE = "RAMET_API_KEY"


def add_run(parser: argparse.ArgumentParser) -> None:
    add_program(parser)
    add_place(parser)
    parser.add_argument("--seed", type=int, help="a seed for every generation is derived from it")
    parser.add_argument("--timeout", type=_seconds, metavar="S", help="seconds after which the program is cancelled")
    parser.add_argument("--json", action="store_true", help="print result, variables and tokens as JSON, and no text")


def add_place(parser: argparse.ArgumentParser) -> None:
    """Declare where programs run; `backend_of` reads it."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--model", help="a catalogue name, a directory, a .gguf file or a hub id")
    where.add_argument(
        "--backend", metavar="URL", help=f"a server of programs (`ramet serve`); its key comes from {KEY_VARIABLE}"
    )
    where.add_argument("--mock", action="store_true", help="no model: answers by the file's SCRIPT, or made up")


def _seconds(text: str) -> float:
    if not 0 < float(text) <= MAX_TIMEOUT_S:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds from 0 to {MAX_TIMEOUT_S:,.0f}")
    return float(text)


def run_run(arguments: argparse.Namespace) -> int:
    """Run the program. Exit status 1 where it fails, or the file or the arguments are wrong."""
    names, program = load_program(arguments)
    given = given_arguments(names, program, arguments)
    check_complete(program, given)
    options = {"seed": arguments.seed, "timeout_s": arguments.timeout}
    options = {name: value for name, value in options.items() if value is not None}
    with ExitStack() as stack:
        backend = backend_of(arguments, names)
        if backend is not None:
            options["backend"] = stack.enter_context(backend)
        start_s = time.monotonic()
        stream = program.stream(**given, **options)
        screen = _Screen(Console(highlight=False, soft_wrap=True, quiet=arguments.json), stream.state)
        for event in stream:
            screen.show(event)
        state = stream.state
        error = state.error()
        screen.end()
        if error is not None:
            raise error
        _report(state, time.monotonic() - start_s, as_json=arguments.json)
    return 0


def backend_of(
    arguments: argparse.Namespace, names: dict[str, Any]
) -> AbstractContextManager[Any] | None:  # Any: what the file defines; engines and backends
    """Choose the backend. None stands for the one that the file has set, or else the default model's engine."""
    if arguments.backend is not None:
        from ramet.lang.backends.remote import Remote

        if not arguments.backend.startswith(("http://", "https://")):
            raise InvalidRequest(f"--backend is {arguments.backend!r}, but must be an http:// address", param="backend")
        return Remote(arguments.backend, api_key=os.environ.get(KEY_VARIABLE))
    if arguments.mock:
        from ramet.lang.backends.in_process import MockBackend

        return MockBackend(names.get("SCRIPT"))
    if arguments.model is not None:
        from ramet.runtime.engine.engine import Engine

        with Console(stderr=True).status("loading the model") as status:
            return Engine(arguments.model, on_stage=status.update)
    return None


class _Screen:
    """Shows a program's text in the order in which it was recorded: of branches that run together, one after another.

    What was given is dim, what the model wrote is not.
    """

    def __init__(self, console: Console, state: State) -> None:
        self._console = console
        self._state = state
        self._next = 0  # the node that is being shown
        self._pending: dict[int, list[ir.NodeEvent]] = {}
        self._shown: dict[int, int] = {}  # characters of a node that were shown as they came
        self._is_at_start = True

    def show(self, event: ir.NodeEvent) -> None:
        self._pending.setdefault(event.node, []).append(event)
        while self._pending.get(self._next):
            found = self._pending[self._next].pop(0)
            self._print(self._next, found)
            if found.kind in ("done", "error"):
                del self._pending[self._next]
                self._next += 1

    def end(self) -> None:
        if not self._is_at_start:
            self._console.print()

    def _print(self, number: int, event: ir.NodeEvent) -> None:
        from ramet.lang.graph import ir

        node = self._state.recorder.run.nodes[number]
        if isinstance(node, ir.Fork):
            self._line(f"── branch {node.index + 1} of {node.width} ──")
        elif isinstance(node, ir.Role):
            if node.is_open:
                self._line(f"{node.role}:")
            elif not self._is_at_start:
                self._write("\n", "")
        elif isinstance(node, ir.Text | ir.Generate | ir.Select):
            style = "dim" if isinstance(node, ir.Text) else ""
            self._write(event.text[self._shown.pop(number, 0) if event.kind == "done" else 0 :], style)
            if event.kind == "text":
                self._shown[number] = self._shown.get(number, 0) + len(event.text)

    def _line(self, text: str) -> None:
        if not self._is_at_start:
            self._write("\n", "")
        self._write(f"{text}\n", "dim cyan")

    def _write(self, text: str, style: str) -> None:
        if text:
            self._console.print(Text(text, style=style), end="")
            self._is_at_start = text.endswith("\n")


def _report(state: State, seconds: float, *, as_json: bool) -> None:
    usage = state.usage
    variables = {name: _plain(value) for name, value in state.variables.items()}
    if as_json:
        tokens = {
            "computed": usage.computed_tokens,
            "cached": usage.cached_tokens,
            "written": usage.completion_tokens,
        }
        found = {"result": _plain(state.result), "variables": variables, "tokens": tokens, "seconds": round(seconds, 3)}
        json.dump(found, sys.stdout, indent=2, ensure_ascii=False)
        print()
        return
    console = Console(highlight=False)
    if state.result is not None:
        console.print(Text.assemble(("result ", "bold"), repr(state.result)))
    for name, value in variables.items():
        console.print(Text.assemble((f"{name} ", "bold"), json.dumps(value, ensure_ascii=False)))
    console.print(
        f"[dim]{usage.computed_tokens:,} prompt tokens computed, {usage.cached_tokens:,} from the cache, "
        f"{usage.completion_tokens:,} written, {seconds:.1f} s[/]"
    )


def _plain(value: Any) -> Any:  # Any: a value of any type, and JSON
    """Return the value in JSON types; a value that has no JSON form as its `repr`."""
    import msgspec

    try:
        return msgspec.to_builtins(value, enc_hook=repr)
    except (TypeError, ValueError):
        return repr(value)
