"""Traces of requests for OpenTelemetry: one span of HTTP, and below it what the request waited for and what it took.

    POST /v1/chat/completions      the request; its parent is the client's span, if it sent `traceparent` (W3C)
        route                      which engine was chosen, and what its cache was expected to hold
        move pages                 from another engine, where that was worth it
        queue, prefill, decode     in the engine: until its first step, until the first token, until the end
        program                    a program of which the request is a part, from its start to its end

Spans are made here, in the server's process: an engine tells its times once, with the end of each request, so tracing
costs it nothing. A thread of OpenTelemetry's SDK sends them (OTLP over HTTP); a collector that is away delays nobody.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ramet.errors import ConfigError
from ramet.runtime.server.link.protocol import Output

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

_SEND_S = 5.0  # for the collector to answer

Attributes = Mapping[str, str | int | float | bool]


class Trace:
    """The spans of one HTTP request. `span` is the uppermost one."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        from opentelemetry.trace import set_span_in_context

        self.span = span
        self._tracer = tracer
        self._context = set_span_in_context(span)

    def add(self, name: str, start_s: float, end_s: float, attributes: Attributes) -> None:
        """Add a span below the uppermost one. start_s, end_s: of time.monotonic()."""
        zero_s = time.time() - time.monotonic()
        start_ns, end_ns = (int(1e9 * (zero_s + at_s)) for at_s in (start_s, end_s))
        self._tracer.start_span(name, self._context, attributes=attributes, start_time=start_ns).end(end_ns)

    def add_output(self, output: Output) -> None:
        """Add what a request's last increment says of its way through the engine."""
        times = output.timings
        if times is None:
            return
        end_s = time.monotonic()
        start_s = end_s - times["total_s"]
        first_s = start_s + times["first_token_s"]
        begun_s = min(start_s + times["queue_s"], first_s)
        name: Attributes = {"ramet.request": output.id}
        self.add("queue", start_s, begun_s, name)
        prompt: Attributes = {"ramet.prompt_tokens": output.prompt_tokens, "ramet.cached_tokens": output.cached_tokens}
        self.add("prefill", begun_s, first_s, {**name, **prompt})
        written: Attributes = {
            "ramet.output_tokens": output.completion_tokens,
            "ramet.finish_reason": output.finish_reason or "",
        }
        self.add("decode", first_s, end_s, {**name, **written})


# The trace of the HTTP request that is being answered; None: there is no tracing.
CURRENT: ContextVar[Trace | None] = ContextVar("ramet-trace", default=None)


class Tracing:
    """Makes traces and sends them to a collector. One for each server, which closes it."""

    def __init__(self, endpoint: str) -> None:
        """endpoint: of the collector, such as http://localhost:4318. Raises ConfigError."""
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"otlp_endpoint is {endpoint!r} but must be a URL such as http://localhost:4318")
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            raise ConfigError(
                "--otlp-endpoint needs OpenTelemetry's SDK, which is not installed: pip install 'ramet[otel]'"
            ) from None
        url = endpoint.rstrip("/")
        exporter = OTLPSpanExporter(url if url.endswith("/v1/traces") else f"{url}/v1/traces", timeout=_SEND_S)
        self._provider = TracerProvider(resource=Resource.create({SERVICE_NAME: "ramet"}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("ramet")
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def request(self, method: str, path: str, headers: Mapping[str, str]) -> Iterator[Trace]:
        """A trace for an HTTP request, current in this task and in those that it starts. headers: in lower case."""
        from opentelemetry.trace import SpanKind

        above = self._propagator.extract(
            {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        )
        attributes = {"http.request.method": method, "url.path": path}
        with self._tracer.start_as_current_span(f"{method} {path}", above, SpanKind.SERVER, attributes) as span:
            trace = Trace(self._tracer, span)
            token = CURRENT.set(trace)
            try:
                yield trace
            finally:
                CURRENT.reset(token)

    def close(self) -> None:
        """Send what is left, and end the thread that sends. Takes a few seconds at most."""
        self._provider.force_flush(int(1e3 * _SEND_S))
        self._provider.shutdown()
