"""What `/metrics` says: Prometheus metrics of the engine's heartbeats and of the requests that end.

Names of our own (`ramet_...`), five that deployment guides of SGLang look for (`sglang_...`), and on request the
spellings of SGLang (`sglang:...`) and vLLM (`vllm:...`). Hit rates come from token counters; the gauge is over the last
minute.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ramet.runtime.server.engine_proxy import EngineProxy
from ramet.runtime.server.protocol import Output

WINDOW_S = 60.0
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_GAP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

Family = GaugeMetricFamily | CounterMetricFamily


class EngineCollector(Collector):
    """Gauges and counters that the engine counts itself, as of its last heartbeat."""

    def __init__(self, proxy: EngineProxy, *, compat: bool) -> None:
        self._proxy = proxy
        self._compat = compat
        self._window: deque[tuple[float, float, float]] = deque()  # time, cached tokens, computed tokens

    def note_heartbeat(self, stats: dict[str, float]) -> None:
        """Remember the token counters, for the hit rate of the last minute."""
        now_s = time.monotonic()
        self._window.append((now_s, stats["num_cached_tokens"], stats["num_computed_tokens"]))
        while len(self._window) > 1 and self._window[1][0] <= now_s - WINDOW_S:
            self._window.popleft()

    @property
    def hit_rate(self) -> float:
        """Cached share of the prompt tokens of the last minute; 0 where there were none."""
        if len(self._window) < 2:
            return 0.0
        cached = self._window[-1][1] - self._window[0][1]
        computed = self._window[-1][2] - self._window[0][2]
        return cached / (cached + computed) if cached + computed > 0 else 0.0

    def collect(self) -> Iterator[Family]:
        stats, counters = self._proxy.stats, self._proxy.counters
        yield gauge("ramet_engine_up", "1 while the engine is ready", float(self._proxy.hello is not None))
        yield counter("ramet_engine_starts", "engine processes started", counters.num_starts)
        yield counter("ramet_engine_crashes", "engine processes that ended on their own", counters.num_crashes)
        yield counter("ramet_aborted_requests", "requests and programs aborted by clients", counters.num_aborts)
        yield gauge("ramet_in_flight", "requests and programs between arrival and end", self._proxy.num_in_flight)
        if not stats:
            return
        yield from self._engine_metrics(stats)

    def _engine_metrics(self, stats: dict[str, float]) -> Iterator[Family]:
        pages = stats["num_pages"]
        used = pages - stats["num_free_pages"] - stats["num_evictable_pages"]
        usage = used / pages if pages else 0.0
        running, waiting = stats["num_running"], stats["num_waiting"]
        cached, computed = stats["num_cached_tokens"], stats["num_computed_tokens"]
        yield gauge("ramet_running_requests", "sequences that run", running)
        yield gauge("ramet_waiting_requests", "sequences that wait", waiting)
        yield gauge("ramet_kv_pages", "pages of the KV pool", pages)
        yield gauge("ramet_kv_free_pages", "pages that hold nothing", stats["num_free_pages"])
        yield gauge(
            "ramet_kv_evictable_pages", "pages that hold cached prefixes nobody uses", stats["num_evictable_pages"]
        )
        yield gauge("ramet_kv_usage_ratio", "share of the pages that running sequences hold", usage)
        yield gauge(
            "ramet_prefix_cache_hit_ratio", "cached share of the prompt tokens of the last minute", self.hit_rate
        )
        yield counter("ramet_prefix_cache_hit_tokens", "prompt tokens taken from the cache", cached)
        yield counter("ramet_prefix_cache_query_tokens", "prompt tokens looked up in the cache", cached + computed)
        yield counter("ramet_computed_tokens", "prompt tokens computed", computed)
        yield counter("ramet_decoded_tokens", "tokens computed by decode steps", stats["num_decoded_tokens"])
        yield counter("ramet_engine_steps", "steps of the engine", stats["num_steps"])
        yield counter("ramet_preemptions", "sequences sent back to the queue for memory", stats["num_preemptions"])
        same = {
            "num_running_reqs": ("sequences that run", running),
            "num_queue_reqs": ("sequences that wait", waiting),
            "token_usage": ("share of the pages that running sequences hold", usage),
            "cache_hit_rate": ("cached share of the prompt tokens of the last minute", self.hit_rate),
        }
        for name, (text, value) in same.items():
            yield gauge(f"sglang_{name}", text, value)
            if self._compat:
                yield gauge(f"sglang:{name}", text, value)
        if self._compat:
            yield gauge("vllm:num_requests_running", "sequences that run", running)
            yield gauge("vllm:num_requests_waiting", "sequences that wait", waiting)
            yield gauge("vllm:kv_cache_usage_perc", "share of the pages that running sequences hold", usage)
            yield counter("vllm:prefix_cache_hits", "prompt tokens taken from the cache", cached)
            yield counter("vllm:prefix_cache_queries", "prompt tokens looked up in the cache", cached + computed)
            yield counter("vllm:num_preemptions", "sequences sent back to the queue", stats["num_preemptions"])


class ServerMetrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(self, proxy: EngineProxy, *, compat: bool = False) -> None:
        self.registry = CollectorRegistry()
        self.engine = EngineCollector(proxy, compat=compat)
        self.registry.register(self.engine)
        first_token = ["ramet_time_to_first_token_seconds", "sglang_time_to_first_token_seconds"]
        if compat:
            first_token += ["sglang:time_to_first_token_seconds", "vllm:time_to_first_token_seconds"]
        self._first_token = [self._histogram(name, "arrival to first token", _SECONDS) for name in first_token]
        self._gap = self._histogram("ramet_inter_token_latency_seconds", "mean gap of a request", _GAP_SECONDS)
        self._queue = self._histogram("ramet_queue_time_seconds", "arrival to the first step", _SECONDS)
        self._total = self._histogram("ramet_e2e_request_latency_seconds", "arrival to end", _SECONDS)
        self._prompt = Counter("ramet_prompt_tokens", "prompt tokens of ended requests", registry=self.registry)
        self._output = Counter("ramet_generation_tokens", "generated tokens of ended requests", registry=self.registry)
        self._ended = Counter("ramet_requests", "ended requests by reason", ["reason"], registry=self.registry)
        self._http = Counter("ramet_http_responses", "responses by status", ["status"], registry=self.registry)
        self._programs = Counter("ramet_programs", "ended programs by outcome", ["outcome"], registry=self.registry)
        proxy.on_finish = self.note_finish
        proxy.on_heartbeat = self.engine.note_heartbeat

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        return Histogram(name, text, buckets=tuple(buckets), registry=self.registry)

    def note_finish(self, output: Output) -> None:
        """Count a request's last increment."""
        self._ended.labels(output.finish_reason or "unknown").inc()
        self._prompt.inc(output.prompt_tokens)
        self._output.inc(output.completion_tokens)
        timings = output.timings
        if timings is None or not output.completion_tokens:
            return
        for histogram in self._first_token:
            histogram.observe(timings["first_token_s"])
        self._queue.observe(timings["queue_s"])
        self._total.observe(timings["total_s"])
        if output.completion_tokens > 1:
            self._gap.observe((timings["total_s"] - timings["first_token_s"]) / (output.completion_tokens - 1))

    def note_response(self, status: int) -> None:
        self._http.labels(str(status)).inc()

    def note_program(self, outcome: str) -> None:
        self._programs.labels(outcome).inc()

    def exposition(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)


def gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, value=value)
