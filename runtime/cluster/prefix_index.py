"""Which replica holds which prefix: an index by key over all replicas, and each replica's own keys.

A replica that holds a prefix holds every shorter one, so the longest prefix that a replica holds, and the longest that
anybody holds, are found by binary search. Nothing here looks at all replicas.

`PrefixIndex` mirrors what the replicas' caches say of themselves (`CacheChanges`). It is bounded: where there would be
more than `max_keys` pairs of a key and a replica, it keeps the keys of every second page only, then of every fourth,
and so on. `HolderTable`, on which it stands, is used alone for what is about to be cached.

Not here: the choice among the holders (`router`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ramet.runtime.cache.prefix_log import CacheChanges

_COARSEST = 256  # pages; a key says the number of its pages modulo this
_NOBODY: tuple[int, ...] = ()


class HolderTable(dict[int, int | list[int]]):
    """Key -> the replicas that hold it. One holder is kept as a plain integer: most keys have one."""

    def add(self, key: int, replica: int) -> None:
        """Add a holder; a second time, if it holds the key already."""
        found = self.get(key)
        if found is None:
            self[key] = replica
        elif isinstance(found, list):
            found.append(replica)
        else:
            self[key] = [found, replica]

    def discard(self, key: int, replica: int) -> None:
        """Remove a holder once, if it is one."""
        found = self.get(key)
        if found == replica:
            del self[key]
        elif isinstance(found, list) and replica in found:
            found.remove(replica)
            if len(found) == 1:
                self[key] = found[0]

    def of(self, key: int) -> Sequence[int]:
        """Return the holders of a key. The caller must not change them."""
        found = self.get(key)
        return _NOBODY if found is None else found if isinstance(found, list) else (found,)

    def holds(self, key: int, replica: int) -> bool:
        found = self.get(key)
        return found == replica or (isinstance(found, list) and replica in found)

    def num_bytes(self) -> int:
        """Bytes of the table, its keys included. O(keys)."""
        lists = sum(sys.getsizeof(found) for found in self.values() if isinstance(found, list))
        return sys.getsizeof(self) + lists + 36 * len(self)


class PrefixIndex:
    """The mirror of the replicas' caches. `grain`: it knows the prefixes whose pages are a multiple of this number."""

    def __init__(self, max_keys: int = 2_000_000) -> None:
        self.grain = 1
        self.num_keys = 0  # pairs of a key and a replica
        self._max_keys = max_keys
        self._table = HolderTable()
        self._keys: dict[int, set[int]] = {}  # by replica
        self._numbers: dict[int, int] = {}  # of the last changes, by replica

    def apply(self, replica: int, changes: CacheChanges) -> bool:
        """Take over a replica's changes. Returns False if earlier ones are missing: then only a whole list will do.

        Changes that were applied before are ignored.
        """
        seen = self._numbers.get(replica)
        if changes.is_whole:
            if seen is not None and changes.number < seen:
                return True
            self.forget(replica)
        elif seen is None or changes.number > seen + 1:
            return False
        elif changes.number <= seen:
            return True
        self._numbers[replica] = changes.number
        mine = self._keys.setdefault(replica, set())
        for key in changes.removed:
            if key in mine:
                mine.discard(key)
                self._table.discard(key, replica)
                self.num_keys -= 1
        grain = self.grain - 1
        for key in [key for key in changes.added if not key & grain]:
            if not key & (self.grain - 1) and key not in mine:
                if self.num_keys >= self._max_keys:
                    has_room = self._has_room(key)
                    mine = self._keys[replica]
                    if not has_room:
                        continue
                mine.add(key)
                self._table.add(key, replica)
                self.num_keys += 1
        return True

    def forget(self, replica: int) -> None:
        """Drop a replica and all that is known of it. O(its keys)."""
        mine = self._keys.pop(replica, set())
        self._numbers.pop(replica, None)
        self.num_keys -= len(mine)
        for key in mine:
            self._table.discard(key, replica)

    def holds(self, key: int, replica: int) -> bool:
        mine = self._keys.get(replica)
        return mine is not None and key in mine

    def holders(self, key: int) -> Sequence[int]:
        """Return the replicas that hold the prefix with this key. The caller must not change the result."""
        return self._table.of(key)

    def coarse(self, keys: Sequence[int], every: int = 1) -> Sequence[int]:
        """Return those keys of a prompt, one for `every` pages, that this index may know."""
        step = self.grain // every  # an index only becomes coarser
        return keys if step == 1 else keys[step - 1 :: step]

    def num_held(self, keys: Sequence[int]) -> int:
        """Return how many of the keys, the shortest prefix first, somebody holds. O(log)."""
        return _num_within(keys, self._table, len(keys))

    def num_shared(self, keys: Sequence[int], num_held: int) -> int:
        """Return how many of the first `num_held` keys have more holders than the last of these. O(log)."""
        get = self._table.get
        last = get(keys[num_held - 1])
        most = len(last) if isinstance(last, list) else 1
        low, high = 0, num_held - 1  # the longest prefix with more holders is there
        while low < high:
            middle = (low + high + 1) // 2
            found = get(keys[middle - 1])
            if isinstance(found, list) and len(found) > most:
                low = middle
            else:
                high = middle - 1
        return low

    def num_held_by(self, keys: Sequence[int], replica: int, most: int) -> int:
        """Return how many of the first `most` keys a replica holds. O(log)."""
        mine = self._keys.get(replica)
        return 0 if mine is None else _num_within(keys, mine, most)

    def num_bytes(self) -> int:
        """Bytes of the index. O(keys)."""
        return self._table.num_bytes() + sum(sys.getsizeof(mine) for mine in self._keys.values())

    def make_room(self, num_keys: int) -> None:
        """Become so coarse that `num_keys` keys of pages, all those that replicas may have, will not be too many.

        Cheap while nothing is known yet; otherwise O(keys).
        """
        while num_keys > self._max_keys * self.grain and self.grain < _COARSEST:
            self._coarsen()

    def _coarsen(self) -> None:
        """Keep every second page only. All tables are made again: they would not shrink."""
        self.grain *= 2
        self._table = HolderTable()
        self.num_keys = 0
        for replica, mine in self._keys.items():
            kept = self._keys[replica] = {key for key in mine if not key & (self.grain - 1)}
            self.num_keys += len(kept)
            for key in kept:
                self._table.add(key, replica)

    def _has_room(self, wanted: int) -> bool:
        """Return whether the wanted key of a full index may be added, having made room."""
        if self.grain < _COARSEST:
            self._coarsen()
        return not wanted & (self.grain - 1) and self.num_keys < self._max_keys


def _num_within(keys: Sequence[int], held: HolderTable | set[int], most: int) -> int:
    """How many of the first `most` keys are held, of which all come before those that are not."""
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        if keys[middle] in held:
            low = middle + 1
        else:
            high = middle
    return low
