"""A server with two engines: one API, one health, metrics of each."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest

from ramet.cli.main import main
from ramet.errors import ConfigError, ModelNotFound
from ramet.runtime.models.catalog import TINY_MODEL
from ramet.runtime.server.app import make_server
from ramet.runtime.server.config import ServerConfig
from ramet.runtime.server.link.replicas import Replicas

ENGINE = {"num_kv_tokens": 4096, "max_running_requests": 8, "device": "cpu"}
Start = Callable[..., AbstractContextManager[Any]]  # Any: RunningServer of conftest.py


def test_two_engines_answer_as_one_and_one_goes_on_alone(start_server: Start) -> None:
    with start_server(dp=2) as server:
        replicas = server.served.proxy
        assert isinstance(replicas, Replicas)
        body = {"prompt": "The same beginning. " * 10, "max_tokens": 4, "temperature": 0}
        first, second = (server.client.post("/v1/completions", json=body).json() for _ in range(2))
        assert first["choices"][0]["text"] == second["choices"][0]["text"]
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 150  # the second went to the first's replica
        metrics = server.client.get("/metrics").text
        of_both = r'^ramet_kv_pages\{replica="[01]"\} [1-9]'
        while len(re.findall(of_both, metrics, re.M)) < 2:  # of each when it is ready and its heart has beaten
            time.sleep(0.1)
            metrics = server.client.get("/metrics").text
        assert len(re.findall(r'^ramet_engine_up\{replica="[01]"\} 1\.0$', metrics, re.M)) == 2
        assert metrics.count("# TYPE ramet_kv_pages gauge") == 1
        assert re.search(r"^ramet_router_known_prefixes [1-9]", metrics, re.M)
        assert re.search(r'^ramet_requests_total\{reason="length"\} 2\.0$', metrics, re.M)

        victims = [proxy.hello.pid for _, proxy in replicas.engines() if proxy.hello is not None]
        os.kill(victims[0], signal.SIGKILL)
        for _ in range(4):  # whichever had it: the request is answered
            assert server.client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 4
        assert server.client.get("/health").json()["status"] == "ok"
        assert server.client.get("/ready").json()["ready"] is True


@pytest.mark.slow
def test_a_server_is_scaled_and_restarted_while_it_serves(
    start_server: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    with start_server(dp=2, admin_api_key="root", drain_s=20.0) as server:
        url = server.url
        assert server.client.post("/scale", json={"replicas": 1}).status_code == 401
        assert main(["scale", "3", "--url", url, "--api-key", "root"]) == 0
        assert capsys.readouterr().out == "engines: 0, 1, 2\n"
        assert main(["scale", "--restart", "--url", url, "--api-key", "root"]) == 0
        renew = ["scale", "--restart", "--url", url, "--api-key", "root"]
        assert main([*renew, "--num-kv-tokens", "2048", "--model", TINY_MODEL]) == 0
        assert server.client.get("/get_server_info").json()["engine"]["num_kv_tokens"] == 2048
        assert main([*renew, "--tp", "7"]) == 1, "the first engine finds out that its heads are not divided by 7"
        assert server.client.get("/ready").json()["stage"] == "ready", "all are what they were"
        assert main(["scale", "1", "--url", url, "--api-key", "root"]) == 0
        assert capsys.readouterr().out == "engines: 0, 1, 2\n" * 2 + "engines: 0\n"
        assert main(["scale", "--restart", "--url", url, "--api-key", "root"]) == 1
        assert "refused (409): there is one replica" in capsys.readouterr().err
        body = {"prompt": "hello", "max_tokens": 4, "temperature": 0}
        assert server.client.post("/v1/completions", json=body).status_code == 200


@pytest.fixture
def others() -> Iterator[Callable[[str | None, dict[str, Any]], object]]:  # Any: fields of EngineConfig
    """What a server of two engines, which are not started, says to other settings."""
    _, served = make_server(TINY_MODEL, ENGINE, ServerConfig(dp=2))
    assert served.others is not None
    yield served.others
    asyncio.run(served.proxy.stop())


def test_other_engines_are_refused_before_any_is_stopped(others: Callable[..., object]) -> None:
    others(None, {"num_kv_tokens": 2048})
    for changes, message in (({"page_size": 0}, "page_size"), ({"no_such": 1}, "no_such"), ({"tp": 0}, "tp")):
        with pytest.raises(ConfigError, match=message):
            others(None, changes)
    with pytest.raises(ConfigError, match="context_length cannot change"):
        others(None, {"context_length": 100})
    with pytest.raises(ModelNotFound):
        others("no-such-model", {})


@pytest.mark.model
def test_a_model_with_other_tokens_is_refused(others: Callable[..., object]) -> None:
    with pytest.raises(ConfigError, match="smollm2-135m has other tokens, or another chat template"):
        others("smollm2-135m", {})


def test_a_server_of_one_engine_stays_so(server: Any, capsys: pytest.CaptureFixture[str]) -> None:  # Any: RunningServer
    answer = server.client.post("/scale", json={"replicas": 2})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "one_engine")
    assert server.client.post("/scale", json={"replicas": 0}).status_code == 400
    refused = server.client.post("/scale", json={"engine": {"tp": 2}}).json()["error"]
    assert "take effect with restart alone" in refused["message"]
    assert main(["scale"]) == 1
    assert "nothing to do" in capsys.readouterr().err
    assert main(["scale", "2", "--url", "http://127.0.0.1:9"]) == 1
    assert "no server answers" in capsys.readouterr().err


def test_an_impossible_number_of_replicas_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dp is 0 but must be in \[1, 256\]"):
        ServerConfig(dp=0)
    with pytest.raises(ConfigError, match=r"max_dp is 2 but must be in \[dp, 256\], where dp is 3"):
        ServerConfig(dp=3, max_dp=2)
    with pytest.raises(ConfigError, match=r"ttft_objective_s is 0\.0 but must be positive"):
        ServerConfig(ttft_objective_s=0.0)
