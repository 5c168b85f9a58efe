"""How long a CPU thread that waits for others spins before it sleeps: set before torch loads OpenMP, or never.

GNU's OpenMP spins 300,000 times, tens of milliseconds. Where another process wants the core (the server and its clients
do), the thread that is waited for does not run meanwhile, and every barrier costs a time slice.
"""

from __future__ import annotations

from collections.abc import MutableMapping

SPIN_COUNT = 1000  # some tens of microseconds: longer than threads of one step wait for each other
_CHOSEN_BY = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # whoever sets one of these has decided


def limit_spinning(environment: MutableMapping[str, str]) -> None:
    """Let threads sleep soon in a process that gets this environment, unless its user says otherwise."""
    if not any(name in environment for name in _CHOSEN_BY):
        environment["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
