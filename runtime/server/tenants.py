"""Whose request this is, and what it may use: keys, limits of each and of all together, counts by the key's name.

A limit is refused with 429, its name, and the time after which it is worth asking again. Not here: the files of keys
(`keys`), the order in which requests run (the engine's scheduler).
"""

from __future__ import annotations

import hmac
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from ramet.errors import Overloaded
from ramet.lang.graph.events import Usage
from ramet.runtime.server.config import ServerConfig
from ramet.runtime.server.keys import KeyEntry, digest_of_key, read_keys
from ramet.runtime.server.link.protocol import Output
from ramet.runtime.server.metrics import SECONDS, Histogram, RequestCollector

_RETRY_S = 1.0  # for limits that end with a request, and nobody knows when


class Held:
    """An amount that requests hold: bytes, or requests. Owner: one event loop.

    Where the limit is reached, a key that holds less than an equal share of it still gets in. All keys together
    therefore hold at most twice the limit, and one of them cannot keep the others out.
    """

    def __init__(self, limit: int, unit: str, way_out: str) -> None:
        """`unit`, `way_out`: how the error calls what is held, and what its reader may do."""
        self.limit = limit
        self._unit = unit
        self._way_out = way_out
        self._by_key: Counter[str] = Counter()
        self.total = 0

    def take(self, key: str, amount: int = 1) -> None:
        """Hold more for a key. Raises Overloaded if it does not fit; nothing is held then."""
        if self.total + amount > self.limit:
            num_keys = len(self._by_key.keys() | {key})
            if num_keys == 1 or self._by_key[key] + amount > self.limit // num_keys:
                raise Overloaded(
                    f"{self.total:,} {self._unit} are in flight already, of {self.limit:,} at most; {self._way_out}",
                    _RETRY_S,
                )
        self._by_key[key] += amount
        self.total += amount

    def give(self, key: str, amount: int = 1) -> None:
        """Hold less for a key."""
        self.total -= amount
        self._by_key[key] -= amount
        if not self._by_key[key]:
            del self._by_key[key]


@dataclass(slots=True)
class Used:
    """What an HTTP request, or all of a key, have used so far: sums over the answers. Times are the longest ones."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)
    queue_s: float | None = None
    first_token_s: float | None = None

    def add(self, usage: Usage | Output, finish_reason: str) -> None:
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.completion_tokens += usage.completion_tokens
        self.finish_reasons[finish_reason] += 1
        timings = usage.timings if isinstance(usage, Output) else None
        if timings is not None:
            self.queue_s = max(self.queue_s or 0.0, timings["queue_s"])
            if usage.completion_tokens:
                self.first_token_s = max(self.first_token_s or 0.0, timings["first_token_s"])

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
    """One name's requests in flight, its debt, and its totals since the start. `left`: tokens, at the time `left_s`.

    `generated_tokens`: also those of requests that have not ended.
    """

    in_flight: int = 0
    queued_tokens: int = 0
    left: float | None = None
    left_s: float = 0.0
    generated_tokens: int = 0
    used: Used = field(default_factory=Used)
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
    """The keys that a server accepts, and what their requests use, as a proxy's `Accounts`. One event loop owns it.

    Keys are those of the configuration, which are called after their digests, and those of a file that can be read
    again. `requests`: counts of all requests. `in_flight`, `bytes`: what all hold together.
    """

    def __init__(self, config: ServerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ConfigError for a wrong file of keys."""
        self.requests = RequestCollector(compat=config.compat_metrics)
        self.in_flight = Held(config.max_in_flight, "requests", "retry later")
        self.bytes = Held(config.bytes_in_flight, "bytes of requests", "retry later, or raise --max-in-flight-bytes")
        self._clock = clock
        digests = [digest_of_key(key.encode()) for key in config.api_key]
        self._plain = [KeyEntry(name=f"key-{digest[:8]}", sha256=(digest,)) for digest in dict.fromkeys(digests)]
        self._path = None if config.api_keys_file is None else Path(config.api_keys_file)
        self._keys: list[tuple[str, KeyEntry]] = []
        self._by_name: dict[str, KeyEntry] = {}
        self._accounts: defaultdict[str, _Account] = defaultdict(_Account)
        self._open: dict[tuple[str, ...], Used] = {}  # by client, for the log
        self.reload()

    # -- keys

    @property
    def need_keys(self) -> bool:
        """True if requests must bring a key: also where the file has none, so that nobody gets in by an empty one."""
        return bool(self._plain) or self._path is not None

    def reload(self) -> int:
        """Read the file again. Returns the number of names. Raises ConfigError; the keys stay as they were then."""
        entries = [*self._plain, *(() if self._path is None else read_keys(self._path).keys)]
        self._keys = [(digest, entry) for entry in entries for digest in entry.sha256]
        self._by_name = {entry.name: entry for entry in entries}
        return len(self._by_name)

    def find(self, key: bytes) -> KeyEntry | None:
        """Return whose key this is. All are compared, in constant time: the time says nothing of which one it was."""
        digest, found = digest_of_key(key), None
        for known, entry in self._keys:
            if hmac.compare_digest(digest, known):
                found = entry
        return found

    def limits(self, name: str) -> KeyEntry | None:
        """The limits of a name; None if there is no such name, or none any longer."""
        return self._by_name.get(name)

    # -- one HTTP request, for the log

    def open(self, client: tuple[str, ...]) -> None:
        """Begin to sum up what a client's requests use."""
        self._open[client] = Used()

    def close(self, client: tuple[str, ...]) -> Used:
        """Return what they used since `open`."""
        return self._open.pop(client, Used())

    # -- requests of the engine

    def enter(self, name: str, num_requests: int, num_tokens: int, *, is_program: bool = False) -> None:
        """Count requests with so many prompt tokens. Raises Overloaded, and counts nothing, if they pass a limit.

        Tokens of a program are a guess: they wait, but only `note_node` tells how many are used.
        """
        account, limits = self._accounts[name], self.limits(name)
        if limits is not None:
            self._check(account, limits, num_requests, num_tokens)
        self.in_flight.take(name, num_requests)
        account.in_flight += num_requests
        account.queued_tokens += num_tokens
        if not is_program:
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
        self._accounts[name].queued_tokens -= num_tokens

    def leave(self, name: str) -> None:
        """Note the end of a request."""
        self._accounts[name].in_flight -= 1
        self.in_flight.give(name)

    def note_tokens(self, name: str, num_tokens: int) -> None:
        """Count generated tokens."""
        account = self._accounts[name]
        account.generated_tokens += num_tokens
        self._charge(account, self.limits(name), num_tokens)

    def note_finish(self, client: tuple[str, ...], output: Output) -> None:
        """Count a request's last increment."""
        self.requests.note_finish(output)
        account = self._accounts[client[0]]
        if output.timings is not None and output.completion_tokens:
            account.first_token.observe(output.timings["first_token_s"])
            account.total.observe(output.timings["total_s"])
        self._add(client, output, output.finish_reason or "unknown")

    def note_node(self, client: tuple[str, ...], usage: Usage, finish_reason: str) -> None:
        """Count what a program's node has used."""
        account = self._accounts[client[0]]
        account.generated_tokens += usage.completion_tokens
        computed = usage.prompt_tokens - usage.cached_tokens  # the path before it was in the cache
        self._charge(account, self.limits(client[0]), computed + usage.completion_tokens)
        self._add(client, usage, finish_reason)

    def _add(self, client: tuple[str, ...], usage: Usage | Output, finish_reason: str) -> None:
        self._accounts[client[0]].used.add(usage, finish_reason)
        if client in self._open:
            self._open[client].add(usage, finish_reason)

    def note_gap(self, seconds: float) -> None:
        """Record the time between two increments of a request."""
        self.requests.gap.observe(seconds)

    def note_heartbeat(self, stats: dict[str, float], replica: int | None = None) -> None:
        """Record an engine's counters."""
        self.requests.hit_rates[replica].note_heartbeat(stats)

    # -- metrics

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]:
        if not self.need_keys:
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
            families["prompt_tokens"].add_metric([name], account.used.prompt_tokens)
            families["cached_tokens"].add_metric([name], account.used.cached_tokens)
            families["generated_tokens"].add_metric([name], account.generated_tokens)
            times["first_token"].add_metric([name], *account.first_token.samples())
            times["total"].add_metric([name], *account.total.samples())
            for reason, count in sorted(account.used.finish_reasons.items()):
                requests.add_metric([name, reason], count)
            for limit, count in sorted(account.refused.items()):
                refused.add_metric([name, limit], count)
        yield gauge
        yield from families.values()
        yield from (requests, refused)
        yield from times.values()
