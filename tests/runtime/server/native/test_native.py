"""The native endpoints over a real socket: generation, health, limits, aborts, metrics."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

Server = Any  # RunningServer of conftest.py, which importlib mode cannot import by name
GREEDY = {"temperature": 0.0, "max_new_tokens": 12, "ignore_eos": True}


def generate(server: Server, **body: Any) -> httpx.Response:
    response: httpx.Response = server.client.post(
        "/generate", json={"text": "hello", "sampling_params": GREEDY, **body}
    )
    return response


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def settled(server: Server) -> dict[str, float]:
    """The engine's figures once nothing runs."""
    for _ in range(300):
        info = server.client.get("/get_server_info").json()
        stats: dict[str, float] = info["stats"]
        if stats and not stats["num_running"] and not stats["num_waiting"] and not info["in_flight"]:
            return stats
        time.sleep(0.05)
    raise AssertionError("the engine does not come to rest")


def test_text_and_token_ids_give_the_same_answer_and_the_second_one_is_cached(server: Server) -> None:
    first = generate(server).json()
    second = generate(server, text=None, input_ids=list(b"hello")).json()
    assert first["text"] == second["text"]
    assert first["output_ids"] == second["output_ids"]
    assert first["meta_info"]["finish_reason"] == {"type": "length"}
    assert first["meta_info"]["completion_tokens"] == 12
    assert second["meta_info"]["cached_tokens"] == 4


def test_a_composed_grammar_constrains_a_text(server: Server) -> None:
    grammar = {"sequence": ["<", {"repeat": {"choices": ["ab", "c"]}, "at_least": 1, "at_most": 3}, ">"]}
    for source in (grammar, json.dumps(grammar)):
        text = generate(server, sampling_params={"max_new_tokens": 20, "composed": source}).json()["text"]
        assert re.fullmatch("<(ab|c){1,3}>", text)


NAMED = {
    "sequence": [
        "<",
        {"capture": "n", "of": {"regex": "[0-9]{2}"}, "type": "int"},
        "|",
        {"capture": "s", "of": {"choices": ["a"]}},
        ">",
    ]
}


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"stream": True, "cumulative": False}])
def test_the_named_parts_of_a_composed_grammar_are_read(server: Server, fields: dict[str, bool]) -> None:
    response = generate(server, sampling_params={"max_new_tokens": 20, "composed": NAMED, "n": 2}, **fields)
    found = events_of(response) if fields else response.json()
    ended = [one for one in found if one["meta_info"]["finish_reason"] is not None]
    assert len(ended) == 2
    for one in ended:
        assert set(one["captures"]) == {"n", "s"}
        assert one["captures"]["s"] == "a"
        assert 0 <= one["captures"]["n"] <= 99
        if fields.get("cumulative", True):
            assert one["text"] == f"<{one['captures']['n']:02}|a>"
    assert all("captures" not in one for one in found if one not in ended)


def test_the_named_parts_of_a_text_that_was_cut_are_null(server: Server) -> None:
    answer = generate(server, sampling_params={"max_new_tokens": 3, "composed": NAMED}).json()
    assert "incomplete" in answer["meta_info"]["finish_reason"]
    assert answer["captures"] is None
    assert "captures" not in generate(server, sampling_params={"max_new_tokens": 3, "regex": "[0-9]{3}"}).json()


def test_a_constrained_text_that_was_cut_says_what_it_would_take(server: Server) -> None:
    sampling = {"max_new_tokens": 4, "regex": "[a-c]{6}"}
    finish = generate(server, sampling_params=sampling).json()["meta_info"]["finish_reason"]
    assert finish["type"] == "length"
    assert "takes 6 tokens" in finish["incomplete"]
    sampling["max_new_tokens"] = 6
    assert "incomplete" not in generate(server, sampling_params=sampling).json()["meta_info"]["finish_reason"]


@pytest.mark.parametrize("cumulative", [None, True, False])
def test_a_stream_adds_up_to_the_whole_answer_and_ends_with_done(server: Server, cumulative: bool | None) -> None:
    whole = generate(server).json()
    fields = {} if cumulative is None else {"cumulative": cumulative}
    events = events_of(generate(server, stream=True, **fields))
    is_cumulative = cumulative is not False  # as SGLang's streams are
    for key in ("output_ids", "text"):
        pieces = [event[key] for event in events]
        summed = pieces[0]
        for piece in pieces[1:]:
            summed = summed + piece
        assert (pieces[-1] if is_cumulative else summed) == whole[key]
    assert events[-1]["meta_info"]["finish_reason"] == {"type": "length"}


def test_several_prompts_and_several_answers_come_as_a_list(server: Server) -> None:
    one, two = (generate(server, text=text).json() for text in ("one", "two"))
    many = generate(server, text=["one", "two"], rid="many").json()
    assert [answer["text"] for answer in many] == [one["text"], two["text"]]
    assert [answer["meta_info"]["id"] for answer in many] == ["many", "many-1"]
    ids = generate(server, text=None, input_ids=[list(b"one"), list(b"two")]).json()
    assert [answer["text"] for answer in ids] == [one["text"], two["text"]]
    sampling = {"max_new_tokens": 6, "n": 2, "sampling_seed": 4}
    drawn = generate(server, sampling_params=sampling).json()
    second = generate(server, sampling_params={**sampling, "n": 1, "sampling_seed": 5}).json()
    assert drawn[0]["text"] != drawn[1]["text"] == second["text"]
    each = generate(server, text=["one", "two"], sampling_params=[GREEDY, {**GREEDY, "max_new_tokens": 3}]).json()
    assert [answer["meta_info"]["completion_tokens"] for answer in each] == [12, 3]
    texts = {}
    for event in events_of(generate(server, text=["one", "two"], stream=True)):
        texts[event["index"]] = event["text"]
    assert texts == {0: one["text"], 1: two["text"]}
    assert len(generate(server, text=["one"]).json()) == 1


def test_log_probabilities_of_what_is_generated_and_of_the_prompt(server: Server) -> None:
    fields = {"return_logprob": True, "top_logprobs_num": 2, "logprob_start_len": 0, "return_text_in_logprobs": True}
    sampling = {**GREEDY, "max_new_tokens": 3}
    answer = generate(server, sampling_params=sampling, **fields).json()
    meta = answer["meta_info"]
    assert [token for _, token, _ in meta["output_token_logprobs"]] == answer["output_ids"]
    for (value, token, text), top in zip(meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True):
        assert top[0] == [value, token, text]  # greedy
        assert len(top) == 2
    scores = meta["input_token_logprobs"]
    assert [(token, text) for _, token, text in scores] == [(ord(c), c) for c in "hello"]
    assert scores[0][0] is None  # nothing stands before the first token
    assert all(value < 0 for value, _, _ in scores[1:])
    tops = meta["input_top_logprobs"]
    assert tops[0] is None
    assert [len(top) for top in tops[1:]] == [2] * 4
    assert all(top[0][0] >= max(top[1][0], score[0]) for top, score in zip(tops[1:], scores[1:], strict=True))
    later = generate(server, sampling_params=sampling, **{**fields, "logprob_start_len": 3}).json()["meta_info"]
    assert [[entry[1:] for entry in top] for top in later["input_top_logprobs"]] == [
        [entry[1:] for entry in top] for top in tops[3:]
    ]
    for given, known in zip(later["input_token_logprobs"], scores[3:], strict=True):
        assert given == [pytest.approx(known[0]), *known[1:]]
    assert generate(server, return_logprob=True).json()["meta_info"]["input_token_logprobs"] == []
    events = events_of(generate(server, sampling_params=sampling, stream=True, **fields))
    last = events[-1]["meta_info"]
    assert len(last["output_token_logprobs"]) == len(last["output_top_logprobs"]) == 3
    assert len(last["input_token_logprobs"]) == 5


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_ends_before_what_a_pattern_matches(server: Server, stream: bool) -> None:
    text = generate(server).json()["text"]
    pattern = re.escape(text[3]) + "[\\s\\S]" + re.escape(text[5])
    start = re.search(pattern, text).start()  # type: ignore[union-attr]
    sampling = {**GREEDY, "stop_regex": [pattern, "never this one"]}
    answer = generate(server, sampling_params=sampling, stream=stream)
    last = events_of(answer)[-1] if stream else answer.json()
    assert last["text"] == text[:start]
    assert last["meta_info"]["finish_reason"] == {"type": "stop", "matched": pattern}
    assert last["meta_info"]["completion_tokens"] == len(last["output_ids"]) < 12


def test_a_constraint_holds(server: Server) -> None:
    pattern = "(red|green|blue)(,(red|green|blue)){1,2}"
    for seed in range(4):
        tokenization = ("canonical", "any")[seed % 2]
        sampling = {"max_new_tokens": 30, "sampling_seed": seed, "regex": pattern, "tokenization": tokenization}
        assert re.fullmatch(pattern, generate(server, sampling_params=sampling).json()["text"])


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"text": None}, 400, "either text or input_ids"),
        ({"input_ids": [1]}, 400, "either text or input_ids"),
        ({"text": ""}, 400, "no tokens"),
        ({"text": 7}, 400, "text"),
        ({"no_such_field": 1}, 400, "no_such_field"),
        ({"sampling_params": {"top_p": 7.0}}, 400, "top_p"),
        ({"sampling_params": {"no_such": 1}}, 400, "no_such"),
        ({"sampling_params": {"regex": "a", "ebnf": "b"}}, 400, "only one of"),
        ({"sampling_params": {"regex": "(unclosed"}}, 400, "unclosed"),
        ({"text": "x" * 3000}, 400, "context"),
        ({"text": None, "input_ids": [999]}, 400, "999"),
        ({"text": None, "input_ids": [2**70]}, 400, "input_ids"),
        ({"text": []}, 400, "text"),
        ({"text": ["a", ""]}, 400, "no tokens"),
        ({"sampling_params": {"max_new_tokens": -1}}, 400, "sampling_params.max_new_tokens"),
        ({"sampling_params": {"min_new_tokens": 5, "max_new_tokens": 3}}, 400, "min_new_tokens"),
        ({"sampling_params": [GREEDY, GREEDY]}, 400, "2 entries for 1 prompts"),
        ({"sampling_params": {"stop_regex": "a$"}}, 400, "looks beyond"),
        ({"sampling_params": {"ebnf": "root ::= gone"}}, 400, "'gone'"),
        ({"sampling_params": {"structural_tag": {"triggers": []}}}, 400, "structures"),
        ({"sampling_params": {"composed": {"sequence": "a"}}}, 400, "sequence must be a list"),
        ({"sampling_params": {"composed": {"select": ["a"]}, "regex": "a"}}, 400, "each constrain the answer"),
        ({"sampling_params": {"regex": "a", "tokenization": "odd"}}, 400, "tokenization"),
        ({"session_params": {"id": "a"}}, 400, "session_params is not supported"),
    ],
)
def test_bad_bodies_get_an_error_that_names_the_field(
    server: Server, body: dict[str, Any], status: int, message: str
) -> None:
    response = generate(server, **body)
    assert response.status_code == status, response.text
    assert message in response.json()["error"]["message"]
    assert generate(server).status_code == 200


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"\xff\xfe", b"[]", b'"text"', b"[" * 100_000, b'{"text": "\\ud800"}', b'{"text": NaN}', b"null"],
)
def test_bodies_that_are_no_json_object_get_a_400(server: Server, raw: bytes) -> None:
    response = server.client.post("/generate", content=raw, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"]


def test_a_body_over_the_limit_is_refused_before_it_is_read(server: Server) -> None:
    response = server.client.post("/generate", content=b"x" * (33 << 20))
    assert response.status_code == 413

    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b"x" * (1 << 20)

    try:
        response = server.client.post("/generate", content=chunks())
        assert response.status_code == 413
    except httpx.TransportError:
        pass  # the server may close while the client is still sending
    assert generate(server).status_code == 200


def test_unknown_paths_and_methods_have_the_same_error_shape(server: Server) -> None:
    unknown = server.client.get("/nowhere")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "not_found")
    assert "/nowhere" in unknown.json()["error"]["message"]
    wrong = server.client.get("/generate")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")


def test_a_client_that_leaves_in_the_middle_frees_its_pages(server: Server) -> None:
    before = server.served.proxy.num_aborts
    with server.client.stream(
        "POST",
        "/generate",
        json={"text": "leaving", "sampling_params": {**GREEDY, "max_new_tokens": 450}, "stream": True},
    ) as response:
        next(response.iter_bytes())
    stats = settled(server)
    assert stats["num_free_pages"] + stats["num_evictable_pages"] == stats["num_pages"]
    assert server.served.proxy.num_aborts == before + 1


def test_a_client_that_leaves_before_a_whole_answer_frees_its_pages(server: Server) -> None:
    before = server.served.proxy.num_aborts
    body = json.dumps({"text": "leaving", "sampling_params": {**GREEDY, "max_new_tokens": 480}}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as raw:
        head = f"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        head += "\r\n\r\n"
        raw.sendall(head.encode() + body)
        while not server.client.get("/get_server_info").json()["in_flight"]:
            assert server.served.proxy.num_aborts == before
    settled(server)
    assert server.served.proxy.num_aborts == before + 1


def test_abort_takes_exact_ids_only(server: Server) -> None:
    assert server.client.post("/abort_request", json={"rid": "no-such"}).json() == {"aborted": []}
    assert server.client.post("/abort_request", json={}).status_code == 400


def test_aborting_an_id_leaves_longer_ids_alone(server: Server) -> None:
    body = {"text": "hello", "rid": "turn-10", "stream": True, "sampling_params": {**GREEDY, "max_new_tokens": 450}}
    with server.client.stream("POST", "/generate", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        for rid in ("turn-1", "turn", "t"):
            assert server.client.post("/abort_request", json={"rid": rid}).json() == {"aborted": []}
        assert server.client.post("/abort_request", json={"rid": "turn-10"}).json() == {"aborted": ["turn-10"]}
        assert len(list(lines)) < 900, "the request was not aborted"
    settled(server)


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_cached_is_a_zero_and_no_null(server: Server, stream: bool) -> None:
    body = {"prompt": f"never seen before {stream}", "max_tokens": 2, "cache_salt": f"fresh {stream}"}
    found = []
    for _ in range(2):
        options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        answer = server.client.post("/v1/completions", json={**body, **options})
        usage = events_of(answer)[-1]["usage"] if stream else answer.json()["usage"]
        found.append(usage["prompt_tokens_details"]["cached_tokens"])
        assert usage["completion_tokens_details"]["reasoning_tokens"] == 0
    assert found == [0, len(f"never seen before {stream}") - 1]


def test_health_ready_and_information(server: Server) -> None:
    assert server.client.get("/health").json() == {"status": "ok", "reason": None}
    assert server.client.get("/ready").json() == {"ready": True, "stage": "ready", "attempt": 1, "reason": None}
    assert server.client.get("/health_generate").json()["status"] == "ok"
    info = server.client.get("/get_model_info").json()
    assert (info["context_length"], info["model_path"]) == (2048, "tiny-random")
    assert server.client.get("/get_server_info").json()["engine"]["num_kv_tokens"] == 4096
    assert server.client.post("/flush_cache").json()["freed_pages"] >= 0


def test_metrics_count_what_happened(server: Server) -> None:
    def value(name: str) -> float:
        text = server.client.get("/metrics").text
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert found, f"{name} is not exported"
        return float(found[1])

    before = value("ramet_generation_tokens_total")
    generate(server)
    assert value("ramet_generation_tokens_total") == before + 12
    assert value('ramet_requests_total{reason="length"}') >= 1
    assert value("ramet_time_to_first_token_seconds_count") >= 1
    time.sleep(1.2)
    for name in (
        "sglang_cache_hit_rate",
        "sglang_num_queue_reqs",
        "sglang_token_usage",
        "sglang_num_running_reqs",
        "sglang_time_to_first_token_seconds_count",
        "ramet_prefix_cache_hit_tokens_total",
        "ramet_prefix_cache_hit_ratio",
        "ramet_kv_usage_ratio",
    ):
        assert value(name) >= 0
    assert value("ramet_kv_pages") == 256


def test_keys_are_asked_for_and_admin_paths_want_the_admin_key(start_server: Any) -> None:
    keys = {"api_key": ("one", "two"), "admin_api_key": "admin", "protect_metrics": True, "isolate_cache_by_key": True}
    with start_server(**keys) as server:
        client = server.client
        assert client.get("/health").status_code == 200
        refused = client.post("/generate", json={"text": "x"})
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"
        good, admin = {"authorization": "Bearer one"}, {"authorization": "Bearer admin"}
        body = {"text": "the same prompt for both", "sampling_params": GREEDY}
        assert client.post("/generate", json=body, headers=good).status_code == 200
        again = client.post("/generate", json=body, headers=good).json()
        other = client.post("/generate", json=body, headers={"authorization": "Bearer two"}).json()
        assert again["meta_info"]["cached_tokens"] > 0
        assert other["meta_info"]["cached_tokens"] == 0
        assert client.post("/flush_cache", headers=good).status_code == 401
        assert client.post("/flush_cache", headers=admin).status_code == 200
        assert client.get("/metrics").status_code == 401
        assert "one" not in client.get("/get_server_info", headers=good).text.replace("none", "").replace("None", "")


def test_programs_run_stream_repeat_and_cancel(server: Server) -> None:
    graph = {
        "version": 1,
        "nodes": [
            {"kind": "argument", "id": 0, "name": "who"},
            {"kind": "text", "id": 1, "parts": ["Hello ", {"node": 0}, ": "]},
            {"kind": "generate", "id": 2, "parent": 1, "name": "x", "sampling": {"max_tokens": 6, "temperature": 0.0}},
        ],
    }
    rows = [{"who": "Ann"}, {"who": "Bob"}]
    result = server.client.post("/v1/programs", json={"graph": graph, "rows": rows}).json()
    assert result["status"] == "done", result
    assert [len(row["nodes"]) for row in result["rows"]] == [3, 3] or all(
        "x" in row["values"] for row in result["rows"]
    )
    assert server.client.get(f"/v1/programs/{result['id']}").json() == result

    body = {"graph": graph, "arguments": {"who": "Ann"}, "stream": True}
    text = server.client.post("/v1/programs", json=body).text
    assert text.startswith("event: program\n")
    assert "event: end\n" in text

    key = {"idempotency-key": "once"}
    first = server.client.post("/v1/programs", json={"graph": graph, "arguments": {"who": "C"}}, headers=key).json()
    second = server.client.post("/v1/programs", json={"graph": graph, "arguments": {"who": "C"}}, headers=key).json()
    assert first["id"] == second["id"]

    long = json.loads(json.dumps(graph))
    long["nodes"][2]["sampling"] = {"max_tokens": 450, "ignore_eos": True}
    started = server.client.post("/v1/programs", json={"graph": long, "arguments": {"who": "D"}, "detach": True})
    assert started.status_code == 202
    assert server.client.delete(f"/v1/programs/{started.json()['id']}").json()["status"] == "cancelled"
    stats = settled(server)
    assert stats["num_free_pages"] + stats["num_evictable_pages"] == stats["num_pages"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "graph"),
        ({"graph": {"version": 99, "nodes": []}}, "version 99"),
        ({"graph": {"version": 1, "nodes": []}, "arguments": {"x": 1}}, "no argument 'x'"),
        ({"graph": {"version": 1, "nodes": []}, "rows": []}, "rows: List should have at least 1"),
        ({"graph": {"version": 1, "nodes": []}, "open": True}, "stream or detach"),
        (
            {
                "graph": {
                    "version": 1,
                    "nodes": [
                        {"kind": "text", "id": 0, "parts": ["{}"]},
                        {"kind": "tool_call", "id": 1, "tool": "f", "arguments": ["{}"]},
                    ],
                }
            },
            "stream or detach",
        ),
        ({"graph": {"version": 1, "nodes": [{"kind": "text", "id": 0, "parent": 5, "parts": ["a"]}]}}, "5"),
        ({"graph": {"version": 1, "nodes": [{"kind": "argument", "id": 0, "name": "x"}]}}, "'x' has no value"),
    ],
)
def test_bad_programs_are_refused_with_what_is_wrong(server: Server, body: dict[str, Any], message: str) -> None:
    response = server.client.post("/v1/programs", json=body)
    assert response.status_code == 400, response.text
    assert message in response.json()["error"]["message"]


def test_no_such_program(server: Server) -> None:
    assert server.client.get("/v1/programs/none").status_code == 404


NUMBERS = """max_tokens temperature top_p top_k min_p frequency_penalty presence_penalty repetition_penalty
    min_tokens string_tokens seed n priority logprobs"""
EXTREMES = (0, -1, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 10**30, 1e-300, 1e308, -1e308)


@pytest.mark.parametrize("name", NUMBERS.split())
def test_no_number_of_a_request_ends_what_runs_beside_it(server: Server, name: str) -> None:
    bystander = {"prompt": "hello", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with server.client.stream("POST", "/v1/completions", json=bystander) as beside:
        lines = beside.iter_lines()
        next(lines)
        for value in EXTREMES:
            found = server.client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 2, name: value})
            assert found.status_code in (200, 400), found.text
            if found.status_code == 400:
                error = found.json()["error"]
                assert (error["param"], error["code"] is None) == (name, False), error
        assert "data: [DONE]" in list(lines), "the other request was cut"
    settled(server)


def test_what_is_too_long_is_named_as_its_body_names_it(server: Server) -> None:
    long = "x" * 3000
    for path, body, param in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long * 1000}]}, "messages"),
        ("/v1/completions", {"prompt": long}, "prompt"),
    ):
        error = server.client.post(path, json=body).json()["error"]
        assert (error["param"], error["code"]) == (param, "context_length_exceeded")


def test_nothing_is_generated_with_no_new_tokens_but_the_prompt_is_cached(server: Server) -> None:
    prompt = "A prompt that nobody has sent before, long enough for some pages of the cache"
    nothing: dict[str, Any] = {"sampling_params": {"max_new_tokens": 0}}
    answer = generate(server, text=prompt, **nothing).json()
    assert (answer["text"], answer["output_ids"]) == ("", [])
    meta = answer["meta_info"]
    assert (meta["completion_tokens"], meta["finish_reason"]["type"]) == (0, "length")
    again = generate(server, text=prompt).json()["meta_info"]
    assert again["prompt_tokens"] == meta["prompt_tokens"]
    assert again["cached_tokens"] > meta["prompt_tokens"] // 2


def test_the_frontend_of_sglang_scores_choices(server: Server) -> None:
    """The requests of its `select`: the prompt is cached, then each choice is scored behind it."""
    prompt, nothing = "The sky is", {"max_new_tokens": 0}
    cached = generate(server, text=prompt, sampling_params=nothing).json()
    start = max(cached["meta_info"]["prompt_tokens"] - 2, 0)
    fields: dict[str, Any] = {"return_logprob": True, "return_text_in_logprobs": True, "logprob_start_len": start}
    texts = [prompt + choice for choice in (" blue", " green")]
    scored = generate(server, text=texts, sampling_params={**nothing, "temperature": 0}, **fields).json()
    for text, answer in zip(texts, scored, strict=True):
        entries = answer["meta_info"]["input_token_logprobs"]
        assert text.endswith("".join(entry[2] for entry in entries))
        assert all(entry[0] <= 0 for entry in entries)
        assert answer["meta_info"]["output_token_logprobs"] == []
    ids = [[entry[1] for entry in answer["meta_info"]["input_token_logprobs"]] for answer in scored]
    alone = generate(server, text=None, input_ids=ids, sampling_params=nothing, return_logprob=True).json()
    for tokens, answer in zip(ids, alone, strict=True):
        entries = answer["meta_info"]["input_token_logprobs"]
        assert [entry[1] for entry in entries] == tokens
        assert entries[0][0] is None


def test_what_the_clients_of_sglang_and_vllm_always_send_is_taken(server: Server) -> None:
    sampling = {"max_new_tokens": 2, "stop_regex": [], "lora_path": None, "spaces_between_special_tokens": True}
    fields: dict[str, Any] = {
        "lora_path": None,
        "image_data": None,
        "log_metrics": True,
        "session_params": None,
        "stream": None,
    }
    assert generate(server, sampling_params=sampling, return_logprob=None, **fields).status_code == 200


def test_second_names_of_sglangs_and_vllms_endpoints(server: Server) -> None:
    client = server.client
    assert client.post("/reset_prefix_cache").json().keys() == {"freed_pages"}
    assert client.post("/concate_and_append_request", json={"src_rids": ["a"], "dst_rid": "b"}).status_code == 200
    for path in ("/start_profile", "/stop_profile"):
        answer = client.post(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (501, "no_profiler")
