"""Reads the calls in a text while it is written: names, pieces of arguments, and the end of each call.

Bytes may come in any pieces. The events are the same, except for the places where deltas are cut. White space around
the characters of the layout may differ, so that unconstrained answers can be read, too. A text that looks like a call
and is not one becomes text. Arguments are passed on as they were written, never decoded.
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass

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

    def __init__(self, layout: ToolFormat) -> None:
        self.layout = layout
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

        is_cut: the text was to go on. Then characters that may begin a call are not text, and a call without a name is
        none.
        """
        events = self._take(self._decoder.decode(b"", final=True))
        if self._read in (self._arguments, self._after) and not self._is_settled():
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
