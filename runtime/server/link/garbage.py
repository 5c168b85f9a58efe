"""When the engine's process collects garbage: a full collection waits until the engine is idle.

A full collection looks at every object that holds others, with the interpreter's lock held: with some hundred grammars
alive it took 74 ms, in the middle of a step. The middle generation is collected after three collections of young
objects instead of eleven: the same work in shorter pauses, of 0.5 instead of 2 to 3 ms.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping

_MIDDLE = 2  # the middle generation is collected when the young one was, more often than this
_MANY = 7000  # collections of the middle generation, after which a full one no longer waits: about 14 million objects
_FEW = 35  # as many since the last full one make another one worth its time


def postpone_full_collections() -> None:
    """Keep all objects that exist now out of collections, and let full ones wait for `collect_if_idle`."""
    gc.collect()
    gc.freeze()
    young, _, _ = gc.get_threshold()
    gc.set_threshold(young, _MIDDLE, _MANY)


def collect_if_idle(stats: Mapping[str, float]) -> None:
    """Make a full collection if it is worth its time and the engine, with these `Engine.stats()`, has nothing to do."""
    if gc.get_count()[2] >= _FEW and not (stats["num_running"] or stats["num_waiting"]):
        gc.collect()
