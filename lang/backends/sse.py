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


def complete_events(body: bytes) -> tuple[list[ServerSentEvent], bytes]:
    """Return the complete events at the beginning of a body that may be cut anywhere, and the rest, for the next call.

    Lines are split in bytes, because JSON may contain characters that `str.splitlines` takes as line ends.
    """
    *blocks, rest = body.replace(b"\r\n", b"\n").split(b"\n\n")
    return [event for block in blocks if (event := _event(block)) is not None], rest


def events_of(pieces: Iterable[bytes]) -> Iterator[ServerSentEvent]:
    """Yield the events of a body that comes in pieces."""
    rest = b""
    for piece in pieces:
        events, rest = complete_events(rest + piece)
        yield from events


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
