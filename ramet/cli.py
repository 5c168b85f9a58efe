"""The `ramet` command. One function for each subcommand: `add_<name>` declares its arguments, `run_<name>` does it.

A new subcommand is one more line in `_COMMANDS`. Exit status: 0 done, 1 failed with a message, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata

from rich.console import Console

from ramet.cli_explain import add_explain, run_explain
from ramet.cli_grammar import add_grammar, run_grammar
from ramet.cli_serve import add_serve, run_serve
from ramet.errors import RametError

Arguments = argparse.Namespace


@dataclass(frozen=True, slots=True)
class _Command:
    name: str
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Arguments], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="ramet", description="Run LLM programs that share their prefixes.")
    parser.add_argument("--version", action="version", version=f"ramet {_version('ramet')}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for command in _COMMANDS:
        sub = commands.add_parser(command.name, help=command.summary, description=command.summary)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    arguments = parser.parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except RametError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


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


# ---- doctor ----


def add_doctor(parser: argparse.ArgumentParser) -> None:
    del parser  # it has no arguments


def run_doctor(arguments: Arguments) -> int:
    """Say what Ramet finds on this machine. Exit status 1 when something stops it from running."""
    del arguments
    console = Console(soft_wrap=True, highlight=False)  # paths stay whole, to be copied
    problems: list[str] = []
    for name, value in (*_software(), *_machine(problems), *_models()):
        console.print(f"[bold]{name:<14}[/]", end="")
        console.print(value, markup=False)
    for problem in problems:
        console.print(f"[bold red]problem:[/] {problem}")
    if not problems:
        console.print("[bold green]ready[/]")
    return 1 if problems else 0


def _software() -> list[tuple[str, str]]:
    rows = [("ramet", _version("ramet")), ("python", f"{platform.python_version()} on {platform.platform()}")]
    for package in ("torch", "triton", "transformers", "tokenizers", "gguf"):
        rows.append((package, _version(package)))
    return rows


def _machine(problems: list[str]) -> list[tuple[str, str]]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = [
        (
            "cpu",
            f"{cores} cores, torch uses {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        )
    ]
    available = _available_memory_bytes()
    rows.append(("memory", "unknown" if available is None else f"{available / 2**30:.1f} GiB available"))
    if available is not None and available < 1 << 30:
        problems.append(
            f"only {available / 2**20:.0f} MiB of memory are available; the smallest model needs about 1 GiB"
        )
    if not torch.cuda.is_available():
        built = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        rows.append(("device", f"cpu ({built})"))
        return rows
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"compute capability {properties.major}.{properties.minor}"
        text = f"{properties.name}, {capability}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        rows.append((f"cuda:{index}", text))
    if _version("triton") == _MISSING:
        problems.append("a GPU is there but Triton is not: pip install triton")
    return rows


def _models() -> list[tuple[str, str]]:
    from ramet.runtime.models.catalog import CATALOG, cache_dir, cached_path, is_cached

    rows = [("cache", f"{cache_dir()} (RAMET_CACHE_DIR changes it)")]
    for model in CATALOG.values():
        if is_cached(model):
            state = f"in the cache: {cached_path(model)}"
        elif cached_path(model).is_file():
            state = f"not checked, or damaged: `ramet pull {model.name}` repairs it"
        else:
            state = f"not fetched: `ramet pull {model.name}` ({model.num_bytes / 1e6:.0f} MB, {model.license})"
        rows.append((model.name, state))
    return rows


_MISSING = "not installed"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return _MISSING


def _available_memory_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not tell (not Linux)."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
    except OSError:
        return None
    return int(fields["MemAvailable"].split()[0]) * 1024


_COMMANDS: tuple[_Command, ...] = (
    _Command("pull", "Fetch a model into the cache.", add_pull, run_pull),
    _Command("serve", "Serve a model over HTTP.", add_serve, run_serve),
    _Command("grammar", "Check what a schema or grammar enforces.", add_grammar, run_grammar),
    _Command("explain", "Show what a program will cost.", add_explain, run_explain),
    _Command("doctor", "Show what Ramet finds on this machine.", add_doctor, run_doctor),
)

if __name__ == "__main__":
    sys.exit(main())
