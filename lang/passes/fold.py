"""Constant folding: bound arguments become text, and adjoining texts become one.

The new graph has the same text and the same tokens.
"""

from __future__ import annotations

from collections import Counter

import msgspec

from ramet.lang.graph import ir


def fold_constants(graph: ir.Graph) -> ir.Graph:
    """Bind `graph.arguments` and merge adjoining texts. O(nodes)."""
    arguments = [n for n in graph.nodes if isinstance(n, ir.Argument)]
    bound = {n.id: graph.arguments[n.name] for n in arguments if n.name in graph.arguments}
    pinned = _pinned(graph)
    children = Counter(node.parent for node in graph.nodes)
    nodes: list[ir.AnyNode] = []
    new_id: dict[int, int] = {}
    # Arguments come first: a merged text may use the arguments of a later text.
    for old in sorted(graph.nodes, key=lambda node: (not isinstance(node, ir.Argument), node.id)):
        if old.id in bound:
            continue
        node = _bind(old, bound)
        above = None if old.parent is None else new_id[old.parent]
        if isinstance(node, ir.Text) and above is not None:
            before = nodes[above]
            assert old.parent is not None
            is_plain = old.parent not in pinned and children[old.parent] == 1
            if isinstance(before, ir.Text) and is_plain and all(new_id[ref.node] < above for ref in ir.refs(node)):
                new_id[old.id] = above
                (parts,) = ir.renumbered(node, new_id).templates()
                nodes[above] = msgspec.structs.replace(before, parts=_merged((*before.parts, *parts)))
                continue
        new_id[old.id] = len(nodes)
        nodes.append(ir.renumbered(node, new_id))
    left = {name: value for name, value in graph.arguments.items() if any(_declares(n, name) for n in nodes)}
    return ir.Graph(tuple(nodes), left)


def _declares(node: ir.AnyNode, name: str) -> bool:
    return isinstance(node, ir.Argument) and node.name == name


def _pinned(graph: ir.Graph) -> set[int]:
    """Return the nodes whose end other nodes refer to. Nothing may be merged into them."""
    found: set[int] = set()
    for node in graph.nodes:
        if isinstance(node, ir.Capture) and node.start is not None:
            found.add(node.start)
        found.update(node.joined())
    return found


def _bind(node: ir.AnyNode, bound: dict[int, ir.JsonValue]) -> ir.AnyNode:
    if not any(ref.node in bound for ref in ir.refs(node)):
        return node

    def fold(template: ir.Template) -> ir.Template:
        parts: list[ir.Part] = []
        for part in template:
            if isinstance(part, ir.Ref) and part.node in bound:
                parts.append(_text_of(part, bound[part.node]))
            else:
                parts.append(part)
        return _merged(tuple(parts))

    return node.changed(fold, lambda other: other)


def _text_of(ref: ir.Ref, value: ir.JsonValue) -> str:
    return ir.render((ref,), lambda _: ir.value_text(value), lambda _: value)


def _merged(parts: ir.Template) -> ir.Template:
    found: list[ir.Part] = []
    for part in parts:
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        elif part != "":
            found.append(part)
    return tuple(found)
