"""What a start costs: a process's import and first token, on a new machine and on one that ran before.

    python benchmarks/bench_start.py [--model smollm2-135m] [--rounds 3] [--out benchmarks/results/start.jsonl]

Each measurement is a process of its own, from its start until it has the answer; its end is not counted. New: the
caches of numba and of Python's bytecode are empty, so that all is compiled once (the model's file is there, and in the
system's cache after a warm-up).
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
from pathlib import Path

import torch
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


def run(code: str, model: str, cache: Path | None) -> float:
    """Seconds until a process with this code says that it is there."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    if cache is not None:
        environment |= {"NUMBA_CACHE_DIR": str(cache / "numba"), "PYTHONPYCACHEPREFIX": str(cache / "python")}
    begin_s = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", code, model], env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        is_there = process.stdout.readline() == b"there\n"
        seconds = time.perf_counter() - begin_s
    if not is_there:
        raise SystemExit(f"the process ended with status {process.returncode}")
    return seconds


def measure(code: str, model: str, rounds: int) -> dict[str, float]:
    """Seconds: `new_s` with empty caches, `warm_s` the median of the runs after it."""
    run(code, model, None)  # the files are in the system's cache
    with tempfile.TemporaryDirectory() as folder:
        new_s = run(code, model, Path(folder))
        warm_s = statistics.median(run(code, model, Path(folder)) for _ in range(rounds))
    return {"new_s": round(new_s, 2), "warm_s": round(warm_s, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = {name: measure(code, args.model, args.rounds) for name, code in CASES.items()}
    table = Table(title="Seconds from a process's start")
    for column in ("until", "new machine", "warm"):
        table.add_column(column, justify="left" if column == "until" else "right")
    for name, times in found.items():
        table.add_row(name, f"{times['new_s']:.2f}", f"{times['warm_s']:.2f}")
    Console().print(table)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    line = json.dumps(
        {
            "benchmark": "start",
            "commit": commit.stdout.strip(),
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "model": args.model,
            "times": found,
        }
    )
    if args.out is not None:
        with args.out.open("a") as file:
            file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
