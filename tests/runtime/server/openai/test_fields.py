"""Every documented field of OpenAI's, SGLang's and vLLM's requests has an effect, or is refused by its name.

A field that is taken changes what is asked of the engine, or the answer; those that do not are listed, with the reason.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from ramet.runtime.server.errors import HttpError
from ramet.runtime.server.native.bodies import GenerateBody, NativeSampling
from ramet.runtime.server.openai.bodies import ChatBody, CompletionBody
from ramet.runtime.server.validation import REFUSED, Strict, parsed

Client = Any  # of conftest.py
Json = dict[str, Any]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, Json] = {CHAT: {"messages": [{"role": "user", "content": "Hi"}]}, COMPLETIONS: {"prompt": "Hi"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
TAG = {"triggers": ["<"], "structures": [{"begin": "<a>", "schema": True, "end": "</a>"}]}

# Values other than the defaults, of fields that both endpoints share.
SHARED: Json = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 3,
    "min_p": 0.1,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "repetition_penalty": 1.5,
    "min_tokens": 2,
    "string_tokens": 9,
    "max_tokens": 7,
    "seed": 3,
    "stop": "x",
    "stop_regex": "x+",
    "stop_token_ids": [5],
    "ignore_eos": True,
    "logit_bias": {"5": 3},
    "n": 2,
    "stream": True,
    "return_token_ids": True,
    "regex": "a",
    "cfg": 'start: "a"',
    "ebnf": 'root ::= "a"',
    "json_schema": "{}",
    "structural_tag": TAG,
    "guided_json": {},
    "guided_regex": "a",
    "guided_choice": ["a"],
    "guided_grammar": 'root ::= "a"',
    "structured_outputs": {"regex": "a"},
    "priority": 3,
    "cache_salt": "s",
    "metadata": {"a": "b"},
}
EFFECTIVE: dict[str, Json] = {
    CHAT: {
        **SHARED,
        "max_completion_tokens": 7,
        "prediction": {"type": "content", "content": [{"type": "text", "text": "an answer"}]},
        "logprobs": True,
        "tools": [TOOL],
        "response_format": {"type": "json_object"},
        "chat_template_kwargs": {"add_generation_prompt_too": 1},
        "add_generation_prompt": False,
        "separate_reasoning": False,
    },
    COMPLETIONS: {**SHARED, "logprobs": 0, "echo": True, "token_healing": True},
}
# Fields whose effect needs other fields beside them: (those, the value).
JOINED: Json = {
    "top_logprobs": ({"logprobs": True}, 2),
    "tool_choice": ({"tools": [TOOL]}, "required"),
    "parallel_tool_calls": ({"tools": [TOOL]}, False),
    "stream_options": ({"stream": True}, {"include_usage": True}),
    "tokenization": ({"regex": "a"}, "any"),
    "whitespace": ({"json_schema": {}}, "compact"),
    "order": ({"json_schema": {}}, "any"),
    "additional_properties": ({"json_schema": {}}, "schema"),
    "guided_whitespace_pattern": ({"json_schema": {}}, "[ ]?"),
    "continue_final_message": ({"messages": [{"role": "assistant", "content": "Hi"}]}, True),
}
# Taken without an effect, because what they say is so anyway, or because they are labels for somebody else.
LABELS: dict[str, Json] = {
    CHAT: {
        "model": "fake",
        "user": "u",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "store": False,
        "service_tier": "auto",
        "skip_special_tokens": True,
        "no_stop_trim": False,
        "include_stop_str_in_output": False,
        "use_beam_search": False,
        "return_hidden_states": False,
        "stream_reasoning": True,
        "modalities": ["text"],
        "reasoning_effort": "none",  # of a template that knows no reasoning
        "verbosity": "low",
        "history": "append",  # test_conversations.py
    }
}
LABELS[COMPLETIONS] = {
    name: value
    for name, value in LABELS[CHAT].items()
    if name not in ("stream_reasoning", "modalities", "reasoning_effort", "verbosity", "history")
} | {"best_of": 1}

# All names in SGLang's, vLLM's and OpenAI's documentation of the three endpoints.
DOCUMENTED = {
    CHAT: """messages model frequency_penalty presence_penalty logit_bias logprobs top_logprobs
        max_tokens max_completion_tokens n seed stop stream stream_options temperature top_p user
        tools tool_choice parallel_tool_calls response_format reasoning_effort top_k min_p
        min_tokens regex ebnf repetition_penalty stop_token_ids stop_regex no_stop_trim ignore_eos
        continue_final_message skip_special_tokens lora_path session_id session_params
        separate_reasoning stream_reasoning chat_template_kwargs return_hidden_states
        return_cached_tokens_details return_token_ids return_prompt_token_ids return_meta_info
        input_ids rid extra_key cache_salt priority custom_labels custom_logit_processor
        custom_params metadata store service_tier modalities audio prediction web_search_options
        verbosity functions function_call safety_identifier prompt_cache_key guided_json
        guided_regex guided_choice guided_grammar structured_outputs structural_tag
        guided_decoding_backend guided_whitespace_pattern add_generation_prompt documents
        chat_template length_penalty use_beam_search include_stop_str_in_output
        truncate_prompt_tokens prompt_logprobs allowed_token_ids bad_words
        spaces_between_special_tokens add_special_tokens logits_processors request_id best_of""",
    COMPLETIONS: """prompt model max_tokens echo suffix best_of logprobs n seed stop stream stream_options
        temperature top_p logit_bias user frequency_penalty presence_penalty json_schema regex ebnf
        top_k min_p min_tokens repetition_penalty stop_token_ids stop_regex no_stop_trim ignore_eos
        skip_special_tokens lora_path session_params return_hidden_states rid extra_key cache_salt
        priority custom_logit_processor custom_params metadata guided_json guided_regex
        guided_choice guided_grammar structural_tag structured_outputs use_beam_search
        length_penalty include_stop_str_in_output spaces_between_special_tokens
        truncate_prompt_tokens allowed_token_ids prompt_logprobs add_special_tokens
        logits_processors request_id return_token_ids""",
    "/generate": """text input_ids input_embeds image_data video_data audio_data sampling_params rid
        return_logprob logprob_start_len top_logprobs_num token_ids_logprob return_text_in_logprobs
        stream lora_path session_id session_params custom_logit_processor return_hidden_states
        priority extra_key cache_salt custom_labels max_thinking_tokens""",
    "sampling_params": """max_new_tokens min_new_tokens stop stop_token_ids stop_regex temperature top_p top_k min_p
        frequency_penalty presence_penalty repetition_penalty n json_schema regex ebnf
        structural_tag ignore_eos skip_special_tokens spaces_between_special_tokens no_stop_trim
        logit_bias custom_params sampling_seed stream_interval""",
}
MODELS: dict[str, type[Strict]] = {
    CHAT: ChatBody,
    COMPLETIONS: CompletionBody,
    "/generate": GenerateBody,
    "sampling_params": NativeSampling,
}


@pytest.mark.parametrize("path", DOCUMENTED)
def test_every_documented_name_is_a_field_or_refused_with_a_reason(path: str) -> None:
    names = set(DOCUMENTED[path].split())
    assert names - set(MODELS[path].model_fields) - set(REFUSED) == set()


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_every_field_is_in_one_of_the_lists_here(path: str) -> None:
    tried = set(EFFECTIVE[path]) | set(JOINED) | set(LABELS[path]) | set(BODIES[path])
    tried |= {"max_thinking_tokens"}  # needs a template with reasoning: test_reasoning.py
    tried |= {"add_special_tokens"}  # needs a tokenizer that adds some: test_completions.py
    assert set(MODELS[path].model_fields) - tried == set()


def outcome(client: Client, path: str, fields: Json) -> tuple[Json, str]:
    """(what was asked of the engine, the answer) of one request."""
    client.engine.submitted.clear()
    client.engine.says("<think>a</think>b")
    response = client.request(path, {**BODIES[path], **fields})
    assert response.status_code == 200, response.text
    asked = [(c.prompt_ids, c.sampling, c.constraint, c.options, c.heals) for c in client.engine.submitted]
    body = response.text
    if response.headers["content-type"] == "application/json":
        answer = response.json()
        answer.pop("created")
        body = json.dumps(answer)
    return {"asked": repr(asked)}, body


@pytest.mark.parametrize(("path", "field"), [(path, field) for path in EFFECTIVE for field in EFFECTIVE[path]])
def test_a_field_that_is_taken_has_an_effect(make_client: Any, path: str, field: str) -> None:
    template = "{{ add_generation_prompt_too }}{% for m in messages %}{{ m.content }}{% endfor %}"
    client = make_client(template + "{% if add_generation_prompt %}>{% endif %}")
    plain = outcome(client, path, {})
    assert outcome(client, path, {}) == plain
    assert outcome(client, path, {field: EFFECTIVE[path][field]}) != plain


@pytest.mark.parametrize("field", JOINED)
def test_a_field_that_goes_with_others_has_an_effect(client: Client, field: str) -> None:
    others, value = JOINED[field]
    assert outcome(client, CHAT, {**others, field: value}) != outcome(client, CHAT, others)


@pytest.mark.parametrize(("path", "field"), [(path, field) for path in LABELS for field in LABELS[path]])
def test_a_label_is_taken_and_changes_nothing(client: Client, path: str, field: str) -> None:
    assert outcome(client, path, {field: LABELS[path][field]}) == outcome(client, path, {})


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_stop_string_that_is_too_long_is_told_its_limit(client: Client, path: str) -> None:
    answer = client.request(path, {**BODIES[path], "stop": "x" * 10_001})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "stop"
    assert "at most 10000 characters" in answer.json()["error"]["message"]


EXTREMES: list[Any] = [
    True, "", "x", "\ud800", -1, 0, 2**31, 2**70, -(2**70), 1e308, -0.5, [], [None], [[]], {}, {"a": None}, ["x"] * 20,
    {"type": "x"}, [{"role": "user"}], "9" * 5000, [-1], [2**70], {"1": 1e308}, {"-1": 1}, {"99999999999": 1},
]  # fmt: skip


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_any_value_of_any_field_is_taken_or_refused_by_the_fields_name(client: Client, path: str) -> None:
    client.engine.says("ok")
    for field in MODELS[path].model_fields:
        for value in EXTREMES:
            data = json.dumps({**BODIES[path], field: value}).encode()
            response = client.request(path, data)
            if response.status_code == 200:
                continue
            assert response.status_code in (400, 404), (field, value, response.text)
            error = response.json()["error"]
            named = error["param"] or ""
            is_named = named.split("[")[0].split(".")[0] == field or field in error["message"]
            joined = field in ("stream", "tools", "continue_final_message", "max_tokens", "max_completion_tokens", "n")
            # A lone surrogate is said to be no Unicode, wherever it stands.
            assert is_named or joined or value == "\ud800", (field, value, error)


def test_an_integer_may_be_written_with_a_fraction_of_zero() -> None:
    """JSON does not tell 16.0 from 16, and some languages write every number so."""
    start = b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": '
    body: Any = parsed(ChatBody, start + b'16.0, "stop_token_ids": [5.0, 6, 7.0], "audio": null}', 10**6)
    assert (body.max_tokens, body.stop_token_ids) == (16, [5, 6, 7])
    assert type(body.max_tokens) is int
    for wrong in ("16.5", "1e400", '"16"', "true", "[16.0]"):
        with pytest.raises(HttpError, match="max_tokens"):
            parsed(ChatBody, start + wrong.encode() + b"}", 10**6)
