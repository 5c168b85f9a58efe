"""The OpenAPI document is whole, and the server keeps to it whatever it is sent."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from ramet.lang.explain.plan import explain_on_server

Server = Any  # RunningServer of conftest.py
CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
)


ROUTES = (
    "post /v1/chat/completions",
    "post /v1/completions",
    "post /v1/responses",
    "post /v1/responses/input_tokens",
    "get /v1/responses/{response_id}",
    "delete /v1/responses/{response_id}",
    "post /v1/responses/{response_id}/cancel",
    "get /v1/responses/{response_id}/input_items",
    "post /v1/messages",
    "post /v1/messages/count_tokens",
    "post /v1/tokenize",
    "post /v1/detokenize",
    "get /v1/models",
    "get /v1/models/{model_id}",
    "post /generate",
    "get /health",
    "get /ready",
    "get /health_generate",
    "get /get_model_info",
    "get /get_server_info",
    "post /flush_cache",
    "post /abort_request",
    "post /scale",
    "post /concate_and_append_request",
    "get /metrics",
    "post /v1/programs",
    "post /v1/programs/explain",
    "get /v1/programs/{program_id}",
    "delete /v1/programs/{program_id}",
    "get /v1/programs/{program_id}/events",
    "post /v1/programs/{program_id}/parts",
    "post /v1/programs/{program_id}/values",
    "post /v1/programs/{program_id}/cancel",
)


@pytest.fixture(scope="module")
def document(server: Server) -> Any:
    return server.client.get("/openapi.json").json()


@pytest.fixture(scope="module")
def api(server: Server) -> Any:
    server.served.explain = explain_on_server  # as `ramet serve` does
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def visit(api: Any, route: str, num_examples: int) -> None:
    """Send cases of one operation, valid ones and wrong ones, and compare the answers with the document."""
    method, path = route.split(" ")
    operation = api[path][method]

    @settings(
        max_examples=num_examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
        derandomize=True,
    )
    @given(data=st.data())
    def sent(data: st.DataObject) -> None:
        mode = data.draw(st.sampled_from([GenerationMode.POSITIVE, GenerationMode.NEGATIVE]))
        case = data.draw(operation.as_strategy(generation_mode=mode))
        case.call_and_validate(checks=CHECKS, timeout=30)

    sent()


@pytest.mark.parametrize("route", ROUTES)
def test_what_is_sent_gets_an_answer_that_the_document_has(api: Any, route: str) -> None:
    visit(api, route, 12)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("route", ROUTES)
def test_the_same_with_many_cases(api: Any, route: str) -> None:
    visit(api, route, 400)


@pytest.mark.parametrize("path", ["/openapi.json", "/docs"])
def test_head_asks_whether_the_document_is_there(server: Server, path: str) -> None:
    answer = server.client.head(path)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-type"] == server.client.get(path).headers["content-type"]


def test_every_route_is_in_the_document_with_its_errors(document: Any) -> None:
    found = {f"{method} {path}" for path, operations in document["paths"].items() for method in operations}
    assert found == set(ROUTES)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation.get("description") or operation["summary"], (method, path)
            statuses = set(operation["responses"])
            assert "200" in statuses
            assert "422" not in statuses or path.startswith("/v1/programs")
            assert "requestBody" not in operation or {"400", "413", "401"} <= statuses


def test_operation_ids_are_unique_and_references_lead_somewhere(document: Any) -> None:
    ids = [operation["operationId"] for operations in document["paths"].values() for operation in operations.values()]
    assert len(set(ids)) == len(ids)
    named = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
    assert named <= set(document["components"]["schemas"])


def test_a_request_that_passes_its_own_deadline_gets_a_status_of_the_document(server: Server, document: Any) -> None:
    answer = server.client.post("/generate", json={"text": "a", "timeout_s": 1e-300})
    assert answer.status_code == 499
    assert "499" in document["paths"]["/generate"]["post"]["responses"]
