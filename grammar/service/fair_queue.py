"""The order in which sources are compiled: short ones first, and nobody's turn because of others.

A source stands at a level. Each level gives it more time than the one below (`BUDGETS_S`). It begins at the level of
its expected cost, and rises when it takes longer. The lowest level goes first, so a small source waits for none of the
large ones, whatever was expected of them. Every fourth turn goes to the level that has waited longest, so a stream of
small sources does not stop the large ones. Within a level, the client goes first for whom least time was spent lately.

Sources: multi-level feedback queues, Corbato et al. 1962, "An Experimental Time-Sharing System"; the bound on a
client's places, Choudhury and Hahne 1998, "Dynamic queue length thresholds for shared-memory packet switches".

A pure state machine without threads and clocks. Not here: who compiles (`compile_service`), what a source is expected
to cost (`cost`).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, TypeVar

BUDGETS_S = (0.025, 0.1, 0.4, 1.6, math.inf)
_AGED_TURN = 4
_FADE_S = 5.0  # the time spent for a client counts 10 % less after each of these intervals
_FADE = 0.9
_FORGOTTEN_S = 1e-3

Client: TypeAlias = tuple[str, ...]
"""Who asks, from the widest circle to the narrowest: (key, connection, request). An empty name stands for nobody."""


@dataclass(slots=True, eq=False, kw_only=True)
class Ticket:
    """A place in the queue. Owner: the queue, but `clients`, to which others who want the same are added.

    `level`: index of BUDGETS_S.
    """

    clients: list[Client]
    expected_s: float
    level: int = field(init=False)
    number: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.level = next(i for i, budget in enumerate(BUDGETS_S) if self.expected_s <= budget)


T = TypeVar("T", bound=Ticket)


class FairQueue(Generic[T]):
    """What waits to be compiled, and what was spent for whom. Not thread-safe."""

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self._levels: list[dict[T, None]] = [{} for _ in BUDGETS_S]
        self._num_pushed = 0
        self._num_of: dict[Client, int] = {}
        self._spent_s: dict[Client, float] = {}
        self._faded_s = 0.0
        self._num_turns = 0
        self._last_turn = [0] * len(BUDGETS_S)

    def __len__(self) -> int:
        return sum(map(len, self._levels))

    def room(self, client: Client) -> int:
        """Return the number of places that a client may still take: it may have as many as are left free."""
        free = self.max_waiting - len(self)
        return min([free - self._num_of.get(circle, 0) for circle in _circles(client)], default=free)

    def push(self, ticket: T) -> None:
        """Add what waits for its first turn, or what has risen to a level that is taken."""
        self._num_pushed += 1
        ticket.number = self._num_pushed
        self._levels[ticket.level][ticket] = None
        self._count(ticket, 1)

    def remove(self, ticket: T) -> bool:
        """Take a ticket from the queue. Returns False if it is not there."""
        if ticket not in self._levels[ticket.level]:
            return False
        del self._levels[ticket.level][ticket]
        self._count(ticket, -1)
        return True

    def join(self, ticket: T, client: Client) -> None:
        """Add another client who wants the same. The ticket goes where its best client's would."""
        is_waiting = self.remove(ticket)
        ticket.clients.append(client)
        if is_waiting:
            self._levels[ticket.level][ticket] = None
            self._count(ticket, 1)

    def first(self, level: int) -> T | None:
        """Return the ticket of a level that is due; None if none waits there."""
        return min(self._levels[level], key=self._rank, default=None)

    def next_level(self, levels: Collection[int]) -> tuple[int, bool]:
        """Choose the level of the next turn. Returns it, and whether it is chosen because it has waited longest."""
        self._num_turns += 1
        chosen = lowest = min(levels)
        if not self._num_turns % _AGED_TURN:
            chosen = min(levels, key=lambda level: self._last_turn[level])
        self._last_turn[chosen] = self._num_turns
        return chosen, chosen != lowest

    def charge(self, ticket: T, seconds: float, now_s: float) -> None:
        """Note that so much time was spent on a ticket."""
        if now_s >= self._faded_s + _FADE_S:
            fade = _FADE ** ((now_s - self._faded_s) // _FADE_S)
            left = {client: spent * fade for client, spent in self._spent_s.items()}
            self._spent_s = {client: spent for client, spent in left.items() if spent >= _FORGOTTEN_S}
            self._faded_s = now_s
        for client in ticket.clients:
            for circle in _circles(client):
                self._spent_s[circle] = self._spent_s.get(circle, 0.0) + seconds / len(ticket.clients)

    def _rank(self, ticket: T) -> tuple[list[float], float, int]:
        """Return what is least for the ticket that is due: spent on its best client, circle by circle, its cost."""
        spent = min(
            [self._spent_s.get(client[:i], 0.0) if client[i - 1] else 0.0 for i in range(1, len(client) + 1)]
            for client in ticket.clients
        )
        return spent, ticket.expected_s, ticket.number

    def _count(self, ticket: T, change: int) -> None:
        for circle in {circle for client in ticket.clients for circle in _circles(client)}:
            number = self._num_of.get(circle, 0) + change
            if number:
                self._num_of[circle] = number
            else:
                del self._num_of[circle]


def _circles(client: Client) -> list[Client]:
    """Return the circles that a client is in, but for those without a name."""
    return [client[:i] for i in range(1, len(client) + 1) if client[i - 1]]
