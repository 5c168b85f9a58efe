"""What a start costs: a process's import and first token, on a new machine and on one that ran before.

    python benchmarks/bench_start.py [--model smollm2-135m] [--rounds 3] [--out benchmarks/results/start.jsonl]
    python benchmarks/bench_start.py --device cuda --rounds 1      random weights of Llama-3.1-8B's shapes, on a card

Each measurement is a process of its own, from its start until it has the answer; its end is not counted. New: the
caches of numba and of Python's bytecode are empty, so that all is compiled once (the model's file is there, and in the
system's cache after a warm-up). On a card, as other engines were measured: no kernel is compiled yet, and that is all.
Grammars alone: `bench_grammar_service.py --fresh`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from json_line import commit, print_record
from rich.console import Console
from rich.table import Table

CASES = {
    "import ramet": "import ramet; ramet.Engine; print('there', flush=True)",
    "first token": """
import sys
from ramet import Engine, SamplingParams
with Engine(sys.argv[1]) as engine:
    engine.generate("Once", SamplingParams(max_tokens=1))
    print("there", flush=True)
""",
}
# As bench_gpu.py starts its engine: what other engines were measured with has no weights to read, either.
ON_DEVICE = """
import json, sys
sys.path.insert(0, sys.argv[2])
import bench_gpu
shapes = bench_gpu.tiny_shapes() if sys.argv[3] == "cpu" else bench_gpu.llama_3_1_8b()
values = {"device": sys.argv[3], "context_length": 16384, **json.loads(sys.argv[4])}
engine, _, _ = bench_gpu.start(shapes, bench_gpu.EngineConfig.from_mapping(values))
print("there", flush=True)
engine.shutdown()
"""


def run(code: str, arguments: list[str], cache: Path | None, *, bytecode: bool) -> float:
    """Seconds until a process with this code says that it is there; the cache has its kernels, and its bytecode."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    if cache is not None:
        folders = {"NUMBA_CACHE_DIR": "numba", "TRITON_CACHE_DIR": "triton", "CUDA_CACHE_PATH": "cuda"}
        if bytecode:
            folders["PYTHONPYCACHEPREFIX"] = "python"
        environment |= {name: str(cache / folder) for name, folder in folders.items()}
    begin_s = time.perf_counter()
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        is_there = any(line == b"there\n" for line in process.stdout)
        seconds = time.perf_counter() - begin_s
    if not is_there:
        raise SystemExit(f"the process ended with status {process.returncode}")
    return seconds


def measure(code: str, arguments: list[str], rounds: int, *, is_new: bool) -> Iterator[dict[str, float]]:
    """Seconds, as they are known: `new_s` with empty caches, `warm_s` the median of the runs after it. is_new: the
    machine is new, and not the kernels alone."""
    if is_new:
        run(code, arguments, None, bytecode=True)  # the files are in the system's cache
    with tempfile.TemporaryDirectory() as folder:
        new_s = round(run(code, arguments, Path(folder), bytecode=is_new), 2)
        yield {"new_s": new_s}
        warm_s = statistics.median(run(code, arguments, Path(folder), bytecode=is_new) for _ in range(rounds))
    yield {"new_s": new_s, "warm_s": round(warm_s, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", help="random weights on this device (cpu: a rehearsal) instead of a model's file")
    parser.add_argument("--set", action="append", default=[], help="configuration, as mem_fraction_static=0.85")
    args = parser.parse_args()
    cases = {name: (code, [args.model]) for name, code in CASES.items()}
    if args.device:
        values = {key: json.loads(value) for key, value in (item.split("=", 1) for item in args.set)}
        arguments = ["8b", str(Path(__file__).parent), args.device, json.dumps(values)]
        cases = {"first token": (ON_DEVICE, arguments)}
    facts = {
        "benchmark": "start",
        "commit": commit(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "model": "8b" if args.device else args.model,
        **({"device": args.device} if args.device else {}),
    }
    found: dict[str, dict[str, float]] = {}
    for name, (code, arguments) in cases.items():
        for times in measure(code, arguments, args.rounds, is_new=not args.device):
            found[name] = times
            if args.device:  # where minutes count: an early end leaves what there is
                print_record({**facts, "times": found}, args.out)
    table = Table(title="Seconds from a process's start")
    for column in ("until", "new machine", "warm"):
        table.add_column(column, justify="left" if column == "until" else "right")
    for name, times in found.items():
        table.add_row(name, f"{times['new_s']:.2f}", f"{times['warm_s']:.2f}")
    Console().print(table)
    if not args.device:
        print_record({**facts, "times": found}, args.out)


if __name__ == "__main__":
    main()
