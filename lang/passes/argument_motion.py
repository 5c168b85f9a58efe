"""Argument motion: how many more tokens different calls share if an argument is moved past the constants after it.

Moving text changes the prompt, so only the author can allow it, with `prefix="late"`. `as_written` undoes these moves
to measure their gain. All other moves are only reported. The pass works on a graph whose arguments are symbolic.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from ramet.lang.graph import ir
from ramet.lang.passes.paths import Paths, interpret
from ramet.lang.passes.target import Target


@dataclass(frozen=True, slots=True)
class Motion:
    """A possible move of `argument`, which is put into the text at `line`.

    `shared_now`: the number of tokens before it. `gain`: the number of tokens after it, up to the next generation
    (`node`), that don't depend on an argument.
    """

    argument: str
    line: str
    node: int
    shared_now: int
    gain: int


def as_written(graph: ir.Graph) -> ir.Graph:
    """Return the graph with every moved text back at its written place. Texts swap places; ids stay. O(nodes)."""
    nodes = list(graph.nodes)
    chains: dict[int, list[int]] = {}  # last moved text of a chain -> its texts in order
    below = {node.parent: node.id for node in graph.nodes if isinstance(node, ir.Text) and node.moved}
    for node in graph.nodes:
        if isinstance(node, ir.Text) and node.moved and node.id not in below:
            chains[node.id] = _chain(graph, node)
    for chain in chains.values():
        texts = [graph.nodes[i] for i in chain]
        order = [text for text in texts if isinstance(text, ir.Text) and not text.moved]
        num_fixed = len(order)
        moved = [text for text in texts if isinstance(text, ir.Text) and text.moved]
        for index, text in enumerate(moved):
            order.insert(num_fixed - text.moved + index, text)
        for place, text in zip(chain, order, strict=True):
            old = graph.nodes[place]
            nodes[place] = msgspec.structs.replace(text, id=old.id, parent=old.parent, moved=0)
    return ir.Graph(tuple(nodes), graph.arguments, graph.first)


def cues_before_late_text(graph: ir.Graph) -> list[tuple[ir.Text, ir.Text]]:
    """Return texts that end in an unfinished line, each with the late text that was moved past it. O(nodes)."""
    found = []
    for late in graph.nodes:
        if isinstance(late, ir.Text) and late.moved and late.parent is not None:
            passed = graph.nodes[late.parent]
            if isinstance(passed, ir.Text) and not passed.moved and unfinished(passed):
                found.append((passed, late))
    return found


def unfinished(text: ir.Text) -> str:
    """Return the last line of a text if neither a line break nor the end of a sentence follows it, else ""."""
    last = text.parts[-1] if text.parts else ""
    line = last.rpartition("\n")[2].rstrip(" ") if isinstance(last, str) else ""
    return "" if line.endswith((".", "!", "?")) else line[-40:]


def _chain(graph: ir.Graph, last: ir.Text) -> list[int]:
    """Return the chain of texts that consists of adjoining moved texts and the texts they were moved past."""
    chain, at, most = [last.id], last.parent, last.moved
    num_fixed = 0
    while at is not None and isinstance(text := graph.nodes[at], ir.Text):
        if not text.moved and num_fixed >= most:
            break
        most = max(most, text.moved)
        num_fixed += not text.moved
        chain.append(at)
        at = text.parent
    return chain[::-1]


def shared_by_calls(graph: ir.Graph, target: Target) -> int:
    """Return the tokens that calls share at the first generation of a path. The graph has symbolic arguments."""
    paths = interpret(graph, target)
    found = (_motion(paths, node, target) for node in graph.nodes if node.run_by == "model" and node.parent)
    return max((motion.shared_now for motion in found if motion is not None), default=0)


def argument_motion(paths: Paths, target: Target) -> list[Motion]:
    """Return the gain at the first generation of every path whose beginning differs between calls. Largest first."""
    nodes = paths.graph.nodes
    best: dict[str, Motion] = {}
    for node in nodes:
        if node.run_by != "model" or node.parent is None:
            continue
        motion = _motion(paths, node, target)
        if motion is not None and (motion.argument not in best or motion.gain > best[motion.argument].gain):
            best[motion.argument] = motion
    return sorted(best.values(), key=lambda motion: -motion.gain)


def _motion(paths: Paths, user: ir.AnyNode, target: Target) -> Motion | None:
    nodes = paths.graph.nodes
    argument = line = None
    before: list[str] = []
    after: list[str] = []
    for node in ir.branch(nodes, user.parent):
        if node.run_by == "model":
            return None  # the first generation of this path has its own report
        if node.is_markup:
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
