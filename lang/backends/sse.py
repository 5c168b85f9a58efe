"""Reads server-sent events from the pieces of a response's body.

Not here: writing them (runtime/server/sending.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

DONE = b"[DONE]"  # data of the last event in a stream of OpenAI's API


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """An event's name, its data, and its id if it has one."""

    name: str
    data: bytes
    id: str | None = None


class EventReader:
    """Turns the pieces of one body into events. The pieces may be cut anywhere.

    Lines are split in bytes, because JSON may contain characters that `str.splitlines` takes as line ends.
    """

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def push(self, piece: bytes) -> list[ServerSentEvent]:
        """Take the next piece of the body; return the events that it completes."""
        *blocks, self._rest = (self._rest + piece).replace(b"\r\n", b"\n").split(b"\n\n")
        return [event for block in blocks if (event := _event(block)) is not None]


def events_of(pieces: Iterable[bytes]) -> Iterator[ServerSentEvent]:
    """Yield the events of a body that comes in pieces."""
    reader = EventReader()
    for piece in pieces:
        yield from reader.push(piece)


def _event(block: bytes) -> ServerSentEvent | None:
    """Return the event of one block of lines; None for a block without data, such as a comment."""
    name, event_id, data = "message", None, list[bytes]()
    for line in block.split(b"\n"):
        key, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if key == b"data":
            data.append(value)
        elif key == b"event":
            name = value.decode()
        elif key == b"id":
            event_id = value.decode()
    return ServerSentEvent(name, b"\n".join(data), event_id) if data else None
