"""Traces of requests, as an OpenTelemetry collector gets them. Skipped where the SDK (ramet[otel]) is not installed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from ramet.errors import ConfigError
from ramet.runtime.models.catalog import TINY_MODEL
from ramet.runtime.server.app import make_server
from ramet.runtime.server.config import ServerConfig

trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
pytest.importorskip("opentelemetry.sdk")

Start = Callable[..., AbstractContextManager[Any]]  # Any: RunningServer of conftest.py
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector(HTTPServer):
    """Takes spans in over HTTP, as OTLP says."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[Any] = []  # Any: messages of protobuf
        self.paths: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        import gzip

        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        message = trace_service.ExportTraceServiceRequest.FromString(body)
        for resource in message.resource_spans:
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.server.paths.add(self.path)
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def collector() -> Iterator[Collector]:
    server = Collector()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def values_of(span: Any) -> dict[str, Any]:  # Any: a message of protobuf
    found = {}
    for each in span.attributes:
        kind = each.value.WhichOneof("value")
        found[each.key] = getattr(each.value, kind)
    return found


def test_a_trace_goes_on_from_the_clients_and_reaches_from_the_route_to_the_steps(
    start_server: Start, collector: Collector
) -> None:
    with start_server(dp=1, prefill_replicas=1, otlp_endpoint=collector.url) as server:
        while any(proxy.hello is None for _, proxy in server.served.proxy.engines()):  # the one for prompts, too
            time.sleep(0.05)
        body = {"prompt": "word " * 100, "max_tokens": 5, "temperature": 0, "ignore_eos": True}
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        assert server.client.post("/v1/completions", json=body, headers=headers).status_code == 200
        broken = {"traceparent": "00-zz-zz-01"}
        assert server.client.post("/v1/completions", json={"prompt": 3.5}, headers=broken).status_code == 400
        assert server.client.get("/health").status_code == 200
    assert collector.paths == {"/v1/traces"}
    ours = {span.name: span for span in collector.spans if span.trace_id.hex() == TRACE}
    assert set(ours) == {"POST /v1/completions", "route", "move pages", "queue", "prefill", "decode"}
    top = ours.pop("POST /v1/completions")
    assert top.parent_span_id.hex() == PARENT
    assert values_of(top)["http.response.status_code"] == 200
    for span in ours.values():
        assert span.parent_span_id == top.span_id
        assert span.start_time_unix_nano <= span.end_time_unix_nano
    assert values_of(ours["route"])["ramet.replica"] == 0
    assert values_of(ours["move pages"]) == {"ramet.replica": 0}
    prefill, decode = (values_of(ours[name]) for name in ("prefill", "decode"))
    assert prefill["ramet.prompt_tokens"] == 500
    assert prefill["ramet.cached_tokens"] == 496
    assert (decode["ramet.output_tokens"], decode["ramet.finish_reason"]) == (5, "length")
    assert ours["queue"].end_time_unix_nano <= ours["prefill"].end_time_unix_nano <= ours["decode"].end_time_unix_nano
    (refused,) = (span for span in collector.spans if span.trace_id.hex() != TRACE)
    assert (refused.name, refused.parent_span_id) == ("POST /v1/completions", b"")
    assert values_of(refused)["http.response.status_code"] == 400


def test_a_collector_that_is_away_changes_nothing_and_a_wrong_address_is_refused(start_server: Start) -> None:
    with start_server(otlp_endpoint="http://127.0.0.1:9") as server:
        body = {"prompt": "hello", "max_tokens": 3, "ignore_eos": True}
        assert server.client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 3
    for wrong in ("localhost:4318", "", "ftp://there"):
        with pytest.raises(ConfigError, match="must be a URL such as http://localhost:4318"):
            make_server(TINY_MODEL, {"device": "cpu"}, ServerConfig(otlp_endpoint=wrong))


def test_engines_for_prompts_are_refused_where_pages_cannot_move() -> None:
    for engine in ({"tp": 2}, {"radix_cache": False}):
        with pytest.raises(ConfigError, match="KV pages cannot move"):
            make_server(TINY_MODEL, {"device": "cpu", **engine}, ServerConfig(prefill_replicas=1))
    with pytest.raises(ConfigError, match=r"prefill_replicas is 256 but must be in \[0, 256\], together with dp"):
        ServerConfig(prefill_replicas=256)
