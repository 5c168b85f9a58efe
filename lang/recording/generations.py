"""Recording generations and selections on a branch: their sampling values, their seeds, and checks in Python.

A check that is data (lang/graph/checks.py) travels with the graph, and its retries happen in the engine. Any other
callable runs here: the program waits for the value and, where the callable refuses it, records another generation from
the same place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ramet.errors import CheckFailed
from ramet.lang.graph import ir
from ramet.lang.recording.primitives import Gen, SelectExpr, merge_sampling
from ramet.lang.recording.types import SELECTED, TEXT
from ramet.lang.recording.values import Value

if TYPE_CHECKING:
    from ramet.lang.recording.state import State


def generate(state: State, item: Gen) -> Value:
    """Append a generation, and return its value; waits where a check is Python. Raises CheckFailed."""
    sampling = _sampling_of(state, item)
    declared = [check for check in item.where if isinstance(check, ir.Check)]
    if len(declared) == len(item.where):
        return _record(state, item, sampling, tuple(declared), item.retries if declared else 0)
    tip, attempts = state._tip, list[dict[str, str]]()
    while True:
        state._tip = tip
        value = _record(state, item, ir.retry_sampling(sampling, len(attempts)))
        state._run.attempts[value._node] = attempts
        problem = _problem(value, item.where)
        if problem is None:
            return value
        attempts.append({"text": state._run.results_text(value._node), "problem": problem})
        if len(attempts) > item.retries:
            raise _failed(state, item, value, attempts)


def _record(
    state: State, item: Gen, sampling: ir.Sampling, checks: tuple[ir.Check, ...] = (), retries: int = 0
) -> Value:
    node = state._add(
        ir.Generate,
        name=state._unique(item.name),
        sampling=sampling,
        constraint=item.constraint,
        checks=checks,
        retries=retries,
        type=item.output.wire,
    )
    return _named(state, Value(state._run, node, item.name, item.output))


def select(state: State, item: SelectExpr) -> Value:
    """Append a selection, and return its value."""
    is_drawn = item.temperature > 0 and item.seed is None
    node = state._add(
        ir.Select,
        name=state._unique(item.name),
        choices=tuple(state._template(choice) for choice in item.choices),
        scorer=item.scorer,
        temperature=float(item.temperature),
        seed=_seed_of_place(state) if is_drawn else item.seed,
    )
    return _named(state, Value(state._run, node, item.name, SELECTED if item.return_probs else TEXT))


def _named(state: State, value: Value) -> Value:
    if value._name is not None:
        state._variables[value._name] = value
    if state._run.stage_always:
        state._run.read_quietly(value._node)
    return value


def _sampling_of(state: State, item: Gen) -> ir.Sampling:
    sampling = merge_sampling(item.sampling, state._sampling)
    seed = _seed_of_place(state)
    return sampling if sampling.seed is not None else merge_sampling(ir.Sampling(seed=seed), sampling)


def _seed_of_place(state: State) -> int | None:
    """Of every place in the program its own, however it is cut into stages. None where the run has no seed."""
    state._num_generated += 1
    if state._run.seed is None:
        return None
    place = f"{state._run.seed}:{state._key}:{state._num_generated}".encode()
    return int.from_bytes(hashlib.blake2b(place, digest_size=4).digest(), "big")


def _problem(value: Value, checks: Sequence[ir.Check | Callable[[Any], object]]) -> str | None:  # Any: the value's type
    """What is wrong with a value, or None. Waits for it. A check may refuse by ValueError or AssertionError, too."""
    run, node = value._run, value._node
    run.read_quietly(node, "where")
    event = run.result_of(node)
    assert event is not None
    if event.kind == "done" and event.error is not None:
        return event.error.message
    found = value._read("where")
    for check in checks:
        if isinstance(check, ir.Check):
            problem = check.problem(event.value)
            if problem is not None:
                return problem
            continue
        try:
            is_fine = bool(check(found))
        except (ValueError, AssertionError) as error:
            return f"{type(error).__name__}: {error}"
        if not is_fine:
            return f"{found!r} is refused by {getattr(check, '__name__', repr(check))}"
    return None


def _failed(state: State, item: Gen, value: Value, attempts: list[dict[str, str]]) -> CheckFailed:
    run = state._run
    line, last = run.nodes[value._node].line, attempts[-1]
    times = "once" if len(attempts) == 1 else f"{len(attempts)} times"
    parent = run.nodes[value._node].parent
    tail = "" if parent is None else run.text_of(parent)[-200:]
    error = CheckFailed(
        f"{state._program}: {item.name or 'a value'} (node {value._node}, {line}) failed its `where` checks {times}; "
        f"the last text was {last['text'][:200]!r}: {last['problem']}; loosen the checks, or raise retries "
        f"({item.retries})",
        program=state._program,
        node=value._node,
        source_line=line,
        prompt_tail=tail,
    )
    error.attempts = tuple(attempts)
    return error
