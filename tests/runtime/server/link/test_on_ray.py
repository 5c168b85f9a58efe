"""Engines on the nodes of a Ray cluster: with a stand-in for Ray, and (slow) on a real cluster of two nodes."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import zmq

from ramet.errors import ConfigError, EngineStopped, ModelNotFound
from ramet.runtime.engine.config import EngineConfig
from ramet.runtime.models.catalog import TINY_MODEL
from ramet.runtime.server.link import on_ray
from ramet.runtime.server.link.protocol import Submit
from ramet.runtime.server.link.proxy import EngineProxy, Listener
from ramet.runtime.server.link.replicas import Replicas
from ramet.runtime.types import SamplingParams

CONFIG = {"num_kv_tokens": 4096, "max_running_requests": 8, "device": "cpu", "num_threads": 1}
ENGINE = EngineConfig.from_mapping(CONFIG)


class ActorLost(Exception):
    """Stands for Ray's RayActorError."""


class FakeMethod:
    """A method of an actor: a call is a task of this event loop."""

    def __init__(self, actor: FakeActor, name: str) -> None:
        self.actor, self.name = actor, name

    def options(self, **options: object) -> FakeMethod:
        return self

    def remote(self, *arguments: object) -> asyncio.Task[Any]:  # Any: what the method returns
        return asyncio.get_running_loop().create_task(self._call(*arguments))

    async def _call(self, *arguments: object) -> Any:
        lost = self.actor.lost
        work = asyncio.ensure_future(getattr(self.actor.made, self.name)(*arguments))
        await asyncio.wait({work, lost}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            lost.result()
        return work.result()


class FakeActor:
    """An actor of this process."""

    def __init__(self, cls: Callable[[], object]) -> None:
        self.made = cls()
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.run, self.end, self.place = (FakeMethod(self, name) for name in ("run", "end", "place"))

    def lose(self) -> None:
        """As when its node is lost: calls fail, and the process ends with the actor."""
        lost, self.lost = self.lost, asyncio.get_running_loop().create_future()
        lost.set_exception(ActorLost("the node is gone\nmore"))
        self.kill()

    def kill(self) -> None:
        if (launcher := self.made._launcher) is not None:  # type: ignore[attr-defined]
            launcher.kill()


class FakeRay(ModuleType):
    """As much of Ray as Ramet uses, on one node of this process."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.exceptions = SimpleNamespace(RayError=ActorLost, RayActorError=ActorLost)
        self.util = SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1")
        self.actors: list[FakeActor] = []
        self.asked: list[dict[str, object]] = []
        self.shapes = [{"CPU": 4.0}]

    def remote(self, cls: Callable[[], object]) -> Any:  # Any: an actor class, as Ray makes it
        def make() -> FakeActor:
            self.actors.append(FakeActor(cls))
            return self.actors[-1]

        def options(**values: object) -> object:
            self.asked.append(values)
            return SimpleNamespace(remote=make)

        return SimpleNamespace(options=options)

    def is_initialized(self) -> bool:
        return True

    def kill(self, actor: FakeActor) -> None:
        actor.kill()

    def nodes(self) -> list[dict[str, object]]:
        return [{"Alive": True, "Resources": shape} for shape in self.shapes]

    def cluster_resources(self) -> dict[str, float]:
        return {name: sum(shape.get(name, 0.0) for shape in self.shapes) for name in ("CPU", "GPU")}


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    ray = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    return ray


def run(scenario: Callable[[EngineProxy], Awaitable[None]]) -> None:
    async def main() -> None:
        proxy = EngineProxy(TINY_MODEL, CONFIG, launcher=on_ray.RayLauncher(ENGINE), replica=3, log_level="ERROR")
        await proxy.start()
        try:
            await scenario(proxy)
        finally:
            await proxy.stop()

    asyncio.run(asyncio.wait_for(main(), 120))


def request(prompt: bytes, num_tokens: int = 8) -> Submit:
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    return Submit(f"test-{os.urandom(4).hex()}", list(prompt), sampling)


def test_an_engine_elsewhere_answers_over_tcp_and_only_who_has_its_keys_may_connect(fake_ray: FakeRay) -> None:
    async def scenario(proxy: EngineProxy) -> None:
        await proxy.wait_ready(60)
        assert fake_ray.asked == [{"num_cpus": 1, "num_gpus": 0, "max_restarts": -1}]
        assert len((await proxy.submit(request(b"hello")).collect()).token_ids) == 8
        commands, reports = (s.getsockopt_string(zmq.LAST_ENDPOINT) for s in (proxy._commands, proxy._reports) if s)
        assert commands.startswith("tcp://127.0.0.1:")
        launcher = proxy._launcher
        assert isinstance(launcher, on_ray.RayLauncher)
        with zmq.Context() as context:
            public, secret = zmq.curve_keypair()
            for keys in (None, (launcher._public, public, secret)):  # even one who knows the server's public key
                strange = [context.socket(kind) for kind in (zmq.PULL, zmq.PUSH)]
                for one in strange:
                    one.setsockopt(zmq.LINGER, 0)
                    if keys is not None:
                        one.curve_serverkey, one.curve_publickey, one.curve_secretkey = keys
                listening, telling = strange
                listening.connect(commands)
                telling.connect(reports)
                telling.setsockopt(zmq.SNDTIMEO, 300)
                with contextlib.suppress(zmq.Again):
                    telling.send(b"nonsense that would end the reader")
                for n in range(4):  # a stranger would get every second one
                    await proxy.submit(request(b"secret %d" % n)).collect()
                assert not listening.poll(200)
                for one in strange:
                    one.close()
        assert proxy.health() is None

    run(scenario)


def test_an_actor_that_is_lost_ends_what_was_in_flight_and_its_engine_starts_again(fake_ray: FakeRay) -> None:
    async def scenario(proxy: EngineProxy) -> None:
        first = await proxy.wait_ready(60)
        stream = proxy.submit(request(b"hello", 1500))
        async for _ in stream:
            break
        lasting = proxy.submit(request(b"hello", 1500))
        fake_ray.actors[0].lose()
        with pytest.raises(EngineStopped, match=r"in flight \(its actor was lost: the node is gone\)"):
            await lasting.collect()
        again = await proxy.wait_ready(60)
        assert again.pid != first.pid
        assert len((await proxy.submit(request(b"hello")).collect()).token_ids) == 8
        assert len(fake_ray.actors) == 1, "Ray restarts the actor; nobody makes another"

    run(scenario)


def test_a_node_with_another_version_is_refused_before_anything_is_loaded(
    fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def elsewhere(actor: on_ray.EngineActor) -> tuple[str, str]:
        return "10.0.0.7", "0.0.9"

    monkeypatch.setattr(on_ray.EngineActor, "place", elsewhere)

    async def scenario(proxy: EngineProxy) -> None:
        with pytest.raises(ConfigError, match=r"the node 10\.0\.0\.7 has Ramet 0\.0\.9, but this server"):
            await proxy.wait_ready(60)

    run(scenario)


def test_a_node_with_other_files_of_the_model_is_refused_before_it_is_loaded(
    fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray, "fingerprint", lambda model: "of other files")  # the engine's process has its own

    async def scenario(proxy: EngineProxy) -> None:
        with pytest.raises(ConfigError, match=r"the model tiny-random on .* has other files than the server's"):
            await proxy.wait_ready(60)

    run(scenario)


def test_a_fingerprint_tells_models_apart_by_their_files(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "same", "tuned", "longer")]
    for folder in folders:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "README.md").write_text(str(folder))
        (folder / "model.safetensors").write_bytes(b"header" + (b"x" if folder.name == "tuned" else b"y"))
    (folders[3] / "model-2.safetensors").write_bytes(b"more")
    one, same, tuned, longer = (on_ray.fingerprint(str(folder)) for folder in folders)
    assert one == same
    assert len({one, tuned, longer}) == 3
    with pytest.raises(ModelNotFound):
        on_ray.fingerprint(str(tmp_path / "none"))


def test_a_cluster_without_room_is_said_after_a_while(fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(actor: on_ray.EngineActor) -> tuple[str, str]:
        return await asyncio.Future()

    monkeypatch.setattr(on_ray.EngineActor, "place", never)
    monkeypatch.setattr(on_ray, "_PLACE_S", 0.05)

    async def scenario(proxy: EngineProxy) -> None:
        with pytest.raises(ConfigError, match="no node of the Ray cluster had 1 CPUs free within"):
            await proxy.wait_ready(60)

    run(scenario)


def test_engines_that_no_node_has_room_for_are_refused_with_what_the_cluster_has(fake_ray: FakeRay) -> None:
    fake_ray.shapes = [{"CPU": 16.0, "GPU": 3.0}, {"CPU": 16.0, "GPU": 1.0}, {"CPU": 2.0}]
    on_ray.check_room(4, EngineConfig(device="cuda"))
    on_ray.check_room(1, EngineConfig(tp=2))
    with pytest.raises(ConfigError, match=r"2 engines .* each with 1 CPUs and 2 GPUs .* room for 1 .*3 nodes: .*tp"):
        on_ray.check_room(2, EngineConfig(device="cuda", tp=2))
    with pytest.raises(ConfigError, match=r"--device cuda:1 names a card .* write --device cuda"):
        on_ray.check_room(1, EngineConfig(device="cuda:1"))
    fake_ray.shapes = [{"CPU": 2.0}]
    on_ray.check_room(2, EngineConfig())  # on CPUs
    with pytest.raises(ConfigError, match=r"room for 0 \(1 nodes: 2 CPUs, 0 GPUs\); lower --dp, or add nodes"):
        on_ray.check_room(1, EngineConfig(device="cuda"))
    with pytest.raises(ConfigError, match="3 engines"):
        on_ray.check_room(3, EngineConfig(device="cpu"))


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'ramet\[ray\]'"):
        on_ray.connect("auto")


def test_an_address_where_nothing_answers_is_refused_at_once(
    fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_ray, "is_initialized", lambda: False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"  # bound, but nobody listens
        with pytest.raises(ConfigError, match=f"no Ray cluster can be joined at --ray-address {address}: .*refused"):
            on_ray.connect(address)
    for address in ("", "local", "ray://head:10001", "head", ":6379", "head:port", "head:6379/x"):
        with pytest.raises(ConfigError, match="must be HOST:PORT, or auto"):  # some would start a cluster of their own
            on_ray.connect(address)


needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed (pip install 'ramet[ray]')"
)
NODE = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "include_dashboard": False}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:  # Any: ray.cluster_utils.Cluster
    """Two nodes of one CPU each, which only this machine reaches."""
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # Ray then takes the loopback address for its own
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args=dict(NODE))
    try:
        made.add_node(**NODE)
        on_ray.connect(made.address)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_node_is_removed_and_added_back_under_load_and_no_request_is_lost(cluster: Any) -> None:
    def make_proxy(replica: int, listener: Listener) -> EngineProxy:
        launcher = on_ray.RayLauncher(ENGINE)
        return EngineProxy(TINY_MODEL, CONFIG, launcher=launcher, replica=replica, listener=listener)

    steps, done = threading.Semaphore(0), threading.Semaphore(0)  # nodes come and go on this thread, as Ray wants it
    failures: list[BaseException] = []
    counts = {"answered": 0, "retries": 0}

    async def main() -> None:
        replicas = Replicas(2, make_proxy)
        await replicas.start()
        is_over = False

        async def load() -> None:
            while not is_over:
                output = await replicas.submit(request(os.urandom(40), 16), is_whole=True).collect()
                assert len(output.token_ids) == 16
                counts["answered"] += 1

        async def settled(stage: str) -> None:
            while replicas.startup["stage"] != stage:
                await asyncio.sleep(0.05)

        try:
            await replicas.wait_ready(180)
            workers = [asyncio.create_task(load()) for _ in range(4)]
            for stage in ("1 of 2 replicas ready", "ready"):
                steps.release()
                await asyncio.to_thread(done.acquire)
                await settled(stage)
                before = counts["answered"]
                while counts["answered"] < before + 20:
                    await asyncio.sleep(0.05)
            hello = replicas.engines()[0][1].hello
            assert hello is not None
            os.kill(hello.pid, signal.SIGKILL)
            killed_s = time.monotonic()
            await settled("1 of 2 replicas ready")
            await settled("ready")
            print(f"an engine was killed, and ready again after {time.monotonic() - killed_s:.1f} s")
            is_over = True
            await asyncio.gather(*workers)
            counts["retries"] = replicas.num_retries
        finally:
            await replicas.stop()

    def serve() -> None:
        try:
            asyncio.run(asyncio.wait_for(main(), 400))
        except BaseException as error:
            failures.append(error)
        finally:
            steps.release(2)

    thread = threading.Thread(target=serve)
    thread.start()
    steps.acquire()
    second = next(iter(cluster.worker_nodes))
    cluster.remove_node(second)
    done.release()
    steps.acquire()
    cluster.add_node(**NODE)
    done.release()
    thread.join()
    assert not failures, failures
    assert counts["answered"] > 40
    print(counts)


@needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_no_cluster_on_this_machine_is_said_so() -> None:
    import ray

    assert not ray.is_initialized()
    with pytest.raises(ConfigError, match="no Ray cluster can be joined at --ray-address auto"):
        on_ray.connect("auto")
