"""Reads the calls in a text while it is written: names, pieces of arguments, and the end of each call.

Bytes may come in any pieces. The events are the same, except for the places where deltas are cut. White space around
the characters of the layout may differ, so that unconstrained answers can be read, too. A text that looks like a call
and is not one becomes text. Arguments in JSON are passed on as they were written, never decoded; those between tags are
passed on as one JSON object, strings as they come.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ramet.grammar.tools.arguments import Kind, kinds_of, value_text
from ramet.grammar.tools.formats import NAME_PATTERN, ToolFormat


@dataclass(frozen=True, slots=True)
class CallStart:
    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The end of a call.

    is_complete False: the text ended, or left the layout, inside the call. Its arguments must not be used.
    """

    index: int
    is_complete: bool


Event = str | CallStart | ArgumentsDelta | CallEnd
"""A str is a piece of the text around the calls."""

_NAME = re.compile(NAME_PATTERN)


class ToolCallReader:
    """Reads one answer. It owns its state, and must not be used by two threads."""

    def __init__(self, layout: ToolFormat, tools: Mapping[str, Any] | None = None) -> None:
        """tools: the schemas of the tools' arguments by name, which say how arguments between tags are read."""
        self.layout = layout
        self._tools = tools or {}
        self._kinds: dict[str, Kind] = {}
        self._key: str | None = None
        self._value = ""  # of an argument between tags: what is not passed on yet
        self._searched = 0  # no closing tag begins before this place
        self._scanned = 0  # characters of a JSON value that `_is_within_string` has looked at
        self._num_keys = 0
        self._is_open = False  # a string's opening quote was passed on
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._events: list[Event] = []
        self._read = self._text
        self._held = ""  # characters that become text if they do not begin a call
        self._ways: list[tuple[str, str]] = []  # (rest of a layout text, what follows it)
        self._name = ""
        self._index = -1
        self._depth = 0
        self._is_string = False
        self._is_escaped = False
        self._has_begun = False

    def push(self, data: bytes) -> list[Event]:
        """Take the next bytes of the answer, and return the events that are now certain."""
        return self._take(self._decoder.decode(data))

    @property
    def is_held(self) -> bool:
        """True if the last characters may begin a call whose name is not known yet."""
        return bool(self._held.strip()) and self._read in (self._text, self._layout_text, self._name_character)

    def finish(self, *, is_cut: bool = False) -> list[Event]:
        """End the answer, and return the events that were held back.

        is_cut: the text was cut off. Then characters that may begin a call are dropped, and a call without a name does
        not count.
        """
        events = self._take(self._decoder.decode(b"", final=True))
        if self._read in (self._arguments, self._parameter, self._after) and not self._is_settled():
            self._events.append(CallEnd(self._index, is_complete=False))
        elif self._is_begun():
            if self._name or not is_cut:
                self._index += 1
                self._events += [CallStart(self._index, self._name), CallEnd(self._index, is_complete=False)]
        elif is_cut and self.is_held:
            pass
        elif self._held and (self._read != self._layout_text or not self._held.strip()):
            self._say(self._held)  # else it begins the text that ends or separates the calls
        self._held = ""
        self._read = self._text
        return [*events, *self._drain()]

    def _is_begun(self) -> bool:
        """Tell whether the text ended inside the layout or name of a call.

        That is after the marker, or after the separator of a further call.
        """
        if self._read == self._name_character:
            return True
        if self._read != self._layout_text or any(then == "text" for _, then in self._ways):
            return False
        held, marker = ("".join(text.split()) for text in (self._held, self.layout.marker))
        is_marked = marker in held or self.layout.marker not in self.layout.separator + self.layout.before_name
        return bool(held) and is_marked

    def _is_settled(self) -> bool:
        """Tell whether only white space, or nothing, is left of the text that ends the call."""
        return self._read == self._after and all(not way.strip() for way, _ in self._ways)

    def _take(self, text: str) -> list[Event]:
        for c in text:
            self._read(c)
        return self._drain()

    def _drain(self) -> list[Event]:
        out: list[Event] = []
        for event in self._events:
            last = out[-1] if out else None
            if isinstance(event, str) and isinstance(last, str):
                out[-1] = last + event
            elif isinstance(event, ArgumentsDelta) and isinstance(last, ArgumentsDelta) and last.index == event.index:
                out[-1] = ArgumentsDelta(event.index, last.text + event.text)
            else:
                out.append(event)
        self._events = []
        return out

    def _say(self, text: str) -> None:
        self._has_begun = self._has_begun or bool(text.strip())
        self._events.append(text)

    # --- one method for each place; each reads one character

    def _text(self, c: str) -> None:
        """Read free text. `_held` is its longest ending that may be the beginning of the marker."""
        marker = self.layout.marker
        self._held += c
        if self.layout.is_only_at_start and self._has_begun:
            self._say(self._held)
            self._held = ""
            return
        skipped = len(self._held) - len(self._held.lstrip()) if self.layout.is_only_at_start else 0
        while not marker.startswith(self._held[skipped:]):
            self._say(self._held[: skipped + 1])
            self._held = self._held[skipped + 1 :]
            skipped = 0
            if self.layout.is_only_at_start and self._has_begun:
                self._say(self._held)
                self._held = ""
                return
        if self._held[skipped:] == marker:
            whole = self.layout.begin + self.layout.before_name
            self._expect([(whole[len(marker) :], "name")])

    def _expect(self, ways: list[tuple[str, str]]) -> None:
        """Match one of several layout texts next. An empty one is taken only if none of the others matches."""
        self._ways = [(way.lstrip(), then) for way, then in ways]
        self._read = self._layout_text
        self._arrive()

    def _arrive(self) -> bool:
        """Continue after a layout text that has been read to its end."""
        done = [then for way, then in self._ways if not way]
        if not done or len(self._ways) > 1:
            return False
        self._go(done[0])
        return True

    def _go(self, then: str) -> None:
        if then == "name":
            self._name = ""
            self._read = self._name_character
        elif then == "arguments":
            self._index += 1
            self._events.append(CallStart(self._index, self._name))
            self._held = ""
            self._depth = 0
            self._is_string = self._is_escaped = False
            self._read = self._arguments
            if self.layout.before_key:
                self._begin_parameters()
        elif then == "next":
            self._end_call()
        else:
            assert then == "text", then
            self._held = ""
            self._read = self._text

    def _layout_text(self, c: str) -> None:
        self._held += c
        if c.isspace():
            return
        kept = [(way[1:].lstrip(), then) for way, then in self._ways if way.startswith(c)]
        if kept:
            self._ways = kept
            self._arrive()
        else:
            self._leave()

    def _leave(self) -> None:
        """Take back what was held: it is not a call. Read it again as text, without its first character."""
        held, self._held = self._held, ""
        self._read = self._text
        self._say(held[:1])
        for c in held[1:]:
            self._read(c)

    def _name_character(self, c: str) -> None:
        self._held += c
        if _NAME.fullmatch(self._name + c):
            self._name += c
        elif self._name and self.layout.before_arguments.lstrip().startswith(c):
            self._expect([(self.layout.before_arguments.lstrip()[1:], "arguments")])
        elif not (c.isspace() and self._name):
            self._leave()

    def _arguments(self, c: str) -> None:
        """Read one JSON object. It ends with the brace that closes its first one."""
        if self._depth == 0 and c.isspace():
            return
        self._events.append(ArgumentsDelta(self._index, c))
        if self._is_string:
            if self._is_escaped:
                self._is_escaped = False
            elif c == "\\":
                self._is_escaped = True
            elif c == '"':
                self._is_string = False
            return
        if c == '"':
            self._is_string = True
        elif c in "{[":
            self._depth += 1
        elif c in "}]":
            self._depth -= 1
        if self._depth <= 0:
            self._ways = [(self.layout.after_arguments.lstrip(), "next")]
            self._held = ""
            self._read = self._after
            if not self._ways[0][0]:
                self._end_call()

    def _begin_parameters(self) -> None:
        self._kinds = kinds_of(self._tools.get(self._name))
        self._key, self._value, self._num_keys, self._is_open = None, "", 0, False
        self._read = self._parameter

    def _pass_on(self, text: str) -> None:
        self._events.append(ArgumentsDelta(self._index, text))

    def _parameter(self, c: str) -> None:
        """Read the tags of arguments, and their values."""
        layout = self.layout
        self._value += c
        if self._key is not None:
            self._read_value(self._kinds.get(self._key, "any"))
            return
        found = self._value.lstrip()
        if found.startswith(layout.before_key):
            name, tag, _ = found[len(layout.before_key) :].partition(layout.before_value.strip())
            if tag:
                self._key, self._value, self._searched, self._scanned = name, "", 0, 0
                self._is_string = self._is_escaped = False
                self._pass_on(("{" if not self._num_keys else ", ") + json.dumps(name, ensure_ascii=False) + ": ")
                self._num_keys += 1
        elif found == layout.first_after_parameters:
            self._pass_on("}" if self._num_keys else "{}")
            self._ways = [(layout.after_arguments[len(found) :].lstrip(), "next")]
            self._held = ""
            self._read = self._after
            if not self._ways[0][0]:
                self._end_call()
        elif not layout.before_key.startswith(found) and not layout.first_after_parameters.startswith(found):
            self._events.append(CallEnd(self._index, is_complete=False))
            self._held = found
            self._leave()

    def _read_value(self, kind: Kind) -> None:
        """Read a value up to its closing tag. Strings are passed on as far as they are certain."""
        layout, close = self.layout, self.layout.after_value.strip()
        lead = layout.after_value[: layout.after_value.index(close)]
        at = self._value.find(close, self._searched)
        while at >= 0:
            rest = self._value[at + len(close) :].lstrip()
            follows = (layout.before_key, layout.first_after_parameters)
            if rest.startswith(follows) and not (kind in ("json", "any") and self._is_within_string(at)):
                self._end_value(self._value[:at].removesuffix(lead), kind)
                self._value = rest
                for c in self._take_back():
                    self._read(c)
                return
            if any(tag.startswith(rest) for tag in follows):
                break
            self._searched = at + 1
            at = self._value.find(close, self._searched)
        if at < 0:
            self._searched = max(self._searched, len(self._value) - len(close) + 1)
        if kind in ("json", "any") or (kind == "nullable" and not self._is_open and self._may_be_null()):
            return
        if at < 0:
            held = max((n for n in range(len(lead + close)) if self._value.endswith((lead + close)[:n])), default=0)
            held = max(held, max((n for n in range(len(close)) if self._value.endswith(close[:n])), default=0))
            at = len(self._value) - held
        else:
            at -= len(lead) if self._value[:at].endswith(lead) else 0
        if at > 0:
            self._say_string(self._value[:at])
            self._value, self._searched = self._value[at:], 0

    def _is_within_string(self, end: int) -> bool:
        """Return whether the first characters of a JSON value end inside of a string. Each is looked at once."""
        for c in self._value[self._scanned : end]:
            if self._is_escaped:
                self._is_escaped = False
            elif c == "\\" and self._is_string:
                self._is_escaped = True
            elif c == '"':
                self._is_string = not self._is_string
        self._scanned = max(self._scanned, end)
        return self._is_string

    def _take_back(self) -> str:
        self._key, value, self._value = None, self._value, ""
        return value

    def _may_be_null(self) -> bool:
        return any(word.startswith(self._value.strip().lower()[:4]) for word in ("null", "none"))

    def _say_string(self, text: str) -> None:
        if not self._is_open:
            text = text.removeprefix(self.layout.before_value[len(self.layout.before_value.rstrip()) :])
            self._pass_on('"')
            self._is_open = True
        self._pass_on(json.dumps(text, ensure_ascii=False)[1:-1])

    def _end_value(self, text: str, kind: Kind) -> None:
        if self._is_open:
            self._pass_on(json.dumps(text, ensure_ascii=False)[1:-1] + '"')
        else:
            space = self.layout.before_value[len(self.layout.before_value.rstrip()) :]
            self._pass_on(value_text(text.removeprefix(space), kind))
        self._is_open = False

    def _after(self, c: str) -> None:
        """Read the text that ends a call. Anything else means that the call is broken."""
        self._held += c
        if c.isspace():
            return
        way = self._ways[0][0]
        if not way.startswith(c):
            self._events.append(CallEnd(self._index, is_complete=False))
            self._leave()
            return
        self._ways = [(way[1:].lstrip(), "next")]
        if not self._ways[0][0]:
            self._end_call()

    def _end_call(self) -> None:
        self._events.append(CallEnd(self._index, is_complete=True))
        self._held = ""
        self._has_begun = True
        more = self.layout.separator + self.layout.before_name
        if self.layout.end:
            self._expect([(more, "name"), (self.layout.end, "text")])
        else:
            self._expect([(more, "name")])
