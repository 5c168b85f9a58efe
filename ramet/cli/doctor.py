"""`ramet doctor`: report what this machine has, what is missing, and how to get it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from rich.console import Console

from ramet.errors import EXTRAS
from ramet.runtime.models.catalog import CATALOG, DEFAULT_MODEL, cache_dir, cached_path, is_cached

DEFAULT_PORT = 30000
_MARKS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "problem": "[bold red]problem[/]"}


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check. `advice` says what to do about it; "" where nothing needs to be done.

    `problem`: Ramet cannot run. `note`: it can, but something is missing or slow.
    """

    name: str
    value: str
    status: Literal["ok", "note", "problem"] = "ok"
    advice: str = ""


def add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Look at device, driver, packages, memory, disk, the port and the model files, and say what to do. "
        "Exit status 1 where something keeps Ramet from running."
    )
    parser.add_argument("--json", action="store_true", help="print the findings as a JSON list")
    parser.add_argument(
        "--port", type=int, metavar="N", default=DEFAULT_PORT, help=f"the port to look at [{DEFAULT_PORT}]"
    )


def run_doctor(arguments: argparse.Namespace) -> int:
    """Print all findings. Exit status 1 when one is a problem."""
    findings = [*_software(), *_image(), *_machine(), *_devices(), *_network(arguments.port), *_models()]
    has_problem = any(finding.status == "problem" for finding in findings)
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
        return int(has_problem)
    console = Console(soft_wrap=True, highlight=False)  # paths stay whole, to be copied
    for finding in findings:
        console.print(f"[bold]{finding.name:<14}[/]", end="")
        console.print(finding.value, markup=False)
    for finding in findings:
        if finding.advice:
            console.print(f"{_MARKS[finding.status]}: {finding.name}: ", end="")
            console.print(finding.advice, markup=False)
    if not has_problem:
        console.print("[bold green]ready[/]")
    return int(has_problem)


def version(package: str) -> str | None:
    """A package's version, or None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _software() -> Iterator[Finding]:
    yield Finding("ramet", version("ramet") or "not installed")
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    lacks = {extra: [name for name in names if find_spec(name) is None] for extra, names in EXTRAS.items()}
    if lacks["cpu"]:
        advice = "an engine on this machine needs them: pip install 'ramet[cpu]', or 'ramet[gpu]'"
        yield Finding("engine", f"missing: {', '.join(lacks['cpu'])}", "problem", advice)
    for package in ("torch", "tokenizers", "transformers", "gguf", "numba", "triton"):
        yield Finding(package, version(package) or "not installed")
    if lacks["server"]:
        advice = "`ramet serve` needs them: pip install 'ramet[server]'"
        yield Finding("server", f"missing: {', '.join(lacks['server'])}", "note", advice)
    else:
        yield Finding("server", "its packages are installed")


def _image() -> Iterator[Finding]:
    """What is wrong with how a container of deploy/Dockerfile was started; nothing outside of one."""
    image, driver = os.environ.get("RAMET_IMAGE"), _driver()
    if image is None:
        return
    value, advice = f"{image}, of deploy/Dockerfile", ""
    if image == "cuda" and driver is None:
        advice = "the container sees no GPU: docker run --gpus all, with NVIDIA's container toolkit on the host"
    elif image == "cpu" and driver is not None:
        advice = "there is an NVIDIA driver, which this image does not use: build with --target cuda"
    yield Finding("image", value, "note" if advice else "ok", advice)
    folder = cache_dir()
    if not any(os.path.ismount(path) for path in (folder, *folder.parents[:-1])):
        advice = f"what is fetched is lost with the container: docker run -v ramet-models:{folder}"
        yield Finding("volume", f"none at {folder}", "note", advice)


def _machine() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if find_spec("torch") is None:
        yield Finding("cpu", f"{cores} cores")
    else:
        import torch

        capability = torch.backends.cpu.get_cpu_capability()
        yield Finding("cpu", f"{cores} cores, torch uses {torch.get_num_threads()} threads, {capability}")
    available = _available_memory_bytes()
    if available is None:
        yield Finding("memory", "unknown")
    elif available < 1 << 30:
        advice = "the smallest model needs about 1 GiB; end other programs"
        yield Finding("memory", f"{available / 2**20:.0f} MiB available", "problem", advice)
    else:
        yield Finding("memory", f"{available / 2**30:.1f} GiB available")
    yield _open_files()


def _open_files() -> Finding:
    try:
        import resource
    except ImportError:  # not on Windows
        return Finding("open files", "unknown")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard:,}"
    if hard != resource.RLIM_INFINITY and hard < 4096:
        return Finding("open files", shown, "note", "a connection is an open file: raise the hard limit (ulimit -Hn)")
    return Finding("open files", shown)


def _devices() -> Iterator[Finding]:
    driver = _driver()
    if driver is not None:
        yield Finding("driver", driver)
    if find_spec("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            value, advice = "cpu (this torch is built without CUDA)", ""
            if driver is not None:
                advice = "there is an NVIDIA driver: install a torch built for CUDA (pytorch.org, Get Started)"
        else:
            value = "cpu (torch sees no CUDA device)"
            advice = (
                ""
                if driver is None
                else (
                    f"torch is built for CUDA {torch.version.cuda} but cannot use the driver: check nvidia-smi, "
                    "CUDA_VISIBLE_DEVICES, and that the driver is new enough"
                )
            )
        yield Finding("device", value, "note" if advice else "ok", advice)
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"compute capability {properties.major}.{properties.minor}"
        text = f"{properties.name}, {capability}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        is_full = free < total // 2
        advice = "more than half of its memory is taken: see nvidia-smi, or lower --mem-fraction-static"
        yield Finding(f"cuda:{index}", text, "note" if is_full else "ok", advice if is_full else "")
    if version("triton") is None:
        yield Finding(
            "kernels", "Triton is missing", "problem", "a GPU is there but Triton is not: pip install 'ramet[gpu]'"
        )


def _driver() -> str | None:
    """The NVIDIA driver's version, or None where there is no driver."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(r"\b\d+\.\d+(?:\.\d+)?\b", text)
    return f"NVIDIA {found[0]}" if found else "NVIDIA"


def _network(port: int) -> Iterator[Finding]:
    if not 0 < port < 65536:
        yield Finding("port", f"{port} is no port", "note", "ports are 1 to 65535")
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            advice = "`ramet serve` would fail on it: end what listens there, or choose another with --port"
            yield Finding("port", f"{port}: {error.strerror}", "note", advice)
            return
    yield Finding("port", f"{port} is free")


def _models() -> Iterator[Finding]:
    folder = cache_dir()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    text = f"{folder} (RAMET_CACHE_DIR changes it), {free / 2**30:.1f} GiB free"
    if not os.access(there, os.W_OK):
        yield Finding("cache", text, "note", f"{there} cannot be written: set RAMET_CACHE_DIR to another folder")
    else:
        yield Finding("cache", text)
    for model in CATALOG.values():
        size = f"{model.num_bytes / 1e6:.0f} MB, {model.license}"
        if is_cached(model):
            yield Finding(model.name, f"in the cache: {cached_path(model)}")
        elif cached_path(model).is_file():
            yield Finding(model.name, f"not checked, or damaged: `ramet pull {model.name}` repairs it", "note")
        else:
            value = f"not fetched ({size}): `ramet pull {model.name}`"
            advice = f"the examples use it: `ramet pull {model.name}`" if model.name == DEFAULT_MODEL else ""
            yield Finding(model.name, value, "note" if advice else "ok", advice)


def _available_memory_bytes() -> int | None:
    """Return the memory available without swapping, in bytes; None where the system does not report it (not Linux)."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
    except OSError:
        return None
    return int(fields["MemAvailable"].split()[0]) * 1024
