"""Text completions: several prompts, echo and scores, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

Client = Any  # of conftest.py
PATH = "/v1/completions"


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [("ab", [[97, 98]]), (["a", "b"], [[97], [98]]), ([97, 98], [[97, 98]]), ([[97], [98]], [[97], [98]])],
)
def test_a_prompt_is_text_or_tokens_one_or_several(client: Client, prompt: Any, ids: list[list[int]]) -> None:
    client.engine.says("ok")
    answer = client.request(PATH, {"prompt": prompt, "n": 2, "seed": 4}).json()
    assert [command.prompt_ids for command in client.engine.submitted] == [i for i in ids for _ in range(2)]
    assert [command.sampling.seed for command in client.engine.submitted] == [4, 5] * len(ids)
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(ids)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert answer["usage"]["completion_tokens"] == 3 * 2 * len(ids)


def test_echo_alone_scores_the_prompt_and_generates_nothing(client: Client, replay: Any) -> None:
    def script(command: Any) -> Any:
        (output,) = replay(command, "", finish="length")[-1:]
        output.prompt_logprobs = [-1.0, float("-inf")]
        return [output]

    client.engine.script = script
    answer = client.request(PATH, {"prompt": "h\u00e9", "echo": True, "logprobs": 0, "max_tokens": 0}).json()
    (command,) = client.engine.submitted
    assert command.options.score_from == 1
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("h\u00e9", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -9999.0]
    assert choice["logprobs"]["tokens"] == ["h", "bytes:\\xc3", "bytes:\\xa9"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 1]
    assert answer["usage"]["completion_tokens"] == 0


def test_echo_gives_the_likeliest_tokens_of_each_place_of_the_prompt(client: Client, replay: Any) -> None:
    def script(command: Any) -> Any:
        if command.options.score_from is None:
            return replay(command, "!", finish="length")
        (output,) = replay(command, "", finish="length")[-1:]
        output.prompt_logprobs = [-0.5, -2.0]
        output.prompt_tops = [[(98, -0.5), (99, -1.0)], [(100, -0.1), (0xFF, -0.2)]]
        return [output]

    client.engine.script = script
    body = {"prompt": ["abc", "abc"], "echo": True, "logprobs": 2, "max_tokens": 1}
    first, second = client.request(PATH, body).json()["choices"]
    assert [command.sampling.logprobs for command in client.engine.submitted] == [2] * 4
    assert first["text"] == "abc!"
    assert first["logprobs"]["token_logprobs"] == [None, -0.5, -2.0]
    assert first["logprobs"]["top_logprobs"] == [None, {"b": -0.5, "c": -1.0}, {"d": -0.1, "bytes:\\xff": -0.2}]
    assert second["logprobs"] == first["logprobs"]


def test_without_special_tokens_a_text_has_its_own_tokens_alone(client: Client) -> None:
    client.engine.says("ok")
    client.tokenizer.encode = lambda text, *, add_special=False, **rules: [1] * add_special + list(text.encode())
    for given, ids in (({}, [1, 97]), ({"add_special_tokens": True}, [1, 97]), ({"add_special_tokens": False}, [97])):
        client.request(PATH, {"prompt": "a", **given})
        assert client.engine.submitted[-1].prompt_ids == ids


def test_when_the_score_of_one_prompt_fails_the_others_are_aborted(client: Client) -> None:
    from ramet.runtime.server.link.protocol import ErrorInfo, Output

    def script(command: Any) -> Any:
        if command.options.score_from is None or command.prompt_ids == [99, 99]:
            return []  # goes on for ever
        error = ErrorInfo("InvalidRequest", "no", "prompt")
        return [Output(command.id, 2, 0, 0, finish_reason="error", error=error)]

    client.engine.script = script
    body = {"prompt": ["bb", "cc"], "echo": True, "logprobs": 1}
    assert client.refusal(PATH, body)["param"] == "prompt"
    assert [stream.was_aborted for stream in client.engine.streams] == [True, True, False, True]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [70_000]}, "prompt"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
        ({"token_healing": True, "logprobs": 0}, "token_healing"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(client: Client, fields: dict[str, Any], param: str) -> None:
    assert client.refusal(PATH, {"prompt": "a", **fields})["param"] == param
    assert not client.engine.submitted


def test_when_one_choice_fails_the_others_are_aborted(client: Client, replay: Any) -> None:
    from ramet.runtime.server.link.protocol import ErrorInfo, Output

    def script(command: Any) -> Any:
        if command.prompt_ids == [98]:
            error = ErrorInfo("InvalidRequest", "no", "prompt")
            return [Output(command.id, 1, 0, 0, finish_reason="error", error=error)]
        return replay(command, "abc")[:-1]  # goes on for ever

    client.engine.script = script
    assert client.refusal(PATH, {"prompt": ["a", "b", "c"]})["param"] == "prompt"
    assert [stream.was_aborted for stream in client.engine.streams] == [True, False, True]


def test_an_error_in_a_stream_is_an_event(client: Client, replay: Any, read_events: Any) -> None:
    from ramet.runtime.server.link.protocol import ErrorInfo, Output

    def script(command: Any) -> Any:
        error = ErrorInfo("EngineStopped", "the engine process crashed")
        return [*replay(command, "abc")[:-1], Output(command.id, 1, 0, 3, finish_reason="error", error=error)]

    client.engine.script = script
    events = read_events(client.request(PATH, {"prompt": "a", "stream": True}))
    assert events[0]["choices"][0]["text"] == "abc"
    assert events[-1]["error"]["code"] == "engine_unavailable"


def sent_bodies(client: Client, path: str, body: dict[str, Any]) -> list[bytes]:
    """What the application sends of a stream, in its own pieces."""
    app, pieces = client.app, []

    async def noting(scope: Any, receive: Any, send: Any) -> None:
        async def note(message: Any) -> None:
            if message["type"] == "http.response.body":
                pieces.append(message["body"])
            await send(message)

        await app(scope, receive, note)

    client.app = noting
    assert client.request(path, {**body, "stream": True}).status_code == 200
    return pieces


@pytest.mark.parametrize("options", [None, {"include_usage": True}])
def test_the_last_token_the_usage_and_the_end_leave_together(client: Client, options: Any) -> None:
    client.engine.says("abc", cuts=[1, 2])
    pieces = sent_bodies(client, PATH, {"prompt": ["x", "y"], "stream_options": options})
    assert len(pieces) == 8  # three increments with a token and one with the end for each of two choices
    assert pieces[-1].endswith(b"data: [DONE]\n\n")
    assert pieces[-1].count(b"data: ") == (2 if options is None else 3)
    assert b'"finish_reason":"stop"' in pieces[-1]
    assert all(not stream.was_aborted for stream in client.engine.streams)


def test_a_chat_s_usage_and_end_leave_together(client: Client) -> None:
    client.engine.says("abc")
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream_options": {"include_usage": True}}
    pieces = sent_bodies(client, "/v1/chat/completions", body)
    assert b'"completion_tokens":' in pieces[-1]
    assert pieces[-1].endswith(b"data: [DONE]\n\n")


def test_a_stream_says_a_prompt_s_ids_once_a_choice(client: Client, read_events: Any) -> None:
    client.engine.says("abc", cuts=[1, 2])
    body = {"prompt": "xy", "n": 2, "stream": True, "return_token_ids": True}
    choices = [chunk["choices"][0] for chunk in read_events(client.request(PATH, body))]
    told = [choice for choice in choices if "prompt_token_ids" in choice]
    assert [(choice["index"], choice["prompt_token_ids"]) for choice in told] == [(0, [120, 121]), (1, [120, 121])]
    assert all(choice == next(c for c in choices if c["index"] == choice["index"]) for choice in told)
    assert [token for choice in choices if choice["index"] == 0 for token in choice["token_ids"]] == [97, 98, 99]


def test_a_long_prompt_of_ids_waits_for_no_thread(client: Client) -> None:
    client.engine.says("ok")
    client.served.pool.shutdown()
    assert client.request(PATH, {"prompt": [97] * 2000}).status_code == 200
