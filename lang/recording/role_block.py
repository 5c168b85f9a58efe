"""A message as a block: everything appended in it is the message's content."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from ramet.errors import InvalidProgram, RametError

if TYPE_CHECKING:
    from ramet.lang.recording.state import State


class RoleBlock:
    """`with s.user(): ...`"""

    __slots__ = ("_is_used", "_role", "_state")

    def __init__(self, state: State, role: str, *, is_used: bool) -> None:
        self._state, self._role, self._is_used = state, role, is_used

    def __enter__(self) -> State:
        if self._is_used:
            raise InvalidProgram(f"s.{self._role}(...) with content is a whole message, not a block")
        self._state._open_role(self._role)
        return self._state

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        """Close the message, also where the program's own error leaves the block: it may be caught outside."""
        if kind is None:
            self._state._close_role()
        elif issubclass(kind, Exception):
            with suppress(RametError):  # the run may be over; the error in the block is the one to be seen
                self._state._close_role()
