"""An explanation: a program's predicted or measured cost, as plain data and as a table on the terminal."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ramet.lang.graph import ir
from ramet.lang.graph.run_record import RunRecord, Stage
from ramet.lang.passes.kv_bound import KvBound
from ramet.lang.passes.paths import ZERO, Count

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

    `num_exact`: how many of prompt, shared and new are exact. `twin`: the node whose text it reuses.
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
            "start_s": self.start_s,
            "first_token_s": self.first_token_s,
            "end_s": self.end_s,
            "error": self.error,
        }


@dataclass(frozen=True, slots=True)
class Explanation:
    """The plan of a program. `str()` and rich show it as a table, `to_dict()` as plain data.

    `is_complete`: the plan covers the whole program. If not, the plan and the KV bound end at the stop in `stages`.
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

    @property
    def prompt(self) -> Count:
        """The prompt tokens of all requests."""
        return sum_counts(node.prompt for node in self.nodes)

    @property
    def shared(self) -> Count:
        """The prompt tokens that an earlier request of the program computed."""
        return sum_counts(node.shared for node in self.nodes)

    @property
    def new(self) -> Count:
        """The prompt tokens that are computed."""
        return sum_counts(node.new for node in self.nodes)

    @property
    def written(self) -> Count:
        """The tokens that the model writes."""
        return sum_counts(node.written for node in self.nodes)

    @property
    def usage(self) -> ir.Usage:
        """The measured tokens of all nodes; zero before a run."""
        return sum((one.usage for one in self.measured), ir.Usage())

    def to_dict(self) -> dict[str, Any]:  # Any: JSON
        """Return plain data. A count is an int if it is exact, else [least, most]."""
        return {
            "program": self.program,
            "target": self.target,
            "is_complete": self.is_complete,
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

        out = io.StringIO()
        Console(file=out, width=WIDTH, color_system=None, highlight=False).print(_shown(self))
        return out.getvalue().rstrip("\n")


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
    )


def _plain(count: Count) -> int | list[int]:
    return count.at_most if count.is_exact else [count.at_least, count.at_most]


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

    what = " · ".join(part for part in (found.target, f"{found.num_rows} rows" if found.num_rows > 1 else "") if part)
    first = " (first row)" if found.num_rows > 1 else ""
    if found.measured:
        usage = found.usage
        numbers = (
            f"prompt {usage.prompt_tokens:,} = cached {usage.cached_tokens:,} + computed {usage.computed_tokens:,}; "
            f"decoded {usage.completion_tokens:,}"
        )
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
        failed = sum(one.error is not None for one in members)
        name = first.name or "" if len(members) == 1 else ir.variable(first.name or "")
        label = f"{first.kind} {name}".rstrip() + (" ✗" * min(failed, 1)) + (f"{failed}" if failed > 1 else "")
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
