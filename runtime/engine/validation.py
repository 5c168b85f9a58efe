"""Check requests: turn a caller's arguments into a Request, or raise an error that names the wrong argument."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable

import numpy as np

from ramet.errors import ContextOverflow, InvalidRequest
from ramet.runtime.text.stops import check_pattern
from ramet.runtime.text.tokenizer import Tokenizer
from ramet.runtime.types import (
    Adapter,
    Grammar,
    Pooling,
    Request,
    RequestOptions,
    SamplingParams,
    TokenIds,
    wrong_option,
)

_MOST_EXPECTED = 100_000  # characters of a client's draft; the rest is not looked at


class RequestBorder:
    """Makes the requests of one engine: their ids, seeds and limits. Thread-safe.

    `context_limit`: name of the option that limits the context. `default_max_tokens`: for requests without max_tokens.
    `seed`: seed of the generator that draws seeds for requests without one. `drafts`: those of clients are of use.
    `model_pooling`: as the model's files say. `find_adapter`: returns the loaded adapter of a name, or raises
    InvalidRequest.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        context_length: int,
        *,
        context_limit: str,
        default_max_tokens: int,
        seed: int,
        drafts: bool,
        find_adapter: Callable[[str], Adapter] | None,
        model_pooling: Pooling,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._context_length = context_length
        self._context_limit = context_limit
        self._default_max_tokens = default_max_tokens
        self._drafts = drafts
        self._find_adapter = find_adapter
        self._model_pooling = model_pooling
        self._ids = itertools.count()
        self._seeds = random.Random(seed)
        self._seed_lock = threading.Lock()

    def make(
        self,
        prompt: str | list[int] | TokenIds,
        sampling: SamplingParams,
        options: RequestOptions,
        *,
        grammar: Grammar | None = None,
        request_id: str | None = None,
    ) -> Request:
        """Check the arguments and make a request. Raises the errors of `Engine.submit`."""
        if request_id is not None and not isinstance(request_id, str):
            raise wrong_option("request_id", request_id, "text, or None")
        ids = self._tokenizer.encode(prompt, parse_special=True) if isinstance(prompt, str) else prompt
        vocab = self._vocab_size
        try:
            prompt_ids = np.asarray(ids)
        except ValueError as error:  # lists of several lengths
            raise InvalidRequest(f"the prompt must be text or a list of token ids: {error}", param="prompt") from error
        if prompt_ids.ndim != 1 or (prompt_ids.size and prompt_ids.dtype.kind not in "iu"):
            raise InvalidRequest("the prompt must be text or one list of token ids (integers)", param="prompt")
        if prompt_ids.size and not (prompt_ids.min() >= 0 and prompt_ids.max() < vocab):
            wrong = prompt_ids[(prompt_ids < 0) | (prompt_ids >= vocab)][0]
            raise InvalidRequest(f"prompt token {wrong} is outside the vocabulary of {vocab:,} tokens", param="prompt")
        for name, tokens in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
            for token in tokens:
                if token >= vocab:
                    raise InvalidRequest(f"{name} names token {token}, but the vocabulary has {vocab:,}", param=name)
        for pattern in sampling.stop_regex:
            check_pattern(pattern)
        adapter = self._adapter(options.adapter) if options.adapter else None
        num_prompt = len(prompt_ids)
        score_from = options.score_from
        pooling = self._model_pooling if options.pooling == "model" else options.pooling
        if pooling is not None:  # the states before the last one are needed for a mean alone, and are not cached
            score_from = max(num_prompt, 1) if pooling == "last" else 1
        if num_prompt and score_from is not None and not 1 <= score_from <= num_prompt:
            raise InvalidRequest(f"score_from is {score_from} but must be in [1, {num_prompt}]", param="score_from")
        room = self._context_length - num_prompt
        wanted = sampling.max_tokens
        if score_from is not None:
            wanted = 0
        elif wanted is None:
            wanted = min(self._default_max_tokens, max(room, 1))
        if wanted > room:
            raise ContextOverflow(
                f"prompt has {num_prompt:,} tokens and max_tokens is {wanted:,}, but the context is "
                f"{self._context_length:,}; shorten the prompt, lower max_tokens, or raise {self._context_limit}",
                param="max_tokens" if num_prompt < self._context_length else "prompt",
            )
        seed = sampling.seed
        if seed is None:
            with self._seed_lock:
                seed = self._seeds.getrandbits(63)
        eos = frozenset() if sampling.ignore_eos else self._tokenizer.eos_ids
        expected = options.draft[:_MOST_EXPECTED] if self._drafts else ""
        return Request(
            request_id=request_id or f"request-{next(self._ids)}",
            prompt_ids=prompt_ids.astype(np.int32),
            sampling=sampling,
            max_tokens=wanted,
            stop_ids=eos | frozenset(sampling.stop_token_ids),
            grammar=grammar,
            cache_salt=options.cache_salt if adapter is None else adapter.namespace + options.cache_salt,
            program_id=options.program_id,
            owner=options.owner,
            task=options.task,
            priority=options.priority,
            deadline_s=None if options.deadline_s is None else time.monotonic() + options.deadline_s,
            score_from=score_from,
            seed=seed,
            expected_ids=np.asarray(self._tokenizer.encode(expected), dtype=np.int32) if expected else None,
            adapter=adapter,
            pooling=pooling,
        )

    def _adapter(self, name: str) -> Adapter:
        if self._find_adapter is None:
            raise InvalidRequest(
                f"adapter is {name[:200]!r} but this engine takes none; start it with --lora or --max-loras",
                param="adapter",
            )
        return self._find_adapter(name)
