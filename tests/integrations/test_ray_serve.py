"""Ramet as an application of Ray Serve."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml  # type: ignore[import-untyped]

from ramet.errors import ConfigError

MANIFEST = Path(__file__).parents[2] / "deploy" / "rayservice.yaml"
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed (pip install 'ramet[ray]')"
)
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


def test_without_ray_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "ramet.integrations.ray_serve", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'ramet\[ray\]'"):
        importlib.import_module("ramet.integrations.ray_serve")


class FakeRequestRouter:
    """As much of Serve's RequestRouter as Ramet's uses."""

    def update_replicas(self, replicas: list[Any]) -> None:
        self.curr_replicas = {replica.replica_id: replica for replica in replicas}

    def on_replica_actor_died(self, replica_id: str) -> None:
        del self.curr_replicas[replica_id]


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module with stand-ins for Ray, which may not be installed."""
    names = {
        "ray": [],
        "ray.serve": [],
        "ray.serve.config": ["AutoscalingConfig", "RequestRouterConfig"],
        "ray.serve.request_router": ["PendingRequest", "ReplicaID", "RunningReplica"],
    }
    for name, attributes in names.items():
        module = ModuleType(name)
        for attribute in attributes:
            setattr(module, attribute, object)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["ray"].serve = sys.modules["ray.serve"]  # type: ignore[attr-defined]
    sys.modules["ray.serve.request_router"].RequestRouter = FakeRequestRouter  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "ramet.integrations.ray_serve", raising=False)
    yield importlib.import_module("ramet.integrations.ray_serve")
    sys.modules.pop("ramet.integrations.ray_serve")


def replica(name: str) -> Any:
    return SimpleNamespace(replica_id=name, routing_stats={"num_kv_tokens": 1_000})


def pending(number: int, text: str) -> Any:
    body = json.dumps({"prompt": text}).encode()
    metadata = SimpleNamespace(internal_request_id=str(number))
    context = SimpleNamespace(should_backoff=False)
    return SimpleNamespace(args=["POST", "/v1/completions", b"", [], body], metadata=metadata, routing_context=context)


def test_a_request_goes_where_one_like_it_was_sent_and_elsewhere_if_that_replica_is_gone(
    without_ray: ModuleType,
) -> None:
    router: Any = without_ray.PrefixRouter()
    router.initialize_state(num_drawn=8)
    there = [replica(name) for name in "abc"]
    router.update_replicas(there)

    def send(number: int, text: str, taken: int = 0) -> str:
        """Let Serve take the replica of this rank, and the request end."""
        request = pending(number, text)
        ranks = asyncio.run(router.choose_replicas(there, request))
        assert sorted(one.replica_id for rank in ranks for one in rank) == sorted(r.replica_id for r in there)
        chosen: str = ranks[taken][0].replica_id
        router.on_request_routed(request, chosen, None)
        router.on_request_completed(chosen, str(number))
        return chosen

    homes = {n: send(n, f"{n} document " * 40) for n in range(9)}
    assert {n: send(10 + n, f"{n} document " * 40 + "more") for n in range(9)} == homes
    full = send(20, "0 document " * 40, taken=1)  # its replica was full, and Serve has sent it on
    assert full != homes[0]
    gone = homes[5]
    there = [one for one in there if one.replica_id != gone]
    router.update_replicas(there)
    moved = send(30, "5 document " * 40)
    assert moved != gone
    assert send(31, "5 document " * 40) == moved
    there.append(replica("d"))
    router.update_replicas(there)
    router.on_replica_actor_died("d")
    assert send(32, "5 document " * 40) == moved
    assert asyncio.run(router.choose_replicas(there, None)) == [there]
    for request in (pending(40, "x" * 900), pending(41, "x" * 900)):  # never sent, and tried again
        for _ in range(3):
            asyncio.run(router.choose_replicas(there, request))
    for number in (40, 41):
        router.on_request_completed("a", str(number))
    assert {router._router.load(number) for number in router._router.replicas} == {(0, 0)}


@needs_ray
@pytest.mark.slow
def test_requests_that_begin_alike_have_keys_in_common_whatever_the_order_of_their_fields() -> None:
    from ramet.integrations.ray_serve import described

    first = [{"role": "user", "content": "A long question about something. " * 20}]
    later = [*first, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]
    one = described(json.dumps({"model": "m", "messages": first}).encode())
    other = described(json.dumps({"messages": later, "temperature": 0, "model": "m"}).encode())
    assert len(one.keys) >= 8
    assert list(other.keys[: len(one.keys)]) == list(one.keys)
    assert other.num_tokens > one.num_tokens
    tools = described(json.dumps({"messages": first, "tools": [{"type": "function"}]}).encode())
    assert not set(tools.keys) & set(one.keys), "tools stand before the messages"
    for body in (b"", b"{", b"[]", b'"text"', b"null", b'{"messages": null}', b"\xff", b"[" * 100_000):
        assert list(described(body).keys) == []


@needs_ray
@pytest.mark.slow
def test_what_was_sent_to_a_replica_is_forgotten_in_the_order_of_its_use() -> None:
    from ramet.integrations.ray_serve import SentPrefixes

    sent = SentPrefixes()
    assert sent.add(0, [1, 2, 3], 4).added == [1, 2, 3]
    assert sent.add(0, [1, 2, 5], 4).added == [5]
    changes = sent.add(0, [6, 7], 4)
    assert (changes.number, changes.added, changes.removed) == (3, [6, 7], [3, 1])
    assert sent.add(1, list(range(10)), 4).removed == [], "one prompt that is longer than the cache stays whole"
    sent.forget(0)
    assert sent.add(0, [1], 4).added == [1]


@needs_ray
@pytest.mark.slow
def test_arguments_that_cannot_be_are_refused() -> None:
    from ramet.integrations.ray_serve import build

    with pytest.raises(ConfigError, match=r"unknown arguments: modle; known: .*model"):
        build({"modle": "x"})
    with pytest.raises(ConfigError, match="both min_replicas and max_replicas"):
        build({"min_replicas": 1})


@needs_ray
@pytest.mark.slow
def test_ray_accepts_the_manifest_and_the_builder_takes_its_arguments() -> None:
    from ray.serve.schema import ServeDeploySchema

    from ramet.integrations import ray_serve

    manifest = yaml.safe_load(MANIFEST.read_text())
    config = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    (application,) = config.applications
    module, _, name = str(application.import_path).partition(":")
    assert module == ray_serve.__name__
    assert getattr(ray_serve, name)(application.args) is not None


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    """Two replicas of the tiny model behind Serve, which only this machine reaches."""
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # Ray then takes the loopback address for its own
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import serve

    from ramet.integrations.ray_serve import build

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=3, include_dashboard=False, _node_ip_address="127.0.0.1")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        engine = {"device": "cpu", "num_kv_tokens": 4096, "num_threads": 1}
        arguments: dict[str, Any] = {"model": "tiny-random", "engine": engine, "num_replicas": 2}
        serve.run(build(arguments), name="ramet")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            yield client
    finally:
        serve.shutdown()
        ray.shutdown()


@needs_ray
@pytest.mark.slow
def test_two_replicas_behind_serve_answer_all_endpoints_and_find_their_prefixes(served: httpx.Client) -> None:
    assert served.get("/health").json()["status"] == "ok"
    assert served.get("/v1/models").json()["data"]
    hits = Counter[int]()
    for turn in range(3):
        for document in range(8):
            body = {"prompt": f"{document} document " * 30 + f"question {turn}", "max_tokens": 4, "temperature": 0}
            usage = served.post("/v1/completions", json=body).json()["usage"]
            hits[turn] += usage["prompt_tokens_details"]["cached_tokens"] > 200
    assert (hits[0], hits[1], hits[2]) == (0, 8, 8)
    with served.stream("POST", "/v1/completions", json={"prompt": "x", "max_tokens": 8, "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert sum(line.startswith("data: ") for line in answer.iter_lines()) > 2
    refused = served.post("/v1/chat/completions", content=b"{bad")
    assert (refused.status_code, served.get("/nowhere").status_code) == (400, 404)
    long = {"prompt": "x", "max_tokens": 1500, "stream": True, "ignore_eos": True}
    with served.stream("POST", "/v1/completions", json=long) as answer:
        next(answer.iter_lines())  # and its client leaves
    for _ in range(100):
        if all("ramet_running_requests 0.0" in served.get("/metrics").text for _ in range(4)):
            return
    raise AssertionError("a request goes on that nobody reads")
