"""`prefix="late"`: text that its author allows to stand behind the text that follows it.

It is held back, and recorded right before the next thing that reads the branch. So the order of a branch's text depends
on what is appended to it alone, not on where the program waits for a value. What moving gained is in `explain()`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ramet.errors import InvalidProgram
from ramet.lang.graph import ir
from ramet.lang.recording.primitives import Appendable, Expr
from ramet.lang.recording.source_lines import caller_line
from ramet.lang.recording.values import Value

if TYPE_CHECKING:
    from ramet.lang.recording.state import State


@dataclass(slots=True)
class LateText:
    """Text that is held back. `num_jumped`: texts that were appended after it. Owner: its state."""

    parts: ir.Template
    line: str
    num_jumped: int = 0


def hold_late(state: State, item: Appendable, prefix: str) -> None:
    """See State.append. Raises InvalidProgram for anything but text."""
    if prefix != "late":
        raise InvalidProgram(f'prefix is {prefix!r}, but must be "late"', program=state._program)
    if not isinstance(item, str | Value):
        raise InvalidProgram(f"only text can stand late, not {item!r}", program=state._program)
    if not state._run.is_recording:
        raise InvalidProgram("the program has ended; nothing can be appended to its state", program=state._program)
    parts = state._run.placeholders.split(item if isinstance(item, str) else format(item), state._run.foreign)
    kept = tuple(part for part in parts if isinstance(part, str | ir.Ref))
    if len(kept) < len(parts) or any(isinstance(part, Expr) for part in parts):
        raise InvalidProgram("only text can stand late; append the generation by itself", program=state._program)
    if kept:
        if not state._late:
            state._run.held_back.append(state)
        state._late.append(LateText(kept, caller_line()))


def flush_late(state: State) -> None:
    """Record what is held back on a branch; it stands here now."""
    late, state._late = state._late, []
    for one in late:
        state._add(ir.Text, parts=one.parts, moved=one.num_jumped, line=one.line)
