"""A small model, or a head of the larger one, that drafts for it greedily, for all sequences at once.

It has pages, slots and steps of its own, on a GPU graphs, too. For each sequence that it drafts for it keeps a sequence
with the same tokens, whose KV it computes when the next draft is made: the tokens that are new since the last one, and
then one token after another, which the host reads behind the last one. What it drafted wrongly is forgotten, as the
larger model forgets it; all that a head drafted is read again, with the model's features in place of its own results.
Not here: when it is worth asking (`speculation`), and whether the drafts are right (the scheduler and the steps).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from ramet.errors import ConfigError
from ramet.runtime.cache.page_pool import PagePool
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.speculation.heads import Features
from ramet.runtime.steps.launched_step import LaunchedStep
from ramet.runtime.steps.model_runner import ModelRunner
from ramet.runtime.types import Batch, Request, SamplingParams, ScheduledSequence, Sequence, Status

DRAFT_KV_TOKENS = {"cpu": 8192, "cuda": 65_536}  # of all sequences for which it drafts
MOST_NEW = 256  # tokens that are new to the model, in one draft of all sequences: prompts are computed in such parts


class DraftModel:
    """Drafts by a model or a head. Owner: `Speculation`."""

    def __init__(self, runner: ModelRunner, features: Features | None = None) -> None:
        """features: of a head, whose sequences lack the first token."""
        self._runner = runner
        self._features = features
        self._pool = PagePool(runner.kv_cache.num_pages, runner.kv_cache.page_size)
        self._free_slots = list(range(runner.slots.num_slots))
        self._copies: dict[Sequence, Sequence] = {}
        self._num_read: dict[Sequence, int] = {}  # output tokens of a sequence that its copy had when it was read last
        self._num_steps = 0

    @property
    def num_sequences(self) -> int:
        """How many sequences it holds pages for."""
        return len(self._copies)

    def draft(self, sequences: Seq[Sequence], count: int) -> dict[Sequence, list[int]]:
        """Return `count` tokens that may follow the known ones, of the sequences for which there is room.

        Prompts are computed in parts, so a new sequence may have no draft yet.
        """
        room, extends = MOST_NEW, list[ScheduledSequence]()
        ready: dict[Sequence, Sequence] = {}
        readers: list[Sequence] = []
        for sequence in sequences:
            copy = self._read(sequence) if room else None
            if copy is None or not self._grow(sequence, copy, count):
                continue
            num_new = min(copy.num_tokens - copy.num_computed, room)
            room -= num_new
            is_last = copy.num_computed + num_new == copy.num_tokens
            extends.append(ScheduledSequence(copy, copy.num_computed, num_new, int(is_last)))
            copy.num_computed += num_new
            readers.append(sequence)
            if is_last:
                ready[sequence] = copy
        if not extends:
            return {}
        if self._features is not None:
            self._features.bring(list(zip(readers, extends, strict=True)))
        steps = [self._launch(extends, 0)]
        for _ in range(count - 1 if ready else 0):  # the device knows the tokens that these continue
            rows = [ScheduledSequence(copy, copy.num_computed, 1, 1) for copy in ready.values()]
            for copy in ready.values():
                copy.num_computed += 1
            steps.append(self._launch(rows, len(rows)))
        for step in steps:
            for item, output in zip(step.batch.items, step.read(), strict=True):
                item.sequence.output_ids += output.token_ids
        if self._features is not None:
            for item in extends:
                item.sequence.num_computed = item.start + item.num_tokens
        return {sequence: copy.output_ids[len(sequence.output_ids) :] for sequence, copy in ready.items()}

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence. Does nothing if it is unknown."""
        copy = self._copies.pop(sequence, None)
        if copy is None:
            return
        assert copy.slot is not None
        del self._num_read[sequence]
        self._pool.free(copy.page_ids)
        self._free_slots.append(copy.slot)

    def check_integrity(self) -> None:
        """Check that every page is free or a copy's. Raises: CacheIntegrityError."""
        self._pool.check_integrity()
        used = sorted(page for copy in self._copies.values() for page in copy.page_ids)
        assert used == sorted(self._pool.used_pages()), "pages of the draft model are lost"

    def _read(self, sequence: Sequence) -> Sequence | None:
        """Give the known tokens to the sequence's copy, which forgets its wrong drafts.

        None: no slot is free, or a head has no pair of tokens in the prompt.
        """
        copy = self._copies.get(sequence)
        if copy is None:
            request = sequence.request
            prompt_ids = request.prompt_ids if self._features is None else request.prompt_ids[1:]
            if not self._free_slots or not len(prompt_ids):
                return None
            values = SamplingParams(temperature=0.0)
            same = Request(request.request_id, prompt_ids, values, request.max_tokens)
            copy = Sequence(same, slot=self._free_slots.pop(), status=Status.RUNNING)
            self._copies[sequence], self._num_read[sequence] = copy, 0
        begin = self._num_read[sequence]
        known, drafted = sequence.output_ids[begin:], copy.output_ids[begin:]
        pairs = enumerate(zip(known, drafted, strict=False))
        num_same = next((i for i, (one, other) in pairs if one != other), min(len(known), len(drafted)))
        copy.output_ids[begin:] = known
        num_right = copy.request.num_prompt + begin + num_same
        copy.num_computed = min(copy.num_computed, num_right, copy.num_tokens - 1)
        self._num_read[sequence] = len(copy.output_ids)
        return copy

    def _grow(self, sequence: Sequence, copy: Sequence, count: int) -> bool:
        """Take the pages for a draft. Without room for them, the copy is forgotten."""
        num_tokens = copy.num_tokens + count
        num_missing = -(-num_tokens // self._pool.page_size) - len(copy.page_ids)
        if num_tokens > self._runner.max_kv_len:
            self.release(sequence)
            return False
        if num_missing > 0:
            pages = self._pool.allocate(num_missing)
            if pages is None:
                self.release(sequence)
                return False
            copy.page_ids += pages
        return True

    def _launch(self, items: list[ScheduledSequence], num_decode: int) -> LaunchedStep:
        self._num_steps += 1
        batch = Batch(self._num_steps, tuple(items), num_decode, sum(item.num_tokens for item in items))
        return self._runner.launch(batch)


def check_vocabulary(draft: LoadedModel, target: LoadedModel) -> None:
    """Raise ConfigError unless both models have the same tokens."""
    theirs, ours = draft.tokenizer, target.tokenizer
    pairs = enumerate(zip(theirs.token_bytes, ours.token_bytes, strict=False))
    differing = next((i for i, (one, other) in pairs if one != other), None)
    if differing is not None:
        tokens = theirs.token_bytes[differing], ours.token_bytes[differing]
        detail = f"token {differing} is {tokens[0]!r} there and {tokens[1]!r} in {target.name}"
    elif theirs.special_tokens != ours.special_tokens:
        detail = f"its special tokens are not those of {target.name}"
    elif draft.config.vocab_size > target.config.vocab_size:
        detail = f"it has {draft.config.vocab_size:,} tokens, {target.name} {target.config.vocab_size:,}"
    else:
        return
    raise ConfigError(
        f"the draft model {draft.name} has another vocabulary: {detail}; choose a smaller model of the same family"
    )
