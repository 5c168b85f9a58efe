"""docs/server.md names every field, endpoint and error code of the server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ramet.runtime.server.anthropic.bodies import MessagesBody
from ramet.runtime.server.native.bodies import GenerateBody, LoadAdapterBody, NativeSampling, UnloadAdapterBody
from ramet.runtime.server.openai.bodies import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from ramet.runtime.server.openai.embeddings import EmbeddingBody, ScoreBody
from ramet.runtime.server.responses.bodies import ResponsesBody
from ramet.runtime.server.validation import Strict

Server = Any  # RunningServer of conftest.py
BODIES = [
    ChatBody,
    CompletionBody,
    TokenizeBody,
    DetokenizeBody,
    ResponsesBody,
    MessagesBody,
    GenerateBody,
    NativeSampling,
    EmbeddingBody,
    ScoreBody,
    LoadAdapterBody,
    UnloadAdapterBody,
]
ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "docs" / "server.md").read_text()
NAMED = set(re.findall(r"\b\w+\b", " ".join(re.findall(r"`[^`\n]+`", TEXT))))


@pytest.mark.parametrize("body", BODIES)
def test_every_field_is_named(body: type[Strict]) -> None:
    assert set(body.model_fields) - NAMED == set()


def test_every_endpoint_is_named(server: Server) -> None:
    paths = server.client.get("/openapi.json").json()["paths"]
    assert len(paths) > 20
    for path in paths:
        last = "/" + path.rsplit("/", 1)[1]
        assert path in TEXT or last in TEXT or path.replace("{model_id}", "{id}") in TEXT or "{program_id}" in last, (
            path
        )


def test_every_error_code_is_named() -> None:
    sources = (ROOT / "runtime" / "server").glob("*.py")
    codes = {code for file in sources for code in re.findall(r'code="(\w+)"', file.read_text())}
    internal = {"internal", "cancelled"}  # nobody is to rely on the first; who gets the second has left
    assert codes - NAMED - internal == set()
