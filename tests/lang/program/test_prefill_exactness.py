"""Tokens prefilled in turn k + 1 equal the new tokens, exactly, for every program in the corpus, on the real engine.

The oracle keeps every token sequence whose keys and values were computed, and knows nothing of pages or trees: a
request must compute its prompt but for the longest beginning that any of them has, and at least its last token.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ramet import Engine
from ramet.errors import CheckFailed
from ramet.lang.backends.in_process import EngineBackend
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.types import RequestOptions, RequestOutput, SamplingParams

PROGRAMS = sorted((Path(__file__).resolve().parents[3] / "examples" / "programs").glob("*.py"))
Load = Callable[[Path], Any]  # Any: the Example of conftest.py


class Oracle:
    """An engine's requests, and what each had to compute. A request's own tokens are known once it has ended."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: list[tuple[int, ...]] = []
        self._lock = threading.Lock()
        self.measured: list[tuple[int, int]] = []  # (tokens computed, tokens that were new)
        self.num_scored = 0

    def __getattr__(self, name: str) -> Any:  # Any: the engine's own
        return getattr(self._engine, name)

    def submit(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        options: RequestOptions,
        *,
        on_output: Callable[[RequestOutput], None] | None = None,
        **kwargs: Any,
    ) -> Any:
        assert on_output is not None
        tokens, generated = tuple(prompt), list[int]()
        is_scored = options.score_from is not None
        with self._lock:
            new = len(tokens) - min(self._longest(tokens), len(tokens) - 1)
            if is_scored:
                # Its siblings wait for what they share with it. Nothing is predicted from the last token of a choice.
                self._known.append(tokens[:-1])

        def take(output: RequestOutput) -> None:
            num_before = len(generated)
            generated.extend(output.token_ids)
            if output.finish_reason is not None:
                with self._lock:
                    if is_scored:
                        self.num_scored += 1
                    else:
                        usage = output.usage
                        self.measured.append((usage.prompt_tokens - usage.cached_tokens, new))
                        # The last tokens, sampled or forced, have not been computed; an end token is none of the text.
                        has_end = isinstance(output.stop_match, int)
                        self._known.append((*tokens, *(generated if has_end else generated[:num_before])))
            on_output(output)

        return self._engine.submit(prompt, sampling, options, on_output=take, **kwargs)

    def _longest(self, tokens: Sequence[int]) -> int:
        """How many of these tokens some known sequence begins with."""
        best = 0
        for known in self._known:
            size = 0
            for a, b in zip(known, tokens, strict=False):
                if a != b:
                    break
                size += 1
            best = max(best, size)
        return best


@pytest.fixture(scope="module")
def engine(tiny_model: LoadedModel) -> Iterator[Engine]:
    with Engine(tiny_model, num_kv_tokens=1 << 15, max_running_requests=32) as engine:
        yield engine


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_a_turn_prefills_exactly_its_new_tokens(path: Path, load_example: Load, engine: Engine) -> None:
    example = load_example(path)
    engine.flush_cache()
    oracle = Oracle(engine)
    # One after the other: what runs at the same time may find what another one computes, or come before it.
    with contextlib.suppress(CheckFailed):  # a random model may never write what a program insists on
        example.program.run(**example.arguments, backend=EngineBackend(oracle), seed=11, stage="always", max_tokens=24)
    assert oracle.measured or oracle.num_scored
    assert [computed for computed, _ in oracle.measured] == [new for _, new in oracle.measured]
