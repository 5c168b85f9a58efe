"""The fuzzers' targets: with seeds and their mutations, and, if asked for, for minutes guided by coverage."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("fuzzers.py")
SECONDS = 300  # of each fuzzer
NUM_MUTATED = 25


def load() -> Any:  # Any: the module, which importlib mode cannot import by name
    spec = importlib.util.spec_from_file_location("ramet_fuzzers", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TARGETS = load().TARGETS


def mutated(rng: random.Random, data: bytes, seeds: list[bytes], words: list[bytes]) -> bytes:
    """Cut, repeat, flip, splice, or put a word in."""
    at, to = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    other = rng.choice(seeds)
    return rng.choice(
        [
            data[:at] + data[to:],
            data[:at] + data[at:to] * 2 + data[to:],
            data[:at] + bytes((rng.randrange(256),)) + data[at + 1 :],
            data[:at] + other[rng.randrange(len(other)) :],
            data[:at] + rng.choice([*words, b"0"]) + data[at:],
        ]
    )


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_seeds_are_read_or_refused(name: str, tmp_path: Path) -> None:
    target, rng = TARGETS[name], random.Random(name)
    read = target.make(tmp_path)
    seeds, words = list(target.seeds), [word.encode("latin-1") for word in target.words]
    for seed in seeds:
        read(seed)
    for _ in range(NUM_MUTATED):
        data = rng.choice(seeds)
        for _ in range(rng.randrange(1, 4)):
            data = mutated(rng, data, seeds, words) or b"0"
        read(data[: target.max_bytes])


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 300)
@pytest.mark.parametrize("name", TARGETS)
def test_minutes_of_fuzzing_find_nothing(name: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    command = [sys.executable, str(SCRIPT), name, "--seconds", str(SECONDS)]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    text = done.stdout + done.stderr
    print(text[-400:])  # how many inputs were read
    assert done.returncode == 0, text[-4000:]
