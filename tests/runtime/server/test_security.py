"""Keys, bounds on what one request may cost, and what no client can reach."""

from __future__ import annotations

import hmac
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from ramet.errors import ContextOverflow
from ramet.runtime.server import limits as http_limits
from ramet.runtime.server.config import ServerConfig
from ramet.runtime.server.keys import digest_of_key
from ramet.runtime.server.tenants import Tenants
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer
from ramet.runtime.text.bounded_tokenizer import BoundedTokenizer

Server = Any  # RunningServer of conftest.py, which importlib mode cannot import by name
GREEDY = {"temperature": 0.0, "max_new_tokens": 4, "ignore_eos": True}


def generate(client: httpx.Client, text: str = "hello", headers: dict[bytes, bytes] | None = None, **more: Any) -> Any:
    body = {"text": text, "sampling_params": {**GREEDY, **more.pop("sampling", {})}, **more}
    return client.post("/generate", json=body, headers=headers)


def bearer(key: str, scheme: str = "Bearer") -> dict[bytes, bytes]:
    return {b"authorization": f"{scheme} {key}".encode()}


# -- keys ------------------------------------------------------------------------------------------------------------


def test_keys_are_hashed_and_every_one_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[Any, Any]] = []
    real = hmac.compare_digest

    def compare(a: Any, b: Any) -> bool:
        compared.append((a, b))
        return real(a, b)

    monkeypatch.setattr("ramet.runtime.server.tenants.hmac.compare_digest", compare)
    config = ServerConfig(api_key=("first", "second", "third"), admin_api_key="admin")
    tenants = Tenants(config)
    limits = http_limits.HttpLimits(None, config, tenants)  # type: ignore[arg-type]  # it only judges
    kept = repr(vars(limits)).replace(repr(config), "") + repr(vars(tenants))
    assert not [key for key in ("first", "second", "third") if repr(key) in kept], "a key is kept as it is"
    for key, is_let_in in (("first", True), ("third", True), ("fourth", False), ("", False), ("admin", False)):
        compared.clear()
        headers = [(b"authorization", f"Bearer {key}".encode())]
        refusal = limits.refusal({"path": "/generate", "headers": headers, "state": {"client": ("", "")}})
        assert (refusal is None) == is_let_in
        assert len(compared) == 3, "how many keys were compared says which one it was"
        assert all(len(a) == len(b) == 64 for a, b in compared)


def test_who_may_do_what_with_which_key(start_server: Any) -> None:
    keys = {"api_key": ("one", "schlüssel"), "admin_api_key": "admin", "protect_metrics": True}
    with start_server(**keys) as server:
        client = server.client
        for headers in ({}, bearer("two"), bearer("on"), bearer("onee"), bearer("Bearer"), {b"x-api-key": b"two"}):
            for path in ("/generate", "/v1/chat/completions", "/v1/programs", "/v1/tokenize"):
                answer = client.post(path, json={}, headers=headers)
                assert answer.status_code == 401, (path, headers)
                assert answer.json()["error"]["code"] == "invalid_api_key"
            for path in ("/v1/models", "/get_server_info", "/get_model_info", "/health_generate", "/metrics"):
                assert client.get(path, headers=headers).status_code == 401
        both = [(b"authorization", b"Bearer one"), (b"authorization", b"Bearer two")]
        assert client.post("/generate", json={}, headers=both).status_code == 400
        for headers in (
            bearer("one"),
            bearer("schlüssel"),
            bearer("one", "bearer"),
            bearer(" one"),
            {b"x-api-key": b"one"},
        ):
            assert generate(client, headers=headers).status_code == 200
            for method, path in (("POST", "/flush_cache"), ("GET", "/flush_cache"), ("POST", "/abort_request")):
                assert client.request(method, path, headers=headers, json={}).status_code == 401
        admin = bearer("admin")
        assert generate(client, headers=admin).status_code == 401, "the admin key is not a user's key"
        assert client.post("/flush_cache", headers=admin).status_code == 200
        assert client.get("/metrics", headers=admin).status_code == 200
        for path in ("/health", "/ready", "/openapi.json"):
            assert client.get(path).status_code == 200
        for path in ("//flush_cache", "/flush_cache/", "/./flush_cache", "/FLUSH_CACHE", "/%66lush_cache"):
            answer = client.post(path, headers=bearer("one"), follow_redirects=True)
            assert answer.status_code in (401, 404, 405), path
        shown = client.get("/get_server_info", headers=bearer("one")).text
        assert "schl" not in shown
        assert "admin" not in shown.replace("admin_api_key", "")


@pytest.mark.parametrize("is_isolated", [False, True])
def test_cached_prefixes_are_shared_unless_salts_or_keys_keep_them_apart(start_server: Any, is_isolated: bool) -> None:
    """What a request finds in the cache says what somebody else has asked: a side channel that timing shows."""

    def cached(key: str, salt: str = "") -> int:
        text = "the same long prompt for everybody who asks"
        body = {"prompt": text, "max_tokens": 1, "temperature": 0, "cache_salt": salt or None}
        answer = server.client.post("/v1/completions", json=body, headers=bearer(key)).json()
        found: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found

    with start_server(api_key=("one", "two"), isolate_cache_by_key=is_isolated) as server:
        assert cached("one") == 0
        assert cached("one") > 0
        assert (cached("two") > 0) == (not is_isolated)
        assert cached("one", "salt") == 0, "a salt keeps prefixes apart"
        assert cached("one", "salt") > 0
        assert cached("one", "other salt") == 0
        assert (cached("two", "salt") > 0) == (not is_isolated)


def test_a_salt_cannot_imitate_a_key(start_server: Any) -> None:
    with start_server(api_key=("one", "two"), isolate_cache_by_key=True) as server:
        name = f"key-{digest_of_key(b'one')[:8]}"
        body = {"prompt": "a prompt that only one of them knows", "max_tokens": 1}
        for key, salt in (("one", "s"), ("two", f"{name}/s"), ("two", "s")):
            answer = server.client.post(
                "/v1/completions", json={**body, "cache_salt": salt}, headers=bearer(key)
            ).json()
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0, (key, salt)


# -- bounds ----------------------------------------------------------------------------------------------------------


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_cut_into_tokens(server: Server) -> None:
    text = "x" * (20 << 20)
    for path, body in (
        ("/generate", {"text": text}),
        ("/v1/completions", {"prompt": text}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
        ("/v1/tokenize", {"prompt": text}),
    ):
        start_s = time.monotonic()
        answer = server.client.post(path, json=body)
        assert answer.status_code == 400, path
        assert "context" in answer.json()["error"]["message"]
        assert time.monotonic() - start_s < 3, "seconds were spent on a prompt that nobody will run"


class Recording(ByteTokenizer):
    """Writes down the lengths of the texts that it encodes. A run of ten `=` is one token."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []

    def encode(self, text: str, **options: bool) -> list[int]:
        self.lengths.append(len(text))
        return super().encode(text.replace("=" * 10, "="), **options)


def test_only_texts_that_surely_do_not_fit_are_refused() -> None:
    bounded = BoundedTokenizer(Recording(), 100)
    for text in ("é" * 50, "x" * 101, "=" * 1000, "=" * 900 + "x" * 90):
        assert bounded.encode(text) == Recording().encode(text)
    assert bounded.decode(bounded.encode("hello")) == "hello"


def test_a_text_that_does_not_fit_is_cut_into_tokens_at_its_beginning_alone() -> None:
    recording = Recording()
    bounded = BoundedTokenizer(recording, 100)
    for text in ("x" * 1000, "é" * 1000, "x" * (bounded.max_bytes + 1)):
        with pytest.raises(ContextOverflow, match="100 tokens"):
            bounded.encode(text)
    assert max(recording.lengths) <= 800


HARD_GRAMMARS = [
    {"regex": "(((a{1,500}b?){1,500}c?){1,500}d?){1,500}"},
    {"regex": "(a|ab|abc|b|bc|c)*(x{1,900}|y{1,900}){900}"},
    {"json_schema": {"oneOf": [{"type": "object", "properties": {f"p{i}": {"enum": [i]}}} for i in range(16)]}},
]


@pytest.mark.parametrize("sampling", HARD_GRAMMARS)
def test_a_grammar_may_be_hard_but_nobody_waits_for_it_without_end(server: Server, sampling: dict[str, Any]) -> None:
    """Compiling is bounded and off the step loop: the others are served meanwhile."""
    start_s = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        hard = pool.submit(lambda: generate(server.client, sampling=sampling))
        slowest_s = 0.0
        while not hard.done():
            asked_s = time.monotonic()
            assert generate(server.client, "meanwhile").status_code == 200
            slowest_s = max(slowest_s, time.monotonic() - asked_s)
        answer = hard.result()
    assert time.monotonic() - start_s < 20
    assert slowest_s < 6, "others waited while a grammar was compiled"
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        assert answer.json()["error"]["code"] == "invalid_grammar", answer.text


def test_a_schema_over_the_limit_is_refused_by_its_size(start_server: Any) -> None:
    with start_server(max_schema_bytes=2_000) as server:
        schema = {"enum": ["x" * 40 + str(i) for i in range(100)]}
        answer = generate(server.client, sampling={"json_schema": json.dumps(schema)})
        assert answer.status_code == 400
        assert "2,000" in answer.json()["error"]["message"]


# -- browsers, internals, models -------------------------------------------------------------------------------------


def test_browsers_of_other_origins_are_not_let_in_unless_they_are_named(server: Server, start_server: Any) -> None:
    asking = {"origin": "https://example.org", "access-control-request-method": "POST"}
    for method, path in (("OPTIONS", "/generate"), ("POST", "/generate"), ("GET", "/health")):
        answer = server.client.request(method, path, headers=asking, json={})
        assert not [name for name in answer.headers if name.startswith("access-control")]
    with start_server(cors_allow_origin=("https://example.org",)) as named:
        answer = named.client.options("/generate", headers=asking)
        assert answer.headers["access-control-allow-origin"] == "https://example.org"
        other = named.client.options("/generate", headers={**asking, "origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    "field",
    [
        "bootstrap_host",
        "bootstrap_room",
        "data_parallel_rank",
        "custom_logit_processor",
        "custom_params",
        "session_params",
        "return_hidden_states",
        "request_id",
        "score_from",
        "arrival_s",
    ],
)
def test_no_field_of_a_request_reaches_internals(server: Server, field: str) -> None:
    """One such field, left open to clients, has stopped a scheduler elsewhere."""
    for path, body in (
        ("/generate", {"text": "x"}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        answer = server.client.post(path, json={**body, field: "2.2.2.2"})
        assert answer.status_code == 400, (path, field)
        assert field in answer.json()["error"]["message"]


def test_code_in_a_model_folder_is_never_run(tmp_path: Path) -> None:
    """There is no flag that would allow it: a model that needs code of its own is refused by its architecture."""
    from ramet.errors import RametError
    from ramet.runtime.models.load import load_model

    marker = tmp_path / "ran"
    folder = tmp_path / "model"
    folder.mkdir()
    code = f"open({str(marker)!r}, 'w').write('ran')\nclass Model: pass\nclass Tok: pass\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py"):
        (folder / name).write_text(code)
    automatic = {"AutoConfig": "configuration_evil.Model", "AutoModelForCausalLM": "modeling_evil.Model"}
    config = {"architectures": ["EvilForCausalLM"], "model_type": "evil", "auto_map": automatic}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {"tokenizer_class": "Tok", "auto_map": {"AutoTokenizer": ["tokenization_evil.Tok", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(RametError):
        load_model(folder)
    assert not marker.exists()
