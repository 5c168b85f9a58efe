"""The OpenAPI document is whole, and the server keeps to it whatever it is sent."""

from __future__ import annotations

import json
import re
from collections import Counter
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

# What no JSON schema can say of a body, by the code of its error or a part of its message, and why not.
BEYOND_A_SCHEMA = {
    "invalid_grammar": "a schema, a grammar, a tag or a set of tools has a meaning of its own, which may be none",
    "invalid_program": "the nodes of a graph refer to each other, and to arguments",
    "context_length_exceeded": "a prompt has as many tokens as its text and its template make",
    "previous_response_not_found": "it names what the server has kept",
    "which is not the id of a stored item": "it names what the server has kept",
    "was not made by this server": "it is what the server has given out",
    "input is empty": "a conversation needs a message, and reasoning alone is none",
    "which cannot end a text": "a pattern is read by its own rules",
    "tokens is .* at most max_tokens": "a number bounds another",
    "budget_tokens is .* below max_tokens": "a number bounds another",
    "max_tokens is .* and max_completion_tokens": "two numbers must be equal",
    "logit_bias names token": "the names of fields are compared with patterns, not with numbers",
    "best_of is .* only the value of n": "two numbers must be equal",
    "give one of them$": "two fields must agree about the form of JSON",
    "entries for .* prompts": "two lists must have one length",
    "tool_choice(.name)? (names|is) .* the tools are": "a name must be that of a tool",
    "there is no tool that can be called here": "some kinds of tools are left out, and none may be left",
    "which another tool has": "the names of tools must differ",
    "the model's vectors have": "only the engine knows their size",
    "are more than 2,048 scores": "a product of two lists' lengths",
    "no room for adapters": "what the server's flags say",
    # A schema could say these two, in more cases than tools read (`FieldRule.is_stated`).
    "each constrain the answer": "at most one of sixteen fields",
    "is of JSON, but the request asks for none": "one of seven fields needs one of nine others",
}

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
    "post /v1/embeddings",
    "post /v1/score",
    "post /v1/load_lora_adapter",
    "post /v1/unload_lora_adapter",
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
    """Send cases of one operation, valid ones and wrong ones, and compare the answers with the document.

    A valid body is answered, unless it is wrong in a way that no schema can say.
    """
    method, path = route.split(" ")
    operation = api[path][method]
    refused: Counter[str] = Counter()
    num_valid = 0

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
        answer = case.call_and_validate(checks=CHECKS, timeout=30)
        if mode is GenerationMode.POSITIVE:
            nonlocal num_valid
            num_valid += 1
            if answer.status_code == 400:
                refused[why_refused(answer.json()["error"])] += 1

    sent()
    print(f"{route}: {num_valid} valid bodies; refused: {dict(refused) or 'none'}")


def why_refused(error: Any) -> str:
    """The line of BEYOND_A_SCHEMA for the error of a body that the document calls valid."""
    for what in BEYOND_A_SCHEMA:
        if error["code"] == what or re.search(what, error["message"]):
            return what
    raise AssertionError(f"a valid body is refused: {error}")


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
