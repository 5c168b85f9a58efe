"""What serving asks of grammars: 128 tools, memory of masks, threads, the first import.

    python benchmarks/bench_grammar_service.py [--model smollm2-135m] [--fresh] [--out results.jsonl]

Tools: compile time of a set of 128 tools, first and again with other options (a cache of whole grammars does not help),
milliseconds. Threads: masks of two grammars made by one thread and by two. --fresh: seconds to import the engine and
make a first mask with an empty cache of compiled loops, and again.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from bench_grammar import machine, tokenizer_of
from json_line import print_record

from ramet.grammar import CompiledGrammar, Vocabulary, compile_constraint
from ramet.grammar.service.warm_up import warm_up

FIRST = (
    "import time;b=time.perf_counter();"
    "from ramet.grammar import Vocabulary, compile_constraint;from ramet.grammar.service.warm_up import warm_up;"
    "v=Vocabulary([*(bytes((i,)) for i in range(256)), b'<eos>'],[256],[256]);warm_up(v);"
    "compile_constraint('json_schema',{'type':'object'},v).mask(0);print(time.perf_counter()-b)"
)


def tool(i: int) -> dict[str, Any]:
    kinds: list[Any] = [
        {"type": "string"},
        {"type": "integer", "minimum": 0},
        {"enum": ["a", "b"]},
        {"type": "boolean"},
    ]
    properties = {f"field_{i}_{k}": kinds[(i + k) % 4] for k in range(6)}
    parameters = {"type": "object", "properties": properties, "required": list(properties)[:2]}
    return {"name": f"tool_{i}", "parameters": {**parameters, "additionalProperties": False}}


def tools_ms(vocabulary: Vocabulary, count: int) -> list[float]:
    out = []
    for parallel in (1, 2, 3, 4):  # other options, so that nothing compares equal
        source = {"tools": [tool(i) for i in range(count)], "format": "hermes", "choice": "auto", "parallel": parallel}
        begin = time.perf_counter()
        compile_constraint("tools", source, vocabulary).mask(0)
        out.append(round((time.perf_counter() - begin) * 1e3, 1))
    return out


def states_of(vocabulary: Vocabulary, name: str) -> tuple[CompiledGrammar, list[int]]:
    grammar = compile_constraint("json_schema", {"type": "object", "properties": {name: {}}}, vocabulary)
    text = json.dumps({f"{name}{i}": [i, {"x": "y", "z": [True, None]}] for i in range(40)}, separators=(",", ":"))
    states = [0]
    for byte in text.encode():
        following = grammar.advance_bytes(states[-1], bytes((byte,)))
        assert following is not None
        states.append(following)
    return grammar, states


def fill_s(vocabulary: Vocabulary, num_threads: int) -> float:
    """Seconds for the masks of two grammars, cold."""
    jobs = [states_of(vocabulary, name) for name in "ab"]
    rows = [np.empty((len(states), vocabulary.num_words), dtype=np.int32) for _, states in jobs]
    begin = time.perf_counter()
    if num_threads == 1:
        for (grammar, states), out in zip(jobs, rows, strict=True):
            grammar.fill_masks(states, out)
    else:
        threads = [
            threading.Thread(target=g.fill_masks, args=(states, out))
            for (g, states), out in zip(jobs, rows, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return time.perf_counter() - begin


def first_s() -> list[float]:
    """Seconds of a first and a second process."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        run = [sys.executable, "-c", FIRST]
        return [
            round(float(subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout), 2)
            for _ in range(2)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tools", type=int, default=128)
    parser.add_argument("--fresh", action="store_true", help="also the first import (minutes of compiling)")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    vocabulary, _ = tokenizer_of(arguments.model)
    warm_up(vocabulary)
    gc.collect()
    gc.freeze()  # as a server does at its start
    found: dict[str, Any] = {"tools": arguments.tools, "tools_ms": tools_ms(vocabulary, arguments.tools)}
    grammar, states = states_of(vocabulary, "c")
    for state in states:
        grammar.mask(state)
    rows = grammar.rows
    found["rows"] = {"states": len(states), "distinct": rows.num_rows, "bytes": rows.num_bytes, "limit": rows.max_bytes}
    fill_s(vocabulary, 1)
    one, two = (min(fill_s(vocabulary, n) for _ in range(5)) for n in (1, 2))
    found["fill_masks_ms"] = {"one thread": round(one * 1e3, 2), "two threads": round(two * 1e3, 2)}
    if arguments.fresh:
        found["first_import_s"] = first_s()
    for key, value in found.items():
        print(f"{key}: {value}")
    print_record({"bench": "grammar_service", "vocabulary": vocabulary.vocab_size, **machine(), **found}, arguments.out)


if __name__ == "__main__":
    main()
