"""Recent prompts, to explain to clients where a new one leaves what is cached.

Kept in the HTTP process and compared on the pool's threads, so the engine knows nothing of it. Bounded in prompts and
tokens: a prompt whose neighbour is no longer here is not explained.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ramet.lang.graph.volatile import SHOWN, volatile
from ramet.runtime.text.tokenizer import Tokenizer

MAX_PROMPTS = 32
MAX_TOKENS = 1 << 20  # 4 MiB
_MAX_MISSES = 64
_MAX_DIFFERENT = 4 * SHOWN  # tokens behind the place where two prompts differ: enough for the characters shown

Nearest = tuple[int, NDArray[np.int32]]  # the length of the common prefix, and tokens of the other prompt after it


class FirstDifference(msgspec.Struct, forbid_unknown_fields=True):
    """Where a prompt left the nearest recent one. `message`: its index; null if the place is in none, as in the tools.

    After `before`, the prompt has `text`. `kind`: what both prompts have there: a date, a time, an id, a number, a
    reordered key; null if it looks like none of them.
    """

    message: int | None
    before: str
    text: str  # the other prompt's is not told: it may be somebody else's
    kind: str | None


@dataclass(slots=True)
class PromptLog:
    """The recent prompts of a server. Thread-safe.

    `misses`: where the last ones left their nearest ones: time, the key's name, and the place. Owner: the event loop.
    """

    tokenizer: Tokenizer
    misses: deque[tuple[float, str, FirstDifference]] = field(default_factory=lambda: deque(maxlen=_MAX_MISSES))
    _prompts: deque[tuple[str, NDArray[np.int32]]] = field(default_factory=deque)  # (owner, tokens), the newest last
    _num_tokens: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def nearest(self, ids: Sequence[int], owner: str) -> Nearest | None:
        """Add a prompt. Return its owner's recent one with the longest common prefix: where the two go on differently.

        None if there is none, or if one of the two is the beginning of the other. O(prompts + tokens in common).
        """
        mine = np.asarray(ids, dtype=np.int32)
        with self._lock:
            known = [tokens for other, tokens in self._prompts if other == owner]
            self._prompts.append((owner, mine))
            self._num_tokens += len(mine)
            while len(self._prompts) > MAX_PROMPTS or self._num_tokens > MAX_TOKENS:
                self._num_tokens -= len(self._prompts.popleft()[1])
        best: Nearest | None = None
        longest = 0
        for tokens in reversed(known):
            num_same = _num_same(mine, tokens)
            if num_same > longest:
                longest = num_same
                is_prefix = num_same in (len(tokens), len(mine))
                best = None if is_prefix else (num_same, tokens[num_same : num_same + _MAX_DIFFERENT])
        return best

    def explain(
        self, ids: Sequence[int], nearest: Nearest, messages: Sequence[Mapping[str, Any]]
    ) -> FirstDifference:  # Any: JSON
        """Say where a prompt left the nearest one. O(prompt); call it on the pool."""
        num_same, others = nearest
        text = self.tokenizer.decode(ids)
        start = len(self.tokenizer.decode(ids[:num_same]).rstrip("\ufffd"))
        before, after = text[max(0, start - SHOWN) : start], text[start : start + SHOWN]
        other = self.tokenizer.decode([*ids[max(0, num_same - 8) : num_same], *others.tolist()])
        other = other[len(self.tokenizer.decode(ids[max(0, num_same - 8) : num_same]).rstrip("\ufffd")) :][:SHOWN]
        found = volatile(before, text[start : start + 4 * SHOWN], other)
        kind = None if found is None else found.kind
        return FirstDifference(_message_at(text, start, messages), before, after, kind)


def _num_same(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    size = min(len(a), len(b))
    if not size or a[0] != b[0]:
        return 0
    differ = a[:size] != b[:size]
    place = int(differ.argmax())
    return place if differ[place] else size


def _message_at(text: str, place: int, messages: Sequence[Mapping[str, Any]]) -> int | None:  # Any: JSON
    """Return the index of the message whose content has the character at `place` of a rendered conversation."""
    end = 0
    for index, message in enumerate(messages):
        content = str(message.get("content") or "").strip()
        start = text.find(content, end) if content else -1
        if start < 0:
            continue
        end = start + len(content)
        if place < end:
            return index if place >= start else None
    return None
