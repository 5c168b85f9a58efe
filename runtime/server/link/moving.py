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

_PART_BYTES = 2 << 20  # what else is said on the link waits for a part
_AT_ONCE = 16  # parts, of which this process holds the bytes
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

    async def give(first: int) -> bytes:
        known = prefix[: (first + most) * page_tokens_bytes]
        where = {"tokens": known, "cache_salt": cache_salt, "first": first, "most": most}
        pages: bytes = await source.ask("give_pages", _PART_S, **where)
        return pages

    async def take(first: int, pages: bytes) -> int:
        last = first + len(pages) // giver.page_bytes if pages else num_wanted
        known = prefix[: last * page_tokens_bytes]
        where = {"tokens": known, "cache_salt": cache_salt, "first": first, "identity": giver.identity}
        return int(await target.ask("take_pages", _PART_S, **where, pages=pages))

    moves.num_moves += 1
    is_whole = False
    try:
        cached, has_room = await take(0, b""), True
        while cached < num_wanted and has_room:
            begun_s, before, news = time.monotonic(), cached, None if more is None else more()
            # Asked together: the source's thread answers all between two of its steps.
            asked = {n: asyncio.create_task(give(n)) for n in range(cached, num_wanted, most)[:_AT_ONCE]}
            try:
                for first, part in asked.items():
                    pages = await part
                    if not pages or first != cached:  # the source has no more, or another part of it now
                        break
                    cached = await take(first, pages)
                    has_room = cached > first  # otherwise it has evicted what it had, or its pages are in use
                    if not has_room:
                        break
                    now_s = time.monotonic()
                    moves.note((cached - first) * giver.page_size, len(pages), now_s - begun_s)
                    begun_s = now_s
            finally:
                for part in asked.values():
                    part.cancel()
                await asyncio.gather(*asked.values(), return_exceptions=True)
            if cached == before:
                if news is None or not has_room:
                    break
                await asyncio.wait([news])  # others may wait for it, too: it must not be cancelled
        is_whole = True
    finally:
        moves.num_failed += not is_whole
    return cached


def _ready(proxy: EngineProxy) -> Hello:
    if proxy.hello is None:
        raise EngineStopped(proxy.health() or "the engine is not ready")
    return proxy.hello
