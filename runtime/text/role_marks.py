"""The text that a program's roles and tools add to a branch, as the model's chat template writes it.

A branch only grows, so a message's text depends only on the roles before it. The template is rendered once for each
such sequence of roles. Of a long conversation it is shown the first and the last messages, so that a message costs the
same however many came before. If a template has no messages for tool results, results are written into a user message;
adjoining results share one. If it does not show tools, or they are declared after the first message, their description
is written into a separate message.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property

from ramet.errors import InvalidRequest
from ramet.lang.graph import ir
from ramet.runtime.text.chat_template import ChatTemplate, RoleText
from ramet.runtime.text.tool_style import ToolStyle, tool_style

MAX_SHOWN = 64  # messages of a conversation that the template is shown, at most
_NUM_FIRST = 16  # of these, the first ones of the conversation
_MAX_KNOWN = 4096  # marks that are kept
_OPEN_RESULT, _CLOSE_RESULT = "<tool_response>\n", "\n</tool_response>"


@dataclass(frozen=True, slots=True)
class _Talk:
    """A branch's messages so far.

    `roles`: one for each message; of a long conversation the first and the last ones. `tools`: the tools that the
    template shows, as JSON. `opening`: a description of tools that must still be written into the first message.
    `is_in_result`: the last message is an open user message with tool results.
    """

    roles: tuple[str, ...] = ()
    tools: str = ""
    opening: str = ""
    is_in_result: bool = False


class RoleMarks:
    """The text of one chat template before and after contents. Thread-safe: at worst a mark is computed twice.

    Marks are cached by the roles before them, so that thousands of branches cost one rendering. This assumes that a
    mark does not depend on the contents of messages.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._known: dict[tuple[str, tuple[str, ...], str], RoleText | InvalidRequest] = {}
        self.stop_strings = template.stop_strings
        self.thinking = template.thinking

    @cached_property
    def style(self) -> ToolStyle:
        """How the model calls tools."""
        return tool_style(self._template)

    def mark(self, talk: object, opening: str, node: ir.Marked) -> tuple[object, str]:
        """Return the text that a node adds to its branch; see lang/graph/run.py, `Mark`.

        Raises: InvalidRequest if the template refuses such a message here.
        """
        if isinstance(node, ir.Thinking):
            return talk, self._think(opening, node)
        assert talk is None or isinstance(talk, _Talk)
        return self._step(talk or _Talk(), node)

    def _think(self, opening: str, node: ir.Thinking) -> str:
        marks = self.thinking
        if marks is None:
            raise InvalidRequest(
                "the model's chat template has no thinking; leave `thinking` out, or take a model that reasons",
                param="thinking",
            )
        if not node.is_open:
            return marks.closing
        return "" if opening.rstrip().endswith(marks.open) else marks.opening

    def _step(self, talk: _Talk, node: ir.Role | ir.Tools) -> tuple[_Talk, str]:
        if isinstance(node, ir.Tools):
            return self._declare(talk, node.tools)
        if node.is_open:
            return self._open(talk, node.role)
        if talk.is_in_result:
            return talk, _CLOSE_RESULT
        text = self._mark(talk.roles[:-1], talk.roles[-1], talk.tools).after
        if talk.opening and node.role == "system":
            return _Talk(talk.roles, talk.tools), f"\n\n{talk.opening}{text}"
        return talk, text

    def _open(self, talk: _Talk, role: str) -> tuple[_Talk, str]:
        text = ""
        is_result = role == "tool" and not self._shows_results(talk)
        if talk.is_in_result:
            if is_result:
                return talk, f"\n{_OPEN_RESULT}"
            text = self._mark(talk.roles[:-1], "user", talk.tools).after
            talk = _Talk(talk.roles, talk.tools)
        if talk.opening and role != "system":
            described, added = self._describe(talk.roles, talk.opening)
            talk, text = _Talk(_longer(talk.roles, described), talk.tools), text + added
        shown = "user" if is_result else role
        text += self._mark(talk.roles, shown, talk.tools).before + (_OPEN_RESULT if is_result else "")
        return _Talk(_longer(talk.roles, shown), talk.tools, talk.opening, is_result), text

    def _declare(self, talk: _Talk, tools: str) -> tuple[_Talk, str]:
        listed = json.loads(tools)
        if not talk.roles:
            if self.style.shows_tools:
                return _Talk((), tools), ""
            return _Talk((), "", self.style.description(listed)), ""
        text = ""
        if talk.is_in_result:
            text = self._mark(talk.roles[:-1], "user", talk.tools).after
        role, added = self._describe(talk.roles, self.style.description(listed))
        return _Talk(_longer(talk.roles, role), talk.tools), text + added

    def _describe(self, roles: tuple[str, ...], description: str) -> tuple[str, str]:
        """Return role and text of a message that describes tools: the user's if the template refuses the system's."""
        for role in ("system", "user"):
            try:
                mark = self._mark(roles, role, "")
                self._mark((*roles, role), "user", "")
            except InvalidRequest:
                if role == "user":
                    raise
                continue
            return role, f"{mark.before}{description}{mark.after}"
        raise AssertionError("unreachable")

    def _shows_results(self, talk: _Talk) -> bool:
        try:
            self._mark(talk.roles, "tool", talk.tools)
        except InvalidRequest:
            return False
        return self.style.shows_results

    def _mark(self, roles: tuple[str, ...], role: str, tools: str) -> RoleText:
        key = (role, roles, tools)
        found = self._known.get(key)
        if found is None:
            messages = [{"role": one, "content": "x"} for one in roles]
            try:
                found = self._template.role_text(messages, role, tools=json.loads(tools) if tools else None)
            except InvalidRequest as error:
                found = error
            if len(self._known) >= _MAX_KNOWN:
                self._known = {}
            self._known[key] = found
        if isinstance(found, InvalidRequest):
            raise found
        return found


def _longer(roles: tuple[str, ...], role: str) -> tuple[str, ...]:
    """Return the roles with one more.

    Beyond `MAX_SHOWN`, two adjoining ones are removed, so that roles still alternate.
    """
    if len(roles) >= MAX_SHOWN:
        roles = roles[:_NUM_FIRST] + roles[_NUM_FIRST + 2 :]
    return (*roles, role)
