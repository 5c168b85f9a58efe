"""The engine in its own process: requests, programs, aborts, crashes, slow readers."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from ramet.errors import (
    ConfigError,
    EngineStopped,
    InvalidProgram,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    RequestCancelled,
)
from ramet.lang.graph.ir import Constraint, Generate, Graph, Sampling, Text
from ramet.runtime.engine.engine import Engine
from ramet.runtime.models.catalog import TINY_MODEL
from ramet.runtime.server.config import ServerConfig
from ramet.runtime.server.link.launchers import LocalLauncher
from ramet.runtime.server.link.process import _beat
from ramet.runtime.server.link.protocol import (
    EngineFailed,
    ErrorInfo,
    Heartbeat,
    Hello,
    Report,
    Settings,
    StartProgram,
    Submit,
)
from ramet.runtime.server.link.proxy import EngineProxy
from ramet.runtime.server.tenants import Tenants
from ramet.runtime.types import RequestOptions, SamplingParams

CONFIG = {"num_kv_tokens": 4096, "max_running_requests": 8, "device": "cpu"}
Scenario = Callable[[EngineProxy], Awaitable[None]]


def submit(proxy: EngineProxy, prompt: bytes = b"hello", **more: object) -> Submit:
    sampling: dict[str, Any] = {"temperature": 0.0, "max_tokens": 20, "ignore_eos": True, **more}
    return Submit(proxy.new_id("test"), list(prompt), SamplingParams(**sampling))


def run(scenario: Scenario, model: str = TINY_MODEL) -> None:
    async def main() -> None:
        proxy = EngineProxy(model, CONFIG, accounts=Tenants(ServerConfig(max_in_flight=50)))
        await proxy.start()
        try:
            await scenario(proxy)
        finally:
            await proxy.stop()

    asyncio.run(asyncio.wait_for(main(), 120))


async def settled(proxy: EngineProxy) -> dict[str, float]:
    """Stats once nothing runs any more; every page is free or cached."""
    for _ in range(200):
        stats: dict[str, float] = await proxy.ask("stats")
        if not stats["num_running"] and not stats["num_waiting"]:
            await proxy.ask("check_integrity")
            assert stats["num_free_pages"] + stats["num_evictable_pages"] == stats["num_pages"]
            return stats
        await asyncio.sleep(0.02)
    raise AssertionError("the engine does not come to rest")


def test_work_without_progress_turns_health_red_though_the_engine_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr("ramet.runtime.server.link.proxy.time.monotonic", lambda: now_s)

    async def scenario() -> None:
        nonlocal now_s
        proxy = EngineProxy(TINY_MODEL, CONFIG)
        proxy._take(Hello(1, "tiny", 2048, 256, "cpu", "float32", 4096, 0.1))
        stats = {"num_steps": 7.0, "num_running": 1.0, "num_waiting": 3.0}
        proxy._take(Heartbeat(stats))
        proxy.submit(submit(proxy))
        for later_s in (10.0, 20.0):
            now_s = later_s
            proxy._take(Heartbeat(stats))
            assert proxy.health(20.0) is None
        now_s = 20.5
        proxy._take(Heartbeat(stats))
        assert "made no progress for 20 s" in (proxy.health(20.0) or "")
        proxy._take(Heartbeat({**stats, "num_steps": 8.0}))
        assert proxy.health(20.0) is None
        await proxy.stop()

    asyncio.run(scenario())


def test_a_tour_of_the_protocol() -> None:
    async def scenario(proxy: EngineProxy) -> None:
        hello = await proxy.wait_ready(180)
        assert (hello.context_length, hello.device) == (2048, "cpu")
        assert proxy.health() is None
        environment = Path(f"/proc/{hello.pid}/environ")
        if environment.exists():  # its threads sleep soon where they wait for others
            assert re.search(rb"GOMP_SPINCOUNT=\d+|OMP_WAIT_POLICY=", environment.read_bytes())

        whole = await proxy.submit(submit(proxy)).collect()
        assert len(whole.token_ids) == 20
        assert (whole.finish_reason, whole.prompt_tokens, whole.completion_tokens) == ("length", 5, 20)
        again = await proxy.submit(submit(proxy)).collect()
        assert (again.token_ids, again.cached_tokens) == (whole.token_ids, 4)

        constrained = Submit(
            proxy.new_id("test"),
            list(b"x"),
            SamplingParams(max_tokens=40, seed=1),
            Constraint("regex", "(yes|no){2}"),
        )
        assert (await proxy.submit(constrained).collect()).text in ("yesyes", "yesno", "noyes", "nono")

        with pytest.raises(InvalidRequest, match="no tokens"):
            await proxy.submit(submit(proxy, b"")).collect()
        with pytest.raises(InvalidRequest, match="logit_bias names token 999") as caught:
            await proxy.submit(submit(proxy, logit_bias={999: 1.0})).collect()
        assert caught.value.param == "logit_bias"
        bad = Submit(proxy.new_id("test"), list(b"x"), SamplingParams(), Constraint("regex", "(unclosed"))
        with pytest.raises(ValueError, match="unclosed"):
            await proxy.submit(bad).collect()

        scored = Submit(
            proxy.new_id("test"), list(b"hello"), SamplingParams(temperature=0.0), options=RequestOptions(score_from=2)
        )
        assert len((await proxy.submit(scored).collect()).prompt_logprobs or []) == 3

        stream = proxy.submit(submit(proxy, max_tokens=400))
        async for _ in stream:
            break
        stream.close()
        cancelled = proxy.submit(submit(proxy, max_tokens=400))
        assert proxy.abort(cancelled.id)
        assert not proxy.abort("no such id")
        await settled(proxy)
        assert proxy.num_aborts == 2
        assert await proxy.ask("flush_cache") > 0

    run(scenario)


def test_a_program_runs_in_the_engine_process_and_its_events_come_in_order() -> None:
    async def scenario(proxy: EngineProxy) -> None:
        await proxy.wait_ready(180)
        sampling = Sampling(max_tokens=8, temperature=0.0)
        nodes = (Text(id=0, parts=("Say: ",)), Generate(id=1, parent=0, name="x", sampling=sampling))
        command = StartProgram(proxy.new_id("program"), Graph(nodes).to_json())
        reports = [report async for report in proxy.start_program(command)[0]]
        assert [report.is_last for report in reports] == [False] * (len(reports) - 1) + [True]
        events = [event for report in reports if (event := report.whole()) is not None]
        assert [e.node for e in events if e.kind == "done"] == [0, 1]
        streamed = "".join(e.text for e in events if e.kind == "text")
        assert streamed == next(e.value for e in events if e.kind == "done" and e.node == 1)
        with pytest.raises(InvalidProgram):
            async for _ in proxy.start_program(StartProgram(proxy.new_id("program"), b'{"version": 99}'))[0]:
                pass
        await settled(proxy)

    run(scenario)


def test_a_slow_reader_costs_one_merged_increment() -> None:
    async def scenario(proxy: EngineProxy) -> None:
        await proxy.wait_ready(180)
        stream = proxy.submit(submit(proxy, max_tokens=300))
        while proxy.num_in_flight:
            await asyncio.sleep(0.02)
        increments = [output async for output in stream]
        assert len(increments) == 1
        assert len(increments[0].token_ids) == 300

        whole = [output async for output in proxy.submit(submit(proxy, max_tokens=30), is_whole=True)]
        assert [len(output.token_ids) for output in whole] == [30], "a reader of whole answers was woken before its end"

    run(scenario)


def test_the_pages_of_a_request_that_is_given_up_are_free_within_one_step() -> None:
    """The abort and the question behind it come in one message: no more than the step that runs lies between them."""

    async def scenario(proxy: EngineProxy) -> None:
        await proxy.wait_ready(180)
        for _ in range(5):
            streams = [proxy.submit(submit(proxy, bytes([65 + i]) * 40, max_tokens=1900)) for i in range(4)]
            await anext(aiter(streams[0]))
            for stream in streams:
                stream.close()
            after = await proxy.ask("stats")
            assert after["num_running"] == after["num_waiting"] == 0
            assert after["num_free_pages"] + after["num_evictable_pages"] == after["num_pages"]
            stream = proxy.submit(submit(proxy, b"counted", max_tokens=1900))
            outputs = aiter(stream)
            await anext(outputs)
            before = await proxy.ask("stats")
            assert before["num_running"] == 1
            stream.close()
            after = await proxy.ask("stats")
            assert after["num_running"] == 0
            assert after["num_free_pages"] + after["num_evictable_pages"] == after["num_pages"]
            await asyncio.sleep(0.05)
            assert (await proxy.ask("stats"))["num_steps"] - after["num_steps"] <= 1, "steps go on for nobody"
        await settled(proxy)

    run(scenario)


def test_killing_the_engine_fails_what_is_in_flight_and_another_one_takes_over() -> None:
    async def scenario(proxy: EngineProxy) -> None:
        hello = await proxy.wait_ready(180)
        streams = [proxy.submit(submit(proxy, max_tokens=450)) for _ in range(4)]
        async for _ in streams[0]:
            os.kill(hello.pid, signal.SIGKILL)
            break
        for stream in streams[1:]:
            with pytest.raises(EngineStopped, match="crashed while this was in flight"):
                await stream.collect()
        with pytest.raises(EngineStopped):
            proxy.submit(submit(proxy))
        assert proxy.health() is not None
        second = await proxy.wait_ready(180)
        assert second.pid != hello.pid
        assert len((await proxy.submit(submit(proxy)).collect()).token_ids) == 20
        assert proxy.num_crashes == 1
        await settled(proxy)

    run(scenario)


def test_more_in_flight_than_the_limit_is_refused_with_a_time_to_retry() -> None:
    async def scenario(proxy: EngineProxy) -> None:
        await proxy.wait_ready(180)
        streams = [proxy.submit(submit(proxy, max_tokens=100)) for _ in range(50)]
        with pytest.raises(Overloaded) as caught:
            proxy.submit(submit(proxy))
        assert caught.value.retry_after_s > 0
        outputs = await asyncio.gather(*(stream.collect() for stream in streams))
        assert all(len(output.token_ids) == 100 for output in outputs)

    run(scenario)


def test_a_request_ends_at_its_deadline_and_when_it_is_aborted_also_while_its_grammar_is_compiled() -> None:
    endless = Constraint("regex", "(?:(?!foo|bar|baz).){0,2000}")  # takes up to the limit of 10 s

    async def scenario(proxy: EngineProxy) -> None:
        await proxy.wait_ready(180)
        plain = submit(proxy)
        late = msgspec.structs.replace(plain, id="late", constraint=endless, options=RequestOptions(deadline_s=0.3))
        with pytest.raises(RequestCancelled, match="passed its deadline while its grammar was compiled"):
            await proxy.submit(late).collect()
        aborted = proxy.submit(msgspec.structs.replace(plain, id="aborted", constraint=endless))
        assert proxy.abort("aborted")
        with pytest.raises(RequestCancelled, match="was aborted"):
            await aborted.collect()
        short = msgspec.structs.replace(plain, constraint=Constraint("regex", "[0-9]{5}"))
        assert (await proxy.submit(short).collect()).text[:5].isdecimal()
        await settled(proxy)

    run(scenario)


def test_a_model_that_cannot_be_loaded_says_why_to_whoever_waits() -> None:
    async def scenario(proxy: EngineProxy) -> None:
        with pytest.raises(ModelNotFound, match="no-such-model"):
            await proxy.wait_ready(180)
        assert "no-such-model" in (proxy.health() or "")

    run(scenario, model="no-such-model")


def test_an_engine_process_whose_parent_is_gone_ends() -> None:
    settings = Settings("ipc:///nowhere/commands", "ipc:///nowhere/reports", TINY_MODEL, CONFIG, parent_pid=2**22 - 1)
    process = subprocess.run(
        [sys.executable, "-m", "ramet.runtime.server.link.process"],
        input=msgspec.json.encode(settings) + b"\n",
        timeout=60,
        check=False,
        capture_output=True,
    )
    assert process.returncode == 0, process.stderr


class ScriptedLauncher(LocalLauncher):
    """Starts nothing; `processes` says how each one goes on and ends."""

    def __init__(self, *processes: Callable[[], str]) -> None:
        super().__init__()
        self.processes = iter(processes)

    async def start(self, settings: Settings) -> None:
        self.current = next(self.processes, None)

    async def wait(self) -> str:
        return self.current() if self.current is not None else await asyncio.Future()


def test_an_engine_that_stops_by_itself_says_why(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        def stops() -> str:
            proxy._take(Hello(1, "tiny", 2048, 256, "cpu", "float32", 4096, 0.1))
            proxy._take(EngineFailed(ErrorInfo("EngineStopped", "the engine is stopped: rank 1 was killed")))
            return "it ended with status 0"

        proxy = EngineProxy(TINY_MODEL, CONFIG, launcher=ScriptedLauncher(stops))
        await proxy.start()
        while proxy.num_starts < 2:
            await asyncio.sleep(0.01)
        with pytest.raises(TimeoutError):  # the next one may well be ready; it has not failed
            await proxy.wait_ready(0.05)
        await proxy.stop()

    asyncio.run(main())
    assert "the engine process ended (the engine is stopped: rank 1 was killed); starting another" in caplog.text


def test_a_launcher_that_cannot_start_a_process_is_heard_of() -> None:
    class Unable(ScriptedLauncher):
        async def start(self, settings: Settings) -> None:
            raise ConfigError("no node has room")

    async def main() -> None:
        proxy = EngineProxy(TINY_MODEL, CONFIG, launcher=Unable(), max_engine_failures=2)
        await proxy.start()
        with pytest.raises(ConfigError, match="no node has room"):
            await proxy.wait_ready(5)
        assert "no node has room" in str(await proxy.wait_given_up())
        await proxy.stop()

    asyncio.run(asyncio.wait_for(main(), 30))


@pytest.mark.parametrize("how", ["the process ends", "the process tells that it ends"])
def test_an_engine_that_ends_is_not_ready_from_that_moment_on(how: str) -> None:
    ended = asyncio.Event()

    class Ending(LocalLauncher):
        async def start(self, settings: Settings) -> None:
            pass

        async def wait(self) -> str:
            await ended.wait()
            return "it ended"

        async def end(self) -> None:
            ended.set()

    async def main() -> None:
        proxy = EngineProxy(TINY_MODEL, CONFIG, launcher=Ending())
        await proxy.start()
        await asyncio.sleep(0)
        proxy._take(Hello(1, "tiny", 2048, 256, "cpu", "float32", 4096, 0.1))
        assert proxy.startup["ready"]
        if how == "the process ends":
            ended.set()
            for _ in range(5):  # turns of the event loop: far less than the time for its last reports
                await asyncio.sleep(0)
        else:
            proxy._take(EngineFailed(ErrorInfo("EngineStopped", "the engine is stopped")))
        assert not proxy.startup["ready"]
        assert proxy.health() is not None
        with pytest.raises(EngineStopped):
            proxy.submit(submit(proxy))
        assert proxy.num_crashes == 0, "it is noted before its last reports have been read"
        await proxy.stop()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_an_engine_reports_its_end_without_waiting_for_the_next_heartbeat() -> None:
    sent: list[Report] = []
    ended, asked = threading.Event(), threading.Event()

    class Ending:
        def wait_stopped(self, timeout_s: float) -> bool:
            asked.set()
            return ended.wait(60)  # as if a heartbeat were a minute

        def stats(self) -> dict[str, float]:
            raise EngineStopped("the engine is stopped")

    beating = threading.Thread(target=_beat, args=(cast(Engine, Ending()), sent.append, threading.Event()))
    beating.start()
    assert asked.wait(30)
    assert not sent
    ended.set()
    beating.join(30)
    assert [type(report) for report in sent] == [EngineFailed]


def test_a_heart_that_stops_tells_the_reason() -> None:
    class Stopped:
        def wait_stopped(self, timeout_s: float) -> bool:
            return True

        def stats(self) -> dict[str, float]:
            raise EngineStopped("the engine is stopped: rank 2 was killed")

    sent: list[Report] = []
    is_ending = threading.Event()
    _beat(cast(Engine, Stopped()), sent.append, is_ending)
    assert is_ending.is_set()
    assert sent == [EngineFailed(ErrorInfo("EngineStopped", "the engine is stopped: rank 2 was killed"))]
