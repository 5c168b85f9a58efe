"""A step arrives at another rank as it was sent."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ramet.kernels.attention.tree import ITEM_FIELDS, TreeWork
from ramet.runtime.parallel.messages import RankMessage, decoder, encoder
from ramet.runtime.steps.inputs import ExtendArrays, Step


def int32(rng: np.random.Generator, *shape: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return rng.integers(-(2**31), 2**31 - 1, shape, dtype=np.int32)


@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(0, 5), extends=st.booleans(), plans=st.booleans())
def test_steps_survive_the_way(seed: int, rows: int, extends: bool, plans: bool) -> None:
    rng = np.random.default_rng(seed)
    arrays = {f.name: int32(rng, *(rows, 3) if f.name == "updates" else (rows,)) for f in fields(ExtendArrays)}
    works = {f.name: int32(rng, *(rows, ITEM_FIELDS) if f.name == "items" else (rows,)) for f in fields(TreeWork)}
    step = Step(
        int32(rng, rows),
        int32(rng, rows),
        int32(rng, rows),
        int32(rng, rows, 3),
        ExtendArrays(**arrays) if extends else None,
        uses_tree=bool(rng.integers(2)),
        logprob_rows=int32(rng, rows),
        num_tops=int(rng.integers(20)),
        num_score_tops=int(rng.integers(20)),
        needs_host=bool(rng.integers(2)),
    )
    step.masks, step.edited = int32(rng, rows, 2), [None] * rows
    sent = decoder.decode(encoder.encode(RankMessage.of(step, TreeWork(**works) if plans else None)))
    assert not sent.last
    found = sent.step
    assert found is not None
    for name in ("decode_rows", "new_pages", "kv_lens", "page_copies", "logprob_rows"):
        np.testing.assert_array_equal(getattr(found, name), getattr(step, name), strict=True)
    for name in ("uses_tree", "num_tops", "num_score_tops", "needs_host"):
        assert getattr(found, name) == getattr(step, name)
    assert not [name for name in ("masks", "edited") if getattr(found, name) is not None], "the first rank samples"
    assert (found.extend is not None) == extends
    if found.extend is not None:
        for name, array in arrays.items():
            np.testing.assert_array_equal(getattr(found.extend, name), array, strict=True)
            assert getattr(found.extend, name).flags.writeable, "torch refuses to share memory that it may not write"
    work = sent.work
    assert (work is not None) == plans
    if work is not None:
        for name, array in works.items():
            np.testing.assert_array_equal(getattr(work, name), array, strict=True)


def test_last_tokens_survive_the_way() -> None:
    message = RankMessage(last=[(0, 5, 7), (3, 2, 1)])
    assert decoder.decode(encoder.encode(message)) == message
