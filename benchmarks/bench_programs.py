"""A program as one graph inside the engine against the same program as separate requests.

    python benchmarks/bench_programs.py [--rtt 0 10 50] [--out benchmarks/results/programs.jsonl]

The alternative is measured in the same process on the same engine: every generation is a request with the whole text so
far, as a client of a completion API would send it; the text is tokenised anew, and the round trip is waited for. The
graph is sent once, and waits for one round trip in all. SmolLM2-135M-Instruct, greedy, as many tokens in both; before
every measurement the cache is emptied. Bytes: the JSON of what is sent.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ramet import Engine, Function, State, function, gen, select
from ramet.lang.backend import EngineBackend
from ramet.lang.primitives import Gen
from ramet.runtime.types import Grammar, RequestOutput, SamplingParams

TOKENS = 12


RULES = (
    "You work for a small town. You are patient and exact, and you never repeat yourself. You answer in one sentence "
    "of plain words. You do not guess: where you don't know a thing you say so, and name who might. You give numbers "
    "with their units, dates with their year, and names in full when they come up for the first time. You do not "
    "apologise, you do not promise, and you do not talk about yourself. When somebody is in danger you say what to do "
    "first, and only then why. When a question is about money you say what is included. When it is about time you say "
    "when it begins and when it ends. When it is about a place you say how to get there on foot. What you are told by "
    "the people of the town stays between you and them.\n"
)


def text() -> Gen:
    return gen("x", max_tokens=TOKENS, ignore_eos=True)


@function(temperature=0)
def chat(s: State) -> None:
    s.system(RULES)
    for question in (
        "When do I sow beans?",
        "And peas?",
        "How deep?",
        "How much water?",
        "In the shade?",
        "Until when?",
    ):
        s.user(question)
        s.assistant(text())


@function(temperature=0)
def react(s: State) -> None:
    s += (
        RULES + "Answer with the tools search(words) and read(page).\nQuestion: Who built the old bridge of the town?\n"
    )
    for i, found in enumerate(["3 pages", "a page about bridges", "a page about the town", "built in 1788"]):
        s += f"Thought {i}:" + text() + f"\nAction {i}: " + select("tool", ["search", "read"]) + "(" + text() + ")\n"
        s += f"Observation {i}: {found}\n"
    s += "Answer:" + text()


@function(temperature=0)
def debate(s: State) -> None:
    s += RULES + "A debate about the motion: cities should be free of cars. Each side speaks one sentence at a time.\n"
    for _ in range(4):
        s += "For:" + text() + "\nAgainst:" + text() + "\n"
    s += "The better side was " + select("winner", ["for", "against"])


@function(temperature=0)
def map_reduce(s: State) -> None:
    s += RULES + "You write summaries of one short sentence, in plain words, and you leave out what does not matter.\n"
    branches = s.fork(8)
    branches += lambda i: f"Text: On day {i} the ship sailed {7 * i + 3} miles to the north.\nSummary:"
    branches += text()
    branches.join()
    s += "".join(f"-{summary}\n" for summary in s["x"]) + "All in one sentence:" + gen("all", max_tokens=TOKENS)


PROGRAMS: Sequence[Function] = (chat, react, debate, map_reduce)


class SeparateRequests:
    """The engine as a client of a completion API has it: text in, text out, a round trip each."""

    def __init__(self, engine: Engine, rtt_s: float) -> None:
        self.tokenizer = engine.tokenizer
        self.context_length = engine.context_length
        self.bytes_sent = 0
        self._engine = engine
        self._rtt_s = rtt_s

    def submit(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        *,
        grammar: Grammar | None = None,
        cache_salt: str = "",
        program_id: str | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
        score_from: int | None = None,
        on_output: Callable[[RequestOutput], None] | None = None,
    ) -> Uncancellable:
        assert on_output is not None
        sent = self.tokenizer.decode(prompt)
        body = {"prompt": sent, "max_tokens": sampling.max_tokens, "temperature": sampling.temperature}
        self.bytes_sent += len(json.dumps(body))
        tokens = self.tokenizer.encode(sent, parse_special=True)
        if score_from is not None:
            score_from = min(score_from, len(tokens) - 1)

        def receive(output: RequestOutput) -> None:
            if output.finish_reason is None:
                on_output(output)
            else:
                after(self._rtt_s / 2, lambda: on_output(output))

        def send() -> None:
            self._engine.submit(tokens, sampling, on_output=receive, score_from=score_from)

        after(self._rtt_s / 2, send)
        return Uncancellable()


class Uncancellable:
    def cancel(self) -> None:
        raise NotImplementedError("nothing is cancelled in this benchmark")


def after(seconds: float, work: Callable[[], None]) -> None:
    if seconds == 0:
        work()
    else:
        threading.Timer(seconds, work).start()


def run_graph(program: Function, engine: Engine, rtt_s: float) -> tuple[State, int]:
    compiled = program.compile()
    sent = len(compiled.graph.to_json())
    time.sleep(rtt_s)  # its one round trip
    return compiled.run(backend=engine), sent


def run_separate(program: Function, engine: Engine, rtt_s: float) -> tuple[State, int]:
    client = SeparateRequests(engine, rtt_s)
    state = program.run(backend=EngineBackend(client))
    return state, client.bytes_sent


MODES: dict[str, Callable[[Function, Engine, float], tuple[State, int]]] = {
    "graph": run_graph,
    "separate requests": run_separate,
}


def measure(program: Function, engine: Engine, mode: str, rtt_s: float, repeats: int) -> dict[str, Any]:
    times, state, sent, computed = [], None, 0, 0
    for _ in range(repeats):
        engine.flush_cache()
        before = engine.stats()["num_computed_tokens"]
        start_s = time.perf_counter()
        state, sent = MODES[mode](program, engine, rtt_s)
        times.append(time.perf_counter() - start_s)
        computed = int(engine.stats()["num_computed_tokens"] - before)
    assert state is not None
    error = state.error()
    if error is not None:
        raise error
    return {
        "program": program.name,
        "mode": mode,
        "rtt_ms": round(1000 * rtt_s),
        "latency_s": round(statistics.median(times), 3),
        "spread_s": round(max(times) - min(times), 3),
        "computed_tokens": computed,
        "generated_tokens": state.usage.completion_tokens,
        "bytes_sent": sent,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rtt", type=float, nargs="+", default=[0, 10, 50], help="milliseconds")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    with Engine(args.model, context_length=2048) as engine:
        for program in PROGRAMS:
            measure(program, engine, "graph", 0, 1)  # warm-up
            for rtt in args.rtt:
                rows += [measure(program, engine, mode, rtt / 1000, args.repeats) for mode in MODES]
    table = Table(title=f"programs on {args.model}, {torch.get_num_threads()} threads, cache emptied before each run")
    for column in ("program", "round trip", "mode", "latency", "tokens computed", "bytes sent"):
        table.add_column(column, justify="left" if column in ("program", "mode") else "right")
    for row in rows:
        table.add_row(
            row["program"],
            f"{row['rtt_ms']} ms",
            row["mode"],
            f"{row['latency_s']:.2f} s",
            f"{row['computed_tokens']:,}",
            f"{row['bytes_sent']:,}",
        )
    Console().print(table)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    line = json.dumps(
        {
            "benchmark": "programs",
            "commit": commit.stdout.strip(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "model": args.model,
            "repeats": args.repeats,
            "rows": rows,
        }
    )
    if args.out is not None:
        with args.out.open("a") as file:
            file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
