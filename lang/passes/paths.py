"""Segment tokenisation: the tokens of every branch, as far as they are known before a run.

It follows the executor's rules without a model: the text between two borders (a generation, a selection, a fork) is
tokenised in one piece. Known tokens are token ids. Tokens that depend on the run are one `Opaque` item with limits. Two
paths in the same `Trie` are equal exactly if they have the same position.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import msgspec

from ramet.lang.graph import choice_scores, ir
from ramet.lang.graph.following import MAX_BYTES, beginning, children_of, following, is_ended_by_following
from ramet.lang.graph.operations import Operation
from ramet.lang.graph.prompt_tokens import Piece, healing, special_border, tokenised
from ramet.lang.passes.constraints import masked_checks
from ramet.lang.passes.target import Target

NO_LIMIT = 1 << 20  # tokens; stands for no limit


@dataclass(frozen=True, slots=True)
class Count:
    """A number of tokens between two limits, both included."""

    at_least: int
    at_most: int

    @property
    def is_exact(self) -> bool:
        return self.at_least == self.at_most

    def __add__(self, other: Count) -> Count:
        return Count(self.at_least + other.at_least, self.at_most + other.at_most)

    def __str__(self) -> str:
        if self.is_exact:
            return f"{self.at_most:,}"
        if self.at_most >= NO_LIMIT:
            return f"≥ {self.at_least:,}"
        return f"{self.at_least:,}–{self.at_most:,}" if self.at_least else f"≤ {self.at_most:,}"

    def capped(self, limit: int) -> Count:
        return Count(min(self.at_least, limit), min(self.at_most, limit))


ZERO = Count(0, 0)


@dataclass(frozen=True, slots=True)
class Unknown:
    """Text that depends on the run. Equal keys mean equal text. `max_bytes` None: no limit of its own."""

    key: Hashable
    max_bytes: int | None


@dataclass(frozen=True, slots=True)
class Opaque:
    """Tokens that depend on the run. Equal keys mean equal tokens.

    `is_text`: they are text with a value in it, which may begin with the same tokens as other text. `unread`: the
    number of tokens at the end of generated text without keys and values; the next request computes these.
    """

    key: Hashable
    count: Count
    is_text: bool = False
    unread: Count = ZERO


Item: TypeAlias = int | Opaque
TextPart: TypeAlias = str | Unknown


# Positions of token paths, by (position before an item, item): equal prefixes have equal positions. Owner: whoever
# compares paths.
Trie: TypeAlias = dict[tuple[int, Item], int]


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """One point of one branch: the `items` added after `parent` and their positions, or the text `added` after it.

    `count`: tokens from the beginning to here, without pending text. `node`: the node that added the items.
    `num_literal`: how many bytes at the items' end are the program's own text, and not a chat template's; None: that
    depends on the run.
    """

    parent: Point | None = None
    items: tuple[Item, ...] = ()
    positions: tuple[int, ...] = ()
    position: int = 0
    count: Count = ZERO
    added: tuple[Piece[TextPart], ...] = ()
    node: int | None = None
    num_literal: int | None = 0

    def chain(self) -> Iterator[Point]:
        """Yield this point and those before it, this one first."""
        at: Point | None = self
        while at is not None:
            yield at
            at = at.parent

    @property
    def pending(self) -> list[Piece[TextPart]]:
        """The text up to here that is not tokenised yet. O(pieces)."""
        behind = itertools.takewhile(lambda point: point.added, self.chain())
        return [piece for point in reversed(list(behind)) for piece in point.added]

    def items_backwards(self) -> Iterator[tuple[Item, int]]:
        """Yield the whole path with the position after each item, last item first."""
        for point in self.chain():
            yield from zip(reversed(point.items), reversed(point.positions), strict=True)

    def all_items(self) -> list[Item]:
        """Return the whole path. O(length)."""
        return [item for point in reversed(list(self.chain())) for item in point.items]

    @property
    def is_start(self) -> bool:
        return self.position == 0


@dataclass(frozen=True, slots=True)
class SelectPaths:
    """The branch `before` a selection, and after each of its `choices`.

    `num_shared`: leading tokens shared by all choices, including text that was pending before the selection.
    `num_neutral`: the tokens before the choices where they are scored again without the prompt; 0: they are not.
    """

    before: Point
    choices: tuple[Point, ...]
    num_shared: int
    num_neutral: int


@dataclass(slots=True)
class Paths:
    """The result of `interpret`, which owns it; read-only afterwards.

    `points[i]`: the point after node i. `prompts`: the prompts of Generate nodes. `selections`: the prompts of Select
    nodes. `twins`: a Generate node that always writes the text of an earlier one -> that earlier node. `unordered`:
    nodes with twins, of which only the run decides which one makes the request. `joined`: joins, and the nodes after
    one on its branch. `given_back`: the last token of a generation's prompt, if the model writes it again
    (`lang/graph/prompt_tokens.py`). `prompts` and the request then end before it. None: that depends on the run.
    `unseeded`: generations whose prompt equals an earlier one's, but which sample without a seed, so that each runs.
    """

    graph: ir.Graph
    trie: Trie
    context_length: int
    page_size: int
    points: list[Point] = field(default_factory=list)
    prompts: dict[int, Point] = field(default_factory=dict)
    selections: dict[int, SelectPaths] = field(default_factory=dict)
    given_back: dict[int, bytes | None] = field(default_factory=dict)
    twins: dict[int, int] = field(default_factory=dict)
    unordered: set[int] = field(default_factory=set)
    unseeded: list[int] = field(default_factory=list)
    joined: set[int] = field(default_factory=set)
    texts: list[tuple[TextPart, ...]] = field(default_factory=list)


def interpret(graph: ir.Graph, target: Target, trie: Trie | None = None, row: int = 0) -> Paths:
    """Follow every branch of `graph`. Several graphs that share a `trie` need different `row`s.

    O(tokens of the graph's own text), not of its prompts: shared prefixes are tokenised once.
    """
    return _Interpreter(graph, target, trie if trie is not None else {}, row).run()


class _Interpreter:
    def __init__(self, graph: ir.Graph, target: Target, trie: Trie, row: int) -> None:
        self._graph, self._target, self._row = graph, target, row
        self._found = Paths(graph, trie, target.context_length, target.page_size)
        self._values: dict[int, ir.JsonValue] = {}  # of nodes whose value is known
        self._talks: list[object] = []  # of each node's branch; see lang/graph/run.py, `Mark`
        self._value_parts: dict[int, TextPart] = {}  # text of a value, if something is known about it
        self._classes: dict[Hashable, int] = {}
        self._children = children_of(graph.nodes)
        self._spanned: dict[str, bool] = {}
        self._healing = healing(target.token_bytes)
        self._flushed: dict[int, tuple[Point, Point]] = {}  # id of a point -> the flushed point, and the point itself

    def run(self) -> Paths:
        for node in self._graph.nodes:
            before = Point() if node.parent is None else self._found.points[node.parent]
            if node.parent is not None and (node.parent in self._found.joined or node.joined()):
                self._found.joined.add(node.id)
            self._talks.append(None if node.parent is None else self._talks[node.parent])
            point, text = self._visit(node, before)
            self._found.points.append(point)
            self._found.texts.append(text)
        return self._found

    def _visit(self, node: ir.AnyNode, before: Point) -> tuple[Point, tuple[TextPart, ...]]:
        """Return the point after a node, and the text that it adds."""
        if isinstance(node, ir.Text):
            parts = self._render(node.parts)
            return self._append(before, node.id, parts), parts
        if isinstance(node, ir.Role | ir.Tools | ir.Thinking):
            mark = self._mark(node)
            return self._append(before, node.id, (mark,) if mark else (), is_markup=True), (mark,) if mark else ()
        if isinstance(node, ir.Generate):
            return self._generate(node, self._flush(before))
        if isinstance(node, ir.Select):
            return self._select(node, before)
        if isinstance(node, ir.Recalled):
            point = self._extend(Point(), node.path.tokens, node.id)
            return self._append(point, node.id, (node.path.rest,)), ()
        if isinstance(node, ir.Argument):
            self._argument(node)
        elif isinstance(node, ir.Capture) and node.of == "text":
            self._capture(node)
        elif isinstance(node, ir.ValueNode):
            self._value_parts[node.id] = Unknown(("value", self._row, node.id), None)
        return self._flush(before) if node.is_border else before, ()

    # Values.

    def _argument(self, node: ir.Argument) -> None:
        if node.name in self._graph.arguments:
            self._know(node.id, self._graph.arguments[node.name])
        else:
            self._value_parts[node.id] = Unknown(("argument", node.name), None)

    def _know(self, node: int, value: ir.JsonValue) -> None:
        self._values[node] = value
        self._value_parts[node] = ir.value_text(value)

    def _capture(self, node: ir.Capture) -> None:
        behind = ir.branch(self._graph.nodes, node.parent, node.start)
        whole = [part for one in behind for part in self._found.texts[one.id]]
        if all(isinstance(part, str) for part in whole):
            self._know(node.id, "".join(map(str, whole)))
            return
        self._value_parts[node.id] = Unknown(("captured", self._row, *whole), _max_bytes(whole))

    def _render(self, template: ir.Template) -> tuple[TextPart, ...]:
        found: list[TextPart] = []
        for part in template:
            text = part if isinstance(part, str) else self._ref(part)
            if isinstance(text, str) and found and isinstance(found[-1], str):
                found[-1] += text
            elif text != "":
                found.append(text)
        return tuple(found)

    def _ref(self, ref: ir.Ref) -> TextPart:
        known = self._value_parts[ref.node]
        if ref.node in self._values:
            value = self._values[ref.node]
            return ir.render((ref,), lambda _: str(known), lambda _: value)
        assert isinstance(known, Unknown)
        if not ref.path and not ref.format:
            return known
        # A field of a value is no longer than the value, with three exceptions: numbers that Python prints longer than
        # they are written (1e15: 18 characters for 4), text that a format adds, and what operations make.
        is_plain = not ref.format and not any(isinstance(step, Operation) for step in ref.path)
        is_limited = known.max_bytes is not None and is_plain and ref.path[:1] != ("captures",)
        limit = 6 * known.max_bytes if is_limited and known.max_bytes is not None else None
        return Unknown((known.key, ref.path, ref.format), limit)

    # Nodes.

    def _append(self, before: Point, node: int, parts: Sequence[TextPart], *, is_markup: bool = False) -> Point:
        added = tuple(Piece(part, is_markup, node) for part in parts if part != "")
        if not added:
            return before
        return Point(before, (), (), before.position, before.count, added, node)

    def _mark(self, node: ir.Marked) -> str:
        above, opening = node.parent, ""
        if above is not None and isinstance(self._graph.nodes[above], ir.Role):
            opening = "".join(map(str, self._found.texts[above]))
        self._talks[node.id], text = self._target.mark(self._talks[node.id], opening, node)
        return text

    def _generate(self, node: ir.Generate, prompt: Point) -> tuple[Point, tuple[TextPart, ...]]:
        again = self._given_back(node, prompt)
        if again:
            assert prompt.parent is not None
            position = prompt.positions[-2] if len(prompt.items) > 1 else prompt.parent.position
            count = Count(prompt.count.at_least - 1, prompt.count.at_most - 1)
            items, positions = prompt.items[:-1], prompt.positions[:-1]
            prompt = Point(prompt.parent, items, positions, position, count, (), prompt.node)
        self._found.prompts[node.id], self._found.given_back[node.id] = prompt, again
        name, after = node.id, self._following(node)
        if ir.is_repeatable(node.sampling):
            checks = msgspec.json.encode((node.checks, node.retries))
            is_in_message = ir.is_in_message(self._graph.nodes, node)
            key = (prompt.position, again, node.sampling, node.constraint, checks, is_in_message, after)
            name = self._classes.setdefault(key, node.id)
            if name != node.id:
                self._found.twins[node.id] = name
                if {node.id, name} & self._found.joined:
                    self._found.unordered.add(name)
        elif self._classes.setdefault((prompt.position, node.sampling, node.constraint), node.id) != node.id:
            self._found.unseeded.append(node.id)
        limit, most_bytes = generated_limits(node, self._target)
        # If max_tokens ended the text, the last token has no keys and values. Nor have those that complete a choice:
        # they are appended just before the text ends.
        written = Count(1, limit + 1) if again else Count(0, limit)
        is_choice = node.constraint is not None and node.constraint.kind == "choice"
        tokens = Opaque(("generated", self._row, name), written, unread=Count(0, limit if is_choice else 1))
        text = Unknown(("text", self._row, name), most_bytes)
        self._value_parts[node.id] = text
        point = self._extend(prompt, (tokens,), node.id)
        has_stop = (
            node.sampling.stop
            or node.sampling.stop_regex
            or ir.is_thinking(self._graph.nodes, node)
            or (self._target.stop_strings and ir.is_in_message(self._graph.nodes, node))
        )
        if (has_stop or self._is_spanned(node, after)) and self._target.max_token_bytes > 1:
            # A stop string, or the text that follows, may begin inside of a token. What that token holds of the text
            # before is tokenised with the following text.
            rest = Unknown(("rest", self._row, name), self._target.max_token_bytes - 1)
            point = Point(point, (), (), point.position, point.count, (Piece(rest, False, node.id),), node.id)
        return point, (text,)

    def _given_back(self, node: ir.Generate, prompt: Point) -> bytes | None:
        """Return the prompt's last token if the model writes it again, else b""; None if that depends on the run."""
        if prompt.num_literal is None:
            return None
        last = prompt.items[-1] if prompt.items else None
        if not isinstance(last, int) or prompt.count.at_most < 2:
            return b""
        again = self._healing(last, prompt.num_literal)
        if again and not self._target.goes_on(masked_checks(node, self._target).constraint, again):
            return b""
        return again

    def _following(self, node: ir.Generate) -> tuple[TextPart, ...]:
        """Return the text that ends a constrained value, as far as the engine looks at it."""
        if not is_ended_by_following(node):
            return ()
        template = following(node, self._children)
        later = (
            i for i, part in enumerate(template) if isinstance(part, ir.Ref) and part.node not in self._value_parts
        )
        parts = self._render(template[: next(later, len(template))])
        if not parts or not isinstance(parts[0], str):
            return parts
        start = beginning(parts[0]).decode()
        return (start, *parts[1:]) if start == parts[0] else (start,)

    def _is_spanned(self, node: ir.Generate, after: tuple[TextPart, ...]) -> bool:
        """Return whether a token may hold the end of a value and the beginning of the text after it.

        A number or a boolean ends with a letter or a digit; few tokens hold one, and a space or a comma behind it.
        """
        if not after or node.type not in ("int", "float", "bool") or not isinstance(after[0], str):
            return bool(after)
        if after[0] not in self._spanned:
            text = after[0].encode()
            ends = tuple(text[:size] for size in range(1, min(len(text), self._target.max_token_bytes) + 1))
            tokens = (token for token in self._target.token_bytes if token.endswith(ends))
            self._spanned[after[0]] = any(
                token[: -len(end)][-1:].isalnum() for token in tokens for end in ends if token.endswith(end)
            )
        return self._spanned[after[0]]

    def _select(self, node: ir.Select, before: Point) -> tuple[Point, tuple[TextPart, ...]]:
        rendered = [self._render(choice) for choice in node.choices]
        base = before
        choices = tuple(self._flush(self._append(before, node.id, parts)) for parts in rendered)
        added = [choice.items for choice in choices]
        shared = choice_scores.num_shared(added)
        neutral = choice_scores.NEUTRAL_TEXT.get(node.scorer)
        opening = 0 if neutral is None else len(self._target.encode(neutral, add_special=True, continues=False)) or 1
        self._found.selections[node.id] = SelectPaths(base, choices, shared, opening)
        if len(choices) == 1:
            if all(isinstance(part, str) for part in rendered[0]):
                self._know(node.id, "".join(map(str, rendered[0])))
            else:
                key = ("choice", self._row, *rendered[0])
                self._value_parts[node.id] = Unknown(key, _max_bytes(rendered[0]))
            return choices[0], rendered[0]
        most = [_max_bytes(parts) for parts in rendered]
        name = node.id
        if node.temperature == 0 or node.seed is not None:
            same = (tuple(choice.position for choice in choices), node.scorer, node.temperature, node.seed)
            name = self._classes.setdefault(same, node.id)
        text = Unknown(("chosen", self._row, name), None if None in most else max(m for m in most if m is not None))
        self._value_parts[node.id] = text
        tails = [_count(items[shared:]) for items in added]
        tail = Count(min(t.at_least for t in tails), max(t.at_most for t in tails))
        # Scoring a choice reads all but its last token, unless another choice continues after that token.
        unread = Count(int(not _has_prefixes([items[shared:] for items in added])), 1)
        items = (*added[0][:shared], Opaque(("chosen", self._row, name), tail, unread=unread))
        return self._extend(base, items, node.id), (text,)

    # Tokens.

    def _extend(self, before: Point, items: Sequence[Item], node: int | None) -> Point:
        position, positions, trie = before.position, [], self._found.trie
        for item in items:
            position = trie.setdefault((position, item), len(trie) + 1)
            positions.append(position)
        return Point(before, tuple(items), tuple(positions), position, before.count + _count(items), (), node)

    def _flush(self, before: Point) -> Point:
        """Tokenise the pending text, once for all branches of a fork."""
        if not before.added:
            return before
        if id(before) not in self._flushed:
            pending = before.pending
            items = tokenise(self._target, pending, is_start=before.is_start)
            found = self._extend(before, items, pending[-1].node)
            found = replace(found, num_literal=_num_literal(pending, items))
            self._flushed[id(before)] = (found, before)
        return self._flushed[id(before)][0]


def _num_literal(pieces: Sequence[Piece[TextPart]], items: Sequence[Item]) -> int | None:
    """Return the number of bytes at the end of tokenised pieces that no chat template wrote; None: it is not known."""
    literal = list(itertools.takewhile(lambda piece: not piece.is_markup, reversed(pieces)))
    if literal and isinstance(items[-1], Opaque):
        return None
    return sum(len(piece.text.encode()) for piece in literal if isinstance(piece.text, str))


def tokenise(target: Target, pieces: Sequence[Piece[TextPart]], *, is_start: bool) -> list[Item]:
    """Tokenise adjoining pieces as the executor does: special tokens in markup only, all other text in long runs."""

    def encoded(run: list[TextPart], add_special: bool, continues: bool) -> list[Item]:
        return _encode(target, run, add_special, continues)

    return tokenised(pieces, encoded, special_border(target.special_tokens), target.special_tokens, is_start=is_start)


def _encode(target: Target, run: list[TextPart], add_special: bool, continues: bool) -> list[Item]:
    if all(isinstance(part, str) for part in run):
        return list(target.encode("".join(map(str, run)), add_special=add_special, continues=continues))
    most = _max_bytes(run)
    # Every token is at least one byte. One more token may open the text, and one more may be a space before it.
    limit = target.context_length if most is None else min(target.context_length, most + 2)
    least = -(-sum(len(part.encode()) for part in run if isinstance(part, str)) // target.max_token_bytes)
    return [Opaque(("run", *run, add_special, continues), Count(min(least, limit), limit), is_text=True)]


def generated_limits(node: ir.Generate, target: Target) -> tuple[int, int | None]:
    """Return the most tokens and bytes that a generation can write."""
    limit = min(node.sampling.max_tokens or target.default_max_tokens, target.context_length)
    fixed = None if node.constraint is None else node.constraint.longest()
    if fixed is not None:
        is_choice = node.constraint is not None and node.constraint.kind == "choice"
        fixed += node.is_typed  # it may begin with a space
        # The end of a number is a token, too, or tokens of the text that follows it.
        return min(limit, fixed if is_choice else fixed + MAX_BYTES), fixed
    most = limit * target.max_text_bytes
    if node.type == "str":
        most = min(
            [most, *(4 * characters for characters in map(_most_characters, node.checks) if characters is not None)]
        )
    return limit, most


def _most_characters(check: ir.Check) -> int | None:
    """Return the most characters of a text that passes a check, or None."""
    if check.kind == "all":
        return min((most for most in map(_most_characters, check.of) if most is not None), default=None)
    is_length = check.kind == "length" and check.unit == "characters" and check.at_most is not None
    return int(check.at_most) if is_length and check.at_most is not None else None


def _has_prefixes(paths: Sequence[tuple[Item, ...]]) -> bool:
    """Return whether one of the paths is, or may be, a prefix of another one."""
    if any(isinstance(item, Opaque) for path in paths for item in path):
        return True
    return any(b[: len(a)] == a for i, a in enumerate(paths) for j, b in enumerate(paths) if i != j)


def _max_bytes(parts: Sequence[TextPart]) -> int | None:
    sizes = [len(part.encode()) if isinstance(part, str) else part.max_bytes for part in parts]
    return None if None in sizes else sum(size for size in sizes if size is not None)


def _count(items: Sequence[Item]) -> Count:
    known = sum(isinstance(item, int) for item in items)
    total = Count(known, known)
    for item in items:
        if isinstance(item, Opaque):
            total = total + item.count
    return total
