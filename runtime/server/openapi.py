"""The OpenAPI document: what FastAPI knows of the routes, and what each of them answers, errors included.

Not here: the shapes themselves (`answers`, and the models of bodies).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pydantic
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from ramet.runtime.server import answers

Json = dict[str, Any]  # Any: JSON
Shape = type[pydantic.BaseModel]

# One event of a stream. `data` is JSON, or [DONE] at the end; `event` and `id` are there for programs alone.
_EVENT: Json = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string"}, "event": {"type": "string"}, "id": {"type": "string"}},
}
_ERRORS = {
    400: "the request is wrong; `param` names the field",
    401: "no valid key",
    404: "there is no such thing",
    408: "the body stopped coming",
    409: "not in this state",
    413: "the body is too large",
    422: "the key was used for another request",
    429: "too many requests; Retry-After says when to come again",
    501: "not on this server",
    503: "the engine is not there; Retry-After says when to come again",
}
_READS = (400, 401, 408, 413, 429, 503)  # endpoints that read a body and ask the engine
_PROGRAM = {200: answers.ProgramStatus}
# (answers by status, errors, whether the 200 may be a stream), by method and path
ROUTES: Mapping[str, tuple[Mapping[int, Shape | str], tuple[int, ...], bool]] = {
    "post /v1/chat/completions": ({200: answers.ChatCompletion}, (*_READS, 404), True),
    "post /v1/completions": ({200: answers.Completion}, (*_READS, 404), True),
    "post /v1/tokenize": ({200: answers.Tokens}, (*_READS, 404), False),
    "post /v1/detokenize": ({200: answers.Text}, (*_READS, 404), False),
    "get /v1/models": ({200: answers.ModelList}, (401,), False),
    "get /v1/models/{model_id}": ({200: answers.ModelCard}, (401, 404), False),
    "post /generate": ({200: answers.Generated}, _READS, True),
    "get /health": ({200: answers.Health, 503: answers.Health}, (), False),
    "get /ready": ({200: answers.Ready, 503: answers.Ready}, (), False),
    "get /health_generate": ({200: answers.HealthGenerate}, (401, 429, 503), False),
    "get /get_model_info": ({200: answers.ModelInfo}, (401, 503), False),
    "get /get_server_info": ({200: answers.ServerInfo}, (401,), False),
    "post /flush_cache": ({200: answers.FlushedCache}, (401, 503), False),
    "post /abort_request": ({200: answers.Aborted}, (400, 401, 408, 413), False),
    "get /metrics": ({200: "text/plain"}, (401,), False),
    "post /v1/programs": ({**_PROGRAM, 202: answers.ProgramStatus}, (*_READS, 422), True),
    "post /v1/programs/explain": ({200: answers.Plan}, (400, 401, 408, 413, 501), False),
    "get /v1/programs/{program_id}": (_PROGRAM, (401, 404), False),
    "delete /v1/programs/{program_id}": (_PROGRAM, (401, 404), False),
    "get /v1/programs/{program_id}/events": ({200: "text/event-stream"}, (400, 401, 404), False),
    "post /v1/programs/{program_id}/parts": (_PROGRAM, (*_READS, 404, 409, 422), False),
    "post /v1/programs/{program_id}/values": (_PROGRAM, (*_READS, 404, 409), False),
    "post /v1/programs/{program_id}/cancel": (_PROGRAM, (*_READS, 404, 409), False),
}


def install(app: FastAPI) -> None:
    """Make `app.openapi()`, and so /openapi.json and /docs, the whole document."""

    def document() -> Json:
        if app.openapi_schema is None:
            app.openapi_schema = openapi_document(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # how FastAPI's documentation says to extend it


def openapi_document(app: FastAPI) -> Json:
    """The document of an application. Raises KeyError for a route that `ROUTES` does not know."""
    document = get_openapi(title=app.title, version=app.version, description=_ABOUT, routes=app.routes)
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own; ours is answers.Error
        schemas.pop(name, None)
    schemas |= _shapes()
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"key": []}, {}]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            operation["operationId"] = f"{method}_{path.strip('/').replace('/', '_').replace('{', '').replace('}', '')}"
            operation["responses"] = _responses(*ROUTES[f"{method} {path}"], is_list=path == "/generate")
    return document


_ABOUT = (
    "OpenAI's API, SGLang's native one, and programs. A field that is not declared is refused by its name. "
    "Keys, where the server has some, are sent as `Authorization: Bearer KEY`."
)


def _shapes() -> Json:
    """The schemas of all answers, by name."""
    models = [
        shape
        for shape in vars(answers).values()
        if isinstance(shape, type) and issubclass(shape, pydantic.BaseModel) and shape is not pydantic.BaseModel
    ]
    _, found = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    definitions: Json = found["$defs"]
    return definitions


def _responses(given: Mapping[int, Shape | str], errors: tuple[int, ...], has_stream: bool, *, is_list: bool) -> Json:
    found: Json = {}
    for status, shape in given.items():
        schema: Json = _reference(shape) if not isinstance(shape, str) else {"type": "string"}
        if shape == "text/event-stream":
            schema = _EVENT
        if is_list and status == 200:
            schema = {"anyOf": [schema, {"type": "array", "items": schema}]}
        content = {shape if isinstance(shape, str) else "application/json": {"schema": schema}}
        if has_stream and status == 200:
            content["text/event-stream"] = {"schema": _EVENT}
        found[str(status)] = {"description": "done" if status < 300 else _ERRORS[status], "content": content}
    for status in sorted(errors):
        content = {"application/json": {"schema": _reference(answers.Error)}}
        found[str(status)] = {"description": _ERRORS[status], "content": content}
        if status in (429, 503):
            found[str(status)]["headers"] = {"Retry-After": {"schema": {"type": "string"}, "description": "seconds"}}
    return found


def _reference(shape: Shape) -> Json:
    return {"$ref": f"#/components/schemas/{shape.__name__}"}
