"""What each key's requests use: limits before they run, counts and latencies by the key's name, usage for the log.

A limit is refused with 429, its name, and the time after which it is worth asking again. Not here: the keys themselves
(`keys`), limits of all keys together (`holding`), the order in which requests run (the engine's scheduler).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from ramet.errors import Overloaded
from ramet.lang.graph.events import Usage
from ramet.runtime.server.keys import KeyEntry, KeyRing
from ramet.runtime.server.link.protocol import Output
from ramet.runtime.server.metrics import SECONDS, Histogram

_RETRY_S = 1.0  # for limits that end with a request, and nobody knows when


@dataclass(slots=True)
class Used:
    """What one HTTP request has used so far: sums over its answers. Times are those of the slowest one."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)
    queue_s: float | None = None
    first_token_s: float | None = None

    def add(self, usage: Usage | Output) -> None:
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.completion_tokens += usage.completion_tokens

    def fields(self) -> dict[str, object]:
        """The fields of a log line; empty if no request reached the engine."""
        if not self.finish_reasons:
            return {}
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "finish_reason": ",".join(sorted(self.finish_reasons)),
            **({} if self.queue_s is None else {"queue_s": round(self.queue_s, 4)}),
            **({} if self.first_token_s is None else {"first_token_s": round(self.first_token_s, 4)}),
        }


@dataclass(slots=True)
class _Account:
    """One name's requests in flight, its debt, and its totals since the start. `left`: tokens, at the time `left_s`."""

    in_flight: int = 0
    queued_tokens: int = 0
    left: float | None = None
    left_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    by_reason: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    first_token: Histogram = field(default_factory=lambda: Histogram("", SECONDS))
    total: Histogram = field(default_factory=lambda: Histogram("", SECONDS))

    def tokens_left(self, per_minute: int, now_s: float) -> float:
        """Tokens that may be used now; below zero: what is owed. A minute without requests fills it up."""
        if self.left is None:
            self.left, self.left_s = float(per_minute), now_s
        self.left = min(per_minute, self.left + (now_s - self.left_s) * per_minute / 60)
        self.left_s = now_s
        return self.left


class Tenants(Collector):
    """The accounts of all names, as a proxy's `Accounts`. One event loop owns it."""

    def __init__(self, keys: KeyRing, clock: Callable[[], float] = time.monotonic) -> None:
        self.keys = keys
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._open: dict[tuple[str, ...], Used] = {}  # by client, for the log

    def _account(self, name: str) -> _Account:
        return self._accounts.setdefault(name, _Account())

    # -- one HTTP request, for the log

    def open(self, client: tuple[str, ...]) -> None:
        """Begin to sum up what a client's requests use."""
        self._open[client] = Used()

    def close(self, client: tuple[str, ...]) -> Used:
        """Return what they used since `open`."""
        return self._open.pop(client, Used())

    # -- requests of the engine

    def enter(self, name: str, num_requests: int, num_tokens: int) -> None:
        """Count requests with so many prompt tokens. Raises Overloaded if they pass one of the name's limits."""
        account, limits = self._account(name), self.keys.limits(name)
        if limits is not None:
            self._check(account, limits, num_requests, num_tokens)
        account.in_flight += num_requests
        account.queued_tokens += num_tokens
        self._charge(account, limits, num_tokens)

    def _check(self, account: _Account, limits: KeyEntry, num_requests: int, num_tokens: int) -> None:
        def refuse(limit: str, message: str, retry_s: float) -> Overloaded:
            account.refused[limit] += 1
            return Overloaded(f"{message}; it is {limit} of the key {limits.name!r}", retry_s)

        most = limits.max_in_flight
        if most is not None and account.in_flight + num_requests > most:
            message = f"{account.in_flight:,} requests are in flight and {num_requests:,} more would pass {most:,}"
            raise refuse("max_in_flight", message, _RETRY_S)
        most = limits.max_queued_tokens
        if most is not None and account.queued_tokens + num_tokens > most:
            message = f"{account.queued_tokens:,} tokens of prompts wait and {num_tokens:,} more would pass {most:,}"
            raise refuse("max_queued_tokens", message, _RETRY_S)
        most = limits.tokens_per_minute
        if most is not None and (left := account.tokens_left(most, self._clock())) <= 0:
            retry_s = (1 - left) * 60 / most
            raise refuse("tokens_per_minute", f"more than {most:,} tokens were used within a minute", retry_s)

    def _charge(self, account: _Account, limits: KeyEntry | None, num_tokens: int) -> None:
        if limits is not None and limits.tokens_per_minute is not None:
            left = account.tokens_left(limits.tokens_per_minute, self._clock())
            account.left = left - num_tokens

    def begin(self, name: str, num_tokens: int) -> None:
        """Note that a request with so many prompt tokens waits no longer."""
        self._account(name).queued_tokens -= num_tokens

    def leave(self, name: str) -> None:
        """Note the end of a request."""
        self._account(name).in_flight -= 1

    def note_tokens(self, name: str, num_tokens: int) -> None:
        """Count generated tokens."""
        account = self._account(name)
        account.generated_tokens += num_tokens
        self._charge(account, self.keys.limits(name), num_tokens)

    def note_finish(self, client: tuple[str, ...], output: Output) -> None:
        """Count a request's last increment."""
        account = self._account(client[0])
        account.by_reason[output.finish_reason or "unknown"] += 1
        account.prompt_tokens += output.prompt_tokens
        account.cached_tokens += output.cached_tokens
        timings = output.timings
        if timings is not None and output.completion_tokens:
            account.first_token.observe(timings["first_token_s"])
            account.total.observe(timings["total_s"])
        used = self._open.get(client)
        if used is not None:
            used.add(output)
            used.finish_reasons[output.finish_reason or "unknown"] += 1
            if timings is not None:
                used.queue_s = max(used.queue_s or 0.0, timings["queue_s"])
                if output.completion_tokens:
                    used.first_token_s = max(used.first_token_s or 0.0, timings["first_token_s"])

    def note_node(self, client: tuple[str, ...], usage: Usage, finish_reason: str) -> None:
        """Count what a program's node has used."""
        account = self._account(client[0])
        account.prompt_tokens += usage.prompt_tokens
        account.cached_tokens += usage.cached_tokens
        account.generated_tokens += usage.completion_tokens
        account.by_reason[finish_reason] += 1
        computed = usage.prompt_tokens - usage.cached_tokens  # the path before it was in the cache
        self._charge(account, self.keys.limits(client[0]), computed + usage.completion_tokens)
        used = self._open.get(client)
        if used is not None:
            used.add(usage)
            used.finish_reasons[finish_reason] += 1

    # -- metrics

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]:
        if not self.keys.is_needed:
            return
        accounts = {name: account for name, account in sorted(self._accounts.items()) if name}
        gauge = GaugeMetricFamily("ramet_key_in_flight", "requests and programs in flight, by key", labels=["key"])
        counts = {
            "prompt_tokens": "prompt tokens of ended requests, by key",
            "cached_tokens": "prompt tokens taken from the cache, by key",
            "generated_tokens": "generated tokens, by key",
        }
        families = {
            name: CounterMetricFamily(f"ramet_key_{name}", text, labels=["key"]) for name, text in counts.items()
        }
        requests = CounterMetricFamily(
            "ramet_key_requests", "ended requests, by key and reason", labels=["key", "reason"]
        )
        refused = CounterMetricFamily(
            "ramet_key_refused_requests", "requests over a limit of their key", labels=["key", "limit"]
        )
        times = {
            "first_token": HistogramMetricFamily(
                "ramet_key_time_to_first_token_seconds", "arrival to first token, by key", labels=["key"]
            ),
            "total": HistogramMetricFamily(
                "ramet_key_e2e_request_latency_seconds", "arrival to end, by key", labels=["key"]
            ),
        }
        for name, account in accounts.items():
            gauge.add_metric([name], account.in_flight)
            families["prompt_tokens"].add_metric([name], account.prompt_tokens)
            families["cached_tokens"].add_metric([name], account.cached_tokens)
            families["generated_tokens"].add_metric([name], account.generated_tokens)
            times["first_token"].add_metric([name], *account.first_token.samples())
            times["total"].add_metric([name], *account.total.samples())
            for reason, count in sorted(account.by_reason.items()):
                requests.add_metric([name, reason], count)
            for limit, count in sorted(account.refused.items()):
                refused.add_metric([name, limit], count)
        yield gauge
        yield from families.values()
        yield from (requests, refused)
        yield from times.values()
