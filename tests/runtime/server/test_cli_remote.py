"""`ramet chat --url` and `ramet bench --url` against a server."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from ramet.cli.main import main

Server = Any  # RunningServer of conftest.py


def test_chat_with_a_server(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("One\nTwo\n"))
    assert main(["chat", "--url", server.url, "--turns", "--max-tokens", "5", "--temperature", "0"]) == 0
    captured = capsys.readouterr()
    first, second = [line for line in captured.err.splitlines() if "prompt tokens" in line]
    assert "5 tokens" in first
    cached = int(second.split("(")[1].split(" ")[0])
    assert cached > 20
    monkeypatch.setattr("sys.stdin", io.StringIO("One"))
    assert main(["chat", "other-model", "--url", f"{server.url}/v1/"]) == 1
    assert "does not exist here" in capsys.readouterr().err


def test_bench_of_a_server(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    load = ["--requests", "4", "--concurrency", "2", "--shared-words", "20", "--own-words", "5", "--output-tokens", "6"]
    assert main(["bench", "--url", server.url, "--json", *load]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "tiny-random"
    assert found["output_tokens"] <= 24
    assert found["hit_rate"] > 0.3
