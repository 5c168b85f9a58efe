"""The literal text that follows a constrained generation in its branch, and so ends its value.

A model ends a value where it wants to go on with what follows, so the engine lets it begin that text. Known is what the
same part of the program says: texts after the node, up to the next generation, selection, fork or message. A node of a
later part is not looked at, even if it is there already: the result must not depend on when it comes.

A decimal number of which nothing is known to follow may stand at the end of a sentence. Its full stop looks like the
beginning of a fraction, so a number is taken to be followed by a full stop and a space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ramet.errors import InvalidProgram
from ramet.lang.graph import ir

MAX_BYTES = 64  # of the following text that the engine looks at
_AFTER_NUMBER: ir.Template = (". ",)


def children_of(nodes: Sequence[ir.AnyNode]) -> dict[int, list[ir.AnyNode]]:
    """Return the nodes of one part by their parents."""
    found: dict[int, list[ir.AnyNode]] = {}
    for node in nodes:
        if node.parent is not None:
            found.setdefault(node.parent, []).append(node)
    return found


def is_ended_by_following(node: ir.AnyNode) -> bool:
    """Return whether a node's value ends where the following text begins.

    Free text does not, nor a text that may hold free text beside its values, nor one that has a minimum of tokens.
    """
    constraint = node.narrowed().constraint if isinstance(node, ir.Generate) else None
    if not isinstance(node, ir.Generate) or constraint is None:
        return False
    is_free = constraint.kind in ("tools", "structural_tag")
    return not (is_free or node.sampling.min_tokens or node.sampling.ignore_eos)


def _is_silent(node: ir.AnyNode) -> bool:
    """Return whether a node adds no text to its branch."""
    return isinstance(node, ir.Capture | ir.Join) or (isinstance(node, ir.ToolCall) and not node.is_written)


def followers(node: ir.AnyNode, children: Mapping[int, Sequence[ir.AnyNode]]) -> list[ir.AnyNode]:
    """Return the nodes that decide which text follows a node, if that ends its value."""
    found, left = list[ir.AnyNode](), [node] if is_ended_by_following(node) else []
    while left:
        for child in children.get(left.pop().id, ()):
            if not _is_silent(child):
                found.append(child)
            if isinstance(child, ir.Text) or _is_silent(child):
                left.append(child)
    return found


def following(node: ir.AnyNode, children: Mapping[int, Sequence[ir.AnyNode]]) -> ir.Template:
    """Return the text that follows a node, as its author wrote it, or the beginning of it. Empty if it is not known."""
    is_decimal = isinstance(node, ir.Generate) and node.type == "float"
    parts: list[ir.Part] = []
    size = 0
    while size < MAX_BYTES:
        after = [child for child in children.get(node.id, ()) if not _is_silent(child) or children.get(child.id)]
        if len(after) != 1:
            break
        (node,) = after
        if isinstance(node, ir.Text):
            parts.extend(node.parts)
            size += sum(len(part) for part in node.parts if isinstance(part, str))
        elif not _is_silent(node):
            break
    return tuple(parts) or (_AFTER_NUMBER if is_decimal else ())


def known_start(template: ir.Template, is_known: Callable[[ir.Ref], bool], text: Callable[[ir.Ref], str]) -> bytes:
    """Return the beginning of a template up to the first value that is not known, as far as the engine looks at it."""
    found = ""
    for part in template:
        if (not isinstance(part, str) and not is_known(part)) or len(found) >= MAX_BYTES:
            break
        try:
            found += part if isinstance(part, str) else text(part)
        except InvalidProgram:  # the text's own node reports it
            break
    return beginning(found)


def beginning(text: str) -> bytes:
    """Return at most MAX_BYTES of a text, up to the border of a character. Half of a surrogate pair ends it."""
    try:
        data = text[:MAX_BYTES].encode()
    except UnicodeEncodeError as error:  # the text's own node reports it
        data = text[: error.start].encode()
    return data[:MAX_BYTES].decode(errors="ignore").encode()
