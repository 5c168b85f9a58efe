"""What requests hold together while they are in flight, with a limit for all of them and a fair share for each key."""

from __future__ import annotations

from collections import Counter

from ramet.errors import Overloaded

RETRY_S = 1.0


class Held:
    """An amount that requests hold: bytes, or requests. Owner: one event loop.

    Where the limit is reached, a key that holds less than an equal share of it still gets in. All keys together
    therefore hold at most twice the limit, and one of them cannot keep the others out.
    """

    def __init__(self, limit: int, unit: str, way_out: str) -> None:
        """`unit`, `way_out`: how the error calls what is held, and what its reader may do."""
        self.limit = limit
        self._unit = unit
        self._way_out = way_out
        self._by_key: Counter[str] = Counter()
        self.total = 0

    def of(self, key: str) -> int:
        """The amount that one key holds."""
        return self._by_key[key]

    def take(self, key: str, amount: int = 1) -> None:
        """Hold more for a key. Raises Overloaded if it does not fit; nothing is held then."""
        if self.total + amount > self.limit:
            num_keys = len(self._by_key.keys() | {key})
            if num_keys == 1 or self._by_key[key] + amount > self.limit // num_keys:
                raise Overloaded(
                    f"{self.total:,} {self._unit} are in flight already, of {self.limit:,} at most; {self._way_out}",
                    RETRY_S,
                )
        self._by_key[key] += amount
        self.total += amount

    def give(self, key: str, amount: int = 1) -> None:
        """Hold less for a key."""
        self.total -= amount
        self._by_key[key] -= amount
        if not self._by_key[key]:
            del self._by_key[key]
