from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet.grammar.tools.events import ArgumentsDelta, CallEnd, CallStart, Event, ToolCallReader
from ramet.grammar.tools.formats import FORMATS, ToolFormat

Call = tuple[str, Any]
IN_JSON = [name for name, layout in FORMATS.items() if not layout.before_key]  # others: test_parameters.py


def written(layout: ToolFormat, text: str, calls: list[Call]) -> str:
    if not calls:
        return text
    bodies = [
        layout.before_name
        + name
        + layout.before_arguments
        + json.dumps(arguments, ensure_ascii=False)
        + layout.after_arguments
        for name, arguments in calls
    ]
    return text + layout.begin + layout.separator.join(bodies) + layout.end


def read(layout: ToolFormat, pieces: list[bytes]) -> list[Event]:
    reader = ToolCallReader(layout)
    events = [event for piece in pieces for event in reader.push(piece)]
    return [*events, *reader.finish()]


def joined(events: list[Event]) -> list[Event]:
    """Neighbouring deltas of one kind as one."""
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        if isinstance(event, str) and isinstance(last, str):
            out[-1] = last + event
        elif isinstance(event, ArgumentsDelta) and isinstance(last, ArgumentsDelta) and event.index == last.index:
            out[-1] = ArgumentsDelta(last.index, last.text + event.text)
        else:
            out.append(event)
    return out


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    borders = sorted({0, len(data), *(c % (len(data) + 1) for c in cuts)})
    return [data[a:b] for a, b in pairwise(borders)]


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from(['"}', "</tool_call>", "\\", "é]"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
calls = st.lists(
    st.tuples(
        st.sampled_from(["add", "get_weather", "a.b-c"]), st.dictionaries(st.text(max_size=4), values, max_size=3)
    ),
    max_size=3,
)


@pytest.mark.parametrize("name", IN_JSON)
@given(data=st.data())
def test_events_give_back_what_was_written_under_any_chunking(name: str, data: st.DataObject) -> None:
    layout = FORMATS[name]
    what = data.draw(calls)
    text = "" if layout.is_only_at_start and what else data.draw(st.text("ab <é\n[{", max_size=8))
    whole = written(layout, text, what).encode()
    events = joined(read(layout, cut(whole, data.draw(st.lists(st.integers(0, 10_000), max_size=30)))))
    expected: list[Event] = [text] if text else []
    for i, (tool, arguments) in enumerate(what):
        expected += [CallStart(i, tool), ArgumentsDelta(i, json.dumps(arguments, ensure_ascii=False)), CallEnd(i, True)]
    assert events == expected


@pytest.mark.parametrize("name", IN_JSON)
@given(noise=st.binary(max_size=40), cuts=st.lists(st.integers(0, 1000), max_size=20), data=st.data())
def test_any_bytes_are_read_alike_under_any_chunking_and_no_text_is_lost(
    name: str, noise: bytes, cuts: list[int], data: st.DataObject
) -> None:
    layout = FORMATS[name]
    pieces = [
        layout.marker,
        layout.begin,
        layout.before_name,
        "add",
        layout.before_arguments,
        "{}",
        '{"a": 1}',
        layout.after_arguments,
        layout.separator,
        layout.end,
        " ",
        "\n",
    ]
    soup = "".join(data.draw(st.lists(st.sampled_from(pieces), max_size=12))).encode() + noise
    whole = joined(read(layout, [soup]))
    assert joined(read(layout, cut(soup, cuts))) == whole
    assert joined(read(layout, [bytes((b,)) for b in soup])) == whole
    if not any(isinstance(e, CallStart) for e in whole):
        assert "".join(e for e in whole if isinstance(e, str)) == soup.decode(errors="replace")


def test_white_space_in_the_layout_may_differ() -> None:
    text = b'ok <tool_call> { "name" : "add","arguments":\n{"a": 1} } </tool_call>'
    assert joined(read(FORMATS["hermes"], [text])) == [
        "ok ", CallStart(0, "add"), ArgumentsDelta(0, '{"a": 1}'), CallEnd(0, True)
    ]  # fmt: skip


@pytest.mark.parametrize("end", range(len('<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>')))
def test_a_call_cut_short_is_never_complete(end: int) -> None:
    text = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    events = read(FORMATS["hermes"], [text[:end].encode()])
    assert CallEnd(0, True) not in events
    started = any(isinstance(e, CallStart) for e in events)
    assert started == (end >= len("<tool_call>"))
    assert (CallEnd(0, False) in events) == started


@pytest.mark.parametrize("name", IN_JSON)
def test_every_cut_of_two_calls_leaves_calls_that_are_whole_or_flagged_and_no_text(name: str) -> None:
    layout = FORMATS[name]
    text = written(layout, "", [("add", {"a": 1}), ("find", {})])
    marker = len(layout.marker)
    for end in range(marker, len(text) + 1):
        events = joined(read(layout, [text[:end].encode()]))
        assert not [e for e in events if isinstance(e, str) and e.strip() not in layout.marker], text[:end]
        started = [e.index for e in events if isinstance(e, CallStart)]
        ended = [e.index for e in events if isinstance(e, CallEnd)]
        assert started == ended == list(range(len(started)))
        assert started
        whole = [e for e in events if isinstance(e, CallEnd) and e.is_complete]
        assert len(whole) < 2 or end >= len(text) - len(layout.end + layout.after_arguments)


@pytest.mark.parametrize("name", IN_JSON)
def test_a_text_that_was_to_go_on_has_no_part_of_a_marker_and_no_call_without_a_name(name: str) -> None:
    layout = FORMATS[name]
    text = written(layout, "", [("add", {"a": 1}), ("find", {})])
    for end in range(len(text) + 1):
        reader = ToolCallReader(layout)
        events = [*reader.push(text[:end].encode()), *reader.finish(is_cut=True)]
        assert not [e for e in events if isinstance(e, str) and e.strip()], text[:end]
        assert all(e.name for e in events if isinstance(e, CallStart)), text[:end]


def test_two_calls_in_one_piece_are_both_there() -> None:
    text = written(FORMATS["hermes"], "", [("a", {}), ("b", {"x": "y"})])
    events = read(FORMATS["hermes"], [text.encode()])
    assert [e.name for e in events if isinstance(e, CallStart)] == ["a", "b"]


def test_text_between_calls_is_kept() -> None:
    text = written(FORMATS["hermes"], "", [("a", {})]) + " and " + written(FORMATS["hermes"], "", [("b", {})])
    events = joined(read(FORMATS["hermes"], [text.encode()]))
    assert " and " in events
    assert events[-1] == CallEnd(1, True)


def test_what_looks_like_a_call_but_is_none_is_text() -> None:
    text = "<tool_call> is a tag; <tool_call>{no}"
    assert joined(read(FORMATS["hermes"], [text.encode()])) == [text]
