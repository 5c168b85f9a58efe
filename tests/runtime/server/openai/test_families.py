"""Families of chat templates: each one's own way of calling tools, and conversations that stay in the cache."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ramet.grammar import Matcher
from ramet.grammar.tools.formats import FORMATS
from ramet.lang.graph.ir import Constraint
from ramet.runtime.programs.grammars import ProgramGrammars
from ramet.runtime.server.openai.tool_calls import AnswerReader
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer
from ramet.runtime.text.chat_template import ChatTemplate
from ramet.runtime.text.role_marks import RoleMarks
from ramet.runtime.text.tool_style import ToolStyle, tool_style

Client = Any  # of conftest.py
Json = dict[str, Any]
FOLDER = Path(__file__).resolve().parents[2] / "data" / "chat_templates"
# family -> (format, the template writes tools, calls, results; calls in one answer; length of ids)
FAMILIES: dict[str, tuple[str, bool, bool, bool, int | None, int | None]] = {
    "llama3": ("llama3", True, True, True, 1, None),
    "qwen2.5": ("hermes", True, True, True, None, None),
    "qwen3": ("hermes", True, True, True, None, None),
    "mistral": ("mistral", True, True, True, None, 9),
    "smollm2": ("smollm2", False, False, True, None, None),
    "gemma": ("gemma", False, False, False, None, None),
    "granite": ("granite", True, False, True, None, None),
    "seed_oss": ("seed-oss", True, True, True, None, None),
    "qwen3-coder": ("qwen3-coder", True, True, True, None, None),
}
ENDS = ("<|eot_id|>", "<|im_end|>", "</s>", "<end_of_turn>", "<|end_of_text|>", "<seed:eos>")
ADD: Json = {
    "type": "object",
    "properties": {"a": {"type": "array", "items": {"type": "integer"}}, "note": {"type": "string"}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOLS: list[Json] = [
    {"type": "function", "function": {"name": "add", "parameters": ADD}},
    {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}},
]
USER: Json = {"role": "user", "content": "What is 1 + 2?"}
GIVEN = {"a": [1, 2], "note": 'é "} </tool_call>'}


def source_of(family: str) -> str:
    return (FOLDER / f"{family}.jinja").read_text()


def template_of(family: str) -> ChatTemplate:
    return ChatTemplate(source_of(family), special_texts={"bos_token": "<s>", "eos_token": "</s>"})


def written_by(template: ChatTemplate, style: ToolStyle, num_calls: int) -> str:
    """What the template writes for an answer of calls, up to what ends the turn."""
    calls = [
        {
            "id": style.new_call_id(),
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(given, ensure_ascii=False)},
        }
        for name, given in [("add", GIVEN), ("find", {})][:num_calls]
    ]
    messages, tools = style.adapt([USER, {"role": "assistant", "content": "", "tool_calls": calls}], TOOLS)
    opened = template.render(messages[:-1], add_generation_prompt=True, tools=tools)
    text = template.render(messages, add_generation_prompt=False, tools=tools)
    assert text.startswith(opened.rstrip())
    text = text[len(opened.rstrip()) :].strip()
    end = next(end for end in ENDS if text.endswith(end))
    return text.removesuffix(end)


def accepted(style: ToolStyle, text: bytes, choice: str = "auto") -> int:
    """How many bytes of a text the grammar of a request with these tools takes; one more where it may end there."""
    source = style.tool_set(TOOLS, choice, parallel=True, answer=None)
    tokenizer = ByteTokenizer()
    cache = ProgramGrammars(tokenizer, RoleMarks(tokenizer.chat_template))
    matcher = Matcher(cache.get(Constraint("tools", json.dumps(source))).result(60))
    for index, byte in enumerate(text):
        if not allows(matcher, byte):
            return index
        matcher.advance(byte)
    cache.close()
    return len(text) + int(allows(matcher, 256))


def allows(matcher: Any, token: int) -> bool:
    return bool(int(matcher.mask()[token // 32]) >> (token % 32) & 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_way_of_calling_is_read_from_the_template(family: str) -> None:
    style = tool_style(template_of(family))
    name, tools, calls, results, max_calls, id_length = FAMILIES[family]
    known = FORMATS[name]
    assert (style.format.marker, style.format.before_name) == (known.marker, known.before_name)
    assert re.sub(r"\s", "", style.format.begin) == known.begin
    assert (style.shows_tools, style.shows_calls, style.shows_results) == (tools, calls, results)
    assert (style.max_calls, style.id_length) == (max_calls, id_length)


def test_white_space_before_calls_is_the_templates_own() -> None:
    assert tool_style(template_of("mistral")).format.begin == "[TOOL_CALLS] ["
    tight = source_of("mistral").replace("[TOOL_CALLS] [", "[TOOL_CALLS][")
    style = tool_style(ChatTemplate(tight, special_texts={"eos_token": "</s>"}))
    assert style.format == FORMATS["mistral"]


CALLS_WITH_IDS = (
    "{% for m in messages %}{% if m.tool_calls is defined %}{% for c in m.tool_calls %}[TOOL_CALLS]"
    "{{ c.function.name }}[CALL_ID]{{ c.id }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}</s>{% else %}"
    "[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endif %}{% endfor %}"
)


def test_a_derived_format_has_what_the_template_writes_between_two_calls() -> None:
    style = tool_style(ChatTemplate(CALLS_WITH_IDS))
    assert (style.format.before_name, style.format.separator) == ("[TOOL_CALLS]", "")
    assert style.format.before_arguments.startswith("[CALL_ID]")
    calls = style.read_calls(style.written([("add", '{"a": 1}'), ("find", "{}")]).encode())["calls"]
    assert calls == [{"name": "add", "arguments": {"a": 1}}, {"name": "find", "arguments": {}}]


def test_the_model_that_thinks_has_another_format_than_its_smaller_sister() -> None:
    thinks = "{{ 'Reasoning Mode: /think' }}" + source_of("smollm2")
    assert tool_style(ChatTemplate(thinks)).format == FORMATS["hermes"]


@pytest.mark.parametrize("num_calls", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_template_writes_is_read_as_the_same_calls_and_is_in_the_grammar(family: str, num_calls: int) -> None:
    template = template_of(family)
    style = tool_style(template)
    if style.max_calls is not None and num_calls > style.max_calls:
        pytest.skip("the template refuses several calls in one answer")
    text = written_by(template, style, num_calls)
    text = re.sub(r', "id": "\w{9}"', "", text)  # Mistral's models do not write ids; the template adds them later
    text = text.removeprefix("<think>\n\n</think>").lstrip()  # Qwen3's: the reasoning of an answer that had none
    reader = AnswerReader(None, style, TOOLS)
    for character in text:
        reader.push(character)
    reader.finish()
    expected = [("add", GIVEN, True), ("find", {}, True)][:num_calls]
    assert [(c.name, json.loads(c.arguments), c.is_complete) for c in reader.calls] == expected
    assert reader.content == ""
    data = text.encode()
    assert accepted(style, data) == accepted(style, data, "required") == len(data) + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_free_text_is_free_and_a_call_is_constrained_from_its_marker_on(family: str) -> None:
    style = tool_style(template_of(family))
    free = b'Well, {"x": 1} <tool [TOOL and so on. '
    assert accepted(style, free) == len(free) + 1
    assert accepted(style, free, "required") < len(free)
    marker = (style.format.begin + style.format.before_name).encode()
    start = b"" if style.format.is_only_at_start else free
    assert accepted(style, start + marker) == len(start + marker)  # it cannot end here
    for wrong in (b"gone", b'add", "x"', b'"'):
        assert accepted(style, start + marker + wrong) < len(start + marker + wrong)
    head = marker + b"add" + style.format.before_arguments.encode()
    if style.format.before_key:
        for wrong in (b"{", b"</", b"<parameter=b", b"<parameter=note", b"<parameter=a>x"):
            assert accepted(style, start + head + wrong) < len(start + head + wrong)
        return
    for wrong in (b'{"b"', b'{"a": "', b"[", b"{}"):
        assert accepted(style, start + head + wrong) < len(start + head + wrong)
    assert accepted(style, start + head + b'{"a": [3') == len(start + head) + 8


# ---- special tokens that write calls ----


class MarkedTokenizer(ByteTokenizer):
    """Bytes, and Mistral's markers as special tokens."""

    def __init__(self) -> None:
        super().__init__(vocab_size=272)
        for index, text in enumerate(("[TOOL_CALLS]", "[INST]", "[/INST]", "</s>")):
            self.special_tokens[text] = 262 + index
        self._names = {token: text for text, token in self.special_tokens.items()}
        self._special = re.compile("|".join(re.escape(text) for text in self.special_tokens))
        self.chat_template = template_of("mistral")


def test_a_marker_that_is_a_special_token_can_be_written_and_no_other_one() -> None:
    tokenizer = MarkedTokenizer()
    style = tool_style(tokenizer.chat_template)
    source = json.dumps(style.tool_set(TOOLS, "auto", parallel=True, answer=None))
    cache = ProgramGrammars(tokenizer, RoleMarks(tokenizer.chat_template))
    matcher = Matcher(cache.get(Constraint("tools", source)).result(60))
    marker = tokenizer.special_tokens["[TOOL_CALLS]"]
    assert allows(matcher, marker)
    assert not allows(matcher, tokenizer.special_tokens["[INST]"])
    matcher.advance(marker)
    assert [token for token in range(272) if allows(matcher, token)] == [ord(" ")]
    for byte in b' [{"name": "find", "arguments": {}}]':
        matcher.advance(byte)
    assert allows(matcher, tokenizer.special_tokens["<|endoftext|>"])
    cache.close()


def test_calls_behind_a_special_token_come_as_calls(make_client: Any, replay: Any) -> None:
    tokenizer = MarkedTokenizer()
    client = make_client(tokenizer=tokenizer)
    marker = tokenizer.special_tokens["[TOOL_CALLS]"]

    def script(command: Any) -> Any:
        outputs = replay(command, ' [{"name": "find", "arguments": {}}]', cuts=[3, 9])
        outputs[0].token_ids = [marker, *outputs[0].token_ids]
        return outputs

    client.engine.script = script
    choice = client.chat(tools=TOOLS)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert (call["function"]["name"], call["function"]["arguments"]) == ("find", "{}")
    assert re.fullmatch(r"\w{9}", call["id"])
    assert choice["message"]["content"] is None


# ---- conversations stay cached ----


def said_by(family: str, style: ToolStyle, *, thinks: bool) -> str:
    """An answer with one call, as the model of a family writes it: not as its template would write it again."""
    call = style.written([("add", '{"a":[1,2]}')])
    return f"<think>\nhm\n</think>\n\n{call}" if thinks else call


@pytest.mark.parametrize("with_tools", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_turn_goes_on_from_the_tokens_of_the_turns_before(
    make_client: Any, family: str, with_tools: bool
) -> None:
    client = make_client(source_of(family))
    client.engine.cached_tokens = 10_000
    style = tool_style(client.tokenizer.chat_template)
    thinks = family == "qwen3"
    messages: list[Json] = [USER]
    fields: Json = {"tools": TOOLS} if with_tools else {}
    path: list[int] = []
    for turn in range(4):
        is_call = with_tools and turn % 2 == 0
        said = (
            said_by(family, style, thinks=thinks)
            if is_call
            else "<think>\nso\n</think>\n\nIt is 3." * thinks or "It is 3."
        )
        client.engine.says(said)
        answer = client.chat(messages=messages, **fields)
        prompt = client.engine.submitted[-1].prompt_ids
        if turn:
            assert answer["usage"]["history"] == {"reused_tokens": len(path), "reason": None}
            assert prompt[: len(path)] == path
        path = [*prompt, *said.encode()]
        message = {k: v for k, v in answer["choices"][0]["message"].items() if k != "refusal"}
        messages = [*messages, message]
        for call in message.get("tool_calls", ()):
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": "3"})
        if not is_call:
            messages.append({"role": "user", "content": f"And {turn}?"})


@pytest.mark.parametrize("family", FAMILIES)
def test_why_a_turn_is_not_reused_names_the_message(make_client: Any, family: str) -> None:
    client = make_client(source_of(family))
    client.engine.says("It is 3.")
    client.chat(messages=[USER])
    messages = [USER, {"role": "assistant", "content": "It was 3."}, {"role": "user", "content": "And?"}]
    history = client.chat(messages=messages)["usage"]["history"]
    assert history["reused_tokens"] == 0
    assert "message 1 (assistant)" in history["reason"]
    assert "character 3" in history["reason"]
