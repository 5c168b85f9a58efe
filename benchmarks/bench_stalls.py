"""What one constrained request costs another: the largest gap between a bystander's tokens, on SmolLM2-135M-Instruct.

    python benchmarks/bench_stalls.py [--schemas DIR] [--repeats 3]

The bystander generates 128 tokens without a constraint. After its 16th token, the other request comes: its constraint
is compiled by a compile service in the same process, then it generates up to 96 tokens at temperature 1. Or several
requests without a constraint come at once: long prompts, many choices whose logits are edited. A row's figure
is the median of the repeats. `alone` is measured before and after the rows, in the same process. With --schemas, a
folder of JSON files {"schema": ...}, the schemas whose compilation and first masks take longest are rows, too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import msgspec
from json_line import commit, print_record
from rich.console import Console
from rich.table import Table

from ramet.errors import RametError
from ramet.grammar import CompiledGrammar, Vocabulary, compile_constraint
from ramet.grammar.service.compile_service import CompileService
from ramet.grammar.service.warm_up import warm_up
from ramet.runtime.engine.engine import Engine
from ramet.runtime.types import RequestOutput, SamplingParams

Json = Any  # a decoded JSON document
Source = tuple[str, Json, str]  # kind of constraint, its source, the other request's prompt
Plain = tuple[int, int, SamplingParams]  # requests at once, tokens of each prompt
BEFORE, NUM_TOKENS = 16, 128
SEARCHED_TOKENS = 24


def optional_properties(count: int) -> Json:
    return {"type": "object", "properties": {f"property_{i}": {"type": ["string", "integer"]} for i in range(count)}}


def nested_objects(depth: int) -> Json:
    schema: Json = {"type": "integer"}
    for i in range(depth):
        schema = {"type": "object", "properties": {f"k{i}": schema}, "required": [f"k{i}"]}
    return schema


UNIQUE = {"type": "array", "items": {"type": "string"}, "uniqueItems": True, "minItems": 60}
EDITED = SamplingParams(
    temperature=1.0, max_tokens=32, ignore_eos=True, logprobs=5, frequency_penalty=0.5, logit_bias={5: 1.0, 9: -1.0}
)
LONG = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
ROWS: dict[str, Source | Plain] = {
    "two prompts of 8,000 tokens": (2, 8000, LONG),
    "64 rows with edited logits": (64, 32, EDITED),
    "128 rows with edited logits": (128, 32, EDITED),
    "700 optional properties": ("json_schema", optional_properties(700), 'A JSON object: {"property_1": 1}\nAnother: '),
    "1,000 optional properties": (
        "json_schema",
        optional_properties(1000),
        'A JSON object: {"property_1": 1}\nAnother: ',
    ),
    "60 unique strings": ("json_schema", UNIQUE, 'A JSON list: ["a","b"]\nA longer one: '),
    "150 nested objects": ("json_schema", nested_objects(150), "A JSON object: "),
    "ambiguous rules": ("cfg", 'start: e\ne: e e | e "a" | "a" e | "a"', "Write a: a a a "),
}


def vocabulary(engine: Engine) -> Vocabulary:
    tokenizer = engine.tokenizer
    return Vocabulary(tokenizer.token_bytes, tokenizer.eos_ids, tokenizer.special_ids, tokenizer.vocab_size)


def largest_gap_ms(
    engine: Engine, service: CompileService, words: Vocabulary, source: Source | Plain | None, seed: int
) -> float:
    """Run the bystander, and the other request beside it. Returns the bystander's largest gap after the other came."""
    times: list[float] = []
    has_begun, has_ended = threading.Event(), threading.Event()

    def note(output: RequestOutput) -> None:
        times.append(time.perf_counter())
        if len(times) == BEFORE:
            has_begun.set()
        if output.finish_reason is not None:
            has_ended.set()

    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    engine.submit(f"{seed}: Once upon a time", params, on_output=note)
    has_begun.wait(60)
    others: list[Any] = []  # handles
    if source is not None and isinstance(source[0], int):
        count, num_prompt, sampling = source
        rng = random.Random(seed)
        for i in range(count):
            tokens = [rng.randrange(1000, 40_000) for _ in range(num_prompt)]
            others.append(engine.submit(tokens, msgspec.structs.replace(sampling, seed=i)))
    elif source is not None:
        kind, text, prompt = source

        def run(done: Future[CompiledGrammar]) -> None:
            try:
                sampling = SamplingParams(temperature=1.0, max_tokens=96, seed=seed)
                others.append(engine.submit(prompt, sampling, grammar=done.result()))
            except RametError as error:
                print(f"refused: {error}")

        service.submit(kind, text if kind == "cfg" else json.dumps(text), words).add_done_callback(run)
    has_ended.wait(600)
    for handle in others:
        handle.cancel()
    return max(b - a for a, b in zip(times[BEFORE - 1 :], times[BEFORE:], strict=False)) * 1000


def worst_schemas(folder: Path, words: Vocabulary, count: int) -> dict[str, Source]:
    """The schemas of a folder that take longest to compile and to follow for a few tokens."""
    costs: list[tuple[float, str, Json]] = []
    for path in sorted(folder.glob("*.json")):
        schema = json.loads(path.read_text(encoding="utf-8"))
        schema = schema.get("schema", schema) if isinstance(schema, dict) else schema
        begin = time.thread_time()
        try:
            grammar = compile_constraint("json_schema", json.dumps(schema), words)
            state: int | None = 0
            for _ in range(SEARCHED_TOKENS):
                if state is None or not (way := grammar.shortest_completion(state)):
                    break
                grammar.mask(state)
                state = grammar.advance(state, way[0])
        except RametError:
            pass
        costs.append((time.thread_time() - begin, path.stem, schema))
    costs.sort(key=lambda cost: -cost[0])
    return {name: ("json_schema", schema, "A JSON object: ") for _, name, schema in costs[:count]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemas", type=Path, help="folder of JSON files")
    parser.add_argument("--num-worst", type=int, default=2, help="schemas of the folder that become rows")
    parser.add_argument("--rows", help="only the rows whose name contains this")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="append the JSON line to this file")
    arguments = parser.parse_args()
    with Engine("smollm2-135m", max_running_requests=160, num_kv_tokens=32_768) as engine, CompileService() as service:
        words = vocabulary(engine)
        warm_up(words)
        rows = dict(ROWS)
        if arguments.schemas is not None:
            rows.update(worst_schemas(arguments.schemas, words, arguments.num_worst))
        named: dict[str, Source | Plain | None] = {"alone": None, **rows, "alone, again": None}
        if arguments.rows is not None:
            named = {name: source for name, source in named.items() if arguments.rows in name or source is None}
        largest_gap_ms(engine, service, words, None, 99)
        gaps = {}
        for name, source in named.items():
            found = [largest_gap_ms(engine, service, words, source, seed) for seed in range(arguments.repeats)]
            gaps[name] = round(statistics.median(found), 1)
            print(name, [round(gap, 1) for gap in found], flush=True)
    table = Table("beside", "largest gap ms")
    for name, gap in gaps.items():
        table.add_row(name, f"{gap:,.1f}")
    Console().print(table)
    record = {"bench": "stalls", "commit": commit(), "device": platform.processor() or platform.machine()}
    print_record({**record, "repeats": arguments.repeats, "largest_gap_ms": gaps}, arguments.out)


if __name__ == "__main__":
    main()
