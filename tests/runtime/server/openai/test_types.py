"""Every field is honoured or refused by name, in OpenAI's error shape."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ramet.lang.graph.json_form import JsonForm, whitespace_named
from ramet.runtime.server.errors import HttpError
from ramet.runtime.server.native.bodies import GenerateBody, NativeSampling
from ramet.runtime.server.openai.bodies import ChatBody, CompletionBody, TokenizeBody
from ramet.runtime.server.validation import REFUSED, Strict, body_schema, parsed
from ramet.runtime.types import RequestOptions, SamplingParams

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "Hi"}
Client = Any  # of conftest.py, which importlib mode cannot import by name


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"foo": 1}, "foo", "unknown_parameter"),
        ({"foo": None}, "foo", "unknown_parameter"),
        ({"bootstrap_host": "2.2.2.2"}, "bootstrap_host", "unsupported_parameter"),
        ({"stop_regex": "a$"}, "stop_regex", "invalid_value"),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
        ({"length_penalty": True}, "length_penalty", "unsupported_parameter"),
        ({"lora_path": None, "watermark": True}, "watermark", "unsupported_parameter"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"temperature": True}, "temperature", "invalid_value"),
        ({"temperature": -1}, "temperature", None),
        ({"top_p": 7}, "top_p", None),
        ({"top_k": -2}, "top_k", "invalid_value"),
        ({"top_k": 2**31}, "top_k", "invalid_value"),
        ({"max_tokens": 10**30}, "max_tokens", "invalid_value"),
        ({"min_tokens": 10**30}, "min_tokens", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 1.5}, "n", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", None),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"stop": [""]}, "stop[0]", None),
        ({"stop": ["x"] * 17}, "stop", None),
        ({"logit_bias": {"a": 1}}, "logit_bias.a", None),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", None),
        ({"top_logprobs": 2}, "top_logprobs", None),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", None),
        ({"store": True}, "store", "invalid_value"),
        ({"store": 0}, "store", "invalid_value"),
        ({"skip_special_tokens": 1.0}, "skip_special_tokens", "invalid_value"),
        ({"stream_reasoning": 1}, "stream_reasoning", "invalid_value"),
        ({"response_format": {"type": "grammar"}}, "response_format", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing_required_parameter"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            None,
        ),
        ({"regex": "a", "guided_choice": ["b"]}, "guided_choice", None),
        ({"ebnf": "root ::= x"}, "ebnf", "invalid_grammar"),
        ({"structured_outputs": {"grammar": "root ::= x"}}, "structured_outputs.grammar", "invalid_grammar"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.regex", None),
        ({"skip_special_tokens": False}, "skip_special_tokens", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", None),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", None),
        ({"modalities": ["audio"]}, "modalities[0]", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "user"}, {"content": "x"}]}, "messages[1].role", "missing_required_parameter"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "invalid_value"),
        ({"messages": [{**USER, "weight": 1}]}, "messages[0].weight", "unknown_parameter"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
            "unsupported_content",
        ),
    ],
)
def test_what_is_wrong_with_a_field_is_said_by_its_name(
    client: Client, fields: dict[str, Any], param: str, code: str | None
) -> None:
    error = client.refusal(CHAT, {"messages": [USER], **fields})
    assert error["param"] == param
    assert error["code"] is not None
    assert code is None or error["code"] == code
    assert error["type"] == "invalid_request_error"
    assert param.split("[")[0].split(".")[0] in error["message"]
    assert not client.engine.submitted


@pytest.mark.parametrize("field", sorted(REFUSED))
def test_known_fields_without_an_effect_are_refused_with_a_reason(client: Client, field: str) -> None:
    for path, model, body in (
        (CHAT, ChatBody, {"messages": [USER]}),
        ("/v1/completions", CompletionBody, {"prompt": "a"}),
    ):
        if field not in model.model_fields:
            error = client.refusal(path, {**body, field: "asked"})
            assert (error["param"], error["code"]) == (field, "unsupported_parameter")
            assert REFUSED[field] in error["message"]


@pytest.mark.parametrize(
    ("body", "code"), [(b"{nope", "invalid_json"), (b"[1]", "invalid_type"), (b'"x"', "invalid_type"), (b"\xff", None)]
)
def test_a_body_that_is_no_object_is_refused(client: Client, body: bytes, code: str | None) -> None:
    error = client.refusal(CHAT, body)
    assert code is None or error["code"] == code


def test_a_deep_or_large_body_is_refused_or_read_but_never_breaks_anything(client: Client) -> None:
    client.refusal(CHAT, b"[" * 100_000)
    client.refusal(CHAT, b'{"messages": ' + b'{"a":' * 5000)
    client.engine.says("ok")
    assert client.chat("x" * 200_000)["choices"][0]["message"]["content"] == "ok"


def test_another_model_is_not_found(client: Client) -> None:
    error = client.refusal(CHAT, {"model": "gpt-9", "messages": [USER]}, 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    client.engine.says("ok")
    for name in ("fake", "default", None):
        client.chat(model=name)


def test_labels_and_cache_marks_never_reach_the_prompt(client: Client) -> None:
    client.engine.says("ok")
    client.chat("Hi")
    plain = client.prompt_text()
    part = {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}
    labels = {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "metadata": {"a": "b"}, "store": False}
    answer = client.chat(messages=[{"role": "user", "content": [part]}], service_tier="auto", **labels)
    assert client.prompt_text() == plain
    assert answer["metadata"] == {"a": "b"}


def test_sampling_fields_reach_the_engine(client: Client) -> None:
    client.engine.says("ok")
    fields: dict[str, Any] = {
        "top_k": 5,
        "min_p": 0.1,
        "min_tokens": 2,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
        "seed": 7,
    }
    client.chat(
        **fields,
        stop="x",
        stop_token_ids=[3],
        logit_bias={"5": -1.5},
        max_completion_tokens=9,
        priority=3,
        cache_salt="s",
    )
    command = client.engine.submitted[-1]
    assert command.sampling == SamplingParams(
        **fields, max_tokens=9, stop=("x",), stop_token_ids=(3,), logit_bias={5: -1.5}
    )
    assert command.options == RequestOptions(priority=3, cache_salt="s")
    client.chat()
    defaults = client.engine.submitted[-1].sampling
    assert (defaults.temperature, defaults.top_p) == (1.0, 1.0)  # OpenAI's defaults are the engine's
    client.chat(top_k=-1)
    assert client.engine.submitted[-1].sampling.top_k == 0


@pytest.mark.parametrize(
    ("fields", "kind", "source"),
    [
        ({"regex": "a+"}, "regex", "a+"),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"cfg": 'start: "a"'}, "cfg", 'start: "a"'),
        ({"ebnf": 'start: "a"'}, "cfg", 'start: "a"'),
        ({"guided_grammar": 'start: "a"'}, "cfg", 'start: "a"'),
        ({"ebnf": 'root ::= "a"'}, "cfg", 'start: "a"\n'),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, "cfg", 'start: "a"\n'),
        ({"structured_outputs": {"json": {"type": "null"}}}, "json_schema", '{"type":"null"}'),
        ({"structured_outputs": {"json_object": True}}, "json_schema", '{"type":"object"}'),
        ({"structured_outputs": {"choice": ["a"]}}, "choice", '["a"]'),
        ({"structural_tag": {"triggers": ["a"]}}, "structural_tag", '{"triggers":["a"]}'),
        (
            {"response_format": {"type": "structural_tag", "triggers": ["a"], "structures": []}},
            "structural_tag",
            '{"type":"structural_tag","structures":[],"triggers":["a"]}',
        ),
        ({"guided_choice": ["a", "b"]}, "choice", '["a","b"]'),
        ({"json_schema": '{"type": "null"}'}, "json_schema", '{"type": "null"}'),
        ({"json_schema": {"type": "null"}}, "json_schema", '{"type":"null"}'),
        ({"guided_json": True}, "json_schema", "true"),
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type":"object"}'),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"b": 1, "a": 2}}}},
            "json_schema",
            '{"b":1,"a":2}',
        ),
        ({"response_format": {"type": "text"}}, None, None),
    ],
)
def test_each_kind_of_constraint_reaches_the_engine(
    client: Client, fields: dict[str, Any], kind: str | None, source: str | None
) -> None:
    client.engine.says("ok")
    client.chat(**fields)
    constraint = client.engine.submitted[-1].constraint
    assert (constraint and constraint.kind, constraint and constraint.source) == (kind, source)


SCHEMA_FORMAT = {"name": "x", "schema": {"type": "object"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"json_schema": {}}, JsonForm()),
        ({"json_schema": {}, "whitespace": None, "order": None}, JsonForm()),
        ({"json_schema": {}, "whitespace": "compact", "order": "any"}, JsonForm("compact", "any")),
        ({"json_schema": {}, "additional_properties": "schema"}, JsonForm(None, None, "schema")),
        ({"guided_json": {}, "guided_whitespace_pattern": ""}, JsonForm("compact")),
        ({"structured_outputs": {"json": {}, "whitespace_pattern": "[\n\t ]*"}}, JsonForm("any")),
        ({"structured_outputs": {"json": {}, "whitespace_pattern": "indent=2"}}, JsonForm("indent=2")),
        (
            {
                "structured_outputs": {
                    "json": {},
                    "disable_any_whitespace": True,
                    "disable_additional_properties": True,
                }
            },
            JsonForm("compact", None, "closed"),
        ),
        ({"structured_outputs": {"json": {}, "disable_any_whitespace": False}}, JsonForm()),
        (
            {"response_format": {"type": "json_schema", "json_schema": {**SCHEMA_FORMAT, "whitespace": "indent=4"}}},
            JsonForm("indent=4"),
        ),
        ({"response_format": {"type": "json_object"}, "whitespace": "any"}, JsonForm("any")),
        ({"tools": [TOOL], "whitespace": "compact"}, JsonForm("compact")),
        ({"tools": [TOOL]}, JsonForm()),
        ({"structural_tag": {"triggers": ["a"]}, "order": "any"}, JsonForm(order="any")),
    ],
)
def test_the_form_of_json_reaches_the_engine(client: Client, fields: dict[str, Any], form: JsonForm) -> None:
    client.engine.says("ok")
    client.chat(**fields)
    assert client.engine.submitted[-1].constraint.form == form


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"json_schema": {}, "whitespace": "wide"}, "whitespace", "model"),
        ({"json_schema": {}, "order": "reversed"}, "order", "declared"),
        ({"json_schema": {}, "additional_properties": False}, "additional_properties", "closed"),
        ({"json_schema": {}, "guided_whitespace_pattern": "[ ]{3}"}, "guided_whitespace_pattern", "indent=2"),
        (
            {"structured_outputs": {"json": {}, "whitespace_pattern": "x"}},
            "structured_outputs.whitespace_pattern",
            "model",
        ),
        (
            {"structured_outputs": {"json": {}, "whitespace_pattern": " ?", "disable_any_whitespace": True}},
            "structured_outputs.whitespace_pattern",
            "disable_any_whitespace is 'compact'",
        ),
        ({"whitespace": "compact"}, "whitespace", "asks for none"),
        ({"regex": "a", "order": "any"}, "order", "asks for none"),
        (
            {
                "whitespace": "compact",
                "response_format": {"type": "json_schema", "json_schema": {**SCHEMA_FORMAT, "whitespace": "any"}},
            },
            "whitespace",
            "response_format.json_schema.whitespace is 'any'",
        ),
    ],
)
def test_a_form_that_is_unknown_contradictory_or_without_effect_is_refused(
    client: Client, fields: dict[str, Any], param: str, message: str
) -> None:
    error = client.refusal(CHAT, {"messages": [USER], **fields})
    assert error["param"] == param
    assert message in error["message"]


def test_the_native_and_the_completions_endpoint_take_the_form_of_json(client: Client) -> None:
    client.engine.says("ok")
    sampling = {"json_schema": {}, "whitespace": "compact", "additional_properties": "schema"}
    native = NativeSampling.model_validate(sampling).constraint(1000)
    assert native is not None
    assert native[1].form == JsonForm("compact", None, "schema")
    assert client.request(COMPLETIONS, {"prompt": "a", "json_schema": {}, "order": "any"}).status_code == 200
    assert client.engine.submitted[-1].constraint.form == JsonForm(order="any")
    assert client.refusal(COMPLETIONS, {"prompt": "a", "order": "any"})["param"] == "order"
    body = b'{"text": "a", "sampling_params": [{}, {"whitespace": "any"}]}'
    with pytest.raises(HttpError, match=r"sampling_params\[1\]\.whitespace is of JSON"):
        parsed(GenerateBody, body, 1000)


@pytest.mark.parametrize("asked", [None, "canonical", "any"])
def test_forced_text_is_tokenised_as_asked(client: Client, asked: str | None) -> None:
    client.engine.says("ok")
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}, "strict": True}}
    constraints: list[dict[str, Any]] = [{"regex": "ok"}, {"ebnf": 'root ::= "ok"'}, {"response_format": schema}]
    for fields in (*constraints, {"tools": [tool]}):
        client.chat(tokenization=asked, **fields)
        assert client.engine.submitted[-1].constraint.tokenization == (asked or "canonical")
    assert client.refusal(CHAT, {"messages": [USER], "regex": "a", "tokenization": "odd"})["param"] == "tokenization"


def test_a_constraint_larger_than_allowed_is_refused(make_client: Any) -> None:
    client = make_client(max_schema_bytes=100)
    error = client.refusal(CHAT, {"messages": [USER], "regex": "a" * 101})
    assert (error["param"], error["code"]) == ("regex", "constraint_too_large")


@pytest.mark.parametrize("model", [ChatBody, CompletionBody, TokenizeBody])
def test_the_openapi_document_has_whole_schemas(model: type[Strict]) -> None:
    schema = body_schema(model)
    assert "$ref" not in str(schema)
    assert set(schema["properties"]) == set(model.model_fields)


@pytest.mark.parametrize(
    "pattern", ["", "[ ]?", " ?", "[ ]{0,1}", r"\s?", r"[\s]?", "[ ]*", " *", r"\s*", r"[\n\t ]*", "[ \t\n]*"]
)
def test_white_space_that_a_pattern_stands_for_fits_the_pattern(pattern: str) -> None:
    meant = whitespace_named(pattern)
    assert meant is not None
    written = {"compact": [""], "model": ["", " "], "any": ["", " ", "\n", "\n\t  "]}[meant]
    assert all(re.fullmatch(pattern, text) for text in written)
