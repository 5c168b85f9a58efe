"""Several engine processes behind one interface: placement, crashes, draining, more and fewer."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Collection

import msgspec
import pytest

from ramet.errors import ConfigError, EngineStopped, InvalidRequest, ModelNotFound, Overloaded, RequestCancelled
from ramet.lang.graph.ir import Generate, Graph, Sampling, Text
from ramet.runtime.cache.prefix_log import CacheChanges
from ramet.runtime.cluster.autoscaler import ScalingRule
from ramet.runtime.cluster.router import Placement, RoutedRequest, Router, RouterConfig
from ramet.runtime.engine.config import EngineConfig
from ramet.runtime.engine.loading import config_of_replica
from ramet.runtime.models.catalog import TINY_MODEL
from ramet.runtime.server.config import ServerConfig
from ramet.runtime.server.link.protocol import ExtendProgram, StartProgram, Submit
from ramet.runtime.server.link.proxy import EngineProxy, Listener
from ramet.runtime.server.link.replicas import Replicas
from ramet.runtime.server.tenants import Tenants
from ramet.runtime.types import SamplingParams

CONFIG = {"num_kv_tokens": 4096, "max_running_requests": 8, "device": "cpu", "num_threads": 1}
Scenario = Callable[[Replicas], Awaitable[None]]


class Steady(Router):
    """Takes all replicas for equally fast, whatever else this machine does: prompts that are ten seconds apart, each of
    whose tokens took a millisecond.
    """

    now_s = 0.0

    def place(self, request: RoutedRequest, now_s: float, avoid: Collection[int] = ()) -> Placement:
        self.now_s += 10.0
        return super().place(request, self.now_s, avoid)

    def begun(self, placement: Placement, now_s: float) -> None:
        super().begun(placement, placement.placed_s + 1e-3 * placement.num_lacking)


def run(
    scenario: Scenario,
    count: int = 2,
    model: str = TINY_MODEL,
    max_in_flight: int = 100,
    scaling: ScalingRule | None = None,
    make_router: Callable[[RouterConfig], Router] = Router,
) -> None:
    tenants = Tenants(ServerConfig(max_in_flight=max_in_flight))

    def make_proxy(replica: int, listener: Listener) -> EngineProxy:
        return EngineProxy(model, CONFIG, accounts=tenants, replica=replica, listener=listener, log_level="ERROR")

    async def main() -> None:
        replicas = Replicas(count, make_proxy, make_router=make_router, scaling=scaling)
        await replicas.start()
        try:
            await replicas.wait_ready(120)
            await scenario(replicas)
        finally:
            await replicas.stop()

    asyncio.run(asyncio.wait_for(main(), 240))


def request(replicas: Replicas, prompt: bytes, num_tokens: int = 8) -> Submit:
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    return Submit(replicas.new_id("test"), list(prompt), sampling)


def pids(replicas: Replicas) -> dict[int, int]:
    return {n: proxy.hello.pid for n, proxy in replicas.engines() if proxy.hello is not None and n is not None}


async def where(replicas: Replicas, command: Submit) -> tuple[int, int]:
    """Run a request. Returns its replica, and how many of its tokens were cached."""
    stream = replicas.submit(command, is_whole=True)
    (number,) = [n for n, proxy in replicas.engines() if command.id in proxy.in_flight()]
    output = await stream.collect()
    assert number is not None
    return number, output.cached_tokens


def prompt_of(n: int, length: int = 200) -> bytes:
    return bytes((n * 31 + i * (n + 7)) % 90 + 33 for i in range(length))


def test_requests_go_where_their_prefixes_are_and_new_ones_to_the_less_busy() -> None:
    async def scenario(replicas: Replicas) -> None:
        first = [await where(replicas, request(replicas, prompt_of(n))) for n in range(8)]
        assert {cached for _, cached in first} == {0}
        again = [await where(replicas, request(replicas, prompt_of(n) + b"and more")) for n in range(8)]
        assert [number for number, _ in again] == [number for number, _ in first]
        assert min(cached for _, cached in again) >= 192
        streams = [replicas.submit(request(replicas, prompt_of(20 + n), 40)) for n in range(8)]
        loads = Counter(n for n, proxy in replicas.engines() for _ in proxy.in_flight())
        assert min(loads[n] for n in (0, 1)) >= 3
        assert [len((await stream.collect()).token_ids) for stream in streams] == [40] * 8
        assert replicas.num_in_flight == 0
        stats = await replicas.ask("stats")
        assert stats["num_finished"] == 24
        await replicas.ask("check_integrity")
        known = replicas.num_known_prefixes
        assert known > 8 * 12
        assert await replicas.ask("flush_cache") > 0
        while replicas.num_known_prefixes:  # told after the next step, at the latest
            await where(replicas, request(replicas, b"x", 1))
            await replicas.ask("flush_cache")

    run(scenario, make_router=Steady)


def test_a_killed_replica_loses_no_request_that_had_not_begun() -> None:
    async def scenario(replicas: Replicas) -> None:
        for n in range(4):
            await where(replicas, request(replicas, prompt_of(n)))
        begun = [replicas.submit(request(replicas, prompt_of(n), 1500)) for n in range(4)]
        heads = [aiter(stream) for stream in begun]
        for head in heads:
            await anext(head)  # its reader has seen something
        waiting = [replicas.submit(request(replicas, prompt_of(n), 30)) for n in range(12)]
        whole = [replicas.submit(request(replicas, prompt_of(n), 60), is_whole=True) for n in range(4)]
        victim = max((len(proxy.in_flight()), n) for n, proxy in replicas.engines() if n is not None)[1]
        lost = {head_id for n, proxy in replicas.engines() if n == victim for head_id in proxy.in_flight()}
        os.kill(pids(replicas)[victim], signal.SIGKILL)
        done = await asyncio.gather(*(stream.collect() for stream in (*waiting, *whole)))
        assert [len(output.token_ids) for output in done] == [30] * 12 + [60] * 4
        for stream, head in zip(begun, heads, strict=True):
            if stream.id in lost:
                with pytest.raises(EngineStopped, match="crashed while this was in flight"):
                    async for _ in head:
                        pass
            else:
                stream.close()
        assert replicas.num_retries > 0
        assert replicas.health() is None
        assert sum(proxy.num_crashes for _, proxy in replicas.engines()) == 1
        await replicas.wait_ready(120)
        found = {(await where(replicas, request(replicas, prompt_of(30 + n))))[0] for n in range(24)}
        assert found == {0, 1}  # it takes part again

    run(scenario)


def program(text: str) -> bytes:
    sampling = Sampling(max_tokens=8, temperature=0.0, ignore_eos=True)
    nodes = (Text(id=0, parts=(text,)), Generate(id=1, parent=0, name="a", sampling=sampling))
    return Graph(nodes).to_json()


def test_programs_run_whole_on_one_replica_and_begin_anew_if_it_dies_before_the_model_wrote() -> None:
    async def scenario(replicas: Replicas) -> None:
        async def run_one(number: int) -> list[tuple[int, str]]:
            (stream,) = replicas.start_program(StartProgram(f"p{number}", program("Say: " * 40), text_events=False))
            return [(r.event.node, r.event.kind) async for r in stream if r.event is not None]

        expected = [(0, "done"), (1, "done")]
        assert await run_one(0) == expected
        tasks = [asyncio.create_task(run_one(n)) for n in range(1, 9)]
        await asyncio.sleep(0)
        assert replicas.num_programs == 8
        loads = {n: len(proxy.in_flight()) for n, proxy in replicas.engines()}
        victim = max(loads, key=loads.__getitem__)
        assert victim is not None
        os.kill(pids(replicas)[victim], signal.SIGKILL)
        assert await asyncio.gather(*tasks) == [expected] * 8
        assert replicas.num_programs == 0

    run(scenario)


@pytest.mark.slow
def test_a_program_that_stays_open_gets_its_parts_on_its_replica() -> None:
    async def scenario(replicas: Replicas) -> None:
        (stream,) = replicas.start_program(StartProgram("open", program("Hello"), is_open=True, text_events=False))
        replicas.send_to_program(ExtendProgram("open/0", is_last=True))
        events = [report.event.kind async for report in stream if report.event is not None]
        assert events == ["done", "done"]
        replicas.send_to_program(ExtendProgram("open/0", is_last=True))  # over: nothing happens
        streams = replicas.start_program(StartProgram("rows", program("Hello"), (b"{}",) * 5, text_events=False))
        assert [stream.id for stream in streams] == [f"rows/{n}" for n in range(5)]
        assert replicas.num_programs == 5
        assert {n for n, proxy in replicas.engines() if proxy.num_programs} == {0, 1}
        for stream in streams:
            assert [report.event.kind async for report in stream if report.event] == ["done", "done"]
        (stream,) = replicas.start_program(StartProgram("left", program("Hello"), is_open=True))
        stream.close()
        assert (replicas.num_programs, replicas.num_in_flight) == (0, 0)

    run(scenario)


@pytest.mark.slow
def test_ids_limits_and_aborts_hold_for_all_replicas_together() -> None:
    async def scenario(replicas: Replicas) -> None:
        command = request(replicas, b"hello", 1000)
        stream = replicas.submit(command)
        with pytest.raises(InvalidRequest, match="in use"):
            replicas.submit(command)
        others = [replicas.submit(request(replicas, prompt_of(n), 500)) for n in range(3)]
        with pytest.raises(Overloaded, match="4 requests are in flight already, of 4 at most"):
            replicas.submit(request(replicas, b"one more"))
        with pytest.raises(Overloaded):
            replicas.start_program(StartProgram("rows", program("Hello"), (b"{}",) * 3))
        assert (replicas.num_in_flight, replicas.num_programs) == (4, 0)
        somebody_else = msgspec.structs.replace(request(replicas, b"a share"), client=("another key",))
        assert len((await replicas.submit(somebody_else).collect()).token_ids) == 8
        assert replicas.abort(command.id)
        assert not replicas.abort("nobody")
        with pytest.raises(RequestCancelled):
            await stream.collect()
        for other in others:
            other.close()
        assert replicas.num_in_flight == 0
        for number in (10**12, 10**30, -1):
            with pytest.raises(InvalidRequest):
                await replicas.submit(Submit("bad", [number], SamplingParams(max_tokens=1))).collect()
        assert replicas.num_in_flight == 0

    run(scenario, max_in_flight=4)


@pytest.mark.slow
def test_scaling_up_and_down_and_restarting_lose_nothing() -> None:
    async def scenario(replicas: Replicas) -> None:
        is_over = asyncio.Event()
        num_done = 0

        async def load(worker: int) -> None:
            nonlocal num_done
            while not is_over.is_set():
                output = await replicas.submit(
                    request(replicas, prompt_of(worker) + b"?" * (num_done % 9), 20)
                ).collect()
                assert len(output.token_ids) == 20
                num_done += 1

        workers = [asyncio.create_task(load(n)) for n in range(4)]
        before = pids(replicas)
        await replicas.scale(3, drain_s=30)
        assert sorted(pids(replicas)) == [0, 1, 2]
        await replicas.scale(2, drain_s=30)
        assert pids(replicas) == before
        await replicas.restart(drain_s=30)
        assert set(pids(replicas).values()).isdisjoint(before.values())

        def smaller(replica: int, listener: Listener) -> EngineProxy:
            config = {**CONFIG, "num_kv_tokens": 2048}
            return EngineProxy(TINY_MODEL, config, replica=replica, listener=listener, log_level="ERROR")

        await replicas.restart(30, smaller)
        with pytest.raises(ModelNotFound):
            await replicas.restart(30, lambda n, listener: EngineProxy("no-such", CONFIG, replica=n, listener=listener))
        hellos = [proxy.hello for _, proxy in replicas.engines()]
        assert [hello.num_kv_tokens for hello in hellos if hello is not None] == [2048, 2048]
        await replicas.scale(1, drain_s=30)
        with pytest.raises(ConfigError, match="nothing would serve while it restarts"):
            await replicas.restart(drain_s=1)
        with pytest.raises(ConfigError, match=r"must be in \[1, 256\]"):
            await replicas.scale(0, drain_s=1)
        is_over.set()
        await asyncio.gather(*workers)
        assert num_done > 0
        assert replicas.num_retries == 0

    run(scenario)


@pytest.mark.slow
def test_the_number_of_replicas_follows_the_load_and_no_request_fails() -> None:
    async def scenario(replicas: Replicas) -> None:
        is_over = False

        async def load(worker: int) -> None:
            while not is_over:
                output = await replicas.submit(request(replicas, prompt_of(worker), 20)).collect()
                assert len(output.token_ids) == 20

        async def until(count: int) -> None:
            while sum(proxy.hello is not None for _, proxy in replicas.engines()) != count:
                await asyncio.sleep(0.05)

        workers = [asyncio.create_task(load(n)) for n in range(4)]
        await until(3)
        is_over = True
        await asyncio.gather(*workers)
        await until(1)
        assert replicas.num_retries == 0

    # any request is too much, and none is too little
    run(scenario, count=1, scaling=ScalingRule(1, 3, ttft_s=1e-9, up_s=1.0, down_s=2.0))


@pytest.mark.slow
def test_missed_changes_are_asked_for() -> None:
    async def scenario(replicas: Replicas) -> None:
        number, _ = await where(replicas, request(replicas, prompt_of(1)))
        known = replicas.num_known_prefixes
        replicas.note(number, CacheChanges(99))  # those before it are missing
        while not replicas.num_resyncs:
            await asyncio.sleep(0.01)
        assert replicas.num_known_prefixes == known
        assert (await where(replicas, request(replicas, prompt_of(1))))[0] == number

    run(scenario)


def test_a_model_that_cannot_be_loaded_is_reported_as_by_one_engine() -> None:
    async def main() -> None:
        replicas = Replicas(2, lambda n, listener: EngineProxy("no-such", CONFIG, replica=n, listener=listener))
        await replicas.start()
        with pytest.raises(ModelNotFound):
            await replicas.wait_ready(60)
        with pytest.raises(EngineStopped):
            replicas.submit(request(replicas, b"x"))
        assert replicas.startup["ready"] is False
        assert "replica 0" in (replicas.health() or "")
        await replicas.stop()

    asyncio.run(asyncio.wait_for(main(), 120))


def test_each_engine_takes_the_next_gpus() -> None:
    def devices(config: EngineConfig, num_gpus: int) -> list[str]:
        return [config_of_replica(config, replica, num_gpus).device for replica in range(2)]

    assert devices(EngineConfig(), 0) == ["auto", "auto"]
    assert devices(EngineConfig(device="cpu"), 8) == ["cpu", "cpu"]
    assert devices(EngineConfig(), 2) == ["cuda:0", "cuda:1"]
    assert devices(EngineConfig(device="cuda:2", tp=2), 6) == ["cuda:2", "cuda:4"]
    with pytest.raises(ConfigError, match="engine 1 needs 1 GPUs from number 1 on, but this machine has 1; lower --dp"):
        devices(EngineConfig(), 1)
