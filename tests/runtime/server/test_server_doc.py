"""docs/server.md names every field, endpoint and error code of the server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ramet.runtime.server.native.types import GenerateBody, NativeSampling
from ramet.runtime.server.openai.types import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from ramet.runtime.server.openapi import ROUTES
from ramet.runtime.server.sampling_fields import Strict

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "docs" / "server.md").read_text()
NAMED = set(re.findall(r"\b\w+\b", " ".join(re.findall(r"`[^`\n]+`", TEXT))))


@pytest.mark.parametrize("body", [ChatBody, CompletionBody, TokenizeBody, DetokenizeBody, GenerateBody, NativeSampling])
def test_every_field_is_named(body: type[Strict]) -> None:
    assert set(body.model_fields) - NAMED == set()


def test_every_endpoint_is_named() -> None:
    for route in ROUTES:
        path = route.split(" ")[1]
        last = "/" + path.rsplit("/", 1)[1]
        assert path in TEXT or last in TEXT or path.replace("{model_id}", "{id}") in TEXT or "{program_id}" in last, (
            path
        )


def test_every_error_code_is_named() -> None:
    sources = (ROOT / "runtime" / "server").glob("*.py")
    codes = {code for file in sources for code in re.findall(r'code="(\w+)"', file.read_text())}
    internal = {"internal", "cancelled"}  # nobody is to rely on the first; who gets the second has left
    assert codes - NAMED - internal == set()
