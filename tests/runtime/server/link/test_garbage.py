"""Full collections wait until the engine is idle."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from ramet.runtime.server.link import process

IDLE = {"num_running": 0.0, "num_waiting": 0.0}


@pytest.fixture
def full() -> Iterator[list[int]]:
    """The full collections that were made; the collector is left as it was."""
    found: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "stop" and info["generation"] == 2:
            found.append(1)

    threshold = gc.get_threshold()
    gc.callbacks.append(note)
    yield found
    gc.callbacks.remove(note)
    gc.set_threshold(*threshold)
    gc.unfreeze()


def test_full_collections_wait_for_an_idle_engine(full: list[int]) -> None:
    process.postpone_full_collections()
    full.clear()
    for _ in range(40):
        gc.collect(1)
    for busy in ({"num_running": 1.0, "num_waiting": 0.0}, {"num_running": 0.0, "num_waiting": 2.0}):
        process.collect_if_idle(busy)
    kept = [[[]] for _ in range(30_000)]  # type: ignore[var-annotated]
    assert len(kept) == 30_000
    assert not full
    process.collect_if_idle(IDLE)
    assert len(full) == 1
    process.collect_if_idle(IDLE)
    assert len(full) == 1, "there is nothing new"


def test_what_existed_before_is_not_looked_at_again(full: list[int]) -> None:
    process.postpone_full_collections()
    assert gc.get_freeze_count() > 0
