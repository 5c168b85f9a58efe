"""Which tokens write the forced bytes of a text.

Where a grammar leaves one continuation, such as `"age": ` after a comma, every way to cut it into tokens is a way
through the automaton, and a model under a mask takes odd ones: `"`, `a`, `ge`. It was trained on the tokenizer's own
split alone. So a token is refused if no split of the text that follows can begin with it.

The rule for one state: follow the automaton as far as a few texts are possible. They end where many bytes may follow,
as in a string or a number, or where no token reaches. A token that is shorter than such a text X is refused, unless the
tokenizer's split of some X that begins with it may begin with it. All other tokens stay as the automaton allows them.
The split of X may depend on text on both sides that is not known here:

- before X, by the kind of the character there (`Splits.firsts`);
- behind X, where a longer token may begin inside of X and go past its end. Then the split of the part before that token
  counts, if the tokenizer would cut there (`Splits.goes_on`). Only cuts in the first two tokens of X change the first.

Every text of the language can still be written: if it begins with X, the first token of X's split is allowed, and the
same rule holds in the state after that token.

What depends on X alone is kept by the vocabulary, for all grammars (`beginning`, `is_settled`). To follow the automaton
into another frame may mean to make that frame. So X ends before that if it is *settled*: no token that begins in its
first two tokens reaches past its end.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ramet.grammar.machine import walker
from ramet.grammar.machine.automaton import Machine
from ramet.grammar.machine.frame import DEAD, UNKNOWN
from ramet.grammar.machine.mask_rows import Row
from ramet.grammar.machine.splits import Cut, Splits, is_text, whole_characters

MAX_CHOICES = 8  # bytes; where more may follow (strings, numbers), the texts that are looked at end
MAX_FORCED = 32  # bytes that are looked at after a choice
_MAX_TEXTS = 24  # texts from one state

Ways = tuple[tuple[int, int], ...]  # (byte, the state after it, or UNKNOWN: see walker.choices)


class ForcedRun(NamedTuple):
    """The bytes that must follow a state, at most MAX_FORCED, up to where the text may leave its frame.

    end: the state after them. leaves: the text may leave the frame in that state. following: if so, the byte that must
    follow, where the frame itself allows only one.
    """

    text: bytes
    end: int
    leaves: bool
    following: bytes


class CanonicalTokens:
    """Finds the tokens that are refused in a state of a machine. Owned by a CompiledGrammar, which locks."""

    def __init__(self, machine: Machine, splits: Splits) -> None:
        self.machine = machine
        self.vocabulary = machine.vocabulary
        self.splits = splits
        self._ways: dict[int, Ways | None] = {}
        self._runs: dict[int, ForcedRun] = {}
        self._scratch = np.zeros(8, dtype=np.int64)
        self._text = np.zeros(MAX_FORCED, dtype=np.uint8)
        self._following = np.zeros((MAX_CHOICES, 2), dtype=np.int64)

    def narrow(self, packed: int, row: Row, prefix: bytes = b"") -> Row:
        """Return the mask row of a state without the refused tokens. `row`: all tokens that the automaton allows.

        prefix: text before the state that the token writes, too.
        """
        refused = self.refused(packed, prefix)
        if not refused:
            return row
        row = row.copy()
        walker.clear(row, np.array(refused, dtype=np.int64))
        return row

    def refused(self, packed: int, prefix: bytes = b"") -> list[int]:
        """Return the tokens that the automaton allows in a state, and that no split of the text there begins with."""
        if not is_text(prefix):
            return []
        shorter: dict[int, None] = {}
        firsts: set[int] = set()
        own: frozenset[int] | set[int]
        beginning, num_before = self.vocabulary.beginning, len(prefix)
        texts, possible = self._texts(packed)
        for text, end in texts:
            found = beginning(prefix + text, num_before)
            shorter |= dict.fromkeys(found.shorter)
            own = found.firsts | {cut.first for cut in found.cuts if self._is_cut(end, cut)}
            firsts.update(own or found.shorter, found.whole)
        for text, before_last in possible:
            found = beginning(prefix + text, num_before)
            own = found.firsts | {cut.first for cut in found.cuts} or set(found.shorter)
            # to ask whether the text is possible may be to make a frame: only if that changes the answer
            if not own <= firsts and self.machine.step(before_last, text[-1]) != DEAD:
                shorter |= dict.fromkeys(found.shorter)
                firsts.update(own, found.whole)
        return [token for token in shorter if token not in firsts]

    def joined(self, packed: int, token: int, after: int) -> int:
        """Return the longer token that the tokenizer writes for `token` and the bytes that must follow it.

        after: the state after `token`, which is allowed in the state `packed`. Return `token` itself if there is no
        longer token, if bytes that are not known yet may be a part of it, or if the mask of `packed` has decided: then
        `token` begins a text that it knows.
        """
        own = self.vocabulary.token_bytes[token]
        run = self._run(after)
        forced = run.text
        while run.leaves and len(forced) < MAX_FORCED:
            run = self._run(run.end)
            forced += run.text
        if not forced or any(text.startswith(own) for texts in self._texts(packed) for text, _ in texts):
            return token
        text = own + forced
        tokens = self.splits.tokens(text) if is_text(text) else ()
        size = len(self.vocabulary.token_bytes[tokens[0]]) if tokens else 0
        is_whole = size == len(text) and not self.machine.is_complete(run.end)
        return tokens[0] if size > len(own) and not is_whole else token

    def _texts(self, packed: int) -> tuple[list[tuple[bytes, int]], list[tuple[bytes, int]]]:
        """Return the texts that may follow a state, each as far as few are possible, with the states after them.

        One may begin another. Also return settled texts of which it is not known whether their last byte may follow,
        with the states before that byte.
        """
        out: list[tuple[bytes, int]] = []
        possible: list[tuple[bytes, int]] = []
        if self._ways_of(packed) is None:  # most states: in a string, in a number
            return out, possible
        vocabulary = self.vocabulary
        waiting = [(b"", packed)]
        for done, (text, state) in enumerate(waiting, 1):
            run = self._run(state)
            text += run.text
            while run.leaves:
                if run.following and vocabulary.is_settled(text + run.following):
                    text += run.following  # the state after it is not needed: there are no cuts
                    break
                if vocabulary.is_settled(text):
                    break
                if len(self._ways_of(run.end) or ()) > 1:
                    run = ForcedRun(b"", run.end, False, b"")
                    break
                run = self._run(run.end)
                text += run.text
            state = run.end
            is_end = run.leaves or len(waiting) - done + len(out) >= _MAX_TEXTS
            is_end = is_end or 0 < len(text) >= vocabulary.longest_like(text)
            ways = () if is_end else self._ways_of(state) or ()
            if not ways or self.machine.accepts(state):
                whole = whole_characters(text)
                if whole:
                    end = state if whole == text else self.machine.run_bytes(packed, whole)
                    out.append((whole, end))
            for byte, following in ways:
                longer = text + bytes((byte,))
                if following == UNKNOWN:
                    if vocabulary.is_settled(longer):
                        possible.append((longer, state))
                        continue
                    following = self.machine.step(state, byte)
                if following != DEAD:
                    waiting.append((longer, following))
        return out, possible

    def _is_cut(self, end: int, cut: Cut) -> bool:
        """Tell whether a split may cut there because a token goes on past the end of the text. end: the state there."""
        accepted, num_read = self.machine.accepted, len(cut.rest)
        if len(cut.before) and any(map(len, accepted(end, cut.before, num_read, 1))):
            return True
        if not len(cut.unsure):
            return False
        tokens = np.concatenate(accepted(end, cut.unsure, num_read))  # all that need a run are looked at, too
        if not len(tokens):
            return False
        for tried, token in enumerate(tokens.tolist(), 1):
            if self.splits.goes_on(cut.head, token):
                cut.before = np.append(tokens[tried - 1], cut.before)
                cut.unsure = np.setdiff1d(cut.unsure, tokens[: tried - 1], assume_unique=True)
                return True
        cut.unsure = np.setdiff1d(cut.unsure, tokens, assume_unique=True)
        return False

    def _run(self, packed: int) -> ForcedRun:
        found = self._runs.get(packed)
        if found is not None:
            return found
        machine, scratch, text = self.machine, self._scratch, self._text
        scratch[:] = (0, 0, 0, packed, 0, -1, -1, 0)
        while True:
            status = walker.follow(machine.pool, machine.instances, machine.exits, text, scratch, MAX_FORCED)
            if status == -2:
                machine.exit_target(int(scratch[1]), int(scratch[2]))
            elif status == -4 and not machine.accepts(int(scratch[3])):
                scratch[5] = scratch[3]
            else:
                break
        leaves = status == -5
        following = bytes((int(scratch[6]),)) if leaves and scratch[6] >= 0 else b""
        found = self._runs[packed] = ForcedRun(text[: int(scratch[4])].tobytes(), int(scratch[3]), leaves, following)
        return found

    def _ways_of(self, packed: int) -> Ways | None:
        """Return the bytes that may follow with the states after them; None if there are too many."""
        if packed in self._ways:
            return self._ways[packed]
        machine, scratch, following = self.machine, self._scratch, self._following
        scratch[0] = scratch[3] = 0
        while True:
            found = walker.choices(
                machine.pool, machine.instances, machine.exits, packed, scratch, following, MAX_CHOICES
            )
            if found != -2:
                break
            machine.exit_target(int(scratch[1]), int(scratch[2]))
        rows: list[list[int]] = following[: int(scratch[3])].tolist()
        ways = None if found == -3 else tuple((byte, after) for byte, after in rows)
        self._ways[packed] = ways
        return ways
