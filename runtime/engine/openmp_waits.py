"""Limit how long a CPU thread spins while it waits for other threads. OpenMP reads the limit when torch loads it.

GNU's OpenMP spins 300,000 times, which is tens of milliseconds. Where another process wants the core (a server and its
clients do), the thread that everybody waits for cannot run meanwhile, and every barrier costs a time slice.
"""

from __future__ import annotations

from collections.abc import MutableMapping

SPIN_COUNT = 1000  # some tens of microseconds; the threads of one step wait less for each other
_CHOSEN_BY = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # whoever sets one of these has decided


def limit_spinning(environment: MutableMapping[str, str]) -> None:
    """Let the threads of a process with this environment sleep soon, unless its user has decided otherwise."""
    if not any(name in environment for name in _CHOSEN_BY):
        environment["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
