"""The OpenAPI document of a table of endpoints. The page that shows it in a browser is the explorer's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ramet.lang.graph.ir import VERSION as GRAPH_VERSION
from ramet.lang.graph.ir import Graph
from ramet.runtime.server.errors import Error
from ramet.runtime.server.limits import OPEN_PATHS
from ramet.runtime.server.routing import Endpoint
from ramet.runtime.server.sending import Json, json_response
from ramet.runtime.server.served_model import ServedModel
from ramet.runtime.server.validation import body_schema

VERSION = "0.1.0"
_ABOUT = (
    "OpenAI's API, SGLang's native one, and programs. A field that is not declared is refused by its name. "
    "Keys, where the server has some, are sent as `Authorization: Bearer KEY`."
)
_ERRORS = {
    400: "the request is wrong; `param` names the field",
    401: "no valid key",
    404: "there is no such thing",
    408: "the body stopped coming",
    409: "not in this state",
    413: "the body is too large, as sent or decompressed, or has too many values",
    415: "the body's content-type is not JSON, or its content-encoding is not known here",
    422: "the key was used for another request",
    429: "too many requests; Retry-After says when to come again",
    499: "the request passed its own `timeout_s`",
    501: "not on this server",
    503: "the engine is not there; Retry-After says when to come again",
}
_REFERENCE = "#/components/schemas/{name}"
_OF_A_BODY = (400, 408, 413, 415)
# One event of a stream. `data` is JSON, or [DONE] at the end. Only programs have `event` and `id`.
_EVENT: Json = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string"}, "event": {"type": "string"}, "id": {"type": "string"}},
}


def description_endpoints(endpoints: Sequence[Endpoint], served: ServedModel) -> list[Endpoint]:
    """The endpoint that describes all others."""
    found: list[Json] = []

    async def document(request: Request) -> Response:
        """Return this document."""
        if not found:  # takes a tenth of a second, so it is made at the first request
            found.append(openapi_document(endpoints, _formats(served)))
        return json_response(found[0])

    return [Endpoint("GET", "/openapi.json", document, is_listed=False)]


def _formats(served: ServedModel) -> Json:
    """What this server's model adds to the values of bodies: see `body_schema`."""
    thinks = served.tokenizer.chat_template.thinking is not None
    names = {"enum": [*served.names, "default"]}
    has_start = bool(served.tokenizer.encode("", add_special=True))  # a token before every text
    return {
        "model-name": names,
        "claude-name": {"anyOf": [names, {"pattern": "^claude-"}]},
        "token-id": {"maximum": served.tokenizer.vocab_size - 1},
        "prompt": {} if has_start else {"minLength": 1},
        "thinking-tokens": {} if thinks else {"maximum": 0},
    }


def openapi_document(endpoints: Sequence[Endpoint], formats: Json) -> Json:
    """The document of all listed endpoints. `formats`: as in `body_schema`."""
    listed = [endpoint for endpoint in endpoints if endpoint.is_listed]
    types = [answer for endpoint in listed for answer in _answers(endpoint).values()]
    schemas, components = msgspec.json.schema_components([Error, Graph, *types], ref_template=_REFERENCE)
    error, graph, *answers = schemas
    part = {"version": {"const": GRAPH_VERSION}}
    formats = {**formats, "part-of-a-graph": {**graph, "properties": part}}
    formats["graph"] = {**graph, "properties": {**part, "first": {"const": 0}}}
    rest = iter(answers)
    paths: Json = {}
    for endpoint in listed:
        by_status = {status: next(rest) for status in _answers(endpoint)}
        path = re.sub(r":\w+}", "}", endpoint.path)
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint, path, by_status, error, formats)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Ramet", "description": _ABOUT, "version": VERSION},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}, {}],
    }


def _answers(endpoint: Endpoint) -> dict[int, Any]:  # Any: types
    own = {} if endpoint.answer is None else {200: endpoint.answer}
    return {**own, **endpoint.others}


def _operation(endpoint: Endpoint, path: str, by_status: dict[int, Json], error: Json, formats: Json) -> Json:
    operation: Json = {
        "tags": [endpoint.tag],
        "summary": endpoint.about,
        "operationId": re.sub(r"[{}]", "", f"{endpoint.method.lower()}_{path.strip('/')}").replace("/", "_"),
        "responses": _responses(endpoint, by_status, error),
    }
    names = re.findall(r"{(\w+)}", path)
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if endpoint.body is not None:
        content = {"application/json": {"schema": body_schema(endpoint.body, formats)}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _responses(endpoint: Endpoint, by_status: dict[int, Json], error: Json) -> Json:
    found: Json = {}
    for status, schema in {200: None, **by_status}.items():
        content = {} if schema is None else {"application/json": {"schema": schema}}
        if status == 200 and endpoint.media_type is not None:
            content[endpoint.media_type] = {"schema": {"type": "string"}}
        if status == 200 and endpoint.has_stream:
            content["text/event-stream"] = {"schema": _EVENT}
        found[str(status)] = {"description": "done" if status < 300 else _ERRORS[status], "content": content}
    for status in sorted(_error_statuses(endpoint)):
        content = {"application/json": {"schema": error}}
        found[str(status)] = {"description": _ERRORS[status], "content": content}
        if status in (429, 503):
            found[str(status)]["headers"] = {"Retry-After": {"schema": {"type": "string"}, "description": "seconds"}}
    return found


def _error_statuses(endpoint: Endpoint) -> set[int]:
    """Statuses of errors: those of key and body, and those that the endpoint's row lists."""
    found = set(endpoint.errors)
    if endpoint.path not in OPEN_PATHS:
        found.add(401)
    return found.union(_OF_A_BODY) if endpoint.body is not None else found
