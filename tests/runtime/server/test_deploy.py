"""The files in deploy/: each parses, and every metric they name is exported by a server."""

from __future__ import annotations

import configparser
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

DEPLOY = Path(__file__).parents[3] / "deploy"
Server = Any  # RunningServer of conftest.py, which importlib mode cannot import by name


def expressions() -> list[tuple[str, str]]:
    """Every PromQL expression with the place it stands at."""
    rules = yaml.safe_load((DEPLOY / "alerts.yml").read_text())
    found = [(rule["alert"], rule["expr"]) for group in rules["groups"] for rule in group["rules"]]
    board = json.loads((DEPLOY / "grafana/dashboards/ramet.json").read_text())
    return found + [(panel["title"], target["expr"]) for panel in board["panels"] for target in panel["targets"]]


def test_every_metric_of_alerts_and_dashboard_is_exported(server: Server) -> None:
    body = {"text": "hello", "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
    assert server.client.post("/generate", json=body).status_code == 200
    for _ in range(100):
        text = server.client.get("/metrics").text
        if "ramet_kv_pages " in text:
            break
        time.sleep(0.1)
    exported = set(re.findall(r"^([a-z0-9_]+)(?:\{| )", text, re.MULTILINE))
    exported |= set(re.findall(r"^# TYPE ([a-z0-9_]+) counter", text, re.MULTILINE))  # labelled, and not counted yet
    for place, expression in expressions():
        names = re.findall(r"\bramet_[a-z0-9_]+", expression)
        assert names, f"{place} names no metric: {expression}"
        for name in names:
            assert name in exported, f"{place} names {name}, which is not exported"


@pytest.mark.parametrize(
    ("metric", "limit"),
    [
        ("ramet_waiting_requests", "> 20"),
        ("ramet_kv_usage_ratio", "> 0.85"),
        ("ramet_prefix_cache_hit_tokens_total", "< 0.3"),
        ("ramet_time_to_first_token_seconds_bucket", "> 2"),
    ],
)
def test_what_operators_are_told_about(metric: str, limit: str) -> None:
    assert any(metric in expression and expression.endswith(limit) for _, expression in expressions())


def test_the_service_lets_the_server_drain() -> None:
    unit = configparser.ConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(DEPLOY / "ramet.service")
    assert unit["Service"]["KillMode"] == "mixed"
    assert int(unit["Service"]["TimeoutStopSec"]) > 30


def test_the_files_that_compose_mounts_are_there() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yml").read_text())
    for service in compose["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith(".") or (DEPLOY / source).exists(), source
    for name in ("prometheus.yml", "grafana/provisioning/datasources/prometheus.yml"):
        assert yaml.safe_load((DEPLOY / name).read_text())
