"""Moving KV pages of a prefix from one engine to another, in bounded parts.

    the target says how many pages it has -> the source gives the next part -> the target takes it in -> ...

Neither engine keeps anything between two parts: a part that was taken in belongs to the target's cache like any other
prefix, and the source gives what its cache has at that moment. So whenever a move ends (the source or the target dies,
evicts the pages, or the request is aborted) no page is lost and nothing is to be cleaned up; the target computes what
it lacks. Engines of other models are refused, see `Hello.identity`.

The bytes go over the link, through this process: to any machine, encrypted between machines. Not here: what moves and
when (`replicas`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ramet.errors import EngineStopped, InvalidRequest
from ramet.runtime.server.link.protocol import Hello
from ramet.runtime.server.link.proxy import EngineProxy
from ramet.runtime.types import TokenIds

_PART_BYTES = 4 << 20  # what else is said on the link waits for a part
_PART_S = 120.0  # a step of a long prompt may come before a part; an engine that dies ends the wait at once
_FADE = 0.9  # weight of the measured time of a token, compared with that of the move after it
_FORGET = 0.98  # of that time, whenever a move was not worth it: so one is tried again at times

# Asked before each part: a future that is done once the source may have more of the pages, or None: it has all.
More = Callable[[], asyncio.Future[None] | None]


@dataclass(slots=True)
class Moves:
    """Totals of the moves between the engines of a server, for metrics; and what a token's move takes. Owner: Replicas.

    num_parts: messages with pages. seconds: in which parts were on their way, without waiting for pages to be computed.
    """

    num_moves: int = 0
    num_failed: int = 0
    num_parts: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    token_s: float = 0.0  # lately; 0: not measured

    def pays(self, num_tokens: int, computing_s: float) -> bool:
        """Whether tokens get to another engine sooner by a move than by computing them in so many seconds."""
        if self.token_s * num_tokens < computing_s:
            return True
        self.token_s *= _FORGET
        return False

    def note(self, num_tokens: int, num_bytes: int, seconds: float) -> None:
        """Count a part."""
        self.num_parts += 1
        self.num_tokens += num_tokens
        self.num_bytes += num_bytes
        self.seconds += seconds
        token_s = seconds / num_tokens
        self.token_s = _FADE * self.token_s + (1 - _FADE) * token_s if self.token_s else token_s


async def move(
    source: EngineProxy, target: EngineProxy, tokens: TokenIds, cache_salt: str, moves: Moves, more: More | None = None
) -> int:
    """Let `target` have the pages of the longest prefix of `tokens` that `source` has cached, besides its own.

    more: None takes what the source has cached now. Returns the number of pages of the prefix that the target has then.
    Raises: InvalidRequest, EngineStopped, TimeoutError; what was moved before stays.
    """
    giver, taker = _ready(source), _ready(target)
    if giver.identity != taker.identity or not giver.identity:
        raise InvalidRequest(
            "KV pages move only between engines with the same model files, data type, quantization and page size, "
            "with the radix cache on, and without --tp"
        )
    prefix = np.ascontiguousarray(tokens, dtype=np.int32).tobytes()
    page_tokens_bytes = 4 * giver.page_size
    num_wanted = len(tokens) // giver.page_size
    most = max(_PART_BYTES // giver.page_bytes, 1)

    async def take(first: int, pages: bytes) -> int:
        last = first + len(pages) // giver.page_bytes if pages else num_wanted
        known = prefix[: last * page_tokens_bytes]
        whose = {"cache_salt": cache_salt, "identity": giver.identity}
        return int(await target.ask("take_pages", _PART_S, tokens=known, first=first, pages=pages, **whose))

    moves.num_moves += 1
    is_whole = False
    try:
        cached = await take(0, b"")
        while cached < num_wanted:
            begun_s, news = time.monotonic(), None if more is None else more()
            where = {"tokens": prefix[: (cached + most) * page_tokens_bytes], "cache_salt": cache_salt}
            pages = await source.ask("give_pages", _PART_S, first=cached, most=most, **where)
            if not pages:
                if news is None:
                    break
                await asyncio.wait([news])  # others may wait for it, too: it must not be cancelled
                continue
            before, cached = cached, await take(cached, pages)
            if cached <= before:
                break  # it has no room, or evicted what it had
            moves.note((cached - before) * giver.page_size, len(pages), time.monotonic() - begun_s)
        is_whole = True
    finally:
        moves.num_failed += not is_whole
    return cached


def _ready(proxy: EngineProxy) -> Hello:
    if proxy.hello is None:
        raise EngineStopped(proxy.health() or "the engine is not ready")
    return proxy.hello
