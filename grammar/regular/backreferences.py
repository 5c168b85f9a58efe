r"""Removes back references to groups with few texts: `(["'])\w+\1` is `"\w+"` or `'\w+'`.

The part of a pattern in which a group and all references to it stand is written out once for each text of the group. So
the group must be read exactly once in that part: it stands in no alternative, repeat or assertion there. Patterns have
groups as `Named`, and the references to them as `Reference`, until they become terminals. A reference that ignores case
is `ignoring_case(reference)`.
"""

from __future__ import annotations

from ramet.errors import InvalidRegex
from ramet.grammar import ir
from ramet.grammar.regular import char_classes as chars

MAX_TEXTS = 256  # of all groups that are referred to, multiplied
_MAX_LENGTH = 4096  # of such a text, in characters
_IGNORED = {False: "a text in any case", True: "a text in any ASCII case"}


def ignoring_case(reference: ir.Reference, *, is_ascii: bool) -> ir.Node:
    """Return a reference to the text of a group, in upper or lower case. is_ascii: only of ASCII's letters."""
    return ir.Terminal(reference, _IGNORED[is_ascii])


def without_backreferences(node: ir.Node) -> ir.Node:
    """Return the same texts without references to groups.

    Raises: InvalidRegex if a group is not read exactly once, before the references to it, or has too many texts.
    """
    names = ir.references(node)
    node = ir.changed(node, lambda one: _without_name(one, names))
    if not names:
        return node
    _check_order(node, set())
    node = _expanded(node, set())
    for name in sorted(ir.references(node)):
        raise InvalidRegex(f"a back reference to the group {name}, which is not read exactly once")
    return node


def _expanded(node: ir.Node, outside: set[str]) -> ir.Node:
    """Write the parts of a node out that hold a group and all references to it. outside: referred to elsewhere."""
    parts = ir.parts_of(node)
    names = ir.references(node)
    if not names or not parts:
        return node
    used = [ir.references(part) for part in parts]
    others = [outside.union(*used[:i], *used[i + 1 :]) for i in range(len(parts))]
    node = ir.with_parts(node, [_expanded(part, more) for part, more in zip(parts, others, strict=True)])
    return _written_out(node, ir.references(node) - outside, 1)


def _without_name(node: ir.Node, names: set[str]) -> ir.Node | None:
    """Return a group's content if no reference names the group."""
    if not isinstance(node, ir.Named) or node.name in names:
        return None
    return ir.changed(node.item, lambda one: _without_name(one, names))


def _read_once(node: ir.Node) -> list[ir.Named]:
    match node:
        case ir.Concatenation(parts):
            return [one for part in parts for one in _read_once(part)]
        case ir.Named(item):
            return [node, *_read_once(item)]
    return []


def _check_order(node: ir.Node, ended: set[str]) -> None:
    """Raise InvalidRegex for a reference before the end of its group. ended: the groups that have ended."""
    if isinstance(node, ir.Reference) and node.rule not in ended:
        raise InvalidRegex(f"a back reference to the group {node.rule} before its end")
    for part in ir.parts_of(node):
        _check_order(part, ended)
    if isinstance(node, ir.Named):
        ended.add(node.name)


def _written_out(node: ir.Node, names: set[str], num_ways: int) -> ir.Node:
    """Write a node out for each text of each of these groups, those inside of others first."""
    inner = [one for one in _read_once(node) if one.name in names and not ir.holds(one.item, _is_about_groups)]
    if not inner:
        return node
    group = inner[0]
    texts, reference = _texts(group, MAX_TEXTS // num_ways), ir.Reference(group.name)
    ways = []
    for text in texts:
        literal = ir.Bytes(text.encode())

        def change(one: ir.Node, text: str = text, literal: ir.Node = literal) -> ir.Node | None:
            if isinstance(one, ir.Terminal) and one.item == reference:
                return _in_any_case(text, is_ascii=one.name == _IGNORED[True])
            return literal if one == reference or (isinstance(one, ir.Named) and one.name == group.name) else None

        ways.append(_written_out(ir.changed(node, change), names, num_ways * len(texts)))
    return ways[0] if len(ways) == 1 else ir.Choice(tuple(ways))


def _in_any_case(text: str, *, is_ascii: bool) -> ir.Node:
    """Return the texts that a reference which ignores case reads. Module `re` compares the lower case of characters."""
    parts = []
    for char in text:
        alike = chars.characters(chars.ignore_case(((ord(char), ord(char)),), is_ascii))
        same = [(ord(c), ord(c)) for c in alike if c == char or c.lower()[0] == char.lower()[0]]
        parts.append(ir.Chars(ir.normalize_ranges(same)))
    return ir.Concatenation(tuple(parts))


def _is_about_groups(node: ir.Node) -> bool:
    return isinstance(node, ir.Named | ir.Reference)


def _texts(group: ir.Named, most: int) -> list[str]:
    """Return the texts of a group. Raises: InvalidRegex if there are more than `most`."""
    if ir.holds(group.item, lambda one: isinstance(one, ir.Lookahead | ir.Lookbehind)):
        raise InvalidRegex(f"a back reference to the group {group.name}, in which anchors or assertions stand")
    found = _listed(group.item, most)
    if found is None:
        raise InvalidRegex(
            f"a back reference to the group {group.name}, which has more than {most} texts, or one of more than "
            f"{_MAX_LENGTH:,} characters"
        )
    return sorted(found)


def _listed(node: ir.Node, most: int) -> set[str] | None:
    """Return all texts of a node; None if there are more than `most`, or very long ones."""
    found: set[str] | None = None
    match node:
        case ir.Bytes(value):
            found = {value.decode()}
        case ir.Chars(ranges):
            if sum(high - low + 1 for low, high in ranges) <= most:
                found = {
                    chr(code) for low, high in ranges for code in range(low, high + 1) if not 0xD800 <= code <= 0xDFFF
                }
        case ir.Concatenation(parts):
            found = {""}
            for part in parts:
                found = _joined(found, _listed(part, most), most)
        case ir.Choice(options):
            every = [_listed(option, most) for option in options]
            found = None if None in every else set().union(*(some for some in every if some is not None))
        case ir.Repeat(item, low, high):
            found = _repeated(_listed(item, most), low, most + 1 if high is None else high, most)
        case ir.Terminal(item) | ir.Named(item):
            found = _listed(item, most)
    return None if found is None or len(found) > most else found


def _repeated(texts: set[str] | None, low: int, high: int, most: int) -> set[str] | None:
    """Return the texts of `low` to `high` of these."""
    if texts == {""} or high == 0:
        return {""}
    if high > _MAX_LENGTH:
        return None
    found: set[str] | None = {""} if low == 0 else set()
    longer: set[str] | None = {""}
    for count in range(1, high + 1):
        longer = _joined(longer, texts, most)
        if longer is None or found is None:
            return None
        found = found | longer if count >= low else found
    return found


def _joined(left: set[str] | None, right: set[str] | None, most: int) -> set[str] | None:
    if left is None or right is None or len(left) * len(right) > most * most:
        return None
    found = {a + b for a in left for b in right}
    return None if len(found) > most or any(len(text) > _MAX_LENGTH for text in found) else found
