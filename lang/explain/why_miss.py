"""`why_miss()`: finds the first token in which a prompt differs from the nearest cached one, and its source line.

A value that changes between calls (a date, a time, an id) at the start of a prompt prevents sharing of everything after
it. If the difference looks like such a value, the result names the kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ramet.errors import UndefinedVariable
from ramet.lang.backends.in_process import EngineBackend
from ramet.lang.backends.protocol import Backend
from ramet.lang.graph import ir
from ramet.lang.graph.prompt_tokens import Piece
from ramet.lang.graph.run_record import RunRecord
from ramet.lang.graph.volatile import REORDERED_KEY, SHOWN, volatile
from ramet.lang.passes.paths import Opaque, Paths, Point, TextPart, interpret, tokenise
from ramet.lang.passes.target import Target, target_of


@dataclass(frozen=True, slots=True)
class Miss:
    """The reason why one generation's prompt was not fully cached.

    `num_same`: how many of its `num_prompt` tokens were cached. After the common text `before`, the prompt has `text`
    and the nearest cached prompt has `cached_text` (None: no cached prompt begins like this). `line`: the source line
    of the first token that differs. `volatile`: the kind of value that the difference looks like, or None.
    """

    node: int
    name: str | None
    num_prompt: int
    num_same: int
    before: str
    text: str
    cached_text: str | None
    line: str
    volatile: str | None

    @property
    def num_missed(self) -> int:
        return self.num_prompt - self.num_same

    def __str__(self) -> str:
        what = f"gen {self.name!r}" if self.name else f"node {self.node}"
        if self.num_missed <= 1:
            return f"{what}: all of its {self.num_prompt:,} tokens are cached"
        if not self.num_same and self.cached_text is None:
            what = f"{what}: none of its {self.num_prompt:,} tokens are cached"
            return f"{what}; nothing there begins with {self.text!r} ({self.line})"
        head = f"{what}: {self.num_same:,} of {self.num_prompt:,} tokens are cached; then {self.line} writes"
        if self.cached_text is None:
            return f"{head} {self.text!r} behind {self.before!r}, and nothing in the cache goes on from there"
        found = f"{head} {self.text!r} behind {self.before!r}, where the nearest cached prompt has {self.cached_text!r}"
        if self.volatile is None:
            return found
        if self.volatile.startswith(REORDERED_KEY):
            return f"{found}. It looks like {self.volatile}: write the keys in the same order every time"
        return f"{found}. It looks like {self.volatile}: put it behind the {self.num_missed:,} tokens that follow it"


def why_miss_plan(traced: RunRecord, backend: Backend, cache_salt: str, var: str | None) -> list[Miss]:
    """Return, for each generation of a trace with a known prompt, where it leaves the cached ones. Costliest first.

    `var`: only generations of this variable. Raises ConfigError for a backend without an engine in this process.
    """
    target = target_of(backend)
    paths = interpret(traced.graph, target)
    found = []
    for node, prompt in paths.prompts.items():
        items = prompt.all_items()
        tokens = [item for item in items if isinstance(item, int)]
        if len(tokens) < len(items):
            continue  # it depends on text that is generated first
        differences = _differences(backend, tokens, cache_salt)
        same = max((one.num_same for one in differences), default=0)
        name = traced.graph.nodes[node].label
        found.append(_miss(paths, target, node, name, tokens, same, differences, len(tokens)))
    return _chosen(found, var, traced.program)


def why_miss_run(record: RunRecord, backend: Backend, cache_salt: str, var: str | None) -> list[Miss]:
    """Return the same for a finished run: where each prompt left the ones that were cached then."""
    target = target_of(backend)
    paths = interpret(_as_written(record), target)
    found = []
    for node in record.graph.nodes:
        event = record.events.get(node.id)
        if not isinstance(node, ir.Generate) or event is None or event.usage is None:
            continue
        point = paths.points[node.parent] if node.parent is not None else Point()
        tokens = _tokens_before(paths, target, point)
        cached = min(event.usage.cached_tokens, len(tokens))
        differences = [one for one in _differences(backend, tokens, cache_salt) if one.num_same <= cached]
        size = event.usage.prompt_tokens
        found.append(_miss(paths, target, node.id, node.name, tokens, cached, differences, size))
    return _chosen(found, var, record.program)


def _chosen(found: list[Miss], var: str | None, program: str) -> list[Miss]:
    if var is not None:
        found = [miss for miss in found if ir.variable(miss.name or "") == var]
        if not found:
            raise UndefinedVariable(f"{program}: no generation {var!r} whose prompt is known", program=program)
    return sorted(found, key=lambda miss: -miss.num_missed)


def _differences(backend: Backend, tokens: Sequence[int], salt: str) -> list[Any]:  # Any: runtime Differences
    assert isinstance(backend, EngineBackend)  # whose target was asked
    return list(backend.engine.differences(list(tokens), salt))


def _as_written(record: RunRecord) -> ir.Graph:
    """Return the graph of a run with generated text as Text nodes, so that every path is known."""
    nodes: list[ir.AnyNode] = []
    for node in record.graph.nodes:
        event = record.events.get(node.id)
        text = "" if event is None else event.text
        if isinstance(node, ir.Generate | ir.Select | ir.Text):
            parts = (text,) if text else ()
            nodes.append(ir.Text(id=node.id, parent=node.parent, line=node.line, parts=parts))
        elif isinstance(node, ir.ToolCall | ir.Capture):
            nodes.append(ir.Text(id=node.id, parent=node.parent, line=node.line, parts=()))
        else:
            nodes.append(node)
    return ir.Graph(tuple(nodes), record.graph.arguments)


def _tokens_before(paths: Paths, target: Target, point: Point) -> list[int]:
    tokens = [item for item in point.all_items() if isinstance(item, int)]
    return tokens + _encode(target, point.pending, is_start=not tokens)


def _encode(target: Target, pending: Sequence[Piece[TextPart]], *, is_start: bool) -> list[int]:
    return [item for item in tokenise(target, pending, is_start=is_start) if not isinstance(item, Opaque)]


def _miss(
    paths: Paths,
    target: Target,
    node: int,
    name: str | None,
    tokens: list[int],
    num_same: int,
    differences: Sequence[Any],  # Any: runtime Differences
    num_prompt: int,
) -> Miss:
    nearest = next((one for one in differences if one.num_same == num_same), None)
    before = _text(target, tokens[max(0, num_same - SHOWN) : num_same])
    after = _text(target, tokens[num_same : num_same + SHOWN])
    cached = None if nearest is None else _text(target, nearest.tokens)
    found = None if cached is None else volatile(before, after, cached)
    start = len(_text(target, tokens[:num_same]))
    return Miss(
        node,
        name,
        num_prompt,
        num_same,
        before[-SHOWN:],
        after[:SHOWN],
        None if cached is None else cached[:SHOWN],
        _line_at(paths, node, start),
        None if found is None else str(found),
    )


def _text(target: Target, tokens: Sequence[int]) -> str:
    names = {token: text for text, token in target.special_tokens.items()}
    return b"".join(target.token_bytes[token] or names.get(token, "").encode() for token in tokens).decode(
        "utf-8", errors="replace"
    )


def _line_at(paths: Paths, node: int, start: int) -> str:
    """Return the source line that wrote character `start` of the branch before `node`."""
    branch: list[int] = []
    at = paths.graph.nodes[node].parent
    while at is not None:
        branch.append(at)
        at = paths.graph.nodes[at].parent
    position = 0
    for one in reversed(branch):
        position += sum(len(part) for part in paths.texts[one] if isinstance(part, str))
        if position > start:
            return paths.graph.nodes[one].line
    return paths.graph.nodes[node].line
