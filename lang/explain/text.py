"""An explanation as a table on the terminal."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ramet.lang.graph.ir import Usage
from ramet.lang.passes.paths import ZERO, Count

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from ramet.lang.explain.explain import Explanation, Measured, NodeCost

_TIMES = ("start_s", "first_token_s", "end_s")
MAX_LINES = 40  # of the table; more nodes than that are counted, not shown


def as_text(found: Explanation, width: int = 118) -> str:
    """Plain text without colours."""
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width, color_system=None, highlight=False).print(render(found))
    return out.getvalue().rstrip("\n")


def render(found: Explanation) -> RenderableType:
    """What rich prints."""
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
    """One line for all nodes of one source line and variable: branches of a fork differ in little else."""
    table = _table(("node", "line", "×", "prompt", "shared", "new", "written"), 2)
    groups: dict[tuple[str, str, str], list[NodeCost]] = {}
    for node in nodes:
        groups.setdefault((node.kind, _variable(node.name), node.line), []).append(node)
    for (kind, name, line), members in list(groups.items())[:MAX_LINES]:
        twins = sum(member.twin is not None for member in members)
        counts = [_total([getattr(m, what) for m in members]) for what in ("prompt", "shared", "new", "written")]
        label = f"{kind} {name}".rstrip() + (f" ({twins} taken over)" if twins else "")
        table.add_row(label, _short(line), _times(members), *counts)
    if len(groups) > MAX_LINES:
        table.add_row(f"… {len(groups) - MAX_LINES} more lines", "", "", "", "", "", "")
    return table


def _measured_table(nodes: Sequence[Measured]) -> RenderableType:
    """One line a node; where they are many, one for all of one source line and variable, from the first to the last."""
    columns = ("node", "line", "×", "prompt", "cached", "computed", "decoded", "start", "first token", "end")
    table = _table(columns, 2)
    groups: dict[object, list[Measured]] = {}
    for one in nodes:
        key = one.node if len(nodes) <= MAX_LINES else (one.kind, _variable(one.name), one.line)
        groups.setdefault(key, []).append(one)
    for members in list(groups.values())[:MAX_LINES]:
        first, usage = members[0], sum((one.usage for one in members), Usage())
        failed = sum(one.error is not None for one in members)
        name = first.name or "" if len(members) == 1 else _variable(first.name)
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


def _total(counts: Sequence[Count]) -> str:
    total = ZERO
    for count in counts:
        total = total + count
    return str(total)


def _short(line: str) -> str:
    return line.rpartition("/")[2]


def _variable(name: str | None) -> str:
    """`step#2` is the variable `step` written again."""
    return (name or "").partition("#")[0]


def _times(members: Sequence[object]) -> str:
    return "" if len(members) == 1 else f"{len(members):,}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
