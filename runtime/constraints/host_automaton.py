"""One sequence's automaton on the host: its mask, its next state, and the rules by which its text ends.

Its methods ask the grammar, which may take long. So `begin` and `follow` run as works in turns with the steps (see
turns.py), one at a time, and the engine's thread only reads the results.

A text ends where the model means it, although its grammar would let it go on: where it may end, the mask also allows
the refused tokens that no text could begin with, and one that is sampled becomes the end token (`Grammar.ends`). So the
end is as likely as it and all these tokens together. A text that nothing can follow ends without an end token.

A text must be complete within `max_tokens`. Where it must come nearer to its end, the mask allows only tokens that
bring it there and leave enough tokens to finish, so that the model chooses among the ends. If a text has not come
nearer to its end for long, as a string that repeats itself, it must do so early: up to twice as many tokens as the
shortest rest takes are kept for it. A sampled token that would leave too few tokens all the same is replaced by
the first one of the shortest completion. A string that has `string_tokens` is ended in the same way.

A sampled token that the tokenizer would join with text that must follow is
replaced by the longer one: nothing was computed from it yet. If a grammar allows only one token, the forced tokens need
not be decoded one by one; `forced_run` returns them.

Several tokens that a step has sampled are followed one after the other, as if each step had yielded one: a token that
replaces the sampled one, or ends the text, is the last of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ramet.errors import GrammarError
from ramet.runtime.constraints.incomplete import cut_off
from ramet.runtime.types import Grammar, SamplingParams, Sequence


@dataclass(slots=True, eq=False)
class HostAutomaton:
    """The position of a sequence's text in its grammar. Owner: GrammarStates.

    `state`: None once the text is past its end (the request ignores end tokens). `can_finish`: False once no complete
    text fits into `max_tokens`. It stays False, because each token shortens the path to the end by at most one.
    `was_closed`: a token was replaced or refused because the text would not have ended within `max_tokens`. `mask`: of
    the next token, int32 [W]; None if every token is allowed. `ahead`: the masks of the tokens after that, if the next
    ones are the drafted ones. `num_output`: tokens taken so far. `incomplete`: why the text is incomplete, if
    `max_tokens` has ended it. `nearest`: the smallest bound so far of the tokens to the end; `num_idle`: tokens since
    then. `num_in_string`: tokens inside of the current string, counted if there is a limit of them. `ended_strings`:
    after how many tokens of the text that limit ended a string. `is_free`: any token may follow from now on.
    `is_complete`, `num_held`, `num_after`: of the text so far, as in RowOutput.
    """

    sequence: Sequence
    grammar: Grammar
    state: int | None = 0
    can_finish: bool = True
    was_closed: bool = False
    mask: NDArray[np.int32] | None = None
    ahead: list[NDArray[np.int32]] = field(default_factory=list)
    num_output: int = 0
    incomplete: str | None = None
    nearest: int | None = None
    num_idle: int = 0
    num_in_string: int = 0
    ended_strings: list[int] = field(default_factory=list)
    is_free: bool = False
    is_complete: bool = False
    num_held: int = 0
    num_after: int = 0

    def begin(self, num_words: int) -> None:
        """Make the mask of the first token."""
        self.mask = np.full(num_words, -1, dtype=np.int32)
        self._fill_mask(self.mask, 0)

    def follow(self, sampled: Seq[int], is_better: Callable[[int], bool]) -> list[int]:
        """Take the tokens that a step has sampled, and make the mask of the next one.

        Return the tokens to append: those taken (none if the text ends without an end token), and the tokens that must
        follow them, if `is_better` (of their number) says that they are better not decoded.
        """
        self.ahead = []
        tokens: list[int] = []
        for token in sampled[:-1]:
            taken = self._follow(token, _never)
            tokens += taken
            if taken != [token] or self.is_complete:
                return tokens
        return tokens + self._follow(sampled[-1], is_better)

    def look_ahead(self, draft: Seq[int]) -> None:
        """Make the masks `ahead` for a draft of the next tokens, as far as these would be taken as they are."""
        walked = copy.copy(self)
        walked.ended_strings = list(self.ended_strings)
        walked.mask = None if self.mask is None else self.mask.copy()
        self.ahead = []
        for token in draft:
            if walked.mask is None or not walked.mask[token >> 5] >> (token & 31) & 1:
                return
            taken = walked.follow([token], _never)
            if taken != [token] or walked.is_complete or walked.is_free or walked.num_held or walked.mask is None:
                return
            self.ahead.append(walked.mask.copy())

    def _follow(self, token: int, is_better: Callable[[int], bool]) -> list[int]:
        taken = self.take(token)
        if taken is None:
            self.is_complete = True
            return []
        tokens = [taken]
        run = self.forced_run(taken)
        if run and is_better(len(run)):
            self.append(run)
            tokens += run
        if self.state is not None:
            self.num_held = self.grammar.num_after(self.state, is_last=False)
            self.num_after = self.grammar.num_after(self.state, is_last=True)
            self.is_free = self.grammar.is_free(self.state)
        request = self.sequence.request
        num_output = self.num_output
        if tokens[-1] in request.stop_ids and num_output >= request.sampling.min_tokens:
            return tokens
        may_end = self.num_after > 0 or not request.sampling.ignore_eos  # what follows a value ends it in any case
        self.is_complete = may_end and self.state is not None and self.grammar.is_complete(self.state)
        if self.is_complete:
            return tokens
        if num_output >= request.max_tokens:
            self.incomplete = self._why_incomplete()
        elif self.state is None or self.is_free:
            self.mask = None
        elif self.mask is not None:
            self.mask.fill(-1)
            self._fill_mask(self.mask, num_output)
        return tokens

    def take(self, token: int) -> int | None:
        """Advance by a sampled token, or by the token that must replace it. Return the token taken.

        An end token does not move the automaton. Return None if the model means the end and the request has no end
        token.
        """
        taken = self._take(token)
        self.num_output += taken is not None
        return taken

    def _take(self, token: int) -> int | None:
        state, request = self.state, self.sequence.request
        if state is None or (token in request.stop_ids and self.grammar.is_accepting(state)):
            return token
        after = self.grammar.advance(state, token)
        if after is None and self._may_end(self.num_output) and self.grammar.is_accepting(state):
            return request.end_token
        if after is not None and not self._is_watched:
            joined = self.grammar.joined_token(state, token)
            if joined != token and joined not in request.stop_ids:
                token, after = joined, self.grammar.advance(state, joined)
        if self.can_finish and (after is None or not self._fits(after, self._num_left - 1)):
            token, after = self._finishing(state, token, after)
        self._move(token, after)
        return token

    def forced_run(self, token: int) -> list[int]:
        """Return the tokens that must follow `token`, which was taken last.

        The run is empty if the request needs its tokens one by one: for penalties, log-probabilities or stop strings.
        The run ends with its first stop token, and before a token that `take` would replace.
        """
        request = self.sequence.request
        if self.state is None or self._is_watched or token in request.stop_ids:
            return []
        run = self.grammar.forced_tokens(self.state)[: self._num_left]
        end = next((i for i, forced in enumerate(run, 1) if forced in request.stop_ids), len(run))
        return self._finishable(run[:end])

    def append(self, run: list[int]) -> None:
        """Advance by a forced run."""
        for token in run:
            assert self.state is not None
            self._move(token, self.grammar.advance(self.state, token))
            self.num_output += 1

    def _move(self, token: int, after: int | None) -> None:
        """Take a token, which leads to the state `after`."""
        before, self.state = self.state, after
        if before is None or after is None:
            return
        if self.sequence.request.sampling.string_tokens is not None:
            self.num_in_string = self.num_in_string + 1 if self.grammar.stays_in_string(before, token) else 0
        if self.can_finish:
            bound, self.num_idle = self.grammar.completion_bound(after), self.num_idle + 1
            if self.nearest is None or bound < self.nearest:
                self.nearest, self.num_idle = bound, 0

    def _fill_mask(self, row: NDArray[np.int32], num_output: int) -> None:
        """Write the mask of the token that follows `num_output` others."""
        assert self.state is not None
        closing = self._closing_tokens(self.state, num_output)
        if closing:
            tokens = np.array(closing)
            row.fill(0)
            np.bitwise_or.at(row.view(np.uint32), tokens >> 5, np.uint32(1) << (tokens & 31).astype(np.uint32))
            return
        self.grammar.fill_mask(self.state, row)
        ends = self.grammar.ends(self.state) if self._may_end(num_output) else None
        if ends is not None:
            row |= ends

    def _may_end(self, num_output: int) -> bool:
        """Return whether the text may end after `num_output` tokens, as far as the request says."""
        params = self.sequence.request.sampling
        return not params.ignore_eos and num_output >= params.min_tokens

    def _why_incomplete(self) -> str | None:
        if self.state is None or self.grammar.is_accepting(self.state):
            return None
        try:
            shortest = len(self.grammar.shortest_completion(0))
        except GrammarError:
            shortest = 0
        return cut_off(self.sequence.request.max_tokens, shortest)

    def _finishable(self, run: list[int]) -> list[int]:
        """Return the beginning of a run after each of whose tokens the text can be finished within the budget.

        The fewest tokens that finish a text may be fewer than the forced ones, which the tokenizer would write.
        """
        state, num_left = self.state, self._num_left
        if not self.can_finish or state is None or self.grammar.completion_bound(state) <= num_left:
            return run
        for i, token in enumerate(run):
            state = self.grammar.advance(state, token)
            assert state is not None
            if not self._fits(state, num_left - i - 1):
                return run[:i]
        return run

    @property
    def _is_watched(self) -> bool:
        return is_watched(self.sequence.request.sampling)

    @property
    def _num_left(self) -> int:
        """Return how many tokens the sequence may still add."""
        return self.sequence.request.max_tokens - self.num_output

    def _closing_tokens(self, state: int, num_output: int) -> list[int]:
        """Return the only tokens to allow after `num_output` others, if the text must come nearer to its end."""
        request, grammar = self.sequence.request, self.grammar
        limit, num_left = request.sampling.string_tokens, request.max_tokens - num_output - 1
        if limit is not None and self.num_in_string >= limit:
            ending = [token for token in grammar.closing_tokens(state) if not grammar.stays_in_string(state, token)]
            if ending:
                self.ended_strings.append(num_output)
                return self._with_room(state, ending, num_left) or ending
        if grammar.is_closed or not self.can_finish or self._has_room(state, num_left):
            return []  # a closed grammar may as well run on a device, which knows the shortest way alone
        if not self._fits(state, num_left + 1):
            return []
        found = self._with_room(state, grammar.closing_tokens(state), num_left)
        self.was_closed = self.was_closed or bool(found)
        return found

    def _with_room(self, state: int, tokens: list[int], num_left: int) -> list[int]:
        """Return the tokens that leave enough others to finish the text; if there are none, those that leave a way."""
        found = [(token, after) for token in tokens if (after := self.grammar.advance(state, token)) is not None]
        roomy = [token for token, after in found if self._has_room(after, num_left)]
        return roomy or [token for token, after in found if self._fits(after, num_left)]

    def _has_room(self, state: int, num_left: int) -> bool:
        """Return whether `num_left` tokens are enough from `state`: more than some way takes, if the text was idle."""
        if self.grammar.completion_bound(state) <= num_left:
            return True
        shortest = len(self.grammar.shortest_completion(state))
        return shortest + min(shortest, self.num_idle // 4) <= num_left

    def _fits(self, state: int, num_left: int) -> bool:
        """Return whether `num_left` tokens can finish the text from `state`. The cheap bound comes first."""
        grammar = self.grammar
        return grammar.completion_bound(state) <= num_left or len(grammar.shortest_completion(state)) <= num_left

    def _finishing(self, state: int, token: int, after: int | None) -> tuple[int, int | None]:
        """Return the token that leads from `state` to the end within the budget, and the state after it.

        If there is no such token, return `token` and its state `after`.
        """
        end_token, completion = self.sequence.request.end_token, self.grammar.shortest_completion(state)
        if completion and len(completion) <= self._num_left:
            self.was_closed = True
            return completion[0], self.grammar.advance(state, completion[0])
        if not completion and end_token is not None and self.grammar.is_accepting(state):
            self.was_closed = True
            return end_token, after  # the text may end here, but not after any other token
        self.can_finish = False
        return token, after


def is_watched(params: SamplingParams) -> bool:
    """Return whether a request asks for something of each token, so that tokens are taken as they were sampled."""
    return params.edits_logits or params.logprobs is not None or params.has_stops


def _never(num_forced: int) -> bool:
    return False
