"""Generations and selections: their descriptions, and how they are recorded, with seeds and checks in Python.

A check that is data (lang/graph/checks.py) travels with the graph, and the engine retries. Any other callable runs
here: the program waits for the value. If the callable refuses it, the program records another generation at the same
place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

import msgspec

from ramet.errors import CheckFailed
from ramet.lang.graph import ir
from ramet.lang.recording.recorder import Expr, Recorder
from ramet.lang.running.output_types import SELECTED, TEXT, OutputType
from ramet.lang.running.values import NodeSource, V, Value


@dataclass(frozen=True, slots=True)
class Gen(Expr, Generic[V]):
    """A generation of a value of type V.

    `sampling` holds only the values given to `gen`; the run's defaults fill the rest.
    `grammar`: the description that its constraint was made of, if it was composed. `captures`: the names in that, and
    how their values are read. `draft`: what the text is expected to be like. `adapter`: its name;
    empty: the run's. `model`: its name; empty: the backend's first one.
    """

    name: str | None
    output: OutputType
    constraint: ir.Constraint | None
    sampling: ir.Sampling
    where: tuple[ir.Check | Callable[[Any], object], ...] = ()
    retries: int = 3
    thinking: int | None = None  # the most tokens of the model's thinking before the value; None: it does not think
    grammar: Expr | None = None
    captures: Mapping[str, OutputType] = field(default_factory=dict)
    draft: str = ""
    adapter: str = ""
    model: str = ""

    def record(self, recorder: Recorder) -> NodeSource:
        """Append the generation, and keep its value and captures as variables.

        Waits for the value if a check is in Python. Raises CheckFailed.
        """
        source = self._record_checked(recorder)
        for name, capture in self.captures.items():
            path = ("captures", name)
            inner = NodeSource(source.run, source.node, self.name, self.output, path, capture.shape)
            recorder.variables[name] = Value(inner)
        return source

    def _record_checked(self, recorder: Recorder) -> NodeSource:
        sampling = self.sampling.filled(recorder.sampling)
        if self.thinking is not None:
            self._think(recorder, sampling, self.thinking)
        if sampling.temperature is None and self.constraint is not None and self.constraint.kind == "choice":
            sampling = msgspec.structs.replace(sampling, temperature=0.0)  # the likeliest, as `select`
        seed = recorder.seed_of_place()
        if sampling.seed is None and seed is not None:
            sampling = msgspec.structs.replace(sampling, seed=seed)
        declared = tuple(check for check in self.where if isinstance(check, ir.Check))
        if len(declared) == len(self.where):
            return self._record_once(recorder, sampling, declared, self.retries if declared else 0)
        recorder.record_late()  # before the place where a retry starts
        tip, attempts = recorder.tip, list[dict[str, str]]()
        while True:
            recorder.go_back(tip)
            left = self.retries - len(attempts)
            again = ir.retry_sampling(sampling, len(attempts))
            source = self._record_once(recorder, again, declared, left if declared else 0)
            recorder.run.note_attempts(source.node, attempts)
            problem = _problem(source, self.where)
            if problem is None:
                return source
            event = recorder.run.outcomes[source.node]
            attempts = [*recorder.run.attempts_of(source.node), {"text": event.text, "problem": problem}]
            if len(attempts) > self.retries:
                raise self._failed(source, attempts)

    def _think(self, recorder: Recorder, sampling: ir.Sampling, limit: int) -> None:
        """Append the model's thinking: free text of at most `limit` tokens between the template's marks."""
        values = ("min_tokens", "stop", "stop_regex", "stop_token_ids", "logprobs")
        own = {"max_tokens": limit, **dict.fromkeys(values)}
        seed = recorder.seed_of_place() if sampling.seed is None else sampling.seed
        sampling = msgspec.structs.replace(sampling, seed=seed, **own)
        recorder.add(ir.Thinking, is_open=True, model=self.model)
        recorder.add(ir.Generate, sampling=sampling, adapter=self.adapter, model=self.model)
        recorder.add(ir.Thinking, is_open=False, model=self.model)

    def _record_once(
        self, recorder: Recorder, sampling: ir.Sampling, checks: tuple[ir.Check, ...], retries: int
    ) -> NodeSource:
        node = recorder.add(
            ir.Generate,
            name=recorder.node_name(self.name),
            sampling=sampling,
            constraint=self.constraint,
            checks=checks,
            retries=retries,
            draft=self.draft,
            adapter=self.adapter,
            model=self.model,
            tells_calls=self.output.wire == "tools" and not recorder.run.stage_always,
            type=self.output.wire,
        )
        return _kept(recorder, NodeSource(recorder.run, node, self.name, self.output))

    def _failed(self, source: NodeSource, attempts: list[dict[str, str]]) -> CheckFailed:
        run, last = source.run, attempts[-1]
        node, program = run.nodes[source.node], run.options.program
        times = "once" if len(attempts) == 1 else f"{len(attempts)} times"
        tail = "" if node.parent is None else run.text_of(node.parent)[-200:]
        error = CheckFailed(
            f"{program}: {self.name or 'a value'} (node {node.id}, {node.line}) failed its `where` checks {times}; "
            f"the last text was {last['text'][:200]!r}: {last['problem']}; loosen the checks, or raise retries "
            f"({self.retries})",
            program=program,
            node=node.id,
            source_line=node.line,
            prompt_tail=tail,
        )
        error.attempts = tuple(attempts)
        return error


@dataclass(frozen=True, slots=True)
class SelectExpr(Expr):
    """A selection. Choices may be values of this program."""

    name: str | None
    choices: tuple[str | Value, ...]
    scorer: str = ir.DEFAULT_SCORER
    temperature: float = 0.0
    seed: int | None = None
    return_probs: bool = False
    model: str = ""

    def record(self, recorder: Recorder) -> NodeSource:
        """Append the selection."""
        is_drawn = self.temperature > 0 and self.seed is None
        node = recorder.add(
            ir.Select,
            name=recorder.node_name(self.name),
            choices=tuple(recorder.template(choice) for choice in self.choices),
            scorer=self.scorer,
            temperature=float(self.temperature),
            seed=recorder.seed_of_place() if is_drawn else self.seed,
            model=self.model,
        )
        return _kept(recorder, NodeSource(recorder.run, node, self.name, SELECTED if self.return_probs else TEXT))


def _kept(recorder: Recorder, source: NodeSource) -> NodeSource:
    """Keep a value as the variable of its name."""
    if source.name is not None:
        recorder.variables[source.name] = Value(source)
    recorder.run.stage(source.node)
    return source


def _problem(source: NodeSource, checks: Sequence[ir.Check | Callable[[Any], object]]) -> str | None:  # Any: its type
    """Return the problem of a value, or None. Waits for it. A check may also raise ValueError or AssertionError."""
    source.run.read_quietly(source.node, "where")
    event = source.run.outcomes.get(source.node)
    assert event is not None
    if event.kind == "done" and event.error is not None:
        return event.error.message
    found = source.read("where")
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
