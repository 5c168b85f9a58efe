"""Keys with names: their file, their limits, what is counted for them; HTTPS; the log as JSON."""

from __future__ import annotations

import json
import os
import signal
import ssl
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet.cli.main import main
from ramet.errors import ConfigError, Overloaded
from ramet.lang.graph.events import Usage
from ramet.runtime.server.app import tls_context
from ramet.runtime.server.config import ServerConfig
from ramet.runtime.server.keys import KeyEntry, digest_of_key, read_keys
from ramet.runtime.server.link.protocol import Output
from ramet.runtime.server.tenants import Tenants

Served = Any  # ServedProcess of conftest.py, which importlib mode cannot import by name
BODY = {"text": "hello", "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}


def add_key(path: Path, name: str, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["keys", "add", str(path), name, *flags]) == 0
    return capsys.readouterr().out.strip()


# -- the file --------------------------------------------------------------------------------------------------------


def test_a_file_of_keys_has_no_keys_and_is_its_owners_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.json"
    first = add_key(path, "alice", capsys, "--max-in-flight", "3", "--tokens-per-minute", "100")
    second = add_key(path, "alice", capsys, "--tokens-per-minute", "0")
    third = add_key(path, "bob", capsys)
    text = path.read_text()
    assert not any(key in text for key in (first, second, third))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    ring = keys_of(path)
    assert [ring.find(key.encode()) for key in (first, second)] == [ring.limits("alice")] * 2
    assert ring.limits("alice") == KeyEntry(
        name="alice", sha256=(digest_of_key(first.encode()), digest_of_key(second.encode())), max_in_flight=3
    )
    assert ring.find(b"") is None
    assert main(["keys", "remove", str(path), "alice", "--old"]) == 0
    assert ring.reload() == 2
    assert ring.find(first.encode()) is None
    found = ring.find(second.encode())
    assert found is not None
    assert found.name == "alice"
    capsys.readouterr()
    assert main(["keys", "list", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "alice" in shown
    assert digest_of_key(second.encode()) not in shown
    assert main(["keys", "remove", str(path), "alice"]) == 0
    assert [entry.name for entry in read_keys(path).keys] == ["bob"]
    assert main(["keys", "remove", str(path), "alice"]) == 1
    assert main(["keys", "add", str(path), "no spaces"]) == 1
    assert main(["keys", "add", str(path), "bob", "--max-in-flight", "-1"]) == 1


def keys_of(path: Path) -> Tenants:
    return Tenants(ServerConfig(api_keys_file=str(path)))


GOOD = "a" * 64


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is wrong"),
        ("[" * 100_000, "is wrong"),
        ('{"keys": [{"name": "a b"}]}', "a b"),
        ('{"keys": [{"name": "a", "sha256": ["secret"]}]}', "64 hexadecimal digits"),
        ('{"keys": [{"name": "a", "max_in_flight": 0}]}', "max_in_flight"),
        ('{"keys": [{"name": "a", "max_in_fligth": 1}]}', "max_in_fligth"),
        ('{"keys": [{"name": "a"}, {"name": "a"}]}', "there twice"),
        (f'{{"keys": [{{"name": "a", "sha256": ["{GOOD}"]}}, {{"name": "b", "sha256": ["{GOOD}"]}}]}}', "there twice"),
    ],
)
def test_a_wrong_file_is_refused_and_what_was_read_stays(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": [{"name": "before", "sha256": [digest_of_key(b"key")]}]}))
    ring = keys_of(path)
    path.write_text(text)
    with pytest.raises(ConfigError, match=reason):
        ring.reload()
    entry = ring.find(b"key")
    assert entry is not None
    assert entry.name == "before"
    with pytest.raises(ConfigError, match=reason):
        keys_of(path)
    path.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        ring.reload()


def test_a_file_without_keys_lets_nobody_in(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text('{"keys": [{"name": "a"}]}')
    ring = keys_of(path)
    assert ring.need_keys
    assert ring.find(b"") is None
    assert not Tenants(ServerConfig()).need_keys


# -- limits ----------------------------------------------------------------------------------------------------------


def config_of(tmp_path: Path, **limits: int) -> ServerConfig:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": [{"name": "a", "sha256": [GOOD], **limits}, {"name": "b"}]}))
    return ServerConfig(api_keys_file=str(path))


def test_each_limit_is_refused_by_name_until_it_is_kept_again(tmp_path: Path) -> None:
    clock = [0.0]
    tenants = Tenants(config_of(tmp_path, max_in_flight=3, max_queued_tokens=100), lambda: clock[0])
    tenants.enter("a", 2, 90)
    tenants.enter("b", 50, 5000)
    with pytest.raises(Overloaded, match="max_queued_tokens of the key 'a'"):
        tenants.enter("a", 1, 11)
    tenants.enter("a", 1, 10)
    with pytest.raises(Overloaded, match="max_in_flight of the key 'a'"):
        tenants.enter("a", 1, 0)
    tenants.begin("a", 90)
    tenants.leave("a")
    tenants.enter("a", 1, 90)


def test_tokens_beyond_those_of_a_minute_are_owed_and_paid_back(tmp_path: Path) -> None:
    clock = [0.0]
    tenants = Tenants(config_of(tmp_path, tokens_per_minute=60), lambda: clock[0])
    tenants.enter("a", 1, 50)
    tenants.note_tokens("a", 70)
    for now_s, wait_s in ((0.0, 61), (30.0, 31), (59.0, 2)):
        clock[0] = now_s
        with pytest.raises(Overloaded, match="tokens_per_minute of the key 'a'") as raised:
            tenants.enter("a", 1, 1)
        assert raised.value.retry_after_s == pytest.approx(wait_s)
    clock[0] = 61.0
    tenants.enter("a", 1, 1)
    with pytest.raises(Overloaded):
        tenants.enter("a", 1, 1)


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(1, 100)), max_size=60), st.integers(60, 6000))
def test_nobody_uses_more_than_its_rate_and_one_request(uses: list[tuple[float, int]], per_minute: int) -> None:
    clock = [0.0]
    tenants, used = Tenants(ServerConfig(), lambda: clock[0]), 0
    tenants.limits = lambda name: KeyEntry(name="a", tokens_per_minute=per_minute)  # type: ignore[method-assign]
    for wait_s, num_tokens in uses:
        clock[0] += wait_s
        try:
            tenants.enter("a", 1, num_tokens)
        except Overloaded as error:
            clock[0] += error.retry_after_s
            tenants.enter("a", 1, num_tokens)  # the time that was named is enough
        used += num_tokens
        assert used <= per_minute + clock[0] * per_minute / 60 + 100 + 1e-6


def test_usage_is_counted_by_name_and_summed_up_for_the_log(tmp_path: Path) -> None:
    tenants = Tenants(config_of(tmp_path))
    client = ("a", "1.2.3.4:5")
    tenants.open(client)
    timings = {"queue_s": 0.5, "first_token_s": 1.0, "total_s": 2.0}
    tenants.note_finish(client, Output("r1", 10, 4, 3, finish_reason="stop", timings=timings))
    tenants.note_finish(client, Output("r2", 10, 10, 2, finish_reason="length", timings=None))
    tenants.note_finish(("a", "another"), Output("r3", 1, 0, 1, finish_reason="stop"))
    tenants.note_node(client, Usage(prompt_tokens=7, cached_tokens=2, completion_tokens=1), "done")
    assert tenants.close(client).fields() == {
        "prompt_tokens": 27,
        "cached_tokens": 16,
        "completion_tokens": 6,
        "finish_reason": "done,length,stop",
        "queue_s": 0.5,
        "first_token_s": 1.0,
    }
    assert tenants.close(client).fields() == {}
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for family in tenants.collect()
        for sample in family.samples
    }
    assert values["ramet_key_prompt_tokens_total", "a"] == 28
    assert values["ramet_key_requests_total", "a", "stop"] == 2
    assert values["ramet_key_time_to_first_token_seconds_count", "a"] == 1


# -- a server --------------------------------------------------------------------------------------------------------


def certificates(folder: Path) -> dict[str, Path]:
    """An authority, and a certificate of the server and of a client that it has signed."""

    def run(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    for name in ("ca", "server", "client"):
        run(
            "req",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            f"{name}.key",
            "-out",
            f"{name}.csr",
            "-subj",
            f"/CN={name}",
        )
    (folder / "ca.ext").write_text("basicConstraints=critical,CA:TRUE\nkeyUsage=keyCertSign\n")
    (folder / "names.ext").write_text("subjectAltName=IP:127.0.0.1\n")
    run("x509", "-req", "-in", "ca.csr", "-signkey", "ca.key", "-out", "ca.pem", "-extfile", "ca.ext", "-days", "2")
    for name in ("server", "client"):
        by = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names.ext", "-days", "2")
        run("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *by)
    return {path.name: path for path in folder.iterdir()}


def test_rotation_under_load_fails_no_request(
    serve_command: Callable[..., Served], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over HTTPS with client certificates, limits by name, and a log of JSON objects."""
    files = certificates(tmp_path)
    path = tmp_path / "keys.json"
    keys = {"now": add_key(path, "alice", capsys)}
    limited = add_key(path, "bob", capsys, "--tokens-per-minute", "10")
    tls = (
        "--ssl-certfile",
        files["server.pem"],
        "--ssl-keyfile",
        files["server.key"],
        "--ssl-ca-certs",
        files["ca.pem"],
    )
    server = serve_command("--api-keys-file", str(path), "--log-format", "json", *map(str, tls))
    server.wait_ready()
    assert server.url.startswith("https://")
    context = ssl.create_default_context(cafile=str(files["ca.pem"]))
    with httpx.Client(base_url=server.url, verify=context, trust_env=False) as stranger, pytest.raises(httpx.HTTPError):
        stranger.get("/health")
    context.load_cert_chain(files["client.pem"], files["client.key"])
    statuses: list[int] = []
    is_over = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=server.url, verify=context, trust_env=False, timeout=60) as client:
            while not is_over.is_set():
                headers = {"authorization": f"Bearer {keys['now']}"}
                statuses.append(client.post("/generate", json=BODY, headers=headers).status_code)

    def reload(num_lines: int) -> None:
        os.kill(server.process.pid, signal.SIGHUP)
        deadline_s = time.monotonic() + 30
        while server.log.read_text().count("were read again") < num_lines:
            assert time.monotonic() < deadline_s, server.log.read_text()
            time.sleep(0.02)

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    old = keys["now"]
    for turn in range(3):
        new = add_key(path, "alice", capsys)
        reload(2 * turn + 1)
        keys["now"] = new
        enough = len(statuses) + 6
        while len(statuses) < enough:  # the clients have all sent the new key
            time.sleep(0.05)
        assert main(["keys", "remove", str(path), "alice", "--old"]) == 0
        reload(2 * turn + 2)
    path.rename(tmp_path / "away")
    os.kill(server.process.pid, signal.SIGHUP)
    time.sleep(0.3)
    is_over.set()
    for asker in askers:
        asker.join()
    assert len(statuses) >= 18
    assert set(statuses) == {200}
    with httpx.Client(base_url=server.url, verify=context, trust_env=False, timeout=60) as client:
        assert client.post("/generate", json=BODY, headers={"x-api-key": old}).status_code == 401
        assert client.post("/generate", json=BODY).status_code == 401
        answers = [client.post("/generate", json=BODY, headers={"x-api-key": limited}) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert "tokens_per_minute of the key 'bob'" in answers[2].json()["error"]["message"]
        assert int(answers[2].headers["retry-after"]) > 1
        metrics = client.get("/metrics").text
    assert 'ramet_key_refused_requests_total{key="bob",limit="tokens_per_minute"} 1.0' in metrics
    assert f'ramet_key_requests_total{{key="alice",reason="length"}} {len(statuses)}.0' in metrics
    text = server.log.read_text()
    assert "nothing was read again" in text
    assert not any(key in text for key in (old, keys["now"], limited))
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert {line["process"] for line in lines} == {"server", "engine"}
    asked = [line for line in lines if line["message"] == "request" and line.get("key") == "bob"]
    assert [line["status"] for line in asked] == [200, 200, 429]
    assert asked[0] | {"id": "", "time": "", "seconds": 0, "queue_s": 0, "first_token_s": 0} == {
        "time": "",
        "level": "info",
        "process": "server",
        "logger": "ramet.runtime.server.limits",
        "message": "request",
        "id": "",
        "key": "bob",
        "method": "POST",
        "path": "/generate",
        "status": 200,
        "seconds": 0,
        "prompt_tokens": 5,
        "cached_tokens": asked[0]["cached_tokens"],
        "completion_tokens": 4,
        "finish_reason": "length",
        "queue_s": 0,
        "first_token_s": 0,
    }


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"ssl_certfile": "/nowhere.pem"}, "--ssl-certfile /nowhere.pem"),
        ({"ssl_certfile": "ca.pem", "ssl_keyfile": "server.key"}, "cannot be loaded"),
        ({"ssl_certfile": "server.pem", "ssl_keyfile": "server.key", "ssl_ca_certs": "server.key"}, "--ssl-ca-certs"),
        ({"ssl_certfile": "server.pem", "ssl_keyfile": "locked.key"}, "has a password"),
    ],
)
def test_a_certificate_that_cannot_be_used_ends_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, str], reason: str
) -> None:
    certificates(tmp_path)
    monkeypatch.chdir(tmp_path)
    lock = "openssl rsa -aes256 -passout pass:x -in server.key -out locked.key"
    subprocess.run(lock.split(), check=True, capture_output=True)
    with pytest.raises(ConfigError, match=reason):
        tls_context(ServerConfig(**fields))  # type: ignore[arg-type]  # all are texts


def test_a_key_without_a_certificate_is_refused() -> None:
    for field in ("ssl_keyfile", "ssl_ca_certs"):
        with pytest.raises(ConfigError, match=f"{field} is 'x' but must be set only with ssl_certfile"):
            ServerConfig(**{field: "x"})  # type: ignore[arg-type]
