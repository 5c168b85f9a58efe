"""Responses that clients may come back to: by `previous_response_id`, by GET, or while they run in the background.

They are kept in memory, each for the key that made it. The least recently used ones are dropped first.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from ramet.runtime.server.errors import HttpError
from ramet.runtime.server.responses.answer import ResponseObject
from ramet.runtime.server.responses.bodies import Item, ReferenceItem
from ramet.runtime.server.sending import Json

MAX_RESPONSES = 4096
MAX_BYTES = 64 << 20  # of what clients sent and got, as JSON


@dataclass(slots=True, eq=False)
class BackgroundRun:
    """A response that is written while nobody waits. Owner: the event loop.

    `events`: all so far. `abort`: stops the engine's requests.
    """

    abort: Callable[[], None]
    events: list[Json] = field(default_factory=list)
    is_over: bool = False
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, events: Sequence[Json]) -> None:
        self.events += events
        self._wake()

    def end(self) -> None:
        self.is_over = True
        self._wake()

    async def read(self, start: int) -> AsyncGenerator[Json, None]:
        """Yield the events from sequence number `start` on, also those that are still to come."""
        while True:
            news = self._news
            while start < len(self.events):
                yield self.events[start]
                start += 1
            if self.is_over and start >= len(self.events):
                return
            await news.wait()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


@dataclass(slots=True, eq=False)
class StoredResponse:
    """`items`: the conversation with the answer. `asked`: the items of its own request, as JSON with ids.

    `size`: bytes of its request and its answer.
    """

    owner: str
    response: ResponseObject
    items: list[Item]
    asked: list[Json]
    size: int
    run: BackgroundRun | None = None


class ResponseStore:
    """Owner: the event loop."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()
        self._items: dict[tuple[str, str], Item] = {}  # of answers, by owner and the item's id
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._stored)

    def get(self, response_id: str, owner: str, param: str | None = None) -> StoredResponse:
        """Return a response. `param`: the field that names it. Raises HttpError if this key has none with this id."""
        found = self._stored.get(response_id)
        if found is None or found.owner != owner:
            raise HttpError(
                400 if param else 404,
                f"the response {response_id!r} is not here: it was not stored, or too long ago; "
                "send the whole conversation as input",
                param=param,
                code="previous_response_not_found" if param else "not_found",
            )
        self._stored.move_to_end(response_id)
        return found

    def put(self, stored: StoredResponse) -> None:
        """Keep a response, and drop the oldest ones beyond the limits. One that still runs is not dropped."""
        self.remove(stored.response.id)
        self._stored[stored.response.id] = stored
        self._num_bytes += stored.size
        for old in list(self._stored.values()):
            if len(self._stored) <= self._max_responses and self._num_bytes <= self._max_bytes:
                break
            if old is not stored and (old.run is None or old.run.is_over):
                self.remove(old.response.id)

    def answered(self, stored: StoredResponse, items: Sequence[Item], size: int) -> None:
        """Add the answer to a stored conversation."""
        stored.items += items
        if self._stored.get(stored.response.id) is not stored:
            return
        stored.size += size
        self._num_bytes += size
        for item, written in zip(items, stored.response.output, strict=True):
            self._items[stored.owner, written["id"]] = item

    def remove(self, response_id: str) -> None:
        """Forget a response. Does nothing if it is not here."""
        stored = self._stored.pop(response_id, None)
        if stored is not None:
            self._num_bytes -= stored.size
            for item in stored.response.output:
                self._items.pop((stored.owner, item["id"]), None)

    def resolved(self, items: Sequence[Item], owner: str) -> list[Item]:
        """Return the items with references replaced by what they refer to. Raises HttpError for an unknown one."""
        found: list[Item] = []
        for index, item in enumerate(items):
            if isinstance(item, ReferenceItem):
                known = self._items.get((owner, item.id))
                if known is None:
                    name = f"input[{index}].id"
                    raise HttpError(400, f"{name} is {item.id!r}, which is not the id of a stored item", param=name)
                item = known
            found.append(item)
        return found
