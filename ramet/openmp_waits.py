"""Limit how long a CPU thread spins while it waits for other threads. OpenMP reads the limit when torch loads it.

GNU's OpenMP spins 300,000 times, which is tens of milliseconds. If other processes need the cores (a server and its
clients do), spinning threads keep the awaited thread from running, and every barrier costs a time slice. So `import
ramet` sets the limit; it comes too late in a process that has loaded torch before.
"""

from __future__ import annotations

from collections.abc import MutableMapping

SPIN_COUNT = 1000  # some tens of microseconds; the threads of one step wait less for each other
_CHOSEN_BY = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # a user who sets one of these has chosen


def limit_spinning(environment: MutableMapping[str, str]) -> None:
    """Set the spin limit in a process's environment, unless its user has chosen a limit or policy."""
    if not any(name in environment for name in _CHOSEN_BY):
        environment["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
