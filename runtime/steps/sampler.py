"""Turn a step's hidden states into tokens: compute logits, apply the host's edits and masks, sample, update slots."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from ramet.kernels.grammar.arena import GrammarArena
from ramet.kernels.sampling.logit_edits import count_tokens
from ramet.kernels.sampling.sample import compute_logprobs
from ramet.kernels.slots.tables import SlotTables, commit_decode, upload
from ramet.runtime.models.decoder import Decoder
from ramet.runtime.steps.inputs import ExtendInputs, Step
from ramet.runtime.steps.logit_edits import LogitEdits, apply_edits

# Logits rows of one part of a scoring chunk, at most and at least. Between, it has as many as there are slots: a step's
# workspace has room for the logits of all of them (`memory.logits_bytes`).
_SCORE_ROWS, _LEAST_SCORE_ROWS = 512, 64


@dataclass(slots=True)
class Scores:
    """Scores of Q prompt tokens: log-probabilities fp32 [Q], and of the n likeliest in their places [Q, n]."""

    values: Tensor
    top_ids: Tensor
    top_values: Tensor


@dataclass(slots=True)
class Sampled:
    """A step's results on the device. tokens: int32 [R], one for each sampling row. scores: if requested. pooled:
    fp32 [k, hidden], sums of hidden states, for pooling requests.

    logits_of: returns the model's unedited logits of some of the R rows, by their indices. Valid until the next step.
    """

    tokens: Tensor
    logits_of: Callable[[Tensor], Tensor]
    scores: Scores | None = None
    pooled: Tensor | None = None


class Sampler:
    """Samples tokens and stores them in the slots."""

    def __init__(
        self,
        decoder: Decoder,
        tables: SlotTables,
        arena: GrammarArena | None,
        edits: LogitEdits | None,
        share: Callable[[Tensor], None] | None,
    ) -> None:
        """share: overwrites a tensor with the first rank's, so all ranks store the same tokens; None with one rank."""
        self._decoder = decoder
        self._tables = tables
        self._arena = arena
        self._share = share
        self._score_rows = min(max(tables.num_slots, _LEAST_SCORE_ROWS), _SCORE_ROWS)
        self._sampling = tables.sampling(
            None if arena is None else arena.mask_index,
            None if arena is None else arena.mask_rows,
            None if edits is None else edits.tables,
        )

    def choose(self, logits: Tensor, slots: Tensor, positions: Tensor, mask: Tensor | None, out: Tensor) -> None:
        """Sample a token for each row into `out`, and store it in the row's slot. May be part of a CUDA graph."""
        self._decoder.ops.sample(logits, self._sampling, slots, positions, mask, out)
        self._commit(slots, out, positions)

    def choose_in_turns(
        self, logits: Tensor, turns: Seq[Tensor], positions: Tensor, masks: Tensor | None, out: Tensor
    ) -> None:
        """Sample R positions, of which some follow drafted tokens, into `out` [R + 1]. May be part of a CUDA graph.

        turns: int32 [3, n] each, as `ExtendArrays.turns`. A turn's sampled tokens advance the slots as those of a step
        do, so the next turn has its masks, penalties and budgets. Once a sequence's sampled token is not the drafted
        one, its later positions advance nothing, and yield 0. An index of R stands for no position.
        """
        last, no_slot = len(out) - 2, self._tables.num_slots
        out.fill_(-1)
        for slots, index, after in turns:
            places = index.clamp(max=last)
            mask = None if masks is None else masks.index_select(0, places)
            if mask is not None and self._arena is not None:
                self._arena.set_host_masks(slots, mask)  # what the slots' states select
                mask = None
            is_right = (after < 0) | (out.index_select(0, (index - 1).clamp(min=0)) == after)
            rows = torch.where(is_right, slots, no_slot)
            tokens = torch.empty_like(index)
            self.choose(logits.index_select(0, places), rows, positions.index_select(0, places), mask, tokens)
            out.index_copy_(0, index.long(), torch.where(is_right, tokens, -1))
        out.clamp_(min=0)

    def sample(self, step: Step, logits: Tensor, slots: Tensor, positions: Tensor) -> Sampled:
        """Apply the host's edits and masks to a step's logits [R, V], and sample its rows."""
        edited = apply_edits(logits, step.edited) if step.edited is not None else logits
        mask = None if step.masks is None else upload([step.masks], logits.device)[0]
        tokens = torch.empty(slots.numel() + 1, dtype=torch.int32, device=logits.device)
        if step.num_verified and self._advances:
            assert step.extend is not None
            self.choose_in_turns(edited, upload(step.extend.turns(), logits.device), positions, mask, tokens)
        else:
            self.choose(edited, slots, positions, mask, tokens[:-1])
        return Sampled(tokens[:-1], lambda rows: logits.index_select(0, rows))

    @property
    def _advances(self) -> bool:
        """Whether a slot's masks or edits depend on the tokens that the device sampled for it."""
        return self._arena is not None or self._sampling.edits is not None

    def sample_extend(self, step: Step, hidden: Tensor, sent: ExtendInputs) -> Sampled:
        """Compute the requested scores and sample the sampling rows, from the hidden states of a step's tokens."""
        decoder = self._decoder
        scores = self.score(hidden, sent.score_index, sent.score_targets, step.num_score_tops)
        ranges = () if step.pooled is None else step.pooled.tolist()
        pooled = torch.stack([hidden[first:last].float().sum(0) for first, last in ranges]) if ranges else None
        if sent.sample_rows.numel() == 0:
            return Sampled(sent.sample_rows, decoder.logits, scores, pooled)
        logits = decoder.logits(hidden.index_select(0, sent.sample_index))
        sampled = self.sample(step, logits, sent.sample_rows, sent.sample_positions)
        sampled.scores, sampled.pooled = scores, pooled
        return sampled

    def score(self, hidden: Tensor, index: Tensor, targets: Tensor, num_tops: int) -> Scores | None:
        """Score `targets` [Q] after the hidden states at `index` [Q], with the `num_tops` likeliest; None if Q is 0."""
        if not index.numel():
            return None
        parts = []
        for low in range(0, index.numel(), self._score_rows):
            part = slice(low, low + self._score_rows)
            logits = self._decoder.logits(hidden.index_select(0, index[part]))
            parts.append(compute_logprobs(logits, targets[part], num_tops))
        values, top_values, top_ids = (torch.cat(column) for column in zip(*parts, strict=True))
        return Scores(values, top_ids, top_values)

    def warm_up(self, num_rows: int, dummy_slot: int) -> None:
        """Launch all variants of the sampling kernels: those of logits that the host has edited or masks, too."""
        device, vocab_size = self._decoder.device, self._decoder.config.vocab_size
        slots = torch.full((num_rows,), dummy_slot, dtype=torch.int32, device=device)
        masks: list[Tensor | None] = [None]
        if self._arena is None:  # otherwise its rows hold the host's masks
            masks.append(torch.full((num_rows, -(-vocab_size // 32)), -1, dtype=torch.int32, device=device))
        for dtype in dict.fromkeys((self._decoder.dtype, torch.float32)):
            logits = torch.zeros((num_rows, vocab_size), dtype=dtype, device=device)
            for mask in masks:
                self._decoder.ops.sample(logits, self._sampling, slots, torch.zeros_like(slots), mask, None)

    def _commit(self, slots: Tensor, tokens: Tensor, positions: Tensor) -> None:
        """Advance the slots' automata, which may replace a token to close a text, then store and count the tokens."""
        tables, arena = self._tables, self._arena
        if arena is not None:
            arena.advance(slots, tokens, tables.grammar_state, tables.budgets(positions))
        if self._sampling.edits is not None:
            count_tokens(self._sampling.edits, slots, tokens)
        if self._share is not None:
            self._share(tokens)
        commit_decode(slots, tokens, tables.last_token, tables.kv_len)
