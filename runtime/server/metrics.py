"""The Prometheus metrics of `/metrics`, from the engine's heartbeats and from finished requests.

Metrics have Ramet's names (`ramet_...`). Five also have the names in SGLang's deployment guides (`sglang_...`), and an
option adds the names of SGLang (`sglang:...`) and vLLM (`vllm:...`). Hit rates come from token counters; the gauge
covers the last minute. One event loop counts and answers scrapes.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter as Tally
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ramet.runtime.engine.step_watch import PARTS
from ramet.runtime.server.link.protocol import Hello, Output
from ramet.runtime.server.link.proxy import EngineProxy
from ramet.runtime.server.link.replicas import Replicas

WINDOW_S = 60.0
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_GAP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_TOKENS = (1, 10, 50, 100, 500, 1_000, 2_000, 5_000, 10_000, 50_000, 100_000)

Family = GaugeMetricFamily | CounterMetricFamily | HistogramMetricFamily


class Histogram:
    """Counts by bucket, exported under each of its names. An observation costs less than a microsecond."""

    __slots__ = ("_bounds", "_counts", "_sum", "names", "text")

    def __init__(self, text: str, bounds: Sequence[float], *names: str) -> None:
        self.text = text
        self.names = names
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1  # a bucket includes its upper bound
        self._sum += value

    def samples(self) -> tuple[list[tuple[str, float]], float]:
        """The counts up to each bound, and the sum."""
        total, buckets = 0, []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else str(float(bound)), float(total)))
        return buckets, self._sum

    def collect(self) -> Iterator[HistogramMetricFamily]:
        buckets, total = self.samples()
        for name in self.names:
            yield HistogramMetricFamily(name, self.text, buckets=buckets, sum_value=total)


class CacheHitRate:
    """The share of prompt tokens that came from the cache within the last minute, from the engine's counters."""

    def __init__(self) -> None:
        self._window: deque[tuple[float, float, float]] = deque()  # time, cached tokens, computed tokens

    def note_heartbeat(self, stats: dict[str, float]) -> None:
        now_s, cached, computed = time.monotonic(), stats["num_cached_tokens"], stats["num_computed_tokens"]
        if self._window and self._window[-1][1] + self._window[-1][2] > cached + computed:
            self._window.clear()  # a new engine process counts from zero
        self._window.append((now_s, cached, computed))
        while len(self._window) > 1 and self._window[1][0] <= now_s - WINDOW_S:
            self._window.popleft()

    @property
    def value(self) -> float:
        """The hit rate; 0 if there were no prompt tokens."""
        if len(self._window) < 2:
            return 0.0
        cached = self._window[-1][1] - self._window[0][1]
        computed = self._window[-1][2] - self._window[0][2]
        return cached / (cached + computed) if cached + computed > 0 else 0.0


class EnginesCollector(Collector):
    """The metrics of all engines; of several, each with the label `replica`, and what the router counts."""

    def __init__(self, engines: EngineProxy | Replicas, requests: RequestCollector) -> None:
        self._engines = engines
        self._requests = requests

    def collect(self) -> Iterator[Metric]:
        merged: dict[str, Metric] = {}
        for replica, proxy in self._engines.engines():
            hit_rate = self._requests.hit_rates[replica].value
            for family in _engine_metrics(proxy, hit_rate, compat=self._requests.compat):
                if replica is not None:
                    family.samples = [
                        sample._replace(labels={**sample.labels, "replica": str(replica)}) for sample in family.samples
                    ]
                if family.name in merged:
                    merged[family.name].samples += family.samples
                else:
                    merged[family.name] = family
        yield from merged.values()
        if isinstance(self._engines, Replicas):
            retries, resyncs = self._engines.num_retries, self._engines.num_resyncs
            yield counter("ramet_router_retries", "requests sent again after their replica died", retries)
            yield counter("ramet_router_resyncs", "times that a replica was asked for all it holds", resyncs)
            text = "pairs of a cached prefix and a replica that the router knows"
            yield gauge("ramet_router_known_prefixes", text, self._engines.num_known_prefixes)
            moves = self._engines.moves
            yield counter("ramet_router_moves", "times that KV pages moved from one engine to another", moves.num_moves)
            yield counter("ramet_router_moves_failed", "of these, the ones that an error ended", moves.num_failed)
            yield counter("ramet_router_moved_tokens", "tokens whose KV moved", moves.num_tokens)
            yield counter("ramet_router_moved_bytes", "bytes of KV that moved", moves.num_bytes)
            yield counter(
                "ramet_router_moving_seconds", "time in which parts of moves were on their way", moves.seconds
            )


class RequestCollector(Collector):
    """The HTTP process's counts of requests, programs and responses."""

    def __init__(self, *, compat: bool = False) -> None:
        self.compat = compat
        self.hit_rates: defaultdict[int | None, CacheHitRate] = defaultdict(CacheHitRate)  # by replica

        def histogram(text: str, bounds: Sequence[float], name: str, *others: str) -> Histogram:
            return Histogram(text, bounds, f"ramet_{name}", *(others if compat else ()))

        name = "time_to_first_token_seconds"
        spelled = (f"ramet_{name}", f"sglang_{name}", *((f"sglang:{name}", f"vllm:{name}") if compat else ()))
        self.first_token = Histogram("arrival to first token", SECONDS, *spelled)
        name = "inter_token_latency_seconds"
        text = "gap between two increments of an answer"
        self.gap = histogram(text, _GAP_SECONDS, name, f"sglang:{name}", f"vllm:{name}")
        text = "mean time of a token after the first, by request"
        name = "time_per_output_token_seconds"
        self.per_token = histogram(text, _GAP_SECONDS, name, f"sglang:{name}", f"vllm:request_{name}")
        text = "arrival to the first step"
        self.queue = histogram(
            text, SECONDS, "queue_time_seconds", "sglang:queue_time_seconds", "vllm:request_queue_time_seconds"
        )
        name = "e2e_request_latency_seconds"
        self.total = histogram("arrival to end", SECONDS, name, f"sglang:{name}", f"vllm:{name}")
        text = "wait for the constraint's grammar, by constrained request; about 0 where it was compiled before"
        name = "grammar_compilation_time_seconds"
        self.grammar = histogram(text, (0.001, *SECONDS), name, f"sglang:{name}")
        self.prompt_tokens = histogram(
            "prompt tokens by request", _TOKENS, "request_prompt_tokens", "vllm:request_prompt_tokens"
        )
        self.output_tokens = histogram(
            "generated tokens by request", _TOKENS, "request_generation_tokens", "vllm:request_generation_tokens"
        )
        self.num_prompt_tokens = 0
        self.num_output_tokens = 0
        self.by_reason: Tally[str] = Tally()
        self.by_status: Tally[str] = Tally()
        self.by_outcome: Tally[str] = Tally()
        self.misses: Tally[str] = Tally()

    def collect(self) -> Iterator[Family]:
        for histogram in (self.first_token, self.gap, self.per_token, self.queue, self.total, self.grammar):
            yield from histogram.collect()
        yield from self.prompt_tokens.collect()
        yield from self.output_tokens.collect()
        for prefix in ("ramet_", "sglang:", "vllm:") if self.compat else ("ramet_",):
            yield counter(f"{prefix}prompt_tokens", "prompt tokens of ended requests", self.num_prompt_tokens)
            text = "generated tokens of ended requests"
            yield counter(f"{prefix}generation_tokens", text, self.num_output_tokens)
        yield labelled("ramet_requests", "ended requests by reason", "reason", self.by_reason)
        yield labelled("ramet_http_responses", "responses by status", "status", self.by_status)
        text = "prompts that left the nearest recent one, by what the difference looks like"
        yield labelled("ramet_prompt_misses", text, "kind", self.misses)
        yield labelled("ramet_programs", "ended programs by outcome", "outcome", self.by_outcome)
        if self.compat:
            yield counter("sglang:num_requests", "ended requests", self.by_reason.total())
            yield labelled("vllm:request_success", "ended requests by reason", "finished_reason", self.by_reason)

    def note_finish(self, output: Output) -> None:
        """Count a request's last increment."""
        self.by_reason[output.finish_reason or "unknown"] += 1
        self.num_prompt_tokens += output.prompt_tokens
        self.num_output_tokens += output.completion_tokens
        timings = output.timings
        if timings is None or not output.completion_tokens:
            return
        self.prompt_tokens.observe(output.prompt_tokens)
        self.output_tokens.observe(output.completion_tokens)
        self.first_token.observe(timings["first_token_s"])
        self.queue.observe(timings["queue_s"])
        self.total.observe(timings["total_s"])
        if "grammar_s" in timings:
            self.grammar.observe(timings["grammar_s"])
        if output.completion_tokens > 1:
            rest_s = timings["total_s"] - timings["first_token_s"]
            self.per_token.observe(rest_s / (output.completion_tokens - 1))

    def note_response(self, status: int) -> None:
        self.by_status[str(status)] += 1

    def note_program(self, outcome: str) -> None:
        self.by_outcome[outcome] += 1


def make_registry(engines: EngineProxy | Replicas, requests: RequestCollector, *others: Collector) -> CollectorRegistry:
    """All metrics of one server."""
    registry = CollectorRegistry()
    for collector in (EnginesCollector(engines, requests), requests, *others):
        registry.register(collector)
    return registry


def gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, value=value)


def labelled(name: str, text: str, label: str, counts: Tally[str]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in sorted(counts.items()):
        family.add_metric([value], count)
    return family


def _engine_metrics(proxy: EngineProxy, hit_rate: float, *, compat: bool) -> Iterator[Family]:
    """One engine's own gauges and counters, as of its last heartbeat."""
    stats = proxy.stats
    yield gauge("ramet_engine_up", "1 while the engine is ready", float(proxy.hello is not None))
    yield counter("ramet_engine_starts", "engine processes started", proxy.num_starts)
    yield counter("ramet_engine_crashes", "engine processes that ended on their own", proxy.num_crashes)
    yield counter("ramet_aborted_requests", "requests and programs aborted by clients", proxy.num_aborts)
    yield gauge("ramet_in_flight", "requests and programs between arrival and end", proxy.num_in_flight)
    yield gauge("ramet_running_programs", "programs between arrival and end", proxy.num_programs)
    if compat:
        yield counter("sglang:num_aborted_requests", "requests aborted by clients", proxy.num_aborts)
    if stats:
        yield from _heartbeat_metrics(proxy, stats, hit_rate, compat=compat)


def _heartbeat_metrics(
    proxy: EngineProxy, stats: dict[str, float], hit_rate: float, *, compat: bool
) -> Iterator[Family]:
    pages = stats["num_pages"]
    used = pages - stats["num_free_pages"] - stats["num_evictable_pages"]
    usage = used / pages if pages else 0.0
    running, waiting = stats["num_running"], stats["num_waiting"]
    cached, computed = stats["num_cached_tokens"], stats["num_computed_tokens"]
    yield gauge("ramet_running_requests", "sequences that run", running)
    yield gauge("ramet_max_running_requests", "sequences that can run at once", stats["max_running"])
    yield gauge("ramet_waiting_requests", "sequences that wait", waiting)
    yield gauge("ramet_kv_pages", "pages of the KV pool", pages)
    yield gauge("ramet_kv_free_pages", "pages that hold nothing", stats["num_free_pages"])
    yield gauge("ramet_kv_evictable_pages", "pages that hold cached prefixes nobody uses", stats["num_evictable_pages"])
    yield gauge("ramet_kv_usage_ratio", "share of the pages that running sequences hold", usage)
    yield gauge("ramet_prefix_cache_hit_ratio", "cached share of the prompt tokens of the last minute", hit_rate)
    for what in ("drafted", "accepted"):
        prefix = f"num_{what}_tokens_"
        by_source = {n.removeprefix(prefix): int(value) for n, value in stats.items() if n.startswith(prefix)}
        text = f"tokens {what}, by what they were drafted from"
        yield labelled(f"ramet_{what}_tokens", text, "source", Tally(by_source))
    yield counter("ramet_prefix_cache_hit_tokens", "prompt tokens taken from the cache", cached)
    yield counter("ramet_prefix_cache_query_tokens", "prompt tokens looked up in the cache", cached + computed)
    yield counter("ramet_computed_tokens", "prompt tokens computed", computed)
    yield counter("ramet_decoded_tokens", "tokens computed by decode steps", stats["num_decoded_tokens"])
    yield counter("ramet_engine_steps", "steps of the engine", stats["num_steps"])
    yield gauge(
        "ramet_grammar_waiting_requests", "sequences that wait for their grammar", stats["num_waiting_for_grammar"]
    )
    yield gauge("ramet_longest_step_seconds", "the longest step since the engine started", stats["longest_step_s"])
    parts = GaugeMetricFamily("ramet_longest_step_part_seconds", "the longest part of any step", labels=["part"])
    for part in PARTS:
        parts.add_metric([part], stats[f"longest_step_{part}_s"])
    yield parts
    yield counter("ramet_long_steps", "steps that took 100 ms or more", stats["num_long_steps"])
    yield counter("ramet_preemptions", "sequences sent back to the queue for memory", stats["num_preemptions"])
    same = {
        "num_running_reqs": ("sequences that run", running),
        "num_queue_reqs": ("sequences that wait", waiting),
        "token_usage": ("share of the pages that running sequences hold", usage),
        "cache_hit_rate": ("cached share of the prompt tokens of the last minute", hit_rate),
    }
    for name, (text, value) in same.items():
        yield gauge(f"sglang_{name}", text, value)
        if compat:
            yield gauge(f"sglang:{name}", text, value)
    if compat:
        yield from _other_spellings(proxy.hello, stats, usage)


def _other_spellings(hello: Hello | None, stats: dict[str, float], usage: float) -> Iterator[Family]:
    cached, computed = stats["num_cached_tokens"], stats["num_computed_tokens"]
    num_kv_tokens = 0 if hello is None else hello.num_kv_tokens
    yield gauge("sglang:max_total_num_tokens", "token positions of the KV pool", num_kv_tokens)
    yield gauge("sglang:num_used_tokens", "token positions that running sequences hold", usage * num_kv_tokens)
    yield counter("sglang:cached_tokens", "prompt tokens taken from the cache", cached)
    yield gauge("vllm:num_requests_running", "sequences that run", stats["num_running"])
    yield gauge("vllm:num_requests_waiting", "sequences that wait", stats["num_waiting"])
    yield gauge("vllm:kv_cache_usage_perc", "share of the pages that running sequences hold", usage)
    yield counter("vllm:prefix_cache_hits", "prompt tokens taken from the cache", cached)
    yield counter("vllm:prefix_cache_queries", "prompt tokens looked up in the cache", cached + computed)
    yield counter("vllm:num_preemptions", "sequences sent back to the queue", stats["num_preemptions"])
