"""Masks of context-free grammars (Lark's syntax): JSON, and a small programming language; beside llguidance's.

    python benchmarks/bench_cfg.py [--model smollm2-135m] [--engines ramet,llguidance] [--out results.jsonl]

Compile: from the grammar's text to the first mask, milliseconds, the median of several. Cold masks: one for each token
of a text walked for the first time; warm: of the same text again. Microseconds. One thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from bench_grammar import Cursor, OtherCursor, machine, percentiles, tokenizer_of
from json_line import print_record
from rich.console import Console
from rich.table import Table

from ramet.grammar import Matcher, Vocabulary, compile_constraint
from ramet.grammar.engines import load_backend
from ramet.grammar.service.warm_up import warm_up

JSON_GRAMMAR = r"""
start: value
value: object | array | STRING | NUMBER | "true" | "false" | "null"
object: "{" [pair ("," pair)*] "}"
pair: STRING ":" value
array: "[" [value ("," value)*] "]"
STRING: /"([^"\\\x00-\x1f]|\\(["\\\/bfnrt]|u[0-9a-fA-F]{4}))*"/
NUMBER: /-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/
"""
LANGUAGE = r"""
start: statement*
statement: "let " NAME "=" expression ";" | "if(" expression ")" block ["else" block] | "while(" expression ")" block
    | "fn " NAME "(" [NAME ("," NAME)*] ")" block | "return " expression ";" | expression ";"
block: "{" statement* "}"
expression: comparison (("&&" | "||") comparison)*
comparison: sum (("==" | "!=" | "<=" | ">=" | "<" | ">") sum)?
sum: product (("+" | "-") product)*
product: unary (("*" | "/" | "%") unary)*
unary: ("!" | "-") unary | call
call: atom ("(" [expression ("," expression)*] ")" | "[" expression "]" | "." NAME)*
atom: NUMBER | STRING | NAME | "(" expression ")" | "[" [expression ("," expression)*] "]"
NAME: /[a-zA-Z_][a-zA-Z0-9_]*/
NUMBER: /[0-9]+(\.[0-9]+)?/
STRING: /"[^"\\\n]*"/
"""
JSON_TEXT = json.dumps(
    {
        "id": 4711,
        "name": "Ada Lovelace",
        "tags": ["mathematics", "engines", "ünïcode"],
        "scores": [1, 2.5, -3e8, None, True],
        "nested": {"a": {"b": {"c": [[[]], {"d": "e"}]}}},
        "lines": [{"sku": f"A-{i}", "quantity": i, "price": 1.5 * i, "note": "some words, and more"} for i in range(8)],
    },
    separators=(",", ":"),
    ensure_ascii=False,
)
PROGRAM = (
    'let total=0;let names=["ada","grace","edsger"];fn area(width,height){if(width<=0||height<=0){return 0;}'
    "return width*height;}fn walk(tree,depth){while(depth<10&&tree.left!=0){let tree=tree.left;depth+1;}"
    'return [tree,depth*(2+area(3,-4))/7.25];}if(total==0){print(names[0].length+"!",walk(root,0)[1]);}else{'
    "report(total%3,!done,(1+2)*(3-4));}return total;"
) * 2
CASES = {"json": (JSON_GRAMMAR, JSON_TEXT), "language": (LANGUAGE, PROGRAM)}


class _OurCursor:
    def __init__(self, matcher: Matcher) -> None:
        self.matcher = matcher
        self.accept = matcher.advance

    def fill(self, row: Any) -> None:
        self.matcher.grammar.fill_mask(self.matcher.state, row)


def start(engine: str, grammar: str, vocabulary: Vocabulary) -> Cursor:
    if engine == "ramet":
        return _OurCursor(Matcher(compile_constraint("cfg", grammar, vocabulary)))
    return OtherCursor(load_backend(engine).compile("cfg", grammar, vocabulary))


def walk(cursor: Cursor, tokens: list[int], row: Any) -> list[float]:
    """Microseconds of each mask."""
    times = []
    for token in tokens:
        begin = time.perf_counter_ns()
        cursor.fill(row)
        times.append((time.perf_counter_ns() - begin) / 1e3)
        if not cursor.accept(token):
            raise SystemExit(f"token {token} was refused after {len(times)}")
    return times


def measure(engine: str, name: str, vocabulary: Vocabulary, tokens: list[int], repeats: int) -> dict[str, Any]:
    grammar = CASES[name][0]
    row = np.zeros(vocabulary.num_words, dtype=np.int32)
    compile_ms, cold, warm = [], list[float](), list[float]()
    for _ in range(repeats):
        begin = time.perf_counter_ns()
        cursor = start(engine, grammar, vocabulary)
        cursor.fill(row)
        compile_ms.append((time.perf_counter_ns() - begin) / 1e6)
        if isinstance(cursor, _OurCursor):
            again: Cursor = _OurCursor(cursor.matcher.fork())
        else:
            again = cursor.fork()
        cold += walk(cursor, tokens, row)
        warm += walk(again, tokens, row)
    return {
        "engine": engine,
        "grammar": name,
        "compile_ms": round(statistics.median(compile_ms), 2),
        "cold_us": {**percentiles(cold), "mean": round(statistics.mean(cold), 1)},
        "warm_us": {**percentiles(warm), "mean": round(statistics.mean(warm), 1)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="whose vocabulary")
    parser.add_argument("--engines", default="ramet,llguidance")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="append the JSON line to this file")
    arguments = parser.parse_args()
    vocabulary, encode = tokenizer_of(arguments.model, "any")
    warm_up(vocabulary)
    table = Table("grammar", "engine", "compile ms", "cold µs mean / p50 / p90 / p99", "warm µs mean / p50 / p90 / p99")
    rows = []
    for name, (_, text) in CASES.items():
        tokens = encode(text)
        for engine in arguments.engines.split(","):
            walk(start(engine, CASES[name][0], vocabulary), tokens, np.zeros(vocabulary.num_words, dtype=np.int32))
            found = measure(engine, name, vocabulary, tokens, arguments.repeats)
            rows.append(found)
            cells = (
                " / ".join(f"{found[key][p]:,.1f}" for p in ("mean", "p50", "p90", "p99"))
                for key in ("cold_us", "warm_us")
            )
            table.add_row(name, engine, f"{found['compile_ms']:.2f}", *cells)
    Console(width=140).print(table)
    print_record({"bench": "cfg", "vocabulary": vocabulary.vocab_size, **machine(), "rows": rows}, arguments.out)


if __name__ == "__main__":
    main()
