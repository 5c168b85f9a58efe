"""An explanation: a program's predicted or measured cost, as plain data and as a table on the terminal."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from ramet.lang.graph import ir
from ramet.lang.graph.run_record import RunRecord, Stage
from ramet.lang.passes.paths import NO_LIMIT, ZERO, Count
from ramet.lang.passes.requests import KvBound

if TYPE_CHECKING:  # rich's tables are loaded when a table is printed
    from rich.console import RenderableType
    from rich.table import Table

WIDTH = 118  # width of the table as plain text
_TIMES = ("start_s", "first_token_s", "end_s")
# What a program can write instead of a need for a value, by the use that needed it (Stage.why).
_FORMS = (
    ({"int()", "float()"}, "gen(name, int) and gen(name, float) give numbers without a wait"),
    (
        {"str()", "len()", "a text with this value in it", "a width or precision"},
        "text takes the value itself, also after methods of str, slices, sums; where=length(...) limits a length",
    ),
    (
        {"if, not, bool()", "==", "!=", "<", "<=", ">", ">=", "in", "hash()"},
        "in a body of s.map(...) or branches.each(...), only the branch waits that reads the value",
    ),
    ({"where"}, "checks such as length(...), is_in(...) and contains(...) need no value in Python"),
)
MAX_LINES = 40  # rows of the table; further nodes are only counted


def sum_counts(counts: Iterable[Count]) -> Count:
    """Return the sum of the counts."""
    return sum(counts, ZERO)


@dataclass(frozen=True, slots=True)
class NodeCost:
    """The predicted cost of one generation, or of all choices of one selection.

    `twin`: the node whose text it reuses.
    """

    node: int
    kind: str
    name: str | None
    line: str
    prompt: Count
    shared: Count
    new: Count
    written: Count
    twin: int | None = None

    def to_dict(self) -> dict[str, Any]:  # Any: JSON
        counts = {name: _plain(getattr(self, name)) for name in ("prompt", "shared", "new", "written")}
        return {"node": self.node, "kind": self.kind, "name": self.name, "line": self.line, **counts, "twin": self.twin}


@dataclass(frozen=True, slots=True)
class PassReport:
    """The result of one pass, as a sentence and as numbers."""

    name: str
    text: str
    numbers: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Measured:
    """The measured cost of one node. Times are seconds since the program's start; None if the backend gave none."""

    node: int
    kind: str
    name: str | None
    line: str
    usage: ir.Usage
    start_s: float | None
    first_token_s: float | None
    end_s: float | None
    error: str | None
    is_cancelled: bool  # by the failure of another node, or by the program

    def to_dict(self) -> dict[str, Any]:  # Any: JSON
        return {
            "node": self.node,
            "kind": self.kind,
            "name": self.name,
            "line": self.line,
            "prompt": self.usage.prompt_tokens,
            "cached": self.usage.cached_tokens,
            "computed": self.usage.computed_tokens,
            "decoded": self.usage.completion_tokens,
            "drafted": self.usage.drafted_tokens,
            "accepted": self.usage.accepted_tokens,
            "start_s": self.start_s,
            "first_token_s": self.first_token_s,
            "end_s": self.end_s,
            "error": self.error,
            "cancelled": self.is_cancelled,
        }


@dataclass(frozen=True, slots=True)
class Explanation:
    """The plan of a program. `str()` and rich show it as a table, `to_dict()` as plain data.

    `is_complete`: the plan covers the whole program. If not, the plan and the KV bound end at the stop in `stages`, and
    totals have no upper limit. `arms`: the plans of each way through the program, if it has several; totals are then
    the least and the most of all.
    """

    program: str
    target: str
    nodes: tuple[NodeCost, ...]
    passes: tuple[PassReport, ...]
    stages: tuple[Stage, ...]
    specialised: Mapping[str, str]
    kv: KvBound
    is_complete: bool
    num_rows: int = 1
    measured: tuple[Measured, ...] = ()
    arms: tuple[Explanation, ...] = ()

    @property
    def prompt(self) -> Count:
        """The prompt tokens of all requests."""
        return self._total("prompt")

    @property
    def shared(self) -> Count:
        """The prompt tokens that an earlier request of the program computed."""
        return self._total("shared")

    @property
    def new(self) -> Count:
        """The prompt tokens that are computed."""
        return self._total("new")

    @property
    def written(self) -> Count:
        """The tokens that the model writes."""
        return self._total("written")

    def _total(self, what: str) -> Count:
        if self.arms:
            return widest([getattr(arm, what) for arm in self.arms], is_complete=self.is_complete)
        return widest([sum_counts(getattr(node, what) for node in self.nodes)], is_complete=self.is_complete)

    def money(self, *, new: float, written: float, shared: float | None = None) -> tuple[float, float]:
        """Return the least and the most that a run costs, by prices of a million tokens. After a run, both are its own.

        `shared`: the price of prompt tokens from the cache; None: as `new`. The most is infinite where nobody knows it.
        """
        prices = {"new": new, "written": written, "shared": new if shared is None else shared}
        if self.measured:
            used = self.usage
            counts = {"new": used.computed_tokens, "written": used.completion_tokens, "shared": used.cached_tokens}
            found = {name: Count(size, size) for name, size in counts.items()}
        else:
            # A token is new or shared: the least has as many shared ones as there can be, if these are the cheaper.
            found = {"written": self.written, **self._split_prompt(is_shared_cheaper=prices["shared"] <= new)}
        return _weighed(found, {name: price / 1e6 for name, price in prices.items()})

    def _split_prompt(self, *, is_shared_cheaper: bool) -> dict[str, Count]:
        """Return the new and the shared tokens of the cheapest and of the dearest run."""
        prompt, new, shared = self.prompt, self.new, self.shared
        if not is_shared_cheaper:
            return {"new": Count(new.at_least, new.at_most), "shared": shared}
        return {
            "new": new,
            "shared": Count(max(prompt.at_least - new.at_least, 0), max(prompt.at_most - new.at_most, 0)),
        }

    def seconds(self, *, prefill: float, decode: float) -> tuple[float, float]:
        """Return limits on a run's time on an idle engine, by its tokens a second of prompts and of one answer.

        At least the longest single request, and at most all of them one after the other. After a run, both are the
        measured time.
        """
        if self.measured:
            ends = [one.end_s for one in self.measured if one.end_s is not None]
            return max(ends, default=0.0), max(ends, default=0.0)
        each = [_weighed({"p": n.new, "w": n.written}, {"p": 1 / prefill, "w": 1 / decode}) for n in self.nodes]
        if self.arms:
            limits = [arm.seconds(prefill=prefill, decode=decode) for arm in self.arms]
            return min(least for least, _ in limits), max(most for _, most in limits)
        most = sum(most for _, most in each) if self.is_complete else math.inf
        return max((least for least, _ in each), default=0.0), most

    @property
    def usage(self) -> ir.Usage:
        """The measured tokens of all nodes; zero before a run."""
        return sum((one.usage for one in self.measured), ir.Usage())

    def to_dict(self) -> dict[str, Any]:  # Any: JSON
        """Return plain data. A count is an int if it is exact, else [least, most]; most is None if nobody knows it."""
        return {
            "program": self.program,
            "target": self.target,
            "is_complete": self.is_complete,
            "arms": max(len(self.arms), 1),
            "rows": self.num_rows,
            **{name: _plain(getattr(self, name)) for name in ("prompt", "shared", "new", "written")},
            "kv_bound": {name: getattr(self.kv, name) for name in ("tokens", "pages", "known", "longest")},
            "nodes": [node.to_dict() for node in self.nodes],
            "passes": {one.name: {"text": one.text, **one.numbers} for one in self.passes},
            "stages": [{"line": s.line, "why": s.why, "value": s.value} for s in self.stages],
            "specialised": dict(self.specialised),
            "measured": [one.to_dict() for one in self.measured],
        }

    def __rich__(self) -> RenderableType:
        return _shown(self)

    def __str__(self) -> str:
        from rich.console import Console

        out = io.StringIO()  # rich shows what it prints in a notebook's cell, unless it is told not to
        console = Console(file=out, width=WIDTH, color_system=None, highlight=False, force_jupyter=False)
        console.print(_shown(self))
        return out.getvalue().rstrip("\n")

    def _repr_html_(self) -> str:
        style = "white-space:pre;overflow-x:auto;line-height:1.3;font-family:monospace"
        return f'<pre style="{style}">{escape(str(self))}</pre>'


def explain_run(record: RunRecord) -> Explanation:
    """Explain a run: measured tokens and times by node, and the lines that forced a stage."""
    measured = tuple(
        one for node in record.graph.nodes if (one := _measure(node, record.events.get(node.id))) is not None
    )
    most = max((one.usage.prompt_tokens + one.usage.completion_tokens for one in measured), default=0)
    total = sum((one.usage for one in measured), ir.Usage())
    kv = KvBound(total.computed_tokens + total.completion_tokens, None, total.computed_tokens, most, True)
    return Explanation(record.program, "", (), (), record.stages, {}, kv, True, measured=measured)


def _measure(node: ir.AnyNode, event: ir.NodeEvent | None) -> Measured | None:
    if node.run_by == "runner" or event is None:
        return None
    times = event.timings or {}
    return Measured(
        node.id,
        node.kind_name,
        node.label,
        node.line,
        event.usage or ir.Usage(),
        times.get("start_s"),
        times.get("first_token_s"),
        times.get("end_s"),
        None if event.error is None else f"{event.error.type}: {event.error.message}",
        event.error is not None and event.error.is_cancelled,
    )


def _plain(count: Count) -> int | list[int | None]:
    most = count.at_most if count.at_most < NO_LIMIT else None
    return count.at_most if count.is_exact else [count.at_least, most]


def widest(counts: Sequence[Count], *, is_complete: bool = True) -> Count:
    """Return the least and the most of all counts; no most if what they count goes on."""
    least, most = min(count.at_least for count in counts), max(count.at_most for count in counts)
    return Count(least, most if is_complete else max(most, least + NO_LIMIT))


def _weighed(counts: Mapping[str, Count], weights: Mapping[str, float]) -> tuple[float, float]:
    least = sum(count.at_least * weights[name] for name, count in counts.items())
    is_limited = all(count.at_most < NO_LIMIT for count in counts.values())
    return least, sum(c.at_most * weights[name] for name, c in counts.items()) if is_limited else math.inf


# The table.


def _shown(found: Explanation) -> RenderableType:
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    parts: list[RenderableType] = [_title(found)]
    if found.nodes:
        parts.append(_plan_table(found.nodes))
    if found.measured:
        parts.append(_measured_table(found.measured))
    if found.passes:
        parts.append(Padding(_passes_table(found), (1, 0, 0, 0)))
    stages: dict[str, int] = {}
    for stage in found.stages:
        text = f"{stage.line} needs {stage.value}: {stage.why}"
        stages[text] = stages.get(text, 0) + 1
    for text, times in stages.items():
        parts.append(Text.assemble(("stage  ", "bold yellow"), text + (f" (×{times})" if times > 1 else "")))
    for form in dict.fromkeys(form for stage in found.stages for whys, form in _FORMS if stage.why in whys):
        parts.append(Text(f"       {form}", style="dim"))
    if found.stages and not found.measured:
        parts.append(Text("       what comes after that line is planned when the value is there", style="dim"))
    for name, line in found.specialised.items():
        parts.append(Text.assemble(("holds for  ", "bold yellow"), f"this value of {name!r} alone: {line}"))
    return Group(*parts)


def _title(found: Explanation) -> RenderableType:
    from rich.text import Text

    rows = f"{found.num_rows} rows" if found.num_rows > 1 else ""
    arms = f"{len(found.arms)} ways through it" if found.arms else ""
    part = "" if found.is_complete else "up to the stage below"
    what = " · ".join(each for each in (found.target, rows, arms, part) if each)
    first = " (first row)" if found.num_rows > 1 else ""
    if found.measured:
        usage = found.usage
        numbers = (
            f"prompt {usage.prompt_tokens:,} = cached {usage.cached_tokens:,} + computed {usage.computed_tokens:,}; "
            f"decoded {usage.completion_tokens:,}"
        )
        if usage.drafted_tokens:
            numbers += f", {usage.accepted_tokens:,} of {usage.drafted_tokens:,} drafted ones were right;"
    else:
        numbers = f"prompt {found.prompt} = shared {found.shared} + new {found.new}; written {found.written}{first}"
    title = Text.assemble((found.program, "bold"), ("  " + what if what else "", "dim"))
    return Text("\n").join([title, Text(numbers + " tokens")])


def _table(columns: Sequence[str], num_left: int) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    for index, name in enumerate(columns):
        is_left = index < num_left
        table.add_column(name, justify="left" if is_left else "right", overflow="ellipsis", no_wrap=is_left)
    return table


def _plan_table(nodes: Sequence[NodeCost]) -> RenderableType:
    """Return a table with one row for all nodes of a source line and variable, as branches of a fork hardly differ."""
    table = _table(("node", "line", "×", "prompt", "shared", "new", "written"), 2)
    groups: dict[tuple[str, str, str], list[NodeCost]] = {}
    for node in nodes:
        groups.setdefault((node.kind, ir.variable(node.name or ""), node.line), []).append(node)
    for (kind, name, line), members in list(groups.items())[:MAX_LINES]:
        twins = sum(member.twin is not None for member in members)
        counts = [
            str(sum_counts(getattr(member, what) for member in members))
            for what in ("prompt", "shared", "new", "written")
        ]
        label = f"{kind} {name}".rstrip() + (f" ({twins} taken over)" if twins else "")
        table.add_row(label, _short(line), _times(members), *counts)
    if len(groups) > MAX_LINES:
        table.add_row(f"… {len(groups) - MAX_LINES} more lines", "", "", "", "", "", "")
    return table


def _measured_table(nodes: Sequence[Measured]) -> RenderableType:
    """Return a table with a row for each node. If there are many, a row is all nodes of a source line and variable."""
    columns = ("node", "line", "×", "prompt", "cached", "computed", "decoded", "start", "first token", "end")
    table = _table(columns, 2)
    groups: dict[object, list[Measured]] = {}
    for one in nodes:
        key = one.node if len(nodes) <= MAX_LINES else (one.kind, ir.variable(one.name or ""), one.line)
        groups.setdefault(key, []).append(one)
    for members in list(groups.values())[:MAX_LINES]:
        first, usage = members[0], sum((one.usage for one in members), ir.Usage())
        cancelled = sum(one.is_cancelled for one in members)
        failed = sum(one.error is not None for one in members) - cancelled
        name = first.name or "" if len(members) == 1 else ir.variable(first.name or "")
        label = f"{first.kind} {name}".rstrip() + _mark("✗", failed) + _mark("⊘", cancelled)
        sizes = (usage.prompt_tokens, usage.cached_tokens, usage.computed_tokens, usage.completion_tokens)
        times = [[t for one in members if (t := getattr(one, at)) is not None] for at in _TIMES]
        shown = (
            _time(min(times[0], default=None)),
            _time(min(times[1], default=None)),
            _time(max(times[2], default=None)),
        )
        table.add_row(label, _short(first.line), _times(members), *(f"{size:,}" for size in sizes), *shown)
    if len(groups) > MAX_LINES:
        table.add_row(f"… {len(groups) - MAX_LINES} more lines", *[""] * 9)
    return table


def _mark(mark: str, count: int) -> str:
    return "" if not count else f" {mark}" if count == 1 else f" {mark}{count}"


def _passes_table(found: Explanation) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for one in found.passes:
        table.add_row(one.name, one.text)
    return table


def _short(line: str) -> str:
    return line.rpartition("/")[2]


def _times(members: Sequence[object]) -> str:
    return "" if len(members) == 1 else f"{len(members):,}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
