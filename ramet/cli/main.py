"""The `ramet` command. One function for each subcommand: `add_<name>` declares its arguments, `run_<name>` does it.

A new subcommand is one more line in `_COMMANDS`. Exit status: 0 done, 1 failed with a message, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.markup import escape

import ramet
from ramet.cli.bench import add_bench, run_bench
from ramet.cli.chat import add_chat, run_chat
from ramet.cli.doctor import add_doctor, run_doctor
from ramet.cli.explain import add_explain, run_explain
from ramet.cli.grammar import add_grammar, run_grammar
from ramet.cli.keys import add_keys, run_keys
from ramet.cli.mcp import add_mcp, run_mcp
from ramet.cli.run import add_run, run_run
from ramet.cli.scale import add_scale, run_scale
from ramet.cli.serve import add_serve, run_serve
from ramet.cli.size import add_size, run_size
from ramet.errors import RametError, explained

Arguments = argparse.Namespace
_LONGEST_USAGE = 6  # lines


class _Parser(argparse.ArgumentParser):
    """Puts the error where it is seen: a usage text of dozens of flags would hide it, so --help alone prints that."""

    def error(self, message: str) -> NoReturn:
        usage = self.format_usage()
        if usage.count("\n") > _LONGEST_USAGE:
            usage = ""
        self.exit(2, f"{usage}{self.prog}: error: {message}\n`{self.prog} --help` lists what it takes\n")

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Exit because of unknown arguments; the message suggests the flags with similar names."""
        meant = [
            name
            for word in unknown
            if word.startswith("-")
            for name in difflib.get_close_matches(word.split("=")[0], self._option_string_actions, 1)
        ]
        hint = f"; did you mean {' '.join(meant)}?" if meant else ""
        self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and "further" in arguments and not any(r.startswith("-") for r in rest):
        vars(arguments)[arguments.further] += rest  # argparse stops at an option between the arguments of one list
    elif rest:
        arguments.parser.refuse(rest)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()  # whoever read it may have left, which is to be noticed here
    except ModuleNotFoundError as error:
        found = explained(error)
        if found is error:  # not of our extras: a program's own import
            raise
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(found))}", highlight=False, soft_wrap=True)
        return 1
    except RametError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter's last flush goes there
        return 1
    except Exception as error:
        lines = [line for line in traceback.extract_tb(error.__traceback__) if _is_of_program(line.filename)]
        if not lines:
            raise
        shown = [*traceback.format_list(lines), *traceback.format_exception_only(error)]
        print("".join(shown), end="", file=sys.stderr)
        return 1
    return status


def _is_of_program(file: str) -> bool:
    """Tell whether a line of a traceback stands in a user's program: not in Ramet, Python or an installed package."""
    return not file.startswith((str(Path(ramet.__file__).parent), sys.prefix, sys.base_prefix, "<"))


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(prog="ramet", description="Run LLM programs that share their prefixes.")
    parser.add_argument("--version", action="version", version=f"ramet {ramet.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, (summary, add_arguments, run) in _COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary)
        add_arguments(sub)
        sub.set_defaults(run=run, parser=sub)
    return parser


# ---- pull ----


def add_pull(parser: argparse.ArgumentParser) -> None:
    from ramet.runtime.models.catalog import CATALOG, DEFAULT_MODEL

    names = "; ".join(f"{model.name}: {model.title}, {model.num_bytes / 1e6:.0f} MB" for model in CATALOG.values())
    parser.add_argument("name", nargs="?", default=DEFAULT_MODEL, help=f"a catalogue name or a hub id ({names})")
    parser.add_argument("--quiet", action="store_true", help="no progress bar; print the path alone")


def run_pull(arguments: Arguments) -> int:
    """Fetch a model into the cache and print its path on stdout."""
    from ramet.runtime.models.catalog import CATALOG, pull, resolve_model

    if arguments.name in CATALOG:
        path = pull(arguments.name, show_progress=not arguments.quiet)
    else:
        path = resolve_model(arguments.name)
    print(path)
    return 0


# ---- warm ----


def add_warm(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compile what the first start on this machine would compile: after an install, or while an image is built, by "
        "the user and on the kind of CPU that will run it. With a MODEL, start that once, too, and write a token."
    )
    parser.add_argument("model", nargs="?", help="a catalogue name, a directory, a .gguf file or a hub id")


def run_warm(arguments: Arguments) -> int:
    """Compile, with a line of progress, and print how long it took."""
    import torch

    from ramet.runtime.engine.engine import Engine
    from ramet.runtime.engine.loading import prepare_compiled_code
    from ramet.runtime.types import SamplingParams

    start_s = time.monotonic()
    with Console(stderr=True).status("looking for compiled code") as status:
        prepare_compiled_code(torch.device("cpu"), status.update)
        if arguments.model is not None:
            status.update(f"starting {arguments.model}")
            with Engine(arguments.model, on_stage=status.update) as engine:
                engine.generate("1", SamplingParams(max_tokens=1))
    print(f"warm after {time.monotonic() - start_s:.1f} s")
    return 0


# ---- completion ----


def add_completion(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Print a completion script. bash, zsh: add `eval "$(ramet completion bash)"` to ~/.bashrc, or zsh to ~/.zshrc '
        "behind compinit; fish: ramet completion fish > ~/.config/fish/completions/ramet.fish"
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))


def run_completion(arguments: Arguments) -> int:
    """Print a shell's completion script."""
    import shtab

    print(shtab.complete(make_parser(), shell=arguments.shell))
    return 0


# By name: a summary, the function that declares its arguments, and the one that does it.
_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[Arguments], int]]] = {
    "pull": ("Fetch a model into the cache.", add_pull, run_pull),
    "warm": ("Compile what the first start would compile.", add_warm, run_warm),
    "serve": ("Serve a model over HTTP.", add_serve, run_serve),
    "scale": ("Change the number of a server's engines.", add_scale, run_scale),
    "keys": ("Keep a server's file of API keys.", add_keys, run_keys),
    "chat": ("Talk with a model.", add_chat, run_chat),
    "bench": ("Measure a server or a model.", add_bench, run_bench),
    "grammar": ("Check what a schema or grammar enforces.", add_grammar, run_grammar),
    "run": ("Run a program of a Python file.", add_run, run_run),
    "mcp": ("Offer the programs of a Python file as MCP tools.", add_mcp, run_mcp),
    "explain": ("Show what a program will cost.", add_explain, run_explain),
    "size": ("Show what fits on which GPUs.", add_size, run_size),
    "doctor": ("Show what Ramet finds on this machine.", add_doctor, run_doctor),
    "completion": ("Print a shell's completion script.", add_completion, run_completion),
}
