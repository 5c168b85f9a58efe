"""The choices of one answer, merged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ramet.runtime.server.choices import Job, merged, submit_all
from ramet.runtime.server.link.protocol import Output, Submit
from ramet.runtime.types import SamplingParams


class BrokenProxy:
    """Its second request ends with an error that nobody expects; the first one never ends."""

    def __init__(self) -> None:
        self.closed: list[str] = []

    def submit(self, command: Submit, *, is_whole: bool) -> Any:  # Any: a stream of outputs, as a proxy's
        return Stream(self, command.id)


class Stream:
    def __init__(self, proxy: BrokenProxy, request_id: str) -> None:
        self.proxy, self.id = proxy, request_id

    def close(self) -> None:
        self.proxy.closed.append(self.id)

    async def __aiter__(self) -> AsyncIterator[Output]:
        yield Output(self.id, 1, 0, 1, "a", [1])
        if self.id == "answer-1":
            raise ZeroDivisionError("a bug")
        await asyncio.Event().wait()


def test_an_answer_does_not_wait_for_a_choice_that_failed_in_an_unexpected_way() -> None:
    async def read() -> list[int]:
        jobs = [(Job([1], SamplingParams()), index) for index in range(2)]
        return [index async for index, _ in merged(submit_all(proxy, jobs, "answer"))]  # type: ignore[arg-type]

    proxy = BrokenProxy()
    with pytest.raises(ZeroDivisionError, match="a bug"):
        asyncio.run(asyncio.wait_for(read(), 20))
    assert set(proxy.closed) == {"answer", "answer-1"}
