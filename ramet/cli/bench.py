"""`ramet bench`: measure a server, or a model in this process, and print one table, or with `--table` two.

`--concurrency` clients each send one prompt after another (a closed loop). A prompt begins with text that all prompts
share and goes on with text of its own; in a conversation, the next turn's prompt is the last one, its answer and more
words. Open loops and recorded workloads are in the repository's benchmarks/ folder.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from ramet.cli.chat_models import ChatModel, Reply, open_model
from ramet.cli.flags import add_flags, given_values
from ramet.errors import ConfigError
from ramet.lang.graph.sampling import Sampling

_WORDS = (
    "river stone cloud paper light garden winter summer table window music letter bridge market harbor forest silver "
    "golden early later number answer reason circle square travel morning evening simple quiet corner signal planet"
)
_KNOWN = _WORDS.split()


@dataclass(frozen=True, slots=True)
class Load:
    """The prompts to send, measured in words. A word is roughly a token; the table shows the exact counts.

    `num_requests`: conversations, where they have several turns; each turn after the first adds `turn_words`.
    """

    num_requests: int
    concurrency: int
    shared_words: int
    own_words: int
    output_tokens: int
    seed: int
    turns: int = 1
    turn_words: int = 0


def add_bench(parser: argparse.ArgumentParser) -> None:
    from ramet.runtime.engine.config import EngineConfig

    parser.description = "Measure latency and throughput of a server (--url) or of a model in this process."
    parser.add_argument("model", nargs="?", help="a catalogue name, a directory, a .gguf file or a hub id")
    parser.add_argument("--url", help="a server, such as http://127.0.0.1:30000; any with OpenAI's API")
    parser.add_argument("--api-key", help="the server's key [$RAMET_API_KEY]")
    parser.add_argument("--requests", type=int, metavar="N", default=32, help="prompts in all [32]")
    parser.add_argument("--concurrency", type=int, metavar="N", default=8, help="clients at a time [8]")
    parser.add_argument("--shared-words", type=int, metavar="N", default=200, help="words all prompts begin with [200]")
    parser.add_argument("--own-words", type=int, metavar="N", default=50, help="words of each prompt alone [50]")
    parser.add_argument("--output-tokens", type=int, metavar="N", default=32, help="longest answer [32]")
    parser.add_argument("--load-seed", type=int, metavar="N", default=0, help="of the words [0]")
    parser.add_argument(
        "--table",
        action="store_true",
        help="1, 10, 50 and 100 clients with unique prompts and with shared ones, and four workloads; minutes on a CPU",
    )
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    add_flags(parser, EngineConfig, "engine (without --url)")


def run_bench(arguments: argparse.Namespace) -> int:
    """Send the load, print a table for people and one line of JSON."""
    from ramet.runtime.engine.config import EngineConfig

    load = Load(
        arguments.requests,
        arguments.concurrency,
        arguments.shared_words,
        arguments.own_words,
        arguments.output_tokens,
        arguments.load_seed,
    )
    if min(load.num_requests, load.concurrency, load.output_tokens, load.own_words) < 1 or load.shared_words < 0:
        raise ConfigError("--requests, --concurrency, --own-words and --output-tokens must be at least 1")
    key = arguments.api_key or os.environ.get("RAMET_API_KEY", "").split(",")[0] or None
    console = Console(stderr=True, highlight=False)
    with console.status("loading the model") as status:
        model = open_model(arguments.model, arguments.url, key, given_values(arguments, EngineConfig), status.update)
    what = f"{load.num_requests} requests, {load.concurrency} at a time"
    with contextlib.closing(model), console.status(what) as status:
        if arguments.table:
            return _run_tables(model, load, status.update, as_json=arguments.json)
        found = measure(model, load)
    if not arguments.json:
        Console(highlight=False).print(table_of(found))
    print(json.dumps(found))
    return 0


def loads_of(load: Load) -> dict[str, list[tuple[str, Load]]]:
    """Return the rows of the two tables by title. Lengths follow `load`. No row finds another one's prompts cached."""
    words, shared, own = load.shared_words + load.own_words, load.shared_words, load.own_words
    few = max(1, words // 8)
    clients = {
        f"{kind}, {count} at a time": {"concurrency": count, "shared_words": begin, "own_words": rest}
        for kind, begin, rest in (("unique", 0, words), (f"{100 * shared // words} % shared", shared, own))
        for count in (1, 10, 50, 100)
    }
    workloads = {
        "unique prompts": {"shared_words": 0, "own_words": words},
        "questions about one document": {"shared_words": 2 * words, "own_words": few},
        "conversations of 4 turns": {"shared_words": 0, "own_words": few, "turns": 4, "turn_words": few},
        "agents of 3 turns, same tools": {
            "shared_words": words,
            "own_words": words // 2 + few,
            "turns": 3,
            "turn_words": few,
        },
    }
    tables = {"clients": clients, f"workloads, {load.concurrency} at a time": workloads}
    seeds = itertools.count(load.seed)
    return {
        title: [(name, replace(load, seed=next(seeds), **fields)) for name, fields in rows.items()]
        for title, rows in tables.items()
    }


def _run_tables(model: ChatModel, load: Load, on_stage: Callable[[str], None], *, as_json: bool) -> int:
    every = {}
    for title, rows in loads_of(load).items():
        table = Table(title=f"{model.name}: {title}")
        for name in ("", "tokens/s", "first token, ms", "its p95", "cached"):
            table.add_column(name, justify="left" if not name else "right", no_wrap=True)
        for name, row in rows:
            on_stage(name)
            row = replace(row, num_requests=max(row.num_requests, row.concurrency))
            every[name] = found = measure(model, row)
            first = found["first_token_ms"] or {"p50": 0.0, "p95": 0.0}
            rate = "-" if found["hit_rate"] is None else f"{100 * found['hit_rate']:.0f} %"
            speed = f"{found['output_tokens_per_s']:,.0f}"
            table.add_row(name, speed, f"{first['p50']:,.1f}", f"{first['p95']:,.1f}", rate)
        if not as_json:
            Console(highlight=False).print(table)
    print(json.dumps(every))
    return 0


def prompts_of(load: Load) -> list[str]:
    """Write the prompts of a load. The same load always gives the same prompts."""
    drawn = random.Random(load.seed)

    def words(count: int) -> str:
        return " ".join(drawn.choice(_KNOWN) for _ in range(count))

    shared = words(load.shared_words)
    return [f"{shared} {index} {words(load.own_words)}".lstrip() for index in range(load.num_requests)]


def measure(model: ChatModel, load: Load) -> dict[str, Any]:  # Any: numbers and texts
    """Send one prompt to warm up, then the load; times in milliseconds."""
    sampling = Sampling(max_tokens=load.output_tokens, temperature=0.0, top_p=1.0)

    def one(prompt: str) -> Reply:
        reply = Reply()
        for _ in model.complete(prompt, sampling, reply):
            pass
        return reply

    one("Warm up.")
    start_s = time.monotonic()
    later = random.Random(f"turns of {load.seed}")
    asked = [" ".join(later.choice(_KNOWN) for _ in range(load.turn_words)) for _ in range(1, load.turns)]

    def converse(prompt: str) -> list[Reply]:
        replies = [one(prompt)]
        for words in asked:
            prompt = f"{prompt}{replies[-1].text} {words}"
            replies.append(one(prompt))
        return replies

    with ThreadPoolExecutor(load.concurrency) as pool:
        replies = [reply for some in pool.map(converse, prompts_of(load)) for reply in some]
    return _summary(model.name, load, replies, time.monotonic() - start_s)


def _summary(name: str, load: Load, replies: Sequence[Reply], seconds: float) -> dict[str, Any]:
    prompt, cached, made = (
        sum(getattr(reply, field) or 0 for reply in replies)
        for field in ("prompt_tokens", "cached_tokens", "completion_tokens")
    )
    per_token = [
        (reply.total_s - reply.first_s) / (count - 1)
        for reply in replies
        if reply.first_s is not None and (count := reply.completion_tokens or 0) > 1
    ]
    return {
        "model": name,
        "requests": len(replies),
        "concurrency": load.concurrency,
        "seconds": round(seconds, 3),
        "prompt_tokens": prompt,
        "cached_tokens": cached,
        "hit_rate": round(cached / prompt, 4) if prompt else None,
        "output_tokens": made,
        "output_tokens_per_s": round(made / seconds, 1),
        "prompt_tokens_per_s": round(prompt / seconds, 1),
        "first_token_ms": _spread([reply.first_s for reply in replies if reply.first_s is not None]),
        "per_token_ms": _spread(per_token),
        "request_ms": _spread([reply.total_s for reply in replies]),
    }


def _spread(seconds: Sequence[float]) -> dict[str, float] | None:
    """p50, p95 and the largest, in milliseconds."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    late = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    values = {"p50": statistics.median(ordered), "p95": late, "max": ordered[-1]}
    return {name: round(1000 * value, 2) for name, value in values.items()}


def table_of(found: dict[str, Any]) -> Table:
    """Lay the figures out as a table."""
    table = Table(title=f"{found['model']}: {found['requests']} requests, {found['concurrency']} at a time")
    for name in ("", "p50", "p95", "max"):
        table.add_column(name, justify="left" if not name else "right")
    for key, title in (
        ("first_token_ms", "first token, ms"),
        ("per_token_ms", "per token, ms"),
        ("request_ms", "request, ms"),
    ):
        spread = found[key]
        table.add_row(title, *("-" if spread is None else f"{spread[name]:,.1f}" for name in ("p50", "p95", "max")))
    rate = "-" if found["hit_rate"] is None else f"{100 * found['hit_rate']:.0f} %"
    table.caption = (
        f"{found['output_tokens_per_s']:,.0f} tokens/s out, {found['prompt_tokens_per_s']:,.0f} tokens/s in, "
        f"{rate} of {found['prompt_tokens']:,} prompt tokens from the cache, {found['seconds']:.1f} s"
    )
    return table
