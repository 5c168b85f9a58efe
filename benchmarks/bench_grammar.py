"""First mask and mask times of the grammar engines, in one run, for a 49k and a 262k vocabulary.

    python benchmarks/bench_grammar.py [--schemas DIR [--every N]] [--engines ramet,llguidance,xgrammar,outlines]

First mask: from the schema to the mask of the first token, milliseconds. Mask: one for each token of each valid
instance, written in the layout of --whitespace in the tokenizer's own tokens, microseconds; states that were met before
count as they come. Other engines are asked for compact JSON, so they are compared in that layout alone. Garbage is
collected as in a server. One thread. What an engine shares between schemas stays shared, and is made before the clock
starts; xgrammar's cache of whole grammars is off. outlines-core writes masks through its Guide.
DIR holds JSON files: {"schema": ..., "tests": [{"data": ..., "valid": true}, ...]} or a schema alone; without it, the
schemas of grammar_schemas.py. `compiled` and `walked` say how many schemas and how many of the valid instances an
engine took: times of an engine that refuses the hard ones flatter it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from grammar_schemas import cases
from json_line import commit, print_record
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from ramet.errors import GrammarError
from ramet.grammar import Grammar, Matcher, Vocabulary, compile_constraint
from ramet.grammar.engines import FollowedGrammar, load_backend
from ramet.grammar.service.warm_up import warm_up as make_ready
from ramet.runtime.models.catalog import pull
from ramet.runtime.models.description import describe_model
from ramet.runtime.server.link.process import postpone_full_collections

Json = Any  # a decoded JSON document
Case = tuple[str, Json, list[Json]]
PERCENTILES = (50, 90, 99, 99.9, 100)
CLOCKS = {"wall": time.perf_counter_ns, "cpu": time.thread_time_ns}
SEPARATORS = {"model": (", ", ": "), "compact": (",", ":")}  # by layout
PACKAGES = {"ramet": "ramet", "llguidance": "llguidance", "xgrammar": "xgrammar", "outlines": "outlines-core"}


class Cursor(Protocol):
    """An engine's own matcher."""

    def fill(self, row: NDArray[np.int32]) -> None: ...

    def accept(self, token: int) -> bool: ...


class RametCursor:
    def __init__(self, schema: Json, vocabulary: Vocabulary, whitespace: str) -> None:
        self.grammar = compile_constraint("json_schema", schema, vocabulary, whitespace=whitespace)
        self.matcher = Matcher(self.grammar)

    def fill(self, row: NDArray[np.int32]) -> None:
        self.grammar.fill_mask(self.matcher.state, row)

    def accept(self, token: int) -> bool:
        return self.matcher.advance(token)

    def restart(self) -> RametCursor:
        self.matcher = Matcher(self.grammar)
        return self


class OtherCursor:
    def __init__(self, grammar: Grammar) -> None:
        if not isinstance(grammar, FollowedGrammar):
            raise SystemExit("only the engines of ramet.grammar.engines have matchers to walk")
        self.grammar, self.matcher = grammar, grammar.start

    def fill(self, row: NDArray[np.int32]) -> None:
        self.grammar.fill(self.matcher, row)

    def accept(self, token: int) -> bool:
        following = self.grammar.after(self.matcher, token)
        if following is not None:
            self.matcher = following
        return following is not None


class OutlinesCursor:
    """outlines-core's own cursor, which writes masks itself."""

    def __init__(self, index: Any) -> None:
        from outlines_core import Guide

        self.guide = Guide(index)

    def fill(self, row: NDArray[np.int32]) -> None:
        self.guide.write_mask_into(row.ctypes.data, row.size, row.itemsize)

    def accept(self, token: int) -> bool:
        try:
            self.guide.advance(token)
        except ValueError:
            return False
        return True


def compiler(
    engine: str, vocabulary: Vocabulary, whitespace: str
) -> Callable[[Json], tuple[Cursor, Callable[[], Cursor]]]:
    """Return what compiles a schema to (a cursor at the start, a way to another one)."""
    if engine == "ramet":

        def ours(schema: Json) -> tuple[Cursor, Callable[[], Cursor]]:
            cursor = RametCursor(schema, vocabulary, whitespace)
            return cursor, cursor.restart

        return ours
    backend = load_backend(engine)
    if engine == "outlines":

        def indexed(schema: Json) -> tuple[Cursor, Callable[[], Cursor]]:
            index, _ = OtherCursor(backend.compile("json_schema", schema, vocabulary)).matcher
            return OutlinesCursor(index), lambda: OutlinesCursor(index)

        return indexed

    def theirs(schema: Json) -> tuple[Cursor, Callable[[], Cursor]]:
        grammar = backend.compile("json_schema", schema, vocabulary)
        return OtherCursor(grammar), lambda: OtherCursor(grammar)

    return theirs


def measure(
    engine: str,
    vocabulary: Vocabulary,
    whitespace: str,
    warm_up: list[int],
    encoded: list[tuple[str, Json, list[list[int]]]],
    clock: Callable[[], int],
) -> dict[str, Json]:
    compile_schema = compiler(engine, vocabulary, whitespace)
    row = np.zeros(vocabulary.num_words, dtype=np.int32)
    if engine == "ramet":
        make_ready(vocabulary)
    warm, _ = compile_schema({"type": "object"})
    for token in warm_up:
        warm.fill(row)
        warm.accept(token)
    first_ms: list[float] = []
    mask_us: list[float] = []
    num_compiled = num_instances = num_walked = 0
    postpone_full_collections()
    slowest: list[tuple[float, str]] = []
    for name, schema, instances in encoded:
        num_before = len(mask_us)
        begin = clock()
        try:
            cursor, another = compile_schema(schema)
            cursor.fill(row)
        except GrammarError:
            continue
        first_ms.append((clock() - begin) / 1e6)
        num_compiled += 1
        for i, tokens in enumerate(instances):
            if i:
                cursor = another()
            num_instances += 1
            for token in tokens:
                begin = clock()
                cursor.fill(row)
                mask_us.append((clock() - begin) / 1e3)
                if not cursor.accept(token):
                    break
            else:
                num_walked += 1
        slowest.append((max(mask_us[num_before:], default=0.0), name))
    return {
        "engine": engine,
        "version": metadata.version(PACKAGES[engine]),
        "schemas": len(encoded),
        "compiled": num_compiled,
        "instances": num_instances,
        "walked": num_walked,
        "masks": len(mask_us),
        "first_mask_ms": percentiles(first_ms),
        "mask_us": percentiles(mask_us),
        "slowest_masks_us": {name: round(us, 1) for us, name in sorted(slowest, reverse=True)[:5]},
    }


def percentiles(values: list[float]) -> dict[str, float]:
    return {f"p{p}": round(float(np.percentile(values, p)), 3) for p in PERCENTILES} if values else {}


def read_cases(folder: Path, limit: int | None, every: int) -> Iterator[Case]:
    for path in sorted(folder.glob("*.json"))[:limit:every]:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and "schema" in content:
            valid = [t["data"] for t in content.get("tests", []) if t.get("valid")]
            yield path.stem, content["schema"], valid
        else:
            yield path.stem, content, []


def tokenizer_of(model: str, tokenization: str) -> tuple[Vocabulary, Callable[[str], list[int]]]:
    """The vocabulary and the encoder of a catalogue model, from its file's metadata."""
    tokenizer = describe_model(pull(model)).tokenizer
    vocabulary = Vocabulary(
        tokenizer.token_bytes, tokenizer.eos_ids, tokenizer.special_ids, tokenizer.vocab_size, tokenizer
    )
    if tokenization == "any":
        vocabulary = vocabulary.without_splits
    return vocabulary, lambda text: tokenizer.encode(text, parse_special=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemas", type=Path, help="folder of JSON files (default: the built-in set)")
    parser.add_argument("--limit", type=int, help="only the first schemas")
    parser.add_argument("--every", type=int, default=1, help="only each so manieth schema of the folder")
    parser.add_argument("--engines", default="ramet,llguidance,xgrammar")
    parser.add_argument("--first-only", default="outlines", help="engines that are too slow for the other vocabularies")
    parser.add_argument("--models", default="smollm2-135m,gemma3-270m", help="whose vocabularies")
    parser.add_argument("--tokenization", default="canonical", choices=("canonical", "any"), help="of Ramet's masks")
    parser.add_argument("--whitespace", default="compact", choices=SEPARATORS, help="the layout of JSON")
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: the thread's time, on a busy machine")
    parser.add_argument("--out", type=Path, help="append the JSON line to this file")
    arguments = parser.parse_args()
    engines, separators = arguments.engines.split(","), SEPARATORS[arguments.whitespace]
    if arguments.whitespace != "compact" and engines != ["ramet"]:
        parser.error(f"--whitespace {arguments.whitespace} is measured for Ramet alone: add --engines ramet")
    chosen = (
        cases() if arguments.schemas is None else list(read_cases(arguments.schemas, arguments.limit, arguments.every))
    )
    table = Table(
        "vocabulary",
        "engine",
        "compiled",
        "walked",
        "first mask ms p50 / p90 / p99 / p99.9 / max",
        "mask µs p50 / p90 / p99 / p99.9 / max",
    )
    rows = []
    for number, model in enumerate(arguments.models.split(",")):
        vocabulary, encode = tokenizer_of(model, arguments.tokenization)
        encoded = [(name, schema, [encode(_text(v, separators)) for v in values]) for name, schema, values in chosen]
        warm_up = encode(_text({"warm": ["up", -1.5, None, True], "é": {"x": "y z"}}, separators))
        for engine in engines:
            if number and engine in arguments.first_only.split(","):
                continue
            found = measure(engine, vocabulary, arguments.whitespace, warm_up, encoded, CLOCKS[arguments.clock])
            rows.append({"vocabulary": vocabulary.vocab_size, "model": model, **found})
            table.add_row(
                f"{vocabulary.vocab_size:,}",
                f"{engine} {found['version']}",
                f"{found['compiled']}/{found['schemas']}",
                f"{found['walked']}/{found['instances']}",
                _cells(found["first_mask_ms"], 2),
                _cells(found["mask_us"], 1),
            )
            slow = ", ".join(f"{name} {us:,.0f} µs" for name, us in found["slowest_masks_us"].items())
            print(f"{model} {engine}: slowest masks: {slow}", file=sys.stderr)
    Console(width=160).print(table)
    print_record(
        {
            "bench": "grammar",
            "tokenization": arguments.tokenization,
            "whitespace": arguments.whitespace,
            "clock": arguments.clock,
            "schemas": "built-in" if arguments.schemas is None else f"given, each {arguments.every}",
            **machine(),
            "rows": rows,
        },
        arguments.out,
    )


def _text(value: Json, separators: tuple[str, str]) -> str:
    return json.dumps(value, separators=separators, ensure_ascii=False)


def _cells(percentiles: dict[str, float], digits: int) -> str:
    return " / ".join(f"{v:,.{digits}f}" for v in percentiles.values())


def machine() -> dict[str, Json]:
    return {
        "commit": commit(),
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": metadata.version("numba"),
    }


if __name__ == "__main__":
    main()
