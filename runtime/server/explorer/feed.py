"""What the engines do, asked of them once a second while somebody watches, and told to all who watch.

Cost: the steps' thread answers one small question a second, and tells a part of the tree between two steps. The larger
the tree, the more seldom it is told, so that telling it takes at most half a percent of the thread's time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ramet.errors import Overloaded, RametError
from ramet.runtime.server.link.proxy import EngineProxy
from ramet.runtime.server.served_model import ServedModel

MAX_WATCHERS = 32
_INTERVAL_S = 1.0
_TREE_S, _TREE_NODE_S = 2.0, 5e-4  # between two trees: at least so long, and so long for each of its nodes
_PATIENCE_S = 5.0


@dataclass(slots=True)
class EngineView:
    """One engine as of the last look. Owner: the feed; others only read.

    `activity`: as `Engine.take_activity` tells it, the evictions with texts in place of tokens; None if the engine
    did not answer. `tree`: columns of its segments. `texts`: beginnings of segments, by index; `salts`: those of
    namespaces. `tree_number`: counts the trees.
    """

    activity: dict[str, Any] | None = None  # Any: JSON
    tree: dict[str, list[Any]] = field(default_factory=dict)  # Any: numbers
    texts: dict[int, str] = field(default_factory=dict)
    salts: dict[int, str] = field(default_factory=dict)
    tree_number: int = 0
    tree_due_s: float = 0.0


class Feed:
    """Owner: one event loop. `views`: by the engines' numbers."""

    def __init__(self, served: ServedModel) -> None:
        self.views: dict[int | None, EngineView] = {}
        self._served = served
        self._num_watchers = 0
        self._is_closed = False
        self._task: asyncio.Task[None] | None = None
        self._next: asyncio.Future[None] | None = None
        served.before_shutdown.append(self.close)

    def join(self) -> None:
        """Count a watcher, until `leave`. Raises Overloaded if there are too many."""
        if self._num_watchers >= MAX_WATCHERS:
            raise Overloaded(f"{MAX_WATCHERS} pages watch this server; close one of them", 5.0)
        self._num_watchers += 1
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    def leave(self) -> None:
        """Count a watcher less; the engines are no longer asked after the last one."""
        self._num_watchers -= 1

    def close(self) -> None:
        """End all streams, because the server shuts down."""
        self._is_closed = True
        self._wake()

    async def wait(self) -> bool:
        """Wait for the next look at the engines. Returns False if none will come."""
        if self._is_closed:
            return False
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._next)
        return not self._is_closed

    def _wake(self) -> None:
        if self._next is not None and not self._next.done():
            self._next.set_result(None)
        self._next = None

    async def _run(self) -> None:
        try:
            while self._num_watchers and not self._is_closed:
                engines = self._served.proxy.engines()
                self.views = {number: self.views.get(number) or EngineView() for number, _ in engines}
                await asyncio.gather(*(self._look(proxy, self.views[number]) for number, proxy in engines))
                self._wake()
                await asyncio.sleep(_INTERVAL_S)
        finally:
            self._task = None
            self._wake()

    async def _look(self, proxy: EngineProxy, view: EngineView) -> None:
        """Ask one engine. One that does not answer has no activity; its last tree stays."""
        view.activity = None
        if proxy.hello is None:
            return
        try:
            activity = await proxy.ask("activity", _PATIENCE_S)
            begun = [tokens for _, _, tokens in activity["evictions"]]
            texts = await self._served.off_loop(self._texts, begun)
            told = zip(activity["evictions"], texts, strict=True)
            activity["evictions"] = [(start, num_tokens, text) for (start, num_tokens, _), text in told]
            view.activity = activity
            if time.monotonic() >= view.tree_due_s:
                await self._look_at_tree(proxy, view)
        except (RametError, TimeoutError):
            return

    async def _look_at_tree(self, proxy: EngineProxy, view: EngineView) -> None:
        segments = await proxy.ask("segments", _PATIENCE_S)
        names = ("above", "start", "num_tokens", "refs", "last_used", "is_dead", "last_page", "tokens", "salt")
        columns: dict[str, list[Any]] = dict(  # Any: numbers
            zip(names, map(list, zip(*segments, strict=True)), strict=True) if segments else ((n, []) for n in names)
        )
        tokens, salts = columns.pop("tokens"), columns.pop("salt")
        told = [index for index, some in enumerate(tokens) if some]
        texts = await self._served.off_loop(self._texts, [tokens[index] for index in told])
        view.tree, view.texts = columns, dict(zip(told, texts, strict=True))
        view.salts = {index: salt for index, salt in enumerate(salts) if columns["above"][index] is None}
        view.tree_number += 1
        view.tree_due_s = time.monotonic() + max(_TREE_S, _TREE_NODE_S * len(segments))

    def _texts(self, every: Sequence[Sequence[int]]) -> list[str]:
        return [self._served.tokenizer.decode(tokens) for tokens in every]


def engine_json(number: int | None, proxy: EngineProxy, view: EngineView, *, with_texts: bool) -> dict[str, Any]:
    """What one engine did since the last look, without the tree. `with_texts`: also what prompts say. (Any: JSON)"""
    startup, hello, activity = proxy.startup, proxy.hello, view.activity
    if activity is not None and not with_texts:
        activity = {**activity, "evictions": [(start, num, "") for start, num, _ in activity["evictions"]]}
    return {
        "number": number,
        "ready": startup["ready"],
        "stage": startup["stage"],
        "reason": startup["reason"],
        "hello": None if hello is None else msgspec.to_builtins(hello),
        "stats": proxy.stats,
        "starts": proxy.num_starts,
        "activity": activity,
    }


def tree_json(view: EngineView, *, with_texts: bool) -> dict[str, Any]:  # Any: JSON
    """An engine's tree. Without texts, it has sizes and uses alone."""
    shown = (view.texts, view.salts) if with_texts else ({}, {})
    return {"number": view.tree_number, **view.tree, "texts": shown[0], "salts": shown[1]}
