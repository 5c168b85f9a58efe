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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import urlsplit

from ramet.errors import ConfigError
from ramet.runtime.server.link.protocol import Output

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

_SEND_S = 5.0  # for the collector to answer

Attributes: TypeAlias = Mapping[str, str | int | float | bool]
# Adds a span below that of an HTTP request: its name, start and end (of time.monotonic()), and attributes.
AddSpan: TypeAlias = Callable[[str, float, float, Attributes], None]

# Of the HTTP request that is being answered; None: there is no tracing.
CURRENT: ContextVar[AddSpan | None] = ContextVar("ramet-trace", default=None)


def make_provider(endpoint: str) -> TracerProvider:
    """Make what sends spans to a collector, such as http://localhost:4318, until its `shutdown`. Raises ConfigError."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"otlp_endpoint is {endpoint!r} but must be a URL such as http://localhost:4318")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ConfigError(
            "--otlp-endpoint needs OpenTelemetry's SDK, which is not installed: pip install 'ramet[otel]'"
        ) from None
    url = endpoint.rstrip("/")
    exporter = OTLPSpanExporter(url if url.endswith("/v1/traces") else f"{url}/v1/traces", timeout=_SEND_S)
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: "ramet"}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


@contextmanager
def traced(provider: TracerProvider, method: str, path: str, headers: Mapping[str, str]) -> Iterator[Span]:
    """The span of an HTTP request, current in this task and in those that it starts. headers: in lower case."""
    from opentelemetry.trace import SpanKind, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    tracer = provider.get_tracer("ramet")
    above = TraceContextTextMapPropagator().extract(headers)
    attributes = {"http.request.method": method, "url.path": path}
    with tracer.start_as_current_span(f"{method} {path}", above, SpanKind.SERVER, attributes) as span:
        below = set_span_in_context(span)

        def add(name: str, start_s: float, end_s: float, attributes: Attributes) -> None:
            zero_s = time.time() - time.monotonic()
            start_ns, end_ns = (int(1e9 * (zero_s + at_s)) for at_s in (start_s, end_s))
            tracer.start_span(name, below, attributes=attributes, start_time=start_ns).end(end_ns)

        token = CURRENT.set(add)
        try:
            yield span
        finally:
            CURRENT.reset(token)


def add_output(add: AddSpan, output: Output) -> None:
    """Add what a request's last increment says of its way through the engine."""
    times = output.timings
    if times is None:
        return
    end_s = time.monotonic()
    start_s = end_s - times["total_s"]
    first_s = start_s + times["first_token_s"]
    begun_s = min(start_s + times["queue_s"], first_s)
    name: Attributes = {"ramet.request": output.id}
    add("queue", start_s, begun_s, name)
    prompt: Attributes = {"ramet.prompt_tokens": output.prompt_tokens, "ramet.cached_tokens": output.cached_tokens}
    add("prefill", begun_s, first_s, {**name, **prompt})
    written: Attributes = {
        "ramet.output_tokens": output.completion_tokens,
        "ramet.finish_reason": output.finish_reason or "",
    }
    add("decode", first_s, end_s, {**name, **written})
