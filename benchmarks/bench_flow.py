"""Branches that read values: a `for` loop over the branches against bodies that take turns (`map`, `each`).

    python benchmarks/bench_flow.py [--branches 8] [--repeats 3] [--weights float32 | as-stored] [--out FILE.jsonl]

SmolLM2-135M-Instruct, greedy, fixed lengths, the cache emptied before every run. In float32, both ways of a row write
the same text; int8 activations, which weights as stored have on some CPUs, round by the number of rows in a step:

    read, then go on    each branch writes 4 tokens, reads them in Python, and writes 4 more
    an `if` in a body   the value decides what the branch asks next
    a check in Python   `where=` with a function, which Python calls for each value
    uneven lengths      branch i reads after 2 i tokens and goes on for 2 (n - i)
    programs in a loop  `sub.run(...)` for each row against `sub.run_batch(rows)`
    a plan, then a map  eight steps and the risks as JSON on a branch of its own, 24 tokens about each step: the list
                        read as a whole against the list followed while it is written
    extract, translate  six fields of a report as JSON; the first one is translated in 64 tokens: the value read as a
                        whole against the field as an edge of the graph
    outline, sections   six titles and an abstract as JSON, a section of 32 tokens for each title; as for the plan
    tool loops          each branch calls a tool that takes 0.5 s, and answers: a loop of `call_tools` against
                        `branches.call_tools`

Steps: of the engine. `alone`: the steps of the longest branch alone, by its own run; of the plan, the plan's. `graph`:
the steps of the nodes that the turns recorded, sent as one graph that reads nothing. A prefix that several branches
share is computed once, in a step before theirs, so this is one step more. `at most`: the seconds of the loop over those
of the other way's steps, if a row that decodes beside others cost nothing.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import NamedTuple

from json_line import commit, print_record
from rich.console import Console
from rich.table import Table

from ramet import Engine, State, function, gen, tool
from ramet.lang.backends.default import as_backend
from ramet.lang.graph.ir import Graph, NodeEvent
from ramet.lang.graph.options import ProgramOptions
from ramet.lang.recording.generations import Gen

RULES = "You are patient and exact, and you answer in a few plain words.\n"
Body = Callable[[State, int], None]


def words(name: str, count: int) -> Gen:
    return gen(name, max_tokens=count, ignore_eos=True, temperature=0)


def read_and_go_on(s: State, index: int) -> None:
    s += f"Question {index}:" + words("a", 4)
    s += f"\nIn other words ({len(str(s['a']))} letters):" + words("b", 4)


def branch_on_value(s: State, index: int) -> None:
    s += f"Question {index}:" + words("a", 4)
    s += "\nMore:" if "the" in s["a"] else "\nShorter:"
    s += words("b", 4)


def checked(s: State, index: int) -> None:
    s += f"Question {index}:" + gen("a", max_tokens=4, ignore_eos=True, temperature=0, where=lambda text: len(text) > 0)


def uneven(s: State, index: int) -> None:
    s += f"Question {index}:" + words("a", 2 * index + 2)
    s += f"\nIn other words ({len(str(s['a']))}):" + words("b", 18 - 2 * index if index < 8 else 2)


ROWS: dict[str, Body] = {
    "read, then go on": read_and_go_on,
    "an `if` in a body": branch_on_value,
    "a check in Python": checked,
    "uneven lengths": uneven,
}


@function
def in_loop(s: State, body: Body, indices: list[int]) -> list[str]:
    s += RULES
    branches = s.fork(len(indices))
    for branch, index in zip(branches, indices, strict=True):
        body(branch, index)
    return [branch.text() for branch in branches]


@function
def in_turns(s: State, body: Body, indices: list[int]) -> list[str]:
    s += RULES
    return [branch.text() for branch in s.map(indices, body)]


@function
def alone(s: State, body: Body, index: int) -> None:
    s += RULES
    body(s, index)


def listed(items: str, count: int, rest: str) -> dict[str, object]:
    """Return the schema of an object with a list of texts, and a text after it."""
    texts = {"type": "array", "items": {"type": "string"}, "minItems": count, "maxItems": count}
    return {"type": "object", "properties": {items: texts, rest: {"type": "string"}}, "required": [items, rest]}


PLAN = listed("steps", 8, "risks")
OUTLINE = listed("titles", 6, "abstract")
FIELDS = ("claim", "speaker", "place", "date", "reason", "doubt")
REPORT = {"type": "object", "properties": {name: {"type": "string"} for name in FIELDS}, "required": list(FIELDS)}


@function
def plan_and_map(s: State, is_followed: bool, is_plan_alone: bool = False) -> list[str]:
    s += RULES
    aside = s.copy()
    aside += "Eight steps to move house, and the risks, as JSON:\n"
    aside += gen("plan", PLAN, max_tokens=400, string_tokens=12, temperature=0)
    steps = aside["plan"]["steps"]
    if is_plan_alone:
        return list(steps.value)

    def about(branch: State, step: str) -> None:
        branch += f"How do I do this: {step}?\n" + words("how", 24)

    return [branch.text() for branch in s.map(steps if is_followed else list(steps.value), about)]


@function
def extract_and_translate(s: State, is_followed: bool, is_value_alone: bool = False) -> list[str]:
    s += RULES
    aside = s.copy()
    aside += "The report of a storm at sea, as JSON:\n"
    aside += gen("report", REPORT, max_tokens=400, string_tokens=20, temperature=0)
    if is_value_alone:
        return list(aside["report"].value)
    claim = aside["report"]["claim"] if is_followed else aside["report"].value["claim"]
    s += f"English: {claim}\nFrench:" + words("french", 64)
    return [s["french"], aside["report"].value]


@function
def outline_and_sections(s: State, is_followed: bool, is_value_alone: bool = False) -> list[str]:
    s += RULES
    aside = s.copy()
    aside += "Six titles and the abstract of an essay on rivers, as JSON:\n"
    aside += gen("outline", OUTLINE, max_tokens=400, string_tokens=12, temperature=0)
    titles = aside["outline"]["titles"]
    if is_value_alone:
        return list(titles.value)

    def section(branch: State, title: str) -> None:
        branch += f"## {title}\n" + words("section", 32)

    return [branch.text() for branch in s.map(titles if is_followed else list(titles.value), section)]


@tool
def look_up(word: str) -> str:
    """Look a word up."""
    time.sleep(0.5)
    return f"{word} is a word"


@function(temperature=0, max_tokens=40, tools=[look_up])
def tool_loops(s: State, is_together: bool, count: int) -> list[str]:
    branches = s.fork(count)
    for index, branch in enumerate(branches):
        branch.user(f"Look up word number {index}.")
    if is_together:
        branches.call_tools(choice="required", max_steps=1)
    else:
        for branch in branches:
            branch.call_tools(choice="required", max_steps=1)
    return [branch.text() for branch in branches]


class Measured(NamedTuple):
    """`num_steps`, `seconds`: of the engine, in the median. `lone_s`: the same if a row beside others cost nothing."""

    texts: list[str]
    num_steps: int
    seconds: float
    lone_s: float


def measured(engine: Engine, run: Callable[[], list[str]], repeats: int) -> Measured:
    times, lone_times = [], []
    for _ in range(repeats):
        engine.flush_cache()
        engine.take_activity()
        before, start_s = int(engine.stats()["num_steps"]), time.perf_counter()
        texts = run()
        times.append(time.perf_counter() - start_s)
        num_steps = int(engine.stats()["num_steps"]) - before
        steps = [
            (seconds, decoding, extending) for _, seconds, decoding, extending, _ in engine.take_activity()["steps"]
        ]
        one_row = statistics.median([s for s, decoding, extending in steps if (decoding, extending) == (1, 0)] or [0.0])
        saved = sum(max(0.0, s - one_row) for s, decoding, extending in steps if decoding > 1 and not extending)
        lone_times.append(times[-1] - (saved if one_row else 0.0))
    return Measured(texts, num_steps, statistics.median(times), statistics.median(lone_times))


def steps_of_graph(engine: Engine, graph: Graph) -> int:
    """Return the engine's steps for the nodes of a run, when all are known before it starts."""
    left, ended = len(graph.nodes), Event()

    def on_event(event: NodeEvent) -> None:
        nonlocal left
        left -= event.kind in ("done", "error")
        if not left:
            ended.set()

    engine.flush_cache()
    before = int(engine.stats()["num_steps"])
    session = as_backend(engine).start(ProgramOptions(), on_event)
    session.extend(graph, is_last=True)
    session.finish()
    ended.wait()
    return int(engine.stats()["num_steps"]) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--branches", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--weights", choices=("float32", "as-stored"), default="float32")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    table = Table(title=f"{args.branches} branches that read values, SmolLM2-135M-Instruct")
    columns = ("", "steps: loop", "turns", "graph", "alone", "seconds: loop", "turns", "gain", "at most", "same text")
    for column in columns:
        table.add_column(column, justify="left" if not column else "right")
    indices, found = list(range(args.branches)), {}
    precision = {"dtype": "float32"} if args.weights == "float32" else {}
    with Engine("smollm2-135m", max_step_ms=0, **precision) as engine:
        in_turns.run(read_and_go_on, indices, backend=engine)  # warm-up
        for name, body in ROWS.items():

            def once(body: Body = body) -> int:
                return max(
                    measured(engine, lambda i=i: [alone.run(body, i, backend=engine).text()], 1).num_steps
                    for i in indices
                )

            loop = measured(engine, lambda body=body: in_loop.run(body, indices, backend=engine).result, args.repeats)
            turns = measured(engine, lambda body=body: in_turns.run(body, indices, backend=engine).result, args.repeats)
            graph = in_turns.run(body, indices, backend=engine).record.graph
            found[name] = _row(loop, turns, once(), steps_of_graph(engine, graph))
        body = read_and_go_on
        loop = measured(engine, lambda: [alone.run(body, i, backend=engine).text() for i in indices], args.repeats)
        turns = measured(
            engine,
            lambda: [row.text() for row in alone.run_batch([(body, i) for i in indices], backend=engine)],
            args.repeats,
        )
        first = found["read, then go on"]
        found["programs in a loop"] = _row(loop, turns, int(first["alone"]), int(first["graph"]))
        for name, program in (
            ("a plan, then a map", plan_and_map),
            ("extract, translate", extract_and_translate),
            ("outline, sections", outline_and_sections),
        ):
            loop = measured(engine, lambda p=program: p.run(False, backend=engine).result, args.repeats)
            turns = measured(engine, lambda p=program: p.run(True, backend=engine).result, args.repeats)
            once_alone = measured(engine, lambda p=program: p.run(True, True, backend=engine).result, 1)
            found[name] = _row(loop, turns, once_alone.num_steps)
        loop = measured(engine, lambda: tool_loops.run(False, args.branches, backend=engine).result, args.repeats)
        turns = measured(engine, lambda: tool_loops.run(True, args.branches, backend=engine).result, args.repeats)
        once_alone = measured(engine, lambda: tool_loops.run(True, 1, backend=engine).result, 1)
        found["tool loops"] = _row(loop, turns, once_alone.num_steps)
    for name, row in found.items():
        table.add_row(name, *("" if value is None else str(value) for value in row.values()))
    Console().print(table)
    print_record(
        {
            "benchmark": "flow",
            "commit": commit(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "branches": args.branches,
            "weights": args.weights,
            "rows": found,
        },
        args.out,
    )


def _row(loop: Measured, turns: Measured, alone: int, graph: int | None = None) -> dict[str, int | float | bool | None]:
    return {
        "loop_steps": loop.num_steps,
        "turns_steps": turns.num_steps,
        "graph": graph,
        "alone": alone,
        "loop_s": round(loop.seconds, 2),
        "turns_s": round(turns.seconds, 2),
        "gain": round(loop.seconds / turns.seconds, 2),
        "at_most": round(loop.seconds / turns.lone_s, 2),
        "same_text": loop.texts == turns.texts,
    }


if __name__ == "__main__":
    main()
