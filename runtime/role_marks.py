"""What stands before and after a chat message's content, by the model's own template; asked once for each situation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

Messages = Sequence[Mapping[str, str]]


class Template(Protocol):
    """The part of ChatTemplate that is used here."""

    stop_strings: tuple[str, ...]

    def opening(self, messages: Messages, role: str) -> str: ...

    def closing(self, messages: Messages, role: str) -> str: ...


class RoleMarks:
    """Remembers a template's marks by the roles before them, so that thousands of branches cost one rendering.

    Contents are taken not to matter for the marks. Thread-safe: an entry is computed twice at worst.
    """

    def __init__(self, template: Template) -> None:
        self._template = template
        self._known: dict[tuple[bool, str, tuple[str, ...]], str] = {}
        self.stop_strings = template.stop_strings

    def opening(self, roles: tuple[str, ...], role: str, messages: Callable[[], Messages]) -> str:
        """The text before a message of `role` that follows `messages`, whose roles are `roles`."""
        key = (True, role, roles)
        if key not in self._known:
            self._known[key] = self._template.opening(messages(), role)
        return self._known[key]

    def closing(self, roles: tuple[str, ...], role: str, messages: Callable[[], Messages]) -> str:
        """The text after that message."""
        key = (False, role, roles)
        if key not in self._known:
            self._known[key] = self._template.closing(messages(), role)
        return self._known[key]
