"""KV pages that move between engine processes: with a request, off a replica that leaves, from prefill to decode."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Collection

import msgspec
import numpy as np
import pytest

from ramet.errors import EngineStopped, InvalidRequest, RequestCancelled
from ramet.lang.graph.ir import Constraint
from ramet.runtime.cluster.router import Placement, RoutedRequest, Router
from ramet.runtime.models.catalog import TINY_MODEL
from ramet.runtime.server.link.moving import Moves, move
from ramet.runtime.server.link.protocol import Output, Submit
from ramet.runtime.server.link.proxy import EngineProxy, Listener
from ramet.runtime.server.link.replicas import Replicas
from ramet.runtime.types import RequestOptions, SamplingParams

CONFIG = {"num_kv_tokens": 4096, "max_running_requests": 8, "device": "cpu", "num_threads": 1, "context_length": 2048}
Scenario = Callable[[Replicas], Awaitable[None]]


class Steered(Router):
    """Places requests on the replica that a test has chosen."""

    to: int | None = None

    def place(self, request: RoutedRequest, now_s: float, avoid: Collection[int] = ()) -> Placement:
        others = set() if self.to is None else {*self.replicas} - {self.to}
        return super().place(request, now_s, {*avoid, *others})


def run(scenario: Scenario, count: int = 2, num_prefill: int = 0) -> None:
    def make_proxy(replica: int, listener: Listener) -> EngineProxy:
        return EngineProxy(TINY_MODEL, CONFIG, replica=replica, listener=listener, log_level="ERROR")

    async def main() -> None:
        Steered.to = None
        replicas = Replicas(count, make_proxy, make_router=Steered, num_prefill=num_prefill)
        await replicas.start()
        try:
            await replicas.wait_ready(120)
            await scenario(replicas)
            await replicas.ask("check_integrity")
        finally:
            await replicas.stop()

    asyncio.run(asyncio.wait_for(main(), 240))


def ids(seed: int, length: int) -> list[int]:
    return [int(n) for n in np.random.default_rng(seed).integers(32, 127, length)]


def request(replicas: Replicas, prompt: list[int], num_tokens: int = 12, **options: object) -> Submit:
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, logprobs=2)
    return Submit(replicas.new_id("test"), prompt, sampling, options=RequestOptions().changed(options))


async def on(replicas: Replicas, number: int | None, command: Submit) -> Output:
    Steered.to = number
    return await replicas.submit(command).collect()


def proxy_of(replicas: Replicas, number: int) -> EngineProxy:
    return dict(replicas.engines())[number]


def kill(replicas: Replicas, number: int) -> None:
    hello = proxy_of(replicas, number).hello
    assert hello is not None
    os.kill(hello.pid, signal.SIGKILL)


def test_a_request_takes_its_prefix_along_to_another_replica() -> None:
    async def scenario(replicas: Replicas) -> None:
        prompt = ids(1, 1000)
        own = await on(replicas, 0, request(replicas, prompt))
        assert own.cached_tokens == 0
        moved = await on(replicas, 1, request(replicas, prompt))
        assert moved.cached_tokens == 992
        assert (moved.text, moved.logprobs) == (own.text, own.logprobs)
        hello = proxy_of(replicas, 0).hello
        assert hello is not None
        assert (replicas.moves.num_tokens, replicas.moves.num_bytes) == (992, 62 * hello.page_bytes)
        assert replicas.moves.num_failed == 0
        short = await on(replicas, 0, request(replicas, ids(2, 100)))
        assert (await on(replicas, 1, request(replicas, ids(2, 100)))).text == short.text
        assert replicas.moves.num_tokens == 992  # too few tokens to be worth a move

    run(scenario)


def test_a_replica_that_leaves_gives_its_conversations_to_the_others() -> None:
    async def scenario(replicas: Replicas) -> None:
        texts = {seed: (await on(replicas, 1, request(replicas, ids(seed, 300)))).text for seed in range(4)}
        Steered.to = None
        await replicas.scale(1, drain_s=30)
        for seed, text in texts.items():
            output = await on(replicas, 0, request(replicas, ids(seed, 300)))
            assert (output.text, output.cached_tokens) == (text, 299)  # all but the last
        assert replicas.moves.num_failed == 0

    run(scenario)


def test_prompts_are_computed_apart_and_answered_as_by_one_engine() -> None:
    async def scenario(replicas: Replicas) -> None:
        constraint = Constraint("regex", "[a-f]{8}[0-9]+")
        commands = [
            request(replicas, ids(1, 1500)),
            msgspec.structs.replace(request(replicas, ids(2, 700)), constraint=constraint),
            msgspec.structs.replace(request(replicas, ids(3, 401)), heals=True),
            request(replicas, ids(4, 640), deadline_s=60.0, cache_salt="mine"),
            request(replicas, ids(5, 60)),
            request(replicas, ids(6, 400), score_from=100),
        ]
        apart = [await replicas.submit(command).collect() for command in commands]
        aborted = request(replicas, ids(50, 1900))
        stream = replicas.submit(aborted)
        await asyncio.sleep(0)  # it waits for its pages
        assert replicas.abort(aborted.id)
        with pytest.raises(RequestCancelled):
            await stream.collect()
        alone = EngineProxy(TINY_MODEL, CONFIG, log_level="ERROR")
        await alone.start()
        await alone.wait_ready(120)
        for command, found in zip(commands, apart, strict=True):
            expected = await alone.submit(command).collect()
            assert (found.text, found.token_ids, found.finish_reason) == (
                expected.text,
                expected.token_ids,
                expected.finish_reason,
            )
            for mine, others in (
                (found.logprobs, expected.logprobs),
                (found.prompt_logprobs, expected.prompt_logprobs),
            ):
                assert (mine is None) == (others is None)
                assert mine is None or mine == pytest.approx(others, abs=1e-5)
        await alone.stop()
        assert replicas.moves.num_tokens >= (1500 // 16 + 700 // 16 + 401 // 16 + 640 // 16) * 16
        prefill, moved = proxy_of(replicas, 1), replicas.moves.num_tokens
        while prefill.stats.get("num_computed_tokens", 0) < moved:  # a heartbeat tells
            await asyncio.sleep(0.05)
        assert replicas.health() is None
        assert replicas.num_in_flight == 0

    run(scenario, count=1, num_prefill=1)


@pytest.mark.slow
def test_either_side_of_prefill_apart_may_die_or_lose_interest() -> None:
    async def scenario(replicas: Replicas) -> None:
        texts = {seed: (await replicas.submit(request(replicas, ids(seed, 900))).collect()).text for seed in range(4)}
        await replicas.ask("flush_cache")

        async def ask(seed: int) -> str:
            return (await replicas.submit(request(replicas, ids(seed, 900))).collect()).text

        for victim in (2, 0, 1):  # the one for prompts, and the two that answer
            tasks = [asyncio.create_task(ask(seed)) for seed in texts]
            await asyncio.sleep(0)
            kill(replicas, victim)
            assert await asyncio.gather(*tasks) == [*texts.values()]
            await replicas.wait_ready(120)
        left = replicas.submit(request(replicas, ids(51, 1900)))
        await asyncio.sleep(0.01)
        left.close()
        late = replicas.submit(request(replicas, ids(52, 1900), deadline_s=0.001))
        with pytest.raises(RequestCancelled, match="deadline"):
            await late.collect()
        assert replicas.num_in_flight == 0
        while any(proxy.num_in_flight for _, proxy in replicas.engines()):
            await asyncio.sleep(0.01)

    run(scenario, count=2, num_prefill=1)


def test_a_move_ends_with_an_error_when_an_engine_dies_and_pages_of_other_models_are_refused() -> None:
    async def scenario(replicas: Replicas) -> None:
        source, target = (proxy_of(replicas, n) for n in (0, 1))
        await on(replicas, 0, request(replicas, ids(1, 1000)))
        prompt = np.asarray(ids(1, 1000), dtype=np.int32)
        moves = Moves()
        assert await move(source, target, prompt[:320], "", moves) == 20
        assert source.hello is not None
        given = {"tokens": prompt.tobytes(), "cache_salt": "", "first": 20}
        with pytest.raises(InvalidRequest, match="another model, data type or page size"):
            await target.ask("take_pages", 10.0, **given, pages=b"x" * 16, identity="another model")
        with pytest.raises(InvalidRequest, match="nothing was taken in"):
            await target.ask("take_pages", 10.0, **given, pages=b"x" * 15, identity=source.hello.identity)
        await replicas.ask("check_integrity")
        moving = asyncio.create_task(move(source, target, prompt, "", moves))
        await asyncio.sleep(0)
        kill(replicas, 0)
        with pytest.raises(EngineStopped):
            await moving
        assert moves.num_failed == 1
        await target.ask("check_integrity")
        with pytest.raises(EngineStopped):
            await move(source, target, prompt, "", moves)

    run(scenario)


def test_a_move_that_takes_longer_than_computing_is_not_made_but_tried_again_at_times() -> None:
    moves = Moves()
    assert moves.pays(1000, 0.5)
    moves.note(1000, 1 << 20, 1.0)
    assert not moves.pays(1000, 0.5)
    assert moves.pays(1000, 2.0)
    assert any(moves.pays(1000, 0.5) for _ in range(100))
