"""What serving asks of grammars: 128 tools, memory of masks, threads, the first import.

    python benchmarks/bench_grammar_service.py [--model smollm2-135m] [--engine] [--fresh] [--out results.jsonl]

Tools: compile time of a set of 128 tools, first and again with other options (a cache of whole grammars does not help),
milliseconds. Behind others: how long a small schema waits while four clients compile a regex that never ends, first
come, first served, and in the compile service, where each is given up after --limit seconds. --engine: the gaps between
a bystander's tokens, alone and beside both. Threads: masks of two grammars made by one thread and by two. --fresh:
seconds to import the engine and make a first mask with an empty cache of compiled loops, and again.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from bench_grammar import machine, tokenizer_of
from json_line import print_record

from ramet import Engine, SamplingParams
from ramet.grammar import CompiledGrammar, Limits, Vocabulary, compile_constraint
from ramet.grammar.service.compile_service import CompileService, ServiceConfig
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


NASTY = "(?:(?!foo%s|bar|baz).){0,2000}"
NUM_NASTY = 4
Submit = Callable[[str, str, str], "Future[CompiledGrammar]"]
"""Kind, source, client."""


def in_order(vocabulary: Vocabulary, limit_s: float) -> tuple[Submit, Callable[[], None]]:
    """The alternative to the service: one thread, first come, first served."""
    pool = ThreadPoolExecutor(1)
    limits = Limits(max_time_s=limit_s)
    return (
        lambda kind, source, _: pool.submit(compile_constraint, kind, source, vocabulary, limits=limits),
        lambda: pool.shutdown(cancel_futures=True),
    )


def fair(vocabulary: Vocabulary, limit_s: float) -> tuple[Submit, Callable[[], None]]:
    service = CompileService(ServiceConfig(cache_dir=None, max_time_s=limit_s))
    service.compile("regex", "a", vocabulary)
    return (
        lambda kind, source, client: service.submit(kind, source, vocabulary, client=("", client)),
        service.close,
    )


def waits_ms(vocabulary: Vocabulary, limit_s: float) -> dict[str, Any]:
    """Milliseconds that small schemas wait: alone, behind others first come, first served, and in the service."""
    found: dict[str, Any] = {}
    for name, make, num_nasty in (("alone", fair, 0), ("in order", in_order, NUM_NASTY), ("fair", fair, NUM_NASTY)):
        submit, end = make(vocabulary, limit_s)
        nasty = [submit("regex", NASTY % f"{name[0]}{i}", f"nasty {i}") for i in range(num_nasty)]
        waits = []
        for i in range(20):
            begin = time.perf_counter()
            submit("json_schema", json.dumps({"type": "integer", "minimum": 100 + i}), "small").result()
            waits.append((time.perf_counter() - begin) * 1e3)
            time.sleep(0.05)
        for future in nasty:
            future.cancel()
        end()
        found[name] = {"p50": round(statistics.median(waits), 1), "max": round(max(waits), 1)}
    return found


def gaps_ms(model: str, limit_s: float) -> dict[str, Any]:
    """Milliseconds between the tokens of one request: alone, and while others compile."""
    found: dict[str, Any] = {}
    with Engine(model) as engine:
        tokenizer = engine.tokenizer
        vocabulary = Vocabulary(tokenizer.token_bytes, tokenizer.eos_ids, tokenizer.special_ids, tokenizer.vocab_size)
        for name, make in (("alone", None), ("in order", in_order), ("fair", fair)):
            submit, end = make(vocabulary, limit_s) if make is not None else (None, lambda: None)
            nasty = [submit("regex", NASTY % f"{name[0]}{i}", f"nasty {i}") for i in range(NUM_NASTY)] if submit else []
            times = [time.perf_counter()]
            handle = engine.submit("Once upon a time", SamplingParams(temperature=0.0, max_tokens=150, ignore_eos=True))
            for _ in handle:
                times.append(time.perf_counter())
            for future in nasty:
                future.cancel()
            end()
            gaps = sorted((b - a) * 1e3 for a, b in itertools.pairwise(times[1:]))
            found[name] = {
                "p50": round(statistics.median(gaps), 1),
                "p99": round(gaps[-2], 1),
                "max": round(gaps[-1], 1),
            }
    return found


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
    parser.add_argument("--limit", type=float, default=2.0, help="seconds after which a compilation is given up")
    parser.add_argument("--engine", action="store_true", help="also the gaps between a bystander's tokens")
    parser.add_argument("--fresh", action="store_true", help="also the first import (minutes of compiling)")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    vocabulary, _ = tokenizer_of(arguments.model, "any")
    warm_up(vocabulary)
    gc.collect()
    gc.freeze()  # as a server does at its start
    found: dict[str, Any] = {"tools": arguments.tools, "tools_ms": tools_ms(vocabulary, arguments.tools)}
    found["behind_others_ms"] = waits_ms(vocabulary, arguments.limit)
    if arguments.engine:
        found["bystander_gaps_ms"] = gaps_ms(arguments.model, arguments.limit)
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
