"""Grammars made of other descriptions: `one_or_more(select([tag("h1"), tag("p")]))` is one constraint.

The parts are texts, `gen(...)`, `select(...)`, lists of these, and functions, which stand for what they return: so a
function may use itself. Appended to a state, a grammar is one generation. The parts with a name are read from the
finished text, and become variables. `lower` turns a grammar into JSON (grammar/tools/composed.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from ramet.errors import InvalidRequest
from ramet.lang.graph import ir
from ramet.lang.graph.constraint import Tokenization
from ramet.lang.graph.json_form import AS_CONFIGURED, JsonForm
from ramet.lang.graph.narrowing import narrowing
from ramet.lang.recording.generations import Gen, SelectExpr
from ramet.lang.recording.recorder import Appendable, Chain, Expr, Recorder
from ramet.lang.running.output_types import TEXT, OutputType, captured, captures_type
from ramet.lang.running.run import current_run
from ramet.lang.running.values import NodeSource, Value

MAX_RULES = 1000

Part: TypeAlias = "Appendable | Callable[[], Part]"
Json: TypeAlias = Any  # a node of a composed grammar

_FIELDS = {
    "regex": "regex",
    "choice": "choices",
    "json_schema": "json_schema",
    "cfg": "cfg",
    "substring": "substring_of",
}


@dataclass(frozen=True, slots=True)
class Composition(Expr):
    """A grammar: its parts in order (`sequence`), one of them (`select`), or its only part repeated (`repeat`).

    Appended to a state, it is one generation without a name.
    """

    how: Literal["sequence", "select", "repeat"]
    parts: tuple[Part, ...]
    at_least: int = 1
    at_most: int | None = 1

    def record(self, recorder: Recorder) -> NodeSource:
        """Append the generation, and keep its captures as variables."""
        return composed_gen(None, self, ir.Sampling()).record(recorder)


def composed_gen(
    name: str | None,
    grammar: Composition,
    sampling: ir.Sampling,
    tokenization: Tokenization = "canonical",
    form: JsonForm = AS_CONFIGURED,
    thinking: int | None = None,
) -> Gen:
    """Return the generation of a grammar. Raises InvalidRequest for a part that no grammar can have."""
    source, captures = lower(grammar)
    constraint = ir.Constraint("grammar", json.dumps(source, ensure_ascii=False), tokenization, form)
    output = captures_type(constraint, captures)
    return Gen(name, output, constraint, sampling, thinking=thinking, grammar=grammar, captures=captures)


def one_or_more(part: Part) -> Composition:
    """Return the part once or more, one directly after the other."""
    return repeat(part, 1)


def zero_or_more(part: Part) -> Composition:
    """Return the part any number of times, one directly after the other."""
    return repeat(part)


def optional(part: Part) -> Composition:
    """Return the part, or nothing."""
    return repeat(part, 0, 1)


def repeat(part: Part, at_least: int = 0, at_most: int | None = None) -> Composition:
    """Return the part again and again, directly one after the other. `at_most` None: without a limit."""
    for name, count in (("at_least", at_least), ("at_most", at_most)):
        is_count = isinstance(count, int) and not isinstance(count, bool) and count >= 0
        if not is_count and not (count is None and name == "at_most"):
            raise InvalidRequest(f"{name} is {count!r}, but must be an integer from 0", param=name)
    if at_most is not None and at_most < at_least:
        raise InvalidRequest(f"repeat asks for at least {at_least} and at most {at_most}", param="at_most")
    return Composition("repeat", (part,), at_least, at_most)


def sequence(*parts: Part) -> Composition:
    """Return the parts one after the other, as one grammar: the model writes all of it in one generation."""
    return Composition("sequence", parts)


def lower(grammar: Composition) -> tuple[Json, dict[str, OutputType]]:
    """Return a grammar as JSON, and its captures by name. Reads generated values in texts. Raises InvalidRequest."""
    lowering = _Lowering()
    try:
        start = lowering.node(grammar)
        while lowering.pending:
            name, function = lowering.pending.pop()
            lowering.rules[name] = lowering.node(function())
    except RecursionError as error:
        raise InvalidRequest(
            "a grammar is nested without end; let a function that uses itself name itself without calling it: "
            'sequence("(", value, ")")',
            param="type",
        ) from error
    often = _counts({"": start, **lowering.rules})[""]
    lists = {name for name in lowering.captures if often.get(name, 0) > 1}
    captures = {name: captured(one, is_list=name in lists) for name, one in lowering.captures.items()}
    for node in lowering.capture_nodes:
        if node["capture"] in lists:
            node["list"] = True
    whole = {"start": start, "rules": lowering.rules} if lowering.rules else start
    return whole, captures


def holds_description(text: str | Value) -> bool:
    """Return whether a text holds a `gen(...)` or another description."""
    run = current_run.get()
    if run is None or isinstance(text, Value):
        return False
    return any(isinstance(item, Expr) for item in run.placeholders.split(text, run.foreign))


@dataclass(slots=True)
class _Lowering:
    """The state of one call of `lower`. `names`: functions -> the rules that stand for them."""

    rules: dict[str, Json] = field(default_factory=dict)
    names: dict[Any, str] = field(default_factory=dict)  # Any: functions and other callables that can be hashed
    pending: list[tuple[str, Callable[[], Part]]] = field(default_factory=list)
    captures: dict[str, OutputType] = field(default_factory=dict)
    capture_nodes: list[dict[str, Any]] = field(default_factory=list)

    def node(self, part: object) -> Json:
        if isinstance(part, str | Value):
            return self.text(format(part))
        if isinstance(part, Gen):
            if part.grammar is not None:
                return self.capture(part.name, self.node(part.grammar), TEXT)
            return self.capture(part.name, _generated(part), part.output)
        if isinstance(part, SelectExpr):
            return self.capture(part.name, {"select": [self.node(choice) for choice in part.choices]}, TEXT)
        if isinstance(part, Composition):
            parts = [self.node(one) for one in part.parts]
            if part.how != "repeat":
                return {part.how: parts}
            counts = {"at_least": part.at_least, "at_most": part.at_most}
            return {"repeat": parts[0], **{name: n for name, n in counts.items() if n is not None}}
        if isinstance(part, Chain) and part.role is None:
            return {"sequence": [self.node(one) for one in part.parts]}
        if isinstance(part, Sequence) and not isinstance(part, bytes | bytearray):
            return {"sequence": [self.node(one) for one in part]}
        if callable(part) and not isinstance(part, Expr | type):
            return self.rule(part)
        raise InvalidRequest(
            f"a grammar can't have {part!r} as a part; its parts are texts, gen(...), select(...), repeat(...), lists "
            "of these, and functions that return them",
            param="type",
        )

    def text(self, text: str) -> Json:
        run = current_run.get()
        if run is None:
            return text
        parts = [
            item if isinstance(item, str) else self.node(item) if isinstance(item, Expr) else run.text_of_item(item)
            for item in run.placeholders.split(text, run.foreign)
        ]
        return parts[0] if len(parts) == 1 else {"sequence": parts}

    def rule(self, function: Callable[[], Any]) -> Json:
        try:
            name = self.names.get(function)
        except TypeError as error:
            raise InvalidRequest(
                f"{function!r} can't stand in a grammar, as it can't be hashed", param="type"
            ) from error
        if name is None:
            if len(self.names) >= MAX_RULES:
                raise InvalidRequest(
                    f"a grammar has more than {MAX_RULES:,} functions; one that uses itself must name itself, and not "
                    "a new lambda or partial at each call",
                    param="type",
                )
            label = getattr(function, "__name__", "rule")
            name = self.names[function] = label if label not in self.names.values() else f"{label} {len(self.names)}"
            self.rules[name] = ""
            self.pending.append((name, function))
        return {"rule": name}

    def capture(self, name: str | None, node: Json, output: OutputType) -> Json:
        if name is None:
            return node
        if not isinstance(name, str) or not name or "#" in name:
            raise InvalidRequest(
                f"a variable is named {name!r}; use a text that isn't empty and has no '#'", param="name"
            )
        before = self.captures.setdefault(name, output)
        if (before.wire, before.constraint) != (output.wire, output.constraint):
            raise InvalidRequest(f"{name!r} stands in the grammar with two types; give each its own name", param="name")
        found: dict[str, Any] = {"capture": name, "of": node}
        if output.wire != "str":
            found["type"] = output.wire
        self.capture_nodes.append(found)
        return found


def _generated(gen: Gen) -> Json:
    """Return the texts of a generation inside of a grammar."""
    name = gen.name or "a generation"
    if gen.thinking is not None:
        raise InvalidRequest(f"{name} thinks inside of a grammar; give `thinking` to the whole", param="thinking")
    said = gen.sampling.said()
    stop = said.pop("stop", ())
    if gen.constraint is not None:
        if gen.constraint.tokenization != "canonical":
            said = {"tokenization": gen.constraint.tokenization}
        said = {**gen.constraint.form.said(), **said}
    if said:
        raise InvalidRequest(
            f"{name} says {next(iter(said))} inside of a grammar, which is one generation; give it to the gen(...) of "
            "the whole, or limit the text by where=length(...)",
            param=next(iter(said)),
        )
    checks = tuple(check for check in gen.where if isinstance(check, ir.Check))
    narrowed = narrowing(gen.constraint, checks, gen.output.wire)
    if len(checks) < len(gen.where) or narrowed.retried:
        what = "a check in Python" if len(checks) < len(gen.where) else f"the check {narrowed.retried[0]}"
        raise InvalidRequest(
            f"{what} of {name} is no mask, and can't be retried inside of a grammar; check the value after the "
            "generation",
            param="where",
        )
    return _stopped(stop, _node(narrowed.constraint))


def _node(constraint: ir.Constraint | None) -> Json | None:
    if constraint is None:
        return None
    if constraint.kind == "grammar":
        return json.loads(constraint.source)
    if constraint.kind not in _FIELDS:
        raise InvalidRequest(f"a constraint of kind {constraint.kind!r} can't stand inside of a grammar", param="type")
    is_json = constraint.kind in ("choice", "json_schema")
    return {_FIELDS[constraint.kind]: json.loads(constraint.source) if is_json else constraint.source}


def _stopped(stop: Sequence[str], node: Json | None) -> Json:
    """Return the texts of a node in which no stop string occurs."""
    free = [{"not": {"sequence": [{"all": []}, {"choices": list(stop)}, {"all": []}]}}] if stop else []
    if node is None:
        return free[0] if free else {"all": []}
    return {"all": [node, *free]} if free else node


def _counts(rules: Mapping[str, Json]) -> dict[str, dict[str, int]]:
    """Return how often each name may be captured in one text of each rule: once, or 2 for more often."""
    found: dict[str, dict[str, int]] = {name: {} for name in rules}
    while True:
        after = {name: _count(node, found) for name, node in rules.items()}
        if after == found:
            return found
        found = after


def _count(node: Json, rules: Mapping[str, dict[str, int]]) -> dict[str, int]:
    if isinstance(node, str):
        return {}
    if "rule" in node:
        return rules[node["rule"]]
    found: dict[str, int] = {}
    if "select" in node:
        for one in node["select"]:
            for name, count in _count(one, rules).items():
                found[name] = max(found.get(name, 0), count)
        return found
    if "repeat" in node:
        most = 2 if node.get("at_most") is None else node["at_most"]
        return {name: min(2, count * most) for name, count in _count(node["repeat"], rules).items()}
    for one in node.get("sequence", [node["of"]] if "capture" in node else []):
        for name, count in _count(one, rules).items():
            found[name] = min(2, found.get(name, 0) + count)
    if "capture" in node:
        found[node["capture"]] = min(2, found.get(node["capture"], 0) + 1)
    return found
