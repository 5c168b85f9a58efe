"""A constrained text between two known texts: the end of the prompt before it, and the literal text after it.

A model ends a value where it wants to go on with what follows. A mask that allows only the value and the end of the
text hides that wish: after `34` only a further digit or an end token is left, although the model wants ` years`. So a
bordered grammar reads

    before · value · the beginning of after

`before` is a token of the prompt that was given back: the model writes its bytes again, as part of any token that
begins with them. Instead of `before` there may be a `lead`, a space that the model may write in front of the value, and
that belongs to the text but not to the value: after `Age:`, models write ` 34`. `after` is the literal text that
follows. Where the value is complete, tokens that begin `after` are
allowed, too, and so are tokens that hold the value's end and the beginning of `after`.

A text may have several readings: in `[a-z ]+` followed by ` at the end`, `cat at` is a value, or a value and the
beginning of what follows. All readings are kept. The value has ended when a single one is left that has begun `after`
and the value cannot go on, or when all of `after` was read. If `after` is white space alone, a value that may hold it
goes on: a list's line break is not its end. So a value is lost only if all of `after` stands in it, behind a shorter
value.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ramet.grammar.deadline import check
from ramet.grammar.machine import bitmask
from ramet.grammar.machine.compiled_grammar import CompiledGrammar
from ramet.grammar.machine.ends import end_tokens
from ramet.grammar.machine.grammar import DeviceTables
from ramet.grammar.machine.vocabulary import Vocabulary
from ramet.grammar.machine.walker import GOES_ON, REFUSED

MAX_AFTER = 64  # bytes of the following text that are looked at
_MAX_ROWS = 32  # mask rows that a bordered grammar keeps
_MAX_ANSWERS = 1 << 14
# Tokens over the border are looked for where the value is complete, or this many bytes before. Elsewhere, in the middle
# of a long value, each state would cost as many runs of the automaton, and the value's last token is met later anyway.
_NEAR = 4
_MAX_OVER = 256  # runs of the automaton per state, to find the tokens over the border
_MAX_DEVICE_STATES = 1 << 16

_Place = tuple[int | None, tuple[int, ...]]
"""(state of the value's grammar, None if it refuses the text; the numbers of bytes of `after` that may be read)"""


class Bordered:
    """A grammar between `before` and `after`. Implements `Grammar`. Thread-safe.

    A state is an integer, a pure function of the text, and 0 is the start. Without a grammar, any text is a value; then
    there is no `after`.
    """

    def __init__(
        self,
        grammar: CompiledGrammar | None,
        vocabulary: Vocabulary,
        *,
        before: bytes = b"",
        after: bytes = b"",
        lead: bytes = b"",
    ) -> None:
        """A grammar that allows `lead` itself has none."""
        assert grammar is not None or not (after or lead)
        assert not (before and lead)
        self.grammar, self.vocabulary = grammar, vocabulary
        self.before, self.after, self.lead = before, after, lead
        self._is_blank = after.isspace()
        self._places: list[_Place | None] = [None if before or lead else (0, ())]  # None: the start
        self._state_of: dict[_Place | None, int] = {self._places[0]: 0}
        self._answers: dict[tuple[int, int], int | None] = {}
        self._rows: OrderedDict[int, NDArray[np.int32]] = OrderedDict()
        self._over = self._tokens_over_the_border()
        self._lock = threading.RLock()
        self._device_tables: DeviceTables | None = None
        self._is_too_large = False

    # --- states

    @property
    def is_closed(self) -> bool:
        """True if the value's grammar is closed."""
        return self.grammar is not None and self.grammar.is_closed

    def advance(self, state: int, token: int) -> int | None:
        """Return the state after `token`; None if it is refused. Without a grammar, only `before` refuses a token."""
        key = (state, token)
        if key not in self._answers:
            place = self._places[state]
            answer: int | None = state  # any token
            if self.grammar is not None or place is None:
                after = self._after_token(place, token)
                answer = None if after is None else self._number(after)
            if len(self._answers) >= _MAX_ANSWERS:
                self._answers = {}
            self._answers[key] = answer
            return answer
        return self._answers[key]

    def is_accepting(self, state: int) -> bool:
        """True if the text may end here: it has a reading with a complete value."""
        place = self._places[state]
        if place is None:
            return bool(self.lead) and self._is_value(0)
        return bool(place[1]) or self._is_value(place[0])

    def is_complete(self, state: int) -> bool:
        """True if the value has ended: it cannot go on, or what follows has begun in a way that leaves no doubt."""
        place = self._places[state]
        if place is None:
            return False
        value, read = place
        if not read:
            return value is not None and self.grammar is not None and self.grammar.is_complete(value)
        has_all = read[-1] == len(self.after)
        return has_all and not self._is_blank if value is not None else has_all or len(read) == 1

    def is_free(self, state: int) -> bool:
        """True if any token may follow: without a grammar, once `before` is written."""
        return self.grammar is None and self._places[state] is not None

    def num_after(self, state: int, *, is_last: bool) -> int:
        """Return how many bytes at the text's end are no value. Before the end, count those that may be none."""
        place = self._places[state]
        if place is None or not place[1]:
            return 0
        value, read = place
        if not is_last or self.is_complete(state):
            return read[-1]
        return 0 if self._is_value(value) else read[0]  # the longest complete value

    def _number(self, place: _Place) -> int:
        with self._lock:
            found = self._state_of.get(place)
            if found is None:
                found = self._state_of[place] = len(self._places)
                self._places.append(place)
            return found

    def _after_token(self, place: _Place | None, token: int) -> _Place | None:
        vocabulary = self.vocabulary
        if token < 0 or token >= len(vocabulary.token_bytes) or token in vocabulary.special_ids:
            return None
        text = vocabulary.token_bytes[token]
        if place is not None:
            return self._after_text(place, text, token) if text else None
        head = self.before or self.lead
        if text.startswith(head):
            return self._after_text((0, ()), text[len(head) :])
        return self._after_text((0, ()), text, token) if self.lead and text else None

    def _after_text(self, place: _Place, text: bytes, token: int | None = None) -> _Place | None:
        """Return the place after a text; None if no reading is left. `token`: the token that is the text."""
        grammar, after = self.grammar, self.after
        if grammar is None:
            return place
        value, read = place
        found = {at + len(text) for at in read if after.startswith(text, at)}
        if value is not None:
            for size in range(1, min(len(text), len(after)) + 1):
                if text.endswith(after[:size]) and self._ends_with(value, text[:-size]):
                    found.add(size)
            value = grammar.advance_bytes(value, text) if token is None else grammar.advance(value, token)
        return None if value is None and not found else (value, tuple(sorted(found)))

    def _ends_with(self, value: int, text: bytes) -> bool:
        """Return whether `text` completes the value."""
        assert self.grammar is not None
        return self._is_value(self.grammar.advance_bytes(value, text) if text else value)

    def _is_value(self, value: int | None) -> bool:
        return value is not None and (self.grammar is None or self.grammar.is_accepting(value))

    # --- masks

    def fill_mask(self, state: int, row: NDArray[np.int32]) -> None:
        row[:] = self.mask(state)

    def mask(self, state: int) -> NDArray[np.int32]:
        """Return the mask row of a state, int32 [W]. It is shared: do not write to it."""
        place = self._places[state]
        with self._lock:
            found = self._rows.get(state)
            if found is not None:
                self._rows.move_to_end(state)
                return found
            row = self._first_row() if place is None else self._row(state, place)
            self._rows[state] = row
            if len(self._rows) > _MAX_ROWS:
                self._rows.popitem(last=False)
            return row

    def ends(self, state: int) -> NDArray[np.int32] | None:
        """Return the mask row, int32 [W], of the tokens that end the value (see ends.py), and do not begin `after`.

        There are such tokens also where `after` may have begun, and the value that goes on instead is incomplete: after
        `3.`, `3` is the value if neither a digit nor `after` follows.
        """
        place = self._places[state]
        if place is None or self.grammar is None or not self.is_accepting(state):
            return None
        value, mask = place[0], self.mask(state)
        if value is None:
            row = end_tokens(self.vocabulary, mask, lambda text: GOES_ON if self._after_text(place, text) else REFUSED)
        else:
            row = self.grammar.unlike(value)
        return None if row is None else row & ~mask

    def _first_row(self) -> NDArray[np.int32]:
        """Return the mask row of the start: tokens that begin with `before`, and whose rest begins what follows it.

        The rest begins the value, or what follows an empty value. With a `lead`: the tokens that begin with the lead,
        and those that begin the value without it.
        """
        vocabulary, grammar, before = self.vocabulary, self.grammar, self.before or self.lead
        if grammar is None:
            return bitmask.pack(vocabulary.tokens_with_prefix(before), vocabulary.vocab_size)
        added: list[int] = []
        if grammar.is_accepting(0):
            for size in range(1, len(self.after) + 1):
                added += vocabulary.tokens_with_text(before + self.after[:size])
        for group in self._over.values():
            for token, head in group:
                if head.startswith(before) and self._ends_with(0, head[len(before) :]):
                    added.append(token)
        row = self._with(grammar.mask_after(0, before), added)
        return row | self._row(0, (0, ())) if self.lead else row

    def _row(self, state: int, place: _Place) -> NDArray[np.int32]:
        vocabulary, grammar = self.vocabulary, self.grammar
        value, _ = place
        if grammar is None:
            return np.full(vocabulary.num_words, -1, dtype=np.int32)
        row = np.zeros(vocabulary.num_words, dtype=np.int32) if value is None else grammar.mask(value)
        row = self._with(row, self._tokens_of_after(place, row))
        if self.is_accepting(state) and not self._is_value(value):
            row = row | vocabulary.eos_row
        return row

    def _with(self, row: NDArray[np.int32], tokens: Iterable[int]) -> NDArray[np.int32]:
        tokens = list(tokens)
        return row | bitmask.pack(tokens, self.vocabulary.vocab_size) if tokens else row

    def _tokens_of_after(self, place: _Place, row: NDArray[np.int32]) -> list[int]:
        """Return the tokens that begin or continue `after`, and are not allowed by `row` anyway."""
        grammar, after, vocabulary = self.grammar, self.after, self.vocabulary
        assert grammar is not None
        value, read = place
        is_value = self._is_value(value)
        found: list[int] = []
        for at in (0, *read) if is_value else read:
            for end in range(at + 1, len(after) + 1):
                found += vocabulary.tokens_with_text(after[at:end])
        if value is None or not (is_value or grammar.completion_bound(value) <= _NEAR):
            return found
        num_runs = 0
        for first, group in self._over.items():
            num_runs += 1
            if grammar.advance_bytes(value, first) is None:
                continue
            for token, head in group:
                if num_runs >= _MAX_OVER:
                    return found
                if not bitmask.is_allowed(row, token):
                    num_runs += 1
                    if self._ends_with(value, head):
                        found.append(token)
        return found

    def _tokens_over_the_border(self) -> dict[bytes, list[tuple[int, bytes]]]:
        """Return the tokens that end with the beginning of `after`, and what stands before it in them.

        They are grouped by their first byte; those with the shortest beginnings come first.
        """
        vocabulary, after = self.vocabulary, self.after
        found: dict[bytes, list[tuple[int, bytes]]] = {}
        for size in range(1, len(after) + 1):
            for token in vocabulary.tokens_with_suffix(after[:size]):
                head = vocabulary.token_bytes[token][:-size]
                if head:
                    found.setdefault(head[:1], []).append((token, head))
        for group in found.values():
            group.sort(key=lambda entry: len(entry[1]))
        return found

    # --- what must follow

    def forced_tokens(self, state: int) -> list[int]:
        """Return the tokens that must follow. The run stops where what follows the value may begin."""
        place, grammar = self._places[state], self.grammar
        if place is None or place[1] or place[0] is None or grammar is None:
            return []
        run: list[int] = []
        value: int | None = place[0]
        for token in grammar.forced_tokens(place[0]):
            assert value is not None
            if self._tokens_of_after((value, ()), grammar.mask(value)):
                break
            run.append(token)
            value = grammar.advance(value, token)
        return run

    def joined_token(self, state: int, token: int) -> int:
        """Return the token to take instead of a sampled one: see CompiledGrammar. Not where `after` may have begun."""
        place, grammar = self._places[state], self.grammar
        if grammar is None or place is None or place[0] is None or grammar.advance(place[0], token) is None:
            return token
        after = self._after_token(place, token)
        return token if after is None or after[1] else grammar.joined_token(place[0], token)

    def shortest_completion(self, state: int) -> list[int]:
        """Return the fewest tokens that lead to an accepting state. Raises GrammarError if no tokens write it."""
        place, grammar = self._places[state], self.grammar
        if place is None and self.lead:
            place = (0, ())
        if place is None:
            again = self.vocabulary.tokens_with_text(self.before)[:1]
            return again if grammar is None else [*again, *grammar.shortest_completion(0)]
        if self.is_accepting(state) or grammar is None:
            return []
        assert place[0] is not None
        return grammar.shortest_completion(place[0])

    def completion_bound(self, state: int) -> int:
        """Return an upper bound of len(shortest_completion(state))."""
        place, grammar = self._places[state], self.grammar
        if place is None:
            return 1 if grammar is None else int(not self.lead) + grammar.completion_bound(0)
        if self.is_accepting(state) or grammar is None:
            return 0
        assert place[0] is not None
        return grammar.completion_bound(place[0])

    def closing_tokens(self, state: int) -> list[int]:
        """Return allowed tokens after which the value is nearer to its end; none before it, and where it may end."""
        place = self._places[state]
        if place is None or place[0] is None or self.grammar is None or self.is_accepting(state):
            return []
        return self.grammar.closing_tokens(place[0])

    def stays_in_string(self, state: int, token: int) -> bool:
        """Return whether the value is inside of a string of JSON, and stays in it through this token."""
        place = self._places[state]
        if place is None or place[0] is None or self.grammar is None:
            return False
        return self.grammar.stays_in_string(place[0], token)

    # --- on a device

    def device_tables(self) -> DeviceTables | None:
        """Return the automaton as flat tables; None if the value's grammar is not closed, or if they are too large.

        Their states have numbers of their own. They also allow those tokens over the border that the host's masks leave
        out, far from the value's end (`_NEAR`).
        """
        value = None if self.grammar is None else self.grammar.device_tables()
        if value is not None and self._device_tables is None and not self._is_too_large:
            self._device_tables = self._make_tables(value)
            self._is_too_large = self._device_tables is None
        return self._device_tables

    def _make_tables(self, value: DeviceTables) -> DeviceTables | None:
        """Make the tables. Their states are

        [0, base)           the start, and the places inside of `before`; base is 0 without `before` and `lead`
        [base, base + n)    the value's n states, where `after` has not begun
        [base + n, ...)     the places where it may have begun
        """
        head, after, num_values = self.before or self.lead, self.after, len(value.transitions)
        base = len(head)
        found = None if self.lead and (base > 1 or value.accepting[0]) else _places_in(after, value)
        if found is None:
            return None
        places, ways = found
        special = sorted(set(after + head))
        classes = value.byte_class.astype(np.int64)
        classes[special] = 256 + np.arange(len(special))
        _, one_byte, byte_class = np.unique(classes, return_index=True, return_inverse=True)
        rows = np.where(value.transitions >= 0, value.transitions + base, -1)[:, value.byte_class[one_byte]]
        refused = np.full((base + 1, len(one_byte)), -1)
        of_value = np.array([state for state, _ in places], dtype=np.int64)  # -1: the last row of the next line
        mixed = np.append(rows, refused[:1], axis=0)[of_value]
        rows = np.concatenate([refused[:base], rows, mixed]).astype(np.int32)
        for source, byte, place in ways:
            rows[base + source, byte_class[byte]] = base + num_values + place
        if self.lead:
            rows[0] = rows[base]
        for state, byte in enumerate(head):
            rows[state, byte_class[byte]] = state + 1
        is_value = np.append(value.accepting, np.uint8(0))[of_value] != 0
        num_after, has_ended = np.zeros((len(places), 2), dtype=np.uint8), np.zeros(len(places), dtype=np.bool_)
        for place, (state, begun) in enumerate(places):
            most, least = begun.bit_length() - 1, (begun & -begun).bit_length() - 1
            has_all = most == len(after)
            has_ended[place] = has_all and not self._is_blank if state >= 0 else has_all or most == least
            num_after[place] = most, most if has_ended[place] else 0 if is_value[place] else least
        return DeviceTables(
            byte_class=byte_class.astype(np.uint8),
            transitions=rows,
            accepting=np.concatenate([np.zeros(base), value.accepting, np.where(is_value, 1, 2)]).astype(np.uint8),
            refused=self._refused_pairs(value, base, places),
            is_complete=np.concatenate([np.zeros(base, dtype=np.bool_), value.is_complete, has_ended]),
            num_after=np.concatenate([np.zeros((base + num_values, 2), dtype=np.uint8), num_after]),
        )

    def _refused_pairs(self, value: DeviceTables, base: int, places: list[tuple[int, int]]) -> NDArray[np.int32]:
        """Return the pairs of the tables: the value's, without tokens that may begin or continue `after`. At the start,
        also the tokens that end inside of `before`.
        """
        assert self.grammar is not None
        texts, after, head = self.vocabulary.token_bytes, self.after, self.before or self.lead
        of_value: dict[int, list[int]] = {}
        for state, token in value.refused.tolist():
            of_value.setdefault(state, []).append(token)
        beginnings = tuple(after[:size] for size in range(1, len(after) + 1))
        may_be_after = {
            t for t in set(value.refused[:, 1].tolist()) if texts[t].endswith(beginnings) or texts[t] in after
        }

        def is_refused(place: _Place | None, token: int) -> bool:
            reached = self._after_token(place, token)
            return reached is None or not reached[1]

        pairs: list[tuple[int, int]] = []
        if head:
            first = {*self.grammar.refused_after(head), *(of_value.get(0, ()) if self.lead else ())}
            for size in range(1, len(head)):
                first.update(self.vocabulary.tokens_with_text(head[:size]))
            pairs += [(0, token) for token in sorted(first) if is_refused(None, token)]
        all_places = [*((state, 0) for state in range(len(value.transitions))), *places]
        for number, (state, begun) in enumerate(all_places, base):
            refused = of_value.get(state)
            if refused:
                place = (state, tuple(size for size in range(1, len(after) + 1) if begun >> size & 1))
                pairs += [(number, t) for t in refused if t not in may_be_after or is_refused(place, t)]
        return np.array(pairs, dtype=np.int32).reshape(-1, 2)


def _places_in(after: bytes, value: DeviceTables) -> tuple[list[tuple[int, int]], list[tuple[int, int, int]]] | None:
    """Find the places where a text may have begun `after`; None if they are too many.

    Returns the places: (the value's state, -1 if there is none; a number whose bit k is set if k bytes of `after` may
    be read); and the ways to them: (from, byte, to). `from` counts the value's states first, and then the places.
    """
    places: list[tuple[int, int]] = []
    ways: list[tuple[int, int, int]] = []
    number: dict[tuple[int, int], int] = {}
    continues = {byte: sum(1 << k for k in range(1, len(after)) if after[k] == byte) for byte in after}

    def visit(source: int, state: int, begun: int) -> None:
        for byte, sizes in continues.items():
            following = (begun & sizes) << 1
            if state >= 0 and value.accepting[state] and byte == after[0]:
                following |= 2
            if following:
                place = (int(value.transitions[state, value.byte_class[byte]]) if state >= 0 else -1, following)
                if place not in number:
                    number[place] = len(places)
                    places.append(place)
                ways.append((source, byte, number[place]))

    for state in np.flatnonzero(value.accepting).tolist():
        visit(state, state, 0)
    for source, (state, begun) in enumerate(places, len(value.transitions)):  # grows meanwhile
        check()
        if source > _MAX_DEVICE_STATES:
            return None
        visit(source, state, begun)
    return places, ways
