"""The in-process engine as its callers see it: text, streams, stops, cancellation, bad input, failures."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ramet.errors import (
    ConfigError,
    ContextOverflow,
    EngineStopped,
    InvalidRequest,
    OutOfMemory,
    RequestCancelled,
)
from ramet.runtime.engine import loading
from ramet.runtime.engine.engine import Engine
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.testing.bare_cache import BareCache
from ramet.runtime.types import FinishReason, RequestOptions, RequestOutput, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tiny_model: LoadedModel) -> Iterator[Engine]:
    with Engine(
        tiny_model, num_kv_tokens=4096, context_length=512, max_running_requests=8, chunked_prefill_size=128
    ) as engine:
        yield engine


@pytest.fixture(autouse=True)
def no_page_is_lost(engine: Engine) -> Iterator[None]:
    yield
    deadline = time.monotonic() + 10
    while engine.stats()["num_running"] and time.monotonic() < deadline:
        time.sleep(0.005)
    engine.check_integrity()
    stats = engine.stats()
    assert stats["num_free_pages"] + stats["num_evictable_pages"] == stats["num_pages"]


def test_the_increments_make_up_the_result_and_the_result_is_the_decoded_tokens(engine: Engine) -> None:
    handle = engine.submit("Grüße, 世界! ", GREEDY)
    text = "".join(output.text for output in handle)
    result = handle.result()
    assert result.text == text
    assert result.text == engine.tokenizer.decode(result.token_ids, skip_special=True)
    assert len(result.token_ids) == 20
    assert result.finish_reason is FinishReason.LENGTH
    assert result.usage.prompt_tokens == len("Grüße, 世界! ".encode())


def test_a_warm_run_reports_its_cached_tokens_and_gives_the_same_text(engine: Engine) -> None:
    prompt = "a prompt that nobody used before, and of some length"
    cold, warm = engine.generate(prompt, GREEDY), engine.generate(prompt, GREEDY)
    assert cold.usage.cached_tokens == 0
    assert warm.usage.cached_tokens == len(prompt) - 1
    assert warm.text == cold.text


def test_async_iteration_and_await_give_what_the_sync_interface_gives(engine: Engine) -> None:
    expected = engine.generate("async", GREEDY).text

    async def run() -> tuple[str, list[str]]:
        text = ""
        async for output in engine.submit("async", GREEDY):
            text += output.text
        results = await asyncio.gather(*(engine.submit("async", GREEDY) for _ in range(3)))
        return text, [r.text for r in results]

    text, texts = asyncio.run(run())
    assert [text, *texts] == [expected] * 4


def test_many_threads_submit_at_once_and_each_gets_its_own(engine: Engine) -> None:
    prompts = [f"prompt number {i} " * (1 + i % 3) for i in range(16)]
    expected = [engine.generate(p, GREEDY).text for p in prompts]
    got: dict[int, str] = {}

    def work(i: int) -> None:
        got[i] = engine.generate(prompts[i], GREEDY).text

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[i] for i in range(16)] == expected


def test_a_stop_string_across_tokens_ends_the_text_before_it(engine: Engine) -> None:
    whole = engine.generate("stop here", GREEDY).text
    stop = whole[5:8]
    first = whole.index(stop)
    outputs = list(engine.submit("stop here", msgspec.structs.replace(GREEDY, stop=(stop, "never seen"))))
    assert "".join(o.text for o in outputs) == whole[:first]
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert outputs[-1].stop_match == stop


def test_a_stop_token_is_reported_and_is_not_part_of_the_text(engine: Engine) -> None:
    whole = engine.generate("stop token", GREEDY)
    token = whole.token_ids[4]
    result = engine.generate("stop token", msgspec.structs.replace(GREEDY, stop_token_ids=(token,)))
    assert result.stop_match == token
    assert result.token_ids == whole.token_ids[: whole.token_ids.index(token)]


def test_cancelling_in_the_middle_raises_and_frees_the_slot(engine: Engine) -> None:
    handle = engine.submit("cancel me", SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True))
    outputs = iter(handle)
    next(outputs)
    handle.cancel()
    with pytest.raises(RequestCancelled, match=handle.request_id):
        for _ in outputs:
            pass
    with pytest.raises(RequestCancelled):
        handle.result(timeout_s=5)
    handle.cancel()  # again: nothing happens
    assert engine.generate("alive", GREEDY).text


def wait_for_idle(engine: Engine) -> dict[str, float]:
    """Wait until no request is left, far shorter than the requests of these tests would take."""
    deadline = time.monotonic() + 60
    while (stats := engine.stats())["num_running"] or stats["num_waiting"]:
        assert time.monotonic() < deadline, "a request goes on that nobody can read"
    return stats


ENDLESS = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)


def test_a_request_whose_handle_is_collected_is_cancelled(engine: Engine) -> None:
    before = engine.stats()["num_decoded_tokens"]
    for i in range(20):
        engine.submit(f"nobody keeps this handle {i}", ENDLESS)
    gc.collect()
    assert wait_for_idle(engine)["num_decoded_tokens"] - before < 20 * 400


def test_a_handle_may_be_dropped_while_its_outputs_are_read_or_called_back(engine: Engine) -> None:
    assert sum(len(output.token_ids) for output in engine.submit("read at once", GREEDY)) == 20
    assert len(engine.submit("waited for", GREEDY).result().token_ids) == 20

    async def awaited() -> int:
        return len((await engine.submit("awaited", GREEDY)).token_ids)

    assert asyncio.run(awaited()) == 20
    told: list[RequestOutput] = []
    done = threading.Event()

    def take(output: RequestOutput) -> None:
        told.append(output)
        if output.finish_reason is not None:
            done.set()

    engine.submit("called back", GREEDY, on_output=take)
    gc.collect()
    assert done.wait(60)
    assert sum(len(output.token_ids) for output in told) == 20


def test_an_interrupt_of_generate_cancels_the_request(engine: Engine) -> None:
    before = engine.stats()["num_decoded_tokens"]

    def interrupt() -> None:
        while engine.stats()["num_decoded_tokens"] - before < 3:
            pass
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        engine.generate("interrupted", ENDLESS)
    thread.join()
    assert wait_for_idle(engine)["num_decoded_tokens"] - before < 400


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_is_told_that_the_engine_is_not_its_own(engine: Engine) -> None:
    handle = engine.submit("the parent's", GREEDY)
    child = os.fork()
    if child == 0:  # it must neither return to pytest nor wait for anything
        told = 1
        try:
            engine.submit("the child's", GREEDY)
        except EngineStopped as error:
            told = 0 if f"forked from process {os.getppid()}" in str(error) else 2
        handle.cancel()
        engine.shutdown()
        os._exit(told)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(handle.result(timeout_s=60).token_ids) == 20


def test_a_deadline_ends_a_request(engine: Engine) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
    with pytest.raises(RequestCancelled, match="deadline"):
        engine.submit("late", sampling, deadline_s=0.02).result(timeout_s=10)


def test_result_times_out_and_the_request_goes_on(engine: Engine) -> None:
    handle = engine.submit("patience", SamplingParams(temperature=0.0, max_tokens=300, ignore_eos=True))
    with pytest.raises(TimeoutError, match="goes on"):
        handle.result(timeout_s=0.001)
    assert len(handle.result(timeout_s=30).token_ids) == 300


@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        ("", {}, InvalidRequest, "no tokens"),
        ([], {}, InvalidRequest, "no tokens"),
        ([1, 999], {}, InvalidRequest, "999 is outside the vocabulary"),
        ([-1], {}, InvalidRequest, "-1 is outside"),
        ([[1]], {}, InvalidRequest, "one list"),
        (["a"], {}, InvalidRequest, "token ids"),
        ([1.5], {}, InvalidRequest, "integers"),
        ([[1], [2, 3]], {}, InvalidRequest, "token ids"),
        ("x" * 600, {}, ContextOverflow, "600 tokens .* context is 512.* raise --context-length"),
        ("half \ud83d", {}, InvalidRequest, r"not valid Unicode: it holds '\\ud83d' alone"),
        ("x" * 500, {"sampling": SamplingParams(max_tokens=100)}, ContextOverflow, "lower max_tokens"),
        ("x", {"sampling": SamplingParams(logit_bias={999: 1.0})}, InvalidRequest, "logit_bias names token 999"),
        ("x", {"sampling": SamplingParams(stop_token_ids=(999,))}, InvalidRequest, "stop_token_ids"),
        ("xyz", {"score_from": 9}, InvalidRequest, r"score_from is 9 but must be in \[1, 3\]"),
        ("xyz", {"score_from": 1.5}, InvalidRequest, "score_from is 1.5, but must be an integer, or None"),
        ("xyz", {"score_from": True}, InvalidRequest, "score_from is True"),
        ("xyz", {"on_output": "print"}, InvalidRequest, "on_output is 'print', but must be a function"),
        ("x", {"priority": "high"}, InvalidRequest, "priority is 'high', but must be an integer up to 2147483647"),
        ("x", {"priority": True}, InvalidRequest, "priority is True"),
        ("x", {"priority": 2**31}, InvalidRequest, "priority is 2147483648"),
        ("x", {"cache_salt": "\ud83d"}, InvalidRequest, "but must be text that UTF-8 can write"),
        ("x", {"cache_salt": None}, InvalidRequest, "cache_salt is None"),
        ("x", {"program_id": 3}, InvalidRequest, "program_id is 3, but must be text, or None"),
        ("x", {"request_id": 3}, InvalidRequest, "request_id is 3, but must be text, or None"),
        ("x", {"deadline_s": float("nan")}, InvalidRequest, "deadline_s is nan, but must be a finite number"),
        ("x", {"deadline_sec": 1.0}, TypeError, "deadline_sec"),
    ],
)
def test_bad_requests_are_refused_by_name_and_value(
    engine: Engine, prompt: object, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        engine.submit(prompt, **options)  # type: ignore[arg-type]
    assert engine.generate("alive", GREEDY).text


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"top_k": 2.5},
        {"min_p": 2},
        {"max_tokens": 0},
        {"max_tokens": True},
        {"frequency_penalty": 3},
        {"presence_penalty": -3},
        {"repetition_penalty": 0},
        {"min_tokens": -1},
        {"min_tokens": 200},
        {"stop": ("",)},
        {"stop": "text"},
        {"logprobs": 100},
        {"logit_bias": {1: 1000.0}},
        {"logit_bias": "x"},
        {"logit_bias": [1]},
        {"stop_token_ids": 5},
        {"seed": 1.5},
    ],
)
def test_sampling_values_outside_their_range_name_the_field(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(InvalidRequest, match=name) as caught:
        SamplingParams(**values)
    assert caught.value.param == name


def test_an_id_in_use_is_refused_and_the_first_request_goes_on(engine: Engine) -> None:
    first = engine.submit("first", GREEDY, request_id="same")
    second = engine.submit("second", GREEDY, request_id="same")
    with pytest.raises(InvalidRequest, match="'same' is in use"):
        second.result(timeout_s=10)
    assert len(first.result(timeout_s=10).token_ids) == 20


def test_a_handle_whose_outputs_go_to_a_callback_says_so_instead_of_waiting_for_ever(engine: Engine) -> None:
    handle = engine.submit("hello", SamplingParams(max_tokens=2), on_output=lambda output: None)
    with pytest.raises(InvalidRequest, match="go to its on_output"):
        handle.result()
    with pytest.raises(InvalidRequest, match="go to its on_output"):
        next(iter(handle))


def test_a_callback_that_raises_ends_its_own_request_only(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    def broken(output: RequestOutput) -> None:
        raise RuntimeError("the caller's own mistake")

    other = engine.submit("other", GREEDY)
    engine.submit("broken", SamplingParams(temperature=0.0, max_tokens=300, ignore_eos=True), on_output=broken)
    assert len(other.result(timeout_s=10).token_ids) == 20
    assert engine.generate("alive", GREEDY).text
    assert "the caller's own mistake" in caplog.text


class BrokenGrammar:
    """Allows everything for three tokens, then raises."""

    is_closed = False
    before = b""

    def fill_mask(self, state: int, row: NDArray[np.int32]) -> None:
        if state == 3:
            raise ValueError("broken on purpose")
        row[:] = -1

    def advance(self, state: int, token: int) -> int | None:
        return state + 1

    def is_accepting(self, state: int) -> bool:
        return True

    def is_complete(self, state: int) -> bool:
        return False

    def is_free(self, state: int) -> bool:
        return False

    def num_after(self, state: int, *, is_last: bool) -> int:
        return 0

    def joined_token(self, state: int, token: int) -> int:
        return token

    def ends(self, state: int) -> NDArray[np.int32] | None:
        return None

    def forced_tokens(self, state: int) -> list[int]:
        return []

    def shortest_completion(self, state: int) -> list[int]:
        return []

    def completion_bound(self, state: int) -> int:
        return 0

    def closing_tokens(self, state: int) -> list[int]:
        return []

    def stays_in_string(self, state: int, token: int) -> bool:
        return False

    def device_tables(self) -> None:
        return None

    def __hash__(self) -> int:
        return id(self)


def test_a_grammar_that_raises_ends_its_own_request_only(engine: Engine) -> None:
    other = engine.submit("other", GREEDY)
    with pytest.raises(EngineStopped, match="broken on purpose"):
        engine.submit("x", GREEDY, grammar=BrokenGrammar()).result(timeout_s=10)
    assert len(other.result(timeout_s=10).token_ids) == 20


def test_a_step_that_fails_ends_what_ran_in_it_and_the_engine_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runner = engine._core.runner
    launch = runner.launch

    def broken(*args: object, **options: object) -> object:
        monkeypatch.setattr(runner, "launch", launch)
        raise RuntimeError("device lost on purpose")

    monkeypatch.setattr(runner, "launch", broken)
    with pytest.raises(EngineStopped, match="device lost on purpose"):
        engine.generate("x", GREEDY)
    assert engine.generate("alive", GREEDY).text
    assert "a step failed" in caplog.text


def test_a_step_that_does_not_fit_names_the_way_out(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = engine._core.runner
    launch = runner.launch

    def full(*args: object, **options: object) -> object:
        monkeypatch.setattr(runner, "launch", launch)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(runner, "launch", full)
    with pytest.raises(OutOfMemory, match=r"lower --mem-fraction-static.*Tried to allocate 2 GiB"):
        engine.generate("x", GREEDY)
    assert engine.generate("alive", GREEDY).text


def test_weights_that_do_not_fit_name_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> LoadedModel:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(loading, "load_model", full)
    with pytest.raises(OutOfMemory, match=r"the weights of any do not fit.*ramet size.*Tried to allocate 2 GiB"):
        Engine("any", device="cpu")


def test_a_lost_device_names_the_way_out(tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nFor debugging consider ...")

    with Engine(tiny_model, num_kv_tokens=4096) as engine:
        runner = engine._core.runner
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    runner.device = torch.device("cuda", 0)
    with pytest.raises(
        EngineStopped, match=r"cuda:0 .* \(CUDA error: an illegal .* encountered\): start a new process"
    ):
        runner.check_device()


def test_a_lost_device_ends_the_engine_and_tells_everybody(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    are_submitted = threading.Event()

    def refused(*args: object, **options: object) -> object:
        are_submitted.wait(10)
        raise RuntimeError("an illegal memory access was encountered")

    engine = Engine(tiny_model, num_kv_tokens=4096)
    monkeypatch.setattr(engine._core.runner, "launch", refused)
    monkeypatch.setattr(engine._core.runner, "check_device", refused)
    handles = [engine.submit(text, GREEDY) for text in ("x", "y")]
    are_submitted.set()
    for handle in handles:
        with pytest.raises(EngineStopped, match="illegal memory access"):
            handle.result(timeout_s=10)
    with pytest.raises(EngineStopped, match="make a new one"):
        engine.generate("z", GREEDY)
    assert "the engine's loop failed" in caplog.text
    engine.shutdown()


def test_shutdown_tells_those_in_flight_and_refuses_later_requests(tiny_model: LoadedModel) -> None:
    engine = Engine(tiny_model, num_kv_tokens=4096)
    handle = engine.submit("x", SamplingParams(temperature=0.0, max_tokens=500, ignore_eos=True))
    next(iter(handle))
    engine.shutdown()
    engine.shutdown()
    with pytest.raises(EngineStopped):
        handle.result(timeout_s=5)
    with pytest.raises(EngineStopped, match="make a new one"):
        engine.submit("x")


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["", "raise RuntimeError('mine')"])
def test_a_script_may_end_while_its_engine_works(ending: str) -> None:
    script = (
        "from ramet import Engine, SamplingParams\n"
        "engine = Engine('tiny-random', num_threads=1)\n"
        "handle = engine.submit('abc', SamplingParams(max_tokens=1500, ignore_eos=True))\n"
        f"next(iter(handle))\n{ending}\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "terminate" not in done.stderr
    assert done.returncode == bool(ending), done.stderr


def test_an_idle_engine_takes_no_steps_and_no_processor_time(engine: Engine) -> None:
    engine.generate("x", GREEDY)
    steps, cpu_s = engine._core.scheduler.counters.num_steps, time.process_time()
    time.sleep(0.3)
    assert engine._core.scheduler.counters.num_steps == steps
    assert time.process_time() - cpu_s < 0.1


def test_flushing_the_cache_makes_the_next_run_cold(engine: Engine) -> None:
    engine.generate("flush me please", GREEDY)
    assert engine.flush_cache() > 0
    assert engine.generate("flush me please", GREEDY).usage.cached_tokens == 0


def test_options_may_come_as_one_struct_or_by_name(engine: Engine) -> None:
    options = RequestOptions(cache_salt="carol", priority=3)
    engine.submit("a prompt for the cache", GREEDY, options).result()
    warm = engine.submit("a prompt for the cache", GREEDY, cache_salt="carol").result()
    assert warm.usage.cached_tokens > 0
    other = engine.submit("a prompt for the cache", GREEDY, options, cache_salt="dave").result()
    assert other.usage.cached_tokens == 0, "a name given beside the struct changes that field"
    assert options == RequestOptions(cache_salt="carol", priority=3)


def test_cache_salts_do_not_share_prefixes(engine: Engine) -> None:
    prompt = "a secret that timing must not tell"
    engine.submit(prompt, GREEDY, cache_salt="alice").result()
    assert engine.submit(prompt, GREEDY, cache_salt="bob").result().usage.cached_tokens == 0
    assert engine.submit(prompt, GREEDY, cache_salt="alice").result().usage.cached_tokens > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page_size": 7}, "page_size is 7"),
        ({"mem_fraction_static": 2.0}, "mem_fraction_static"),
        ({"no_such_option": 1}, "no_such_option; known are"),
        ({"device": "gpu"}, "device is 'gpu'"),
        ({"context_length": 10_000}, "trained for 2,048"),
    ],
)
def test_impossible_configurations_are_named(tiny_model: LoadedModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Engine(tiny_model if "device" not in options else None, **options)


def test_a_context_that_the_cache_limits_names_the_caches_option(tiny_model: LoadedModel) -> None:
    overflow = pytest.raises(ContextOverflow, match=r"the context is 128; .* raise --num-kv-tokens")
    with Engine(tiny_model, num_kv_tokens=128) as engine, overflow:
        engine.submit("x" * 200)


def test_a_score_is_the_log_probability_of_each_token_after_the_first(engine: Engine) -> None:
    ids = list(b"a text whose tokens are scored")
    cache = BareCache(engine.model.decoder, 1, len(ids))
    expected = torch.log_softmax(cache.step([], [(0, ids)]).float(), dim=-1)[:-1].gather(
        1, torch.tensor(ids[1:])[:, None]
    )
    for text in (ids, bytes(ids).decode()):  # the second is in the cache
        assert engine.score(text) == pytest.approx(expected[:, 0].tolist(), abs=1e-4)
    assert engine.score("a") == engine.score([]) == ()
    with pytest.raises(InvalidRequest):
        engine.score([1, -5])
