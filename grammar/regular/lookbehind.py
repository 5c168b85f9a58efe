"""Removes lookbehinds of one character from a pattern: anchors, word boundaries, and what people write as lookbehinds.

A lookbehind looks at the character before its place. So a part of the pattern is split by the *kind* of character that
its texts end with, as far as the lookbehinds after it ask for it. With the kinds of `\\b`, for example,

    [ab ]+\\bc?        [ab ]*[ab]  and no word character follows
                      [ab ]*[ ]c

Where the text has ended (`END`), nothing more is read. So a pattern between any texts becomes its own text at once if
it is anchored on both sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ramet.errors import GrammarTooLarge, InvalidRegex
from ramet.grammar import deadline, ir
from ramet.grammar.regular import char_classes as chars

END = ir.Lookahead(ir.ANY_CHAR, is_negative=True)
START, UNKNOWN, _SAME, _ANY = -1, -2, -3, -4  # kinds of place beside those of characters, which count from 0
_MAX_KINDS = 16
_MAX_SIZE = 20_000  # parts of what is made
_MAX_COUNT = 64  # of a repeat with a lookbehind in it

_Place = tuple[int, bool]  # the kind of what stands before, and whether the text has ended
_Ways = dict[_Place, ir.Node]  # the texts of a node by the place after them


def without_lookbehinds(node: ir.Node, before: int = START) -> ir.Node:
    """Return the same texts without lookbehinds. before: START or UNKNOWN, what stands before them.

    Raises: InvalidRegex if a lookbehind looks at a place that is not known; GrammarTooLarge.
    """
    sets = set(_sets(node))
    if not sets:
        return node
    found = _choice(_ways(node, (before, False), _kinds(sets), is_asked=False).values())
    if _size(found, {}) > _MAX_SIZE:
        raise GrammarTooLarge(
            "the repeats with anchors and lookbehinds in them are nested too deeply; simplify the pattern"
        )
    return found


def _size(node: ir.Node, known: dict[int, int]) -> int:
    """Return the number of parts of a node written out, a repeat counting once: large ones have limits of their own.

    known: by the id of nodes, which stand in many places.
    """
    size = known.get(id(node))
    if size is None:
        match node:
            case ir.Concatenation(parts) | ir.Choice(parts):
                size = 1 + sum(_size(part, known) for part in parts)
            case ir.Repeat(item) | ir.Lookahead(item):
                size = 1 + _size(item, known)
            case _:
                size = 1
        known[id(node)] = size
    return size


def _sets(node: ir.Node) -> Iterator[ir.Ranges]:
    """Yield the sets of characters that lookbehinds ask for."""
    match node:
        case ir.Lookbehind(ranges, _):
            yield ranges
        case ir.Concatenation(parts) | ir.Choice(parts) | ir.Intersect(parts):
            for part in parts:
                yield from _sets(part)
        case ir.Repeat(item, _, _) | ir.Lookahead(item, _) | ir.Terminal(item, _) | ir.Complement(item):
            yield from _sets(item)


def _looks_back(node: ir.Node) -> bool:
    return next(_sets(node), None) is not None


def _has_end(node: ir.Node) -> bool:
    match node:
        case ir.Concatenation(parts) | ir.Choice(parts):
            return any(map(_has_end, parts))
        case ir.Repeat(item, _, _) | ir.Terminal(item, _):
            return _has_end(item)
        case _:
            return node == END


def _kinds(sets: Iterable[ir.Ranges]) -> list[ir.Ranges]:
    """Return the sets of characters that all lookbehinds treat alike."""
    kinds = [chars.EVERYTHING]
    for ranges in sorted(sets):
        split = [chars.intersect(kind, part) for kind in kinds for part in (ranges, chars.complement(ranges))]
        kinds = [kind for kind in split if kind]
        if len(kinds) > _MAX_KINDS:
            raise GrammarTooLarge("a pattern has too many different anchors and lookbehinds; simplify it")
    return kinds


def _ways(node: ir.Node, place: _Place, kinds: list[ir.Ranges], *, is_asked: bool) -> _Ways:
    """Return the texts of a node that begins at a place.

    is_asked: a lookbehind after them needs the kind of their last character. A place has the kind _SAME where nothing
    was read, and _ANY where no lookbehind needs the kind.
    """
    deadline.check()
    kind, has_ended = place
    if node == END:
        return {(_SAME, True): ir.EMPTY}
    if not has_ended and not is_asked and not _looks_back(node) and not _has_end(node):
        return {(_ANY, False): node}
    match node:
        case ir.Lookbehind(ranges, at_start):
            return {(_SAME, has_ended): ir.EMPTY} if _holds(kind, ranges, at_start, kinds) else {}
        case ir.Lookahead(item, is_negative):
            found = _ways(item, place, kinds, is_asked=False)
            inner = _choice(_joined(n, END) if ends and not has_ended else n for (_, ends), n in found.items())
            if inner == ir.NOTHING:
                return {(_SAME, has_ended): ir.EMPTY} if is_negative else {}
            return {(_SAME, has_ended): ir.Lookahead(inner, is_negative)}
        case ir.Choice(options):
            return _united(way for o in options for way in _ways(o, place, kinds, is_asked=is_asked).items())
        case ir.Concatenation(parts):
            return _concatenated(parts, place, kinds, is_asked)
        case ir.Repeat(item, low, high):
            return _repeated(item, low, high, place, kinds, is_asked)
        case ir.Terminal(item, _):
            return _ways(item, place, kinds, is_asked=is_asked)
        case ir.Bytes(value) if not has_ended:
            last = ord(value.decode()[-1])
            read = next(i for i, k in enumerate(kinds) if chars.intersect(((last, last),), k))
            return {(read, False): node}
        case ir.Chars(ranges) if not has_ended:
            split = {(i, False): chars.intersect(ranges, kind) for i, kind in enumerate(kinds)}
            return {after: ir.Chars(part) for after, part in split.items() if part}
        case ir.Bytes() | ir.Chars():
            return {}
    raise InvalidRegex("a lookbehind looks into a part of the pattern that is too complex")


def _holds(kind: int, ranges: ir.Ranges, at_start: bool | None, kinds: list[ir.Ranges]) -> bool:
    if kind >= 0:
        return bool(chars.intersect(kinds[kind], ranges))
    if kind == UNKNOWN or at_start is None:
        raise InvalidRegex("a lookbehind looks beyond the terminal")
    return at_start


def _concatenated(parts: tuple[ir.Node, ...], place: _Place, kinds: list[ir.Ranges], is_asked: bool) -> _Ways:
    ways: _Ways = {(_SAME, place[1]): ir.EMPTY}
    for i, part in enumerate(parts):
        asks = is_asked or any(map(_looks_back, parts[i + 1 :]))
        found: list[tuple[_Place, ir.Node]] = []
        for (kind, has_ended), head in ways.items():
            at = place[0] if kind == _SAME else kind, has_ended
            for (after, ends), node in _ways(part, at, kinds, is_asked=asks).items():
                found.append(((kind if after == _SAME else after, ends), _joined(head, node)))
        ways = _united(found)
    return ways


def _repeated(
    item: ir.Node, low: int, high: int | None, place: _Place, kinds: list[ir.Ranges], is_asked: bool
) -> _Ways:
    if high == 0 or (place[1] and low == 0):
        return {(_SAME, place[1]): ir.EMPTY}
    once = _ways(item, place, kinds, is_asked=True)
    empty = once.get((_SAME, place[1]))
    if not _looks_back(item) and not _has_end(item) and (low == 0 or empty in (None, ir.EMPTY)):
        # only the last character of the last iteration matters, and an empty iteration does nothing
        least = 0 if empty is not None else max(low - 1, 0)
        earlier = ir.Repeat(item, least, None if high is None else max(high - 1, least))
        ways = {after: _joined(earlier, last) for after, last in once.items() if after[0] != _SAME}
        return {**ways, (_SAME, place[1]): ir.EMPTY} if low == 0 or empty is not None else ways
    if max(low, high or 0) > _MAX_COUNT:
        raise GrammarTooLarge(f"a part with an anchor or lookbehind in it is repeated more than {_MAX_COUNT} times")
    must = (item,) * low
    if high is not None:
        more: ir.Node = ir.EMPTY
        for _ in range(high - low):
            more = ir.Choice((ir.EMPTY, ir.Concatenation((item, more))))
        return _concatenated((*must, more), place, kinds, is_asked)
    if low:
        return _concatenated((*must, ir.Repeat(item)), place, kinds, is_asked)
    return _starred(item, place, kinds)


def _starred(item: ir.Node, place: _Place, kinds: list[ir.Ranges]) -> _Ways:
    """Return the ways of any number of iterations. Those that read nothing are left out, because they do nothing.

    Source: Kleene's construction, over the kinds of the character before an iteration.
    """
    steps: dict[int, _Ways] = {}
    waiting = [place[0]]
    while waiting:
        kind = waiting.pop()
        if kind not in steps:
            found = _ways(item, (kind, False), kinds, is_asked=True)
            steps[kind] = {after: node for after, node in found.items() if after != (_SAME, False)}
            waiting += [after for after, ends in steps[kind] if not ends and after >= 0]
    inner = [kind for kind in steps if kind >= 0]
    paths = {(a, b): n for a in steps for (b, ends), n in steps[a].items() if not ends}
    for via in inner:
        loop = paths.get((via, via))
        around = ir.EMPTY if loop is None else ir.Repeat(loop)
        fresh = dict(paths)
        for a in steps:
            for b in inner:
                if (a, via) in paths and (via, b) in paths:
                    way = _joined(paths[a, via], around, paths[via, b])
                    fresh[a, b] = _choice([paths[a, b], way]) if (a, b) in paths else way
        paths = fresh
    ways: list[tuple[_Place, ir.Node]] = [((_SAME, False), ir.EMPTY)]
    ways += [(after, n) for after, n in steps[place[0]].items() if after[1]]
    for b in inner:
        if (place[0], b) in paths:
            ways.append(((b, False), paths[place[0], b]))
            for (after, ends), last in steps[b].items():
                if ends:
                    ways.append(((b if after == _SAME else after, True), _joined(paths[place[0], b], last)))
    return _united(ways)


def _united(ways: Iterable[tuple[_Place, ir.Node]]) -> _Ways:
    found: dict[_Place, list[ir.Node]] = {}
    for after, node in ways:
        found.setdefault(after, []).append(node)
    return {after: _choice(nodes) for after, nodes in found.items()}


def _choice(nodes: Iterable[ir.Node]) -> ir.Node:
    options = tuple(nodes)
    return options[0] if len(options) == 1 else ir.Choice(options)


def _joined(*nodes: ir.Node) -> ir.Node:
    parts: list[ir.Node] = []
    for node in nodes:
        parts += node.parts if isinstance(node, ir.Concatenation) else [node]
    return parts[0] if len(parts) == 1 else ir.Concatenation(tuple(parts))
