"""An explanation as a table on the terminal."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ramet.lang.passes.paths import ZERO, Count

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from ramet.lang.explain import Explanation, Measured, NodeCost

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
        table.add_column(name, justify="left" if index < num_left else "right", overflow="fold", no_wrap=index == 0)
    return table


def _plan_table(nodes: Sequence[NodeCost]) -> RenderableType:
    """One line for all nodes of one source line and variable: branches of a fork differ in little else."""
    table = _table(("node", "line", "×", "prompt", "shared", "new", "written"), 2)
    groups: dict[tuple[str, str, str], list[NodeCost]] = {}
    for node in nodes:
        groups.setdefault((node.kind, (node.name or "").partition("#")[0], node.line), []).append(node)
    for (kind, name, line), members in list(groups.items())[:MAX_LINES]:
        twins = sum(member.twin is not None for member in members)
        times = "" if len(members) == 1 else f"{len(members)}"
        counts = [_total([getattr(m, what) for m in members]) for what in ("prompt", "shared", "new", "written")]
        label = f"{kind} {name}".rstrip() + (f" ({twins} taken over)" if twins else "")
        table.add_row(label, _short(line), times, *counts)
    if len(groups) > MAX_LINES:
        table.add_row(f"… {len(groups) - MAX_LINES} more lines", "", "", "", "", "", "")
    return table


def _measured_table(nodes: Sequence[Measured]) -> RenderableType:
    table = _table(("node", "line", "prompt", "cached", "computed", "decoded", "start", "first token", "end"), 2)
    for one in nodes[:MAX_LINES]:
        usage = one.usage
        label = f"{one.kind} {one.name or ''}".rstrip() + (" ✗" if one.error else "")
        sizes = (usage.prompt_tokens, usage.cached_tokens, usage.computed_tokens, usage.completion_tokens)
        times = (_ms(one.start_s), _ms(one.first_token_s), _ms(one.end_s))
        table.add_row(label, _short(one.line), *(f"{size:,}" for size in sizes), *times)
    if len(nodes) > MAX_LINES:
        table.add_row(f"… {len(nodes) - MAX_LINES} more nodes", *[""] * 8)
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


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:,.1f} ms"
