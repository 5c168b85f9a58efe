"""Argument motion: how many tokens more different calls would share if an argument stood behind the constants after it.

A report, not a rewrite: moving text changes what the model reads, so the author has to do it. Works on a graph whose
arguments are symbolic.
"""

from __future__ import annotations

from dataclasses import dataclass

from ramet.lang import ir
from ramet.lang.passes.paths import Paths
from ramet.lang.passes.target import Target


@dataclass(frozen=True, slots=True)
class Motion:
    """Argument `argument`, put into the text at `line`: `shared_now` tokens stand before it; `gain` more follow that
    don't depend on an argument, up to the first generation behind it (`node`)."""

    argument: str
    line: str
    node: int
    shared_now: int
    gain: int


def argument_motion(paths: Paths, target: Target) -> list[Motion]:
    """The gain at the first generation of every path that begins differently from call to call. Largest first."""
    nodes = paths.graph.nodes
    best: dict[str, Motion] = {}
    for node in nodes:
        if not isinstance(node, ir.Generate | ir.Select) or node.parent is None:
            continue
        motion = _motion(paths, node, target)
        if motion is not None and (motion.argument not in best or motion.gain > best[motion.argument].gain):
            best[motion.argument] = motion
    return sorted(best.values(), key=lambda motion: -motion.gain)


def _motion(paths: Paths, user: ir.AnyNode, target: Target) -> Motion | None:
    nodes = paths.graph.nodes
    branch: list[ir.AnyNode] = []
    at = user.parent
    while at is not None:
        branch.append(nodes[at])
        at = nodes[at].parent
    argument = line = None
    before: list[str] = []
    after: list[str] = []
    for node in reversed(branch):
        if isinstance(node, ir.Generate | ir.Select):
            return None  # the first generation of this path has its own report
        if isinstance(node, ir.Role | ir.Tools):
            mark = "".join(part for part in paths.texts[node.id] if isinstance(part, str))
            (before if argument is None else after).append(mark)
        for part in node.parts if isinstance(node, ir.Text) else ():
            if isinstance(part, str):
                (before if argument is None else after).append(part)
            elif isinstance(nodes[part.node], ir.Argument):
                if argument is None:
                    found = nodes[part.node]
                    assert isinstance(found, ir.Argument)
                    argument, line = found.name, node.line
            elif argument is None:
                return None
    if argument is None or line is None:
        return None
    return Motion(argument, line, user.id, _num_tokens(target, before, False), _num_tokens(target, after, True))


def _num_tokens(target: Target, texts: list[str], continues: bool) -> int:
    return len(target.encode("".join(texts), add_special=False, continues=continues))
