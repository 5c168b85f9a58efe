"""Metrics without a server: what is counted, under which names, and what a windowed hit rate is."""

from __future__ import annotations

import re
from typing import cast

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from ramet.runtime.engine.step_watch import StepWatch
from ramet.runtime.server.link.protocol import Output
from ramet.runtime.server.link.proxy import EngineProxy
from ramet.runtime.server.metrics import CacheHitRate, Histogram, RequestCollector, make_registry

STATS = {
    "num_pages": 100.0,
    "num_free_pages": 60.0,
    "num_evictable_pages": 30.0,
    "num_running": 3.0,
    "max_running": 8.0,
    "num_waiting": 4.0,
    "num_cached_tokens": 0.0,
    "num_computed_tokens": 0.0,
    "num_decoded_tokens": 5.0,
    "num_steps": 6.0,
    "num_preemptions": 7.0,
    "num_waiting_for_grammar": 1.0,
    **StepWatch().stats(),
}
GUIDE_NAMES = ("cache_hit_rate", "num_queue_reqs", "token_usage", "time_to_first_token_seconds", "num_running_reqs")


class FakeProxy:
    """What metrics read of a proxy."""

    def __init__(self) -> None:
        self.stats = dict(STATS)
        self.num_starts = self.num_crashes = self.num_aborts = 0
        self.hello = None
        self.num_in_flight = 2
        self.num_programs = 1

    def engines(self) -> list[tuple[int | None, FakeProxy]]:
        return [(None, self)]


def make(*, compat: bool = False) -> tuple[RequestCollector, CollectorRegistry]:
    requests = RequestCollector(compat=compat)
    return requests, make_registry(cast(EngineProxy, FakeProxy()), requests)


def names(metrics: CollectorRegistry) -> set[str]:
    return set(re.findall(r"^# TYPE (\S+)", generate_latest(metrics).decode(), re.MULTILINE))


def value(metrics: CollectorRegistry, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", generate_latest(metrics).decode(), re.MULTILINE)
    assert found, f"{name} is not exported"
    return float(found[1])


def finished(**more: object) -> Output:
    timings = {"queue_s": 0.5, "first_token_s": 1.5, "total_s": 3.5}
    output = Output("x", 10, 4, 5, finish_reason="length", timings=timings)
    for name, given in more.items():
        setattr(output, name, given)
    return output


def test_the_five_names_of_deployment_guides_are_always_there() -> None:
    _, metrics = make()
    assert {f"sglang_{name}" for name in GUIDE_NAMES} <= names(metrics)
    assert not [name for name in names(metrics) if ":" in name]
    assert value(metrics, "sglang_num_queue_reqs") == 4
    assert value(metrics, "sglang_token_usage") == pytest.approx(0.1)


def test_the_spellings_of_sglang_and_vllm_come_with_a_flag_and_say_the_same() -> None:
    requests, metrics = make(compat=True)
    requests.note_finish(finished())
    shown = names(metrics)
    assert {f"sglang:{name}" for name in GUIDE_NAMES} <= shown
    pairs = {
        "ramet_running_requests": ["sglang:num_running_reqs", "vllm:num_requests_running"],
        "ramet_waiting_requests": ["sglang:num_queue_reqs", "vllm:num_requests_waiting"],
        "ramet_kv_usage_ratio": ["sglang:token_usage", "vllm:kv_cache_usage_perc"],
        "ramet_prompt_tokens_total": ["sglang:prompt_tokens_total", "vllm:prompt_tokens_total"],
        "ramet_generation_tokens_total": ["sglang:generation_tokens_total", "vllm:generation_tokens_total"],
        "ramet_e2e_request_latency_seconds_sum": [
            "sglang:e2e_request_latency_seconds_sum",
            "vllm:e2e_request_latency_seconds_sum",
        ],
        "ramet_queue_time_seconds_sum": ["sglang:queue_time_seconds_sum", "vllm:request_queue_time_seconds_sum"],
        "ramet_time_to_first_token_seconds_sum": [
            "sglang:time_to_first_token_seconds_sum",
            "vllm:time_to_first_token_seconds_sum",
        ],
    }
    for ours, others in pairs.items():
        for other in others:
            assert value(metrics, other) == value(metrics, ours)
    assert value(metrics, 'vllm:request_success_total{finished_reason="length"}') == 1


def test_a_finished_request_is_counted_once_in_every_histogram() -> None:
    requests, metrics = make()
    requests.note_finish(finished(timings={"queue_s": 0.5, "first_token_s": 1.5, "total_s": 3.5, "grammar_s": 0.25}))
    requests.note_finish(finished(finish_reason="error", completion_tokens=0))
    assert value(metrics, "ramet_queue_time_seconds_sum") == 0.5
    assert value(metrics, "ramet_time_to_first_token_seconds_count") == 1
    assert value(metrics, "ramet_time_per_output_token_seconds_sum") == 0.5
    assert value(metrics, "ramet_grammar_compilation_time_seconds_sum") == 0.25
    assert value(metrics, 'ramet_requests_total{reason="length"}') == 1
    assert value(metrics, 'ramet_requests_total{reason="error"}') == 1


def test_a_value_on_a_bound_belongs_to_that_bucket_and_buckets_add_up() -> None:
    histogram = Histogram("text", (1.0, 2.0), "a", "b")
    for observed in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(observed)
    first, second = histogram.collect()
    assert (first.name, second.name) == ("a", "b")
    counts = {sample.labels["le"]: sample.value for sample in first.samples if sample.name == "a_bucket"}
    assert counts == {"1.0": 2, "2.0": 3, "+Inf": 4}
    assert [sample.value for sample in first.samples if sample.name == "a_sum"] == [12.0]


def test_the_hit_rate_is_that_of_the_last_minute_and_survives_another_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gauge that every batch overwrites shows whatever came last: a health check makes it zero."""
    now_s = 0.0
    monkeypatch.setattr("ramet.runtime.server.metrics.time.monotonic", lambda: now_s)
    hit_rate = CacheHitRate()

    def beat(cached: float, computed: float) -> None:
        hit_rate.note_heartbeat({**STATS, "num_cached_tokens": cached, "num_computed_tokens": computed})

    beat(0, 0)
    now_s = 1.0
    beat(900, 100)
    assert hit_rate.value == pytest.approx(0.9)
    now_s = 2.0
    beat(900, 101)  # a probe of one token
    assert hit_rate.value == pytest.approx(900 / 1001)
    now_s = 90.0
    beat(900, 101)
    now_s = 91.0
    beat(900, 101)
    assert hit_rate.value == 0.0, "nothing was asked for in the last minute"
    now_s = 92.0
    beat(0, 0)
    now_s = 93.0
    beat(10, 30)  # another engine process counts from zero
    assert hit_rate.value == pytest.approx(0.25)


def test_drafted_tokens_are_counted_by_their_source() -> None:
    proxy = FakeProxy()
    proxy.stats |= {"num_drafted_tokens_text": 9.0, "num_accepted_tokens_text": 7.0, "num_drafted_tokens_runs": 2.0}
    metrics = make_registry(cast(EngineProxy, proxy), RequestCollector(compat=False))
    assert value(metrics, 'ramet_drafted_tokens_total{source="text"}') == 9
    assert value(metrics, 'ramet_drafted_tokens_total{source="runs"}') == 2
    assert value(metrics, 'ramet_accepted_tokens_total{source="text"}') == 7
