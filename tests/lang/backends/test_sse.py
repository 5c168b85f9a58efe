"""Server-sent events are read however their bytes are cut."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from ramet.lang.backends.sse import DONE, ServerSentEvent, complete_events, events_of
from ramet.runtime.server.sending import event

SENT = (
    event({"text": "two\nlines, and a line\u2028separator"}, "node", 7)
    + b": still here\n\n"
    + event({"text": "\u00e9\u20ac"})
    + b"data: first\r\ndata:second\r\n\r\n"
    + b"data: [DONE]\n\n"
)
READ = [
    ServerSentEvent("node", '{"text":"two\\nlines, and a line\u2028separator"}'.encode(), "7"),
    ServerSentEvent("message", '{"text":"\u00e9\u20ac"}'.encode()),
    ServerSentEvent("message", b"first\nsecond"),
    ServerSentEvent("message", DONE),
]


@given(cuts=st.lists(st.integers(0, len(SENT)), max_size=20))
def test_events_are_the_same_under_any_cuts(cuts: list[int]) -> None:
    borders = sorted({0, *cuts, len(SENT)})
    pieces = [SENT[start:end] for start, end in pairwise(borders)]
    assert list(events_of(pieces)) == READ


def test_an_event_is_read_as_soon_as_its_last_byte_has_come() -> None:
    assert complete_events(b"data: a\n") == ([], b"data: a\n")
    assert complete_events(b"data: a\n\ndata: b") == ([ServerSentEvent("message", b"a")], b"data: b")
    assert complete_events(b"data: b\n\n") == ([ServerSentEvent("message", b"b")], b"")
