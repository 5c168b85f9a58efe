"""The shortest ways through a frame's table, compared with a search by single bytes."""

from __future__ import annotations

import numpy as np
import pytest

from ramet.grammar.machine.frame import REFUSE, FrameTable, leave, length_to_exit, path_to_exit, ways_to_exits

NUM_EXITS = 4


def random_table(seed: int) -> FrameTable:
    rng = np.random.default_rng(seed)
    n, width = int(rng.integers(1, 9)), int(rng.integers(1, 5))
    entries = [REFUSE, *range(n), *(leave(e, again) for e in range(NUM_EXITS) for again in (False, True))]
    chances = np.array([4, *[2] * n, *[0.4] * (2 * NUM_EXITS)])
    rows = rng.choice(entries, size=(n, width), p=chances / chances.sum()).astype(np.int32)
    byte_class = rng.integers(0, width, size=256).astype(np.uint8)
    byte_class[:width] = np.arange(width)
    ends = rng.choice([-1, -1, -1, *range(NUM_EXITS)], size=n).astype(np.int32) if seed % 2 else None
    return FrameTable(rows, byte_class, NUM_EXITS, ends)


def read(table: FrameTable, local: int, text: bytes) -> set[int]:
    """The exits by which a text leaves, at its last byte or unread after it."""
    for i, byte in enumerate(text):
        entry = int(table.rows[local, table.byte_class[byte]])
        if entry < 0:
            return {e for e in range(NUM_EXITS) if entry == leave(e) and i + 1 == len(text)}
        local = entry
    unread = {e for e in range(NUM_EXITS) if (table.rows[local] == leave(e, again=True)).any()}
    return unread | ({int(table.end_exits[local])} - {-1} if table.end_exits is not None else set())


def lengths_by_bytes(table: FrameTable, local: int) -> dict[int, int]:
    found: dict[int, int] = {}
    level = {b"": local}
    samples = [int(np.flatnonzero(table.byte_class == c)[0]) for c in range(table.width)]
    seen = {local}
    for length in range(table.num_states + 2):
        for text in level:
            for e in read(table, local, text):
                found.setdefault(e, length)
        direct = {e for text, state in level.items() for e in range(NUM_EXITS) if (table.rows[state] == leave(e)).any()}
        following = {}
        for text, state in level.items():
            for byte in samples:
                entry = int(table.rows[state, table.byte_class[byte]])
                if entry >= 0 and entry not in seen:
                    seen.add(entry)
                    following[text + bytes((byte,))] = entry
        for state in following.values():
            for e in range(NUM_EXITS):
                if (table.rows[state] == leave(e, again=True)).any():
                    found.setdefault(e, length + 1)
                if table.end_exits is not None and table.end_exits[state] == e:
                    found.setdefault(e, length + 1)
        for e in direct:
            found[e] = min(found.get(e, length + 1), length + 1)
        level = following
    return found


@pytest.mark.parametrize("seed", range(200))
def test_ways_are_shortest_and_lead_to_their_exits(seed: int) -> None:
    table = random_table(seed)
    for local in range(table.num_states):
        expected = lengths_by_bytes(table, local)
        ways = ways_to_exits(table, local)
        for e in range(NUM_EXITS):
            length, path = length_to_exit(table, e, local), path_to_exit(table, e, local)
            assert length == expected.get(e)
            assert int(ways.lengths[e]) == (-1 if length is None else length)
            if length is not None:
                assert path is not None
                for way in (path, ways.way(e)):
                    assert len(way) == length
                    assert e in read(table, local, way)
