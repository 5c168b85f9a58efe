"""Ramet as an application of Ray Serve: `serve run ramet.integrations.ray_serve:build model=MODEL`, or with KubeRay.

Every replica of the deployment `RametServer` is a whole server with an engine process of its own, which answers all of
Ramet's endpoints. The deployment `RametIngress` reads a request and sends it to the replica that Ramet's router chooses
(`PrefixRouter`). Serve starts replicas, watches them, and changes their number by its own autoscaling.

Serve's routers hear little of caches. So the router takes what it sent to a replica for cached there, up to as many
tokens as the replica has; `ramet serve --dp` knows it from the caches themselves.

Not here: engines of one Ramet server on the nodes of a cluster (`ramet serve --ray-address`).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Collection, MutableMapping
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ramet.errors import ConfigError
from ramet.runtime.cache.prefix_log import CacheChanges, prefix_keys
from ramet.runtime.cluster.router import Placement, RoutedRequest, Router, RouterConfig
from ramet.runtime.server.app import make_server
from ramet.runtime.server.config import ServerConfig

try:
    from ray import serve
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig
    from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
except ImportError as missing:
    raise ImportError("ramet.integrations.ray_serve needs Ray Serve: pip install 'ramet[ray]'") from missing

_PAGE_BYTES = 64  # of a request's text, for which there is a key
_BYTES_A_TOKEN = 4  # roughly
_ANSWER_TOKENS = 128  # what an answer counts as work, besides what the prompt lacks
_DEFAULT_KV_TOKENS = 100_000  # of a replica that has not told its own yet
_PREFIX_FIELDS = ("tools", "instructions", "system", "messages", "input", "prompt", "text", "graph")


def described(body: bytes) -> RoutedRequest:
    """Describe a request to the router by the texts of its JSON body, in the order in which they stand in prompts."""
    try:
        fields = json.loads(body)
        texts = [json.dumps(fields[name]) for name in _PREFIX_FIELDS if fields.get(name)]
    except (ValueError, AttributeError, RecursionError):  # the server says what is wrong with it
        texts = []
    data = np.frombuffer("".join(texts).encode("ascii", "replace"), dtype=np.uint8).astype(np.int32)
    return RoutedRequest(len(data) // _BYTES_A_TOKEN + _ANSWER_TOKENS, prefix_keys(data, _PAGE_BYTES))


class SentPrefixes:
    """What was sent to each replica, the last of it, as changes of its cache. Owner: the router."""

    def __init__(self) -> None:
        self._keys: dict[int, OrderedDict[int, None]] = {}
        self._numbers: dict[int, int] = {}

    def forget(self, replica: int) -> None:
        self._keys.pop(replica, None)

    def add(self, replica: int, keys: Collection[int], most: int) -> CacheChanges:
        """Note a prompt. Returns what the replica's cache has gained and lost, so far as is known."""
        held = self._keys.setdefault(replica, OrderedDict())
        self._numbers[replica] = number = self._numbers.get(replica, 0) + 1
        added = []
        for key in keys:
            if key not in held:
                added.append(key)
            held[key] = None
            held.move_to_end(key)
        removed = [held.popitem(last=False)[0] for _ in range(len(held) - max(most, len(keys)))]
        return CacheChanges(number, added, removed)


class PrefixRouter(RequestRouter):  # type: ignore[misc]  # Ray has no types here
    """Ramet's router, as the request router of a deployment whose method takes the body as its last argument."""

    def initialize_state(self, **values: object) -> None:
        """values: fields of RouterConfig."""
        pages = {"page_size": _PAGE_BYTES // _BYTES_A_TOKEN}
        self._router = Router(RouterConfig(**{**pages, **values}))  # type: ignore[arg-type]
        self._sent = SentPrefixes()
        self._numbers: dict[ReplicaID, int] = {}
        self._next_number = 0
        self._placements: dict[str, Placement] = {}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take over which replicas there are."""
        super().update_replicas(replicas)
        present = {replica.replica_id for replica in replicas}
        for gone in self._numbers.keys() - present:
            self._forget(gone)
        for new in present - self._numbers.keys():
            self._numbers[new] = number = self._next_number
            self._next_number += 1
            self._router.add(number)
            self._router.apply(number, CacheChanges(0, is_whole=True))

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._forget(replica_id)

    def _forget(self, replica_id: ReplicaID) -> None:
        number = self._numbers.pop(replica_id, None)
        if number is not None:
            self._router.remove(number)
            self._sent.forget(number)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Put the replica that Ramet's router chooses first, and the others, which Serve takes if it is full, last."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        numbers = {self._numbers.get(replica.replica_id): replica for replica in candidate_replicas}
        self._withdraw(pending_request.metadata.internal_request_id)
        placement = self._place(pending_request, set(self._router.replicas) - numbers.keys())
        chosen = None if placement is None else numbers.get(placement.replica)
        if chosen is None:
            return [candidate_replicas]
        others = [replica for replica in candidate_replicas if replica is not chosen]
        return [[chosen], others] if others else [[chosen]]

    def _place(self, request: PendingRequest, avoid: Collection[int]) -> Placement | None:
        if len(avoid) >= len(self._router.replicas):
            return None
        body = request.args[-1] if request.args and isinstance(request.args[-1], bytes) else b""
        placement = self._router.place(described(body), time.monotonic(), avoid)
        self._placements[request.metadata.internal_request_id] = placement
        return placement

    def _withdraw(self, request_id: str) -> Placement | None:
        placement = self._placements.pop(request_id, None)
        if placement is not None:
            self._router.finished(placement)
        return placement

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        """Count the request where Serve has sent it, which may be another replica than the one that was chosen."""
        number = self._numbers.get(replica_id)
        placement = self._placements.get(pending_request.metadata.internal_request_id)
        if placement is not None and placement.replica != number:
            self._withdraw(pending_request.metadata.internal_request_id)
            placement = None
        if placement is None and number is not None:
            placement = self._place(pending_request, set(self._router.replicas) - {number})
        if placement is not None:
            keys = placement.request.keys
            most = self._kv_tokens(replica_id) * _BYTES_A_TOKEN // _PAGE_BYTES
            self._router.apply(placement.replica, self._sent.add(placement.replica, keys, most))

    def _kv_tokens(self, replica_id: ReplicaID) -> int:
        replica = self.curr_replicas.get(replica_id)
        stats = {} if replica is None else replica.routing_stats
        return int(stats.get("num_kv_tokens", _DEFAULT_KV_TOKENS))

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._withdraw(internal_request_id)


class RametServer:
    """A whole server of Ramet except its socket, with its engine process."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, model: str | None, engine: dict[str, Any], server: dict[str, Any]
    ) -> None:
        """engine, server: fields of EngineConfig and ServerConfig. Any: they are checked there."""
        self._app, self._served = make_server(model, engine, ServerConfig(**server))
        self._life = AsyncExitStack()
        await self._life.enter_async_context(self._app.router.lifespan_context(self._app))
        try:
            await self._served.proxy.wait_ready()
        except BaseException:
            await self._life.aclose()
            raise

    async def answer(
        self, method: str, path: str, query: bytes, headers: list[tuple[bytes, bytes]], body: bytes
    ) -> AsyncIterator[Any]:  # Any: the status and the headers first, then bytes
        """Answer an HTTP request."""
        events: asyncio.Queue[MutableMapping[str, Any] | None] = asyncio.Queue(64)
        is_read = False

        async def receive() -> dict[str, Any]:
            nonlocal is_read
            if is_read:  # the caller is there until this task is cancelled
                await asyncio.Event().wait()
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def run() -> None:
            try:
                await self._app(scope, receive, events.put)
            finally:
                await events.put(None)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": query,
            "headers": headers,
            "client": None,
            "server": None,
            "state": {},
        }
        task = asyncio.create_task(run())
        try:
            while (event := await events.get()) is not None:
                if event["type"] == "http.response.start":
                    yield event["status"], event["headers"]
                elif event.get("body"):
                    yield event["body"]
            await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def check_health(self) -> None:
        """Raise what is wrong. Serve then replaces this replica; an engine that starts again is given its time."""
        proxy = self._served.proxy
        if proxy.hello is not None and (problem := proxy.health(self._served.config.health_patience_s)) is not None:
            raise RuntimeError(problem)

    async def record_routing_stats(self) -> dict[str, int]:
        hello = self._served.proxy.hello
        return {} if hello is None else {"num_kv_tokens": hello.num_kv_tokens}

    async def __del__(self) -> None:
        await self._life.aclose()


class RametIngress:
    """Reads requests and sends each whole to a replica of `RametServer`."""

    def __init__(self, servers: Any) -> None:  # Any: a DeploymentHandle, as Serve makes it
        self._answer = servers.answer.options(stream=True)

    async def __call__(self, request: Request) -> Response:
        headers = [(name, value) for name, value in request.headers.raw if name != b"transfer-encoding"]
        query = request.url.query.encode()
        stream = self._answer.remote(request.method, request.url.path, query, headers, await request.body())
        status, head = await anext(stream)

        async def rest() -> AsyncIterator[bytes]:
            try:
                async for chunk in stream:
                    yield chunk
            finally:
                stream.cancel()

        response = StreamingResponse(rest(), status)
        response.raw_headers = head
        return response


def build(arguments: dict[str, Any]) -> Any:  # Any: an Application; what Serve's configuration files hold
    """Make the application. Serve calls it with the `args` of a configuration file, or of `serve run`.

    model: as in `ramet serve`. engine, server: fields of EngineConfig and ServerConfig. num_replicas, or min_replicas
    and max_replicas with target_ongoing_requests: how many there are. num_gpus, num_cpus: of each replica.
    max_ongoing_requests: requests that a replica has at most.
    Raises: ConfigError for other arguments.
    """
    known: dict[str, Any] = {"model": None, "engine": {}, "server": {}, "num_gpus": 0, "num_cpus": 1}
    known |= {"num_replicas": 1, "min_replicas": None, "max_replicas": None, "target_ongoing_requests": 16}
    known |= {"max_ongoing_requests": 256}
    if unknown := sorted(arguments.keys() - known.keys()):
        raise ConfigError(f"unknown arguments: {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    given = {**known, **arguments}
    if (given["min_replicas"] is None) != (given["max_replicas"] is None):
        raise ConfigError("give both min_replicas and max_replicas, or num_replicas")
    options: dict[str, Any] = {"num_replicas": given["num_replicas"]}
    if given["max_replicas"] is not None:
        options = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=given["min_replicas"],
                max_replicas=given["max_replicas"],
                target_ongoing_requests=given["target_ongoing_requests"],
            )
        }
    servers = serve.deployment(
        RametServer,
        ray_actor_options={"num_gpus": given["num_gpus"], "num_cpus": given["num_cpus"]},
        max_ongoing_requests=given["max_ongoing_requests"],
        request_router_config=RequestRouterConfig(request_router_class=PrefixRouter, request_routing_stats_period_s=5),
        **options,
    )
    ingress = serve.deployment(RametIngress, max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0})
    return ingress.bind(servers.bind(given["model"], given["engine"], given["server"]))
