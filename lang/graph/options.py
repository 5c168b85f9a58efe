"""The options of a whole run of a program: its name, its priority, its limits, and its deadline."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ramet.errors import DeadlineExceeded, InvalidRequest
from ramet.lang.graph.ir import is_json

MAX_PRIORITY = 2**31 - 1
RUN_OPTIONS = ("timeout_s", "token_budget", "priority", "cache_salt", "adapter")  # as callers of a program name them
MAX_TIMEOUT_S = 1e9  # a thread can't wait for more seconds than this


@dataclass(frozen=True, slots=True)
class ProgramOptions:
    """The options of a whole run of a program.

    `deadline_s`: by time.monotonic(). `priority`: the lower runs first. `token_budget`: the most tokens that all
    generations together may write. `cache_salt`: prefixes are shared only between runs with the same salt.
    `adapter`: of generations that name none, and of selections; empty: the model alone.
    `text_events`: report text as it is generated, not only when a node is done. This costs some microseconds for each
    token on the engine's thread.

    Raises:
        InvalidRequest: a value that is invalid for every runtime.
    """

    program: str = "program"
    deadline_s: float | None = None
    token_budget: int | None = None
    priority: int = 0
    cache_salt: str = ""
    text_events: bool = False
    adapter: str = ""

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, limit: str) -> None:
            if not ok:
                value = getattr(self, name)
                raise InvalidRequest(f"{self.program}: {name} is {value!r}, but must be {limit}", param=name)

        check(
            _is_int(self.priority) and abs(self.priority) <= MAX_PRIORITY,
            "priority",
            f"an integer up to {MAX_PRIORITY}",
        )
        for name in ("cache_salt", "adapter"):
            value = getattr(self, name)
            check(isinstance(value, str) and is_json(value), name, "text that UTF-8 can write")
        budget = self.token_budget
        check(budget is None or (_is_int(budget) and budget >= 1), "token_budget", "an integer from 1, or None")


def run_options(program: str, given: Mapping[str, Any], *, text_events: bool = False) -> ProgramOptions:
    """Return the options of a run. `given`: values by the names in RUN_OPTIONS; others are ignored.

    Raises InvalidRequest.
    """
    known = {name: given[name] for name in RUN_OPTIONS if name in given}
    return ProgramOptions(program, deadline(program, known.pop("timeout_s", None)), text_events=text_events, **known)


def deadline(program: str, timeout_s: float | None) -> float | None:
    """Return the end of a run's time limit, by time.monotonic(), or None without a limit. Raises InvalidRequest."""
    if timeout_s is None:
        return None
    is_number = isinstance(timeout_s, int | float) and not isinstance(timeout_s, bool)
    if not is_number or not math.isfinite(timeout_s) or timeout_s > MAX_TIMEOUT_S:
        raise InvalidRequest(
            f"{program}: timeout_s is {timeout_s!r}, but must be seconds up to {MAX_TIMEOUT_S:,.0f}, or None",
            param="timeout_s",
        )
    return time.monotonic() + timeout_s


@dataclass(frozen=True, slots=True)
class Deadline:
    """The deadline of a program or a request. `at_s`: by time.monotonic(); None: there is no deadline."""

    at_s: float | None

    def left_s(self) -> float | None:
        return None if self.at_s is None else max(0.0, self.at_s - time.monotonic())

    def allows(self, pause_s: float) -> bool:
        """Return whether a pause of this many seconds ends before the deadline."""
        left_s = self.left_s()
        return left_s is None or pause_s < left_s

    @property
    def has_passed(self) -> bool:
        return self.left_s() == 0.0

    @staticmethod
    def error() -> DeadlineExceeded:
        """Return the error of a node that the deadline ended."""
        return DeadlineExceeded("the program's deadline passed")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
