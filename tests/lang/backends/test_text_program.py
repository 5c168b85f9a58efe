"""A graph on an endpoint that only takes and returns text."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from ramet import State, function, gen
from ramet.lang.backends.http_loop import HttpLoop
from ramet.lang.backends.text_program import Prompt, TextSession
from ramet.lang.graph import ir
from ramet.lang.graph.events import OnEvent
from ramet.lang.graph.options import Deadline, ProgramOptions

TRIP = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}


class Endpoint:
    """Writes the rest of a trip only once the guide to its city is begun."""

    def __init__(self) -> None:
        self.http = HttpLoop("http://127.0.0.1:9", {})
        self.guide_is_begun = asyncio.Event()
        self.prompts: list[str] = []

    def start(self, options: ProgramOptions, on_event: OnEvent) -> TextSession:
        return TextSession(self.http, self.write, self.choose, options, on_event)

    async def write(
        self,
        prompt: Prompt,
        node: ir.Generate,
        deadline: Deadline,
        on_text: Callable[[str], None] | None,
        on_call: object,
    ) -> ir.NodeResult:
        self.prompts.append(prompt.text)
        if node.type != "json":
            self.guide_is_begun.set()
            return ir.NodeResult("walk", finish_reason="stop")
        assert on_text is not None
        on_text('{"city": "Lyon", ')
        await asyncio.wait_for(self.guide_is_begun.wait(), 30)
        on_text('"days": 3}')
        return ir.NodeResult('{"city": "Lyon", "days": 3}', finish_reason="stop")

    async def choose(self, prompt: Prompt, node: ir.Select, choices: Sequence[str], deadline: Deadline) -> Any:
        raise AssertionError


def test_what_uses_a_field_begins_while_the_endpoint_still_writes_the_value() -> None:
    endpoint = Endpoint()

    @function
    def plan(s: State) -> None:
        with s.copy() as aside:
            aside += "Trip: " + gen("trip", TRIP)
        s += f"In {aside['trip']['city']}: " + gen("guide")
        s += f" for {aside['trip']['days']} days"

    assert plan.run(backend=endpoint).text() == "In Lyon: walk for 3 days"
    assert endpoint.prompts == ["Trip: ", "In Lyon: "]
    endpoint.http.close()
