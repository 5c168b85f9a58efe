"""Chat templates: equal to transformers' rendering, and a conversation that grows piece by piece."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from ramet.errors import BrokenModelFile, InvalidRequest
from ramet.lang.graph.ir import Role
from ramet.runtime.models.description import describe_model
from ramet.runtime.text.chat_template import ChatTemplate
from ramet.runtime.text.role_marks import MAX_SHOWN, RoleMarks

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The forms of Gemma 3 (system message inside the first user turn, roles must alternate), of Llama 3 (contents are
# trimmed) and of Qwen3 (reasoning of earlier turns is dropped), written down in short.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{% if loop.first %}{{ first }}{% endif %}{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN3 = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' and not loop.last %}{{ message.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ message.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>"}
ALL = {"chatml": CHATML, "gemma": GEMMA, "llama3": LLAMA3, "qwen3": QWEN3}
TALK = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "Name a fruit."},
    {"role": "assistant", "content": "Pear."},
    {"role": "user", "content": "Another."},
    {"role": "assistant", "content": "Fig."},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def template(name: str) -> ChatTemplate:
    return ChatTemplate(ALL[name], special_texts=SPECIAL)


def theirs(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    rendered, _ = render_jinja_template([messages], chat_template=source, **SPECIAL, **options)
    return str(rendered[0])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("prompt", [False, True])
def test_rendering_equals_that_of_transformers(name: str, count: int, prompt: bool) -> None:
    expected = theirs(ALL[name], TALK[:count], add_generation_prompt=prompt)
    assert template(name).render(TALK[:count], add_generation_prompt=prompt) == expected


def test_filters_functions_and_loop_controls_equal_those_of_transformers() -> None:
    source = (
        "{% for m in messages %}{% if loop.index0 == 2 %}{% break %}{% endif %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% endfor %}{{ tools | tojson(indent=2) }}{{ '<é>' | tojson }}{{ strftime_now('%Y') }}"
        "{% set ns = namespace(x=1) %}{% set ns.x = ns.x + 1 %}{{ ns.x }}{{ extra }}{{ eos_token }}"
    )
    ours = ChatTemplate(source, special_texts=SPECIAL).render(
        TALK, add_generation_prompt=False, tools=TOOLS, variables={"extra": [1, "a"]}
    )
    assert ours == theirs(source, TALK, tools=TOOLS, extra=[1, "a"])


@pytest.mark.parametrize("name", ALL)
def test_a_conversation_grown_role_by_role_equals_the_whole(name: str) -> None:
    chat = template(name)
    text = ""
    for index, message in enumerate(TALK):
        role = chat.role_text(TALK[:index], message["role"])
        text += role.before + message["content"] + role.after
        if name == "gemma" and index == 0:
            continue  # the system message is closed by the user message that follows
        assert text == chat.render(TALK[: index + 1], add_generation_prompt=False)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("start", [0, 1])
def test_a_long_conversation_grown_by_marks_equals_the_whole(
    name: str, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs the same for each message: the template is never shown more than `MAX_SHOWN` before it."""
    chat = template(name)
    marks, role_text = RoleMarks(chat), chat.role_text

    def bounded(previous: Any, role: str, **options: Any) -> Any:
        assert len(previous) <= MAX_SHOWN
        return role_text(previous, role, **options)

    monkeypatch.setattr(chat, "role_text", bounded)
    talk, text = None, ""
    messages = [*TALK[start:1], *TALK[1:3] * 100]
    for index, message in enumerate(messages):
        role = message["role"]
        talk, before = marks.mark(talk, "", Role(id=2 * index, role=role, is_open=True))
        talk, after = marks.mark(talk, "", Role(id=2 * index + 1, role=role, is_open=False))
        text += before + message["content"] + after
    assert text == chat.render(messages, add_generation_prompt=False)


@pytest.mark.parametrize("name", ALL)
def test_assistant_opens_with_the_generation_prompt(name: str) -> None:
    chat = template(name)
    talk = TALK[1:2]
    whole = chat.render(talk, add_generation_prompt=True)
    assert whole == chat.render(talk, add_generation_prompt=False) + chat.role_text(talk, "assistant").before


def test_generation_prompt_with_an_empty_block_of_reasoning_is_kept() -> None:
    role = template("qwen3").role_text(TALK[1:2], "assistant", variables={"enable_thinking": False})
    assert role.before == "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert role.after == "<|im_end|>\n"


def test_a_role_can_be_appended_where_the_template_rewrites_earlier_turns() -> None:
    talk = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "<think>\neasy\n</think>\n\n4"},
    ]
    assert template("qwen3").role_text(talk, "user").before == "<|im_start|>user\n"


def test_contents_are_appended_as_they_are_even_where_the_template_trims_history() -> None:
    chat = template("llama3")
    talk = [{"role": "user", "content": "  spaced  "}]
    assert chat.role_text([], "user").after == "<|eot_id|>"
    assert chat.role_text(talk, "assistant").before == "<|start_header_id|>assistant<|end_header_id|>\n\n"


def test_the_templates_own_refusal_reaches_the_caller() -> None:
    with pytest.raises(InvalidRequest, match="must alternate"):
        template("gemma").render(TALK[1:2] + TALK[1:2], add_generation_prompt=False)


def test_a_role_that_the_template_drops_is_refused() -> None:
    source = "{% for m in messages if m.role != 'tool' %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    with pytest.raises(InvalidRequest, match="does not show a tool message"):
        ChatTemplate(source).role_text(TALK[1:2], "tool")


def test_a_template_that_joins_two_messages_is_refused_with_both_texts() -> None:
    source = "{% for m in messages %}{{ m.content }}{% if loop.last %}[end]{% else %}, {% endif %}{% endfor %}"
    with pytest.raises(InvalidRequest, match=r"'\[end\]'.*', '"):
        ChatTemplate(source).role_text(TALK[1:2], "user")


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen3"])
def test_the_last_message_can_be_left_open(name: str) -> None:
    opened = template(name).render(TALK[:3], add_generation_prompt=False, continue_final_message=True)
    assert opened == theirs(ALL[name], TALK[:3], continue_final_message=True)
    assert opened.endswith("Pear.")
    with pytest.raises(InvalidRequest, match="exclude each other"):
        template(name).render(TALK[:3], add_generation_prompt=True, continue_final_message=True)


def test_text_parts_are_joined_and_other_parts_are_refused() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "user\nab<|im_end|>" in template("chatml").render(
        [{"role": "user", "content": parts}], add_generation_prompt=False
    )
    picture = [{"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(InvalidRequest, match="message 0"):
        template("chatml").render([{"role": "user", "content": picture}], add_generation_prompt=False)


def test_arguments_of_tool_calls_reach_the_template_as_objects() -> None:
    source = (
        "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": "é"}'}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    assert ChatTemplate(source).render(messages, add_generation_prompt=False) == '{"a": "é"}'
    broken = [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]
    with pytest.raises(InvalidRequest, match="arguments are no JSON"):
        ChatTemplate(source).render(broken, add_generation_prompt=False)
    assert call["function"] == {"name": "add", "arguments": '{"a": "é"}'}  # the caller's message is not changed


def test_plain_default_serves_models_without_a_template() -> None:
    chat = ChatTemplate.plain({"bos_token": "<s>"})
    assert chat.render(TALK[1:3], add_generation_prompt=True) == (
        "<s>### User:\nName a fruit.\n\n### Assistant:\nPear.\n\n### Assistant:\n"
    )
    assert chat.stop_strings == ("\n\n### ",)
    assert chat.role_text(TALK[1:2], "assistant").before == "### Assistant:\n"


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ strftime_now.__globals__['os'] }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% set x = messages.append(1) %}",
    ],
)
def test_templates_run_in_a_sandbox(attack: str) -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate(attack).render(TALK, add_generation_prompt=False)


def test_objects_do_not_reach_a_template() -> None:
    with pytest.raises(InvalidRequest, match="PosixPath"):
        ChatTemplate("{{ x }}").render(TALK, add_generation_prompt=False, variables={"x": Path()})


def test_a_template_that_does_not_parse_is_a_broken_file() -> None:
    with pytest.raises(BrokenModelFile, match="does not parse"):
        ChatTemplate("{% for m in messages %}")


@pytest.mark.parametrize("messages", [[], ["hi"], [{"content": "x"}], [{"role": "user", "content": 3}]])
def test_messages_of_a_wrong_form_are_refused(messages: list[Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        template("chatml").render(messages, add_generation_prompt=False)
    assert caught.value.param == "messages"


@pytest.mark.model
def test_smollm2_conversation_grown_role_by_role_equals_the_whole(smollm2_path: Path) -> None:
    chat = describe_model(smollm2_path).tokenizer.chat_template
    for talk in (TALK, TALK[1:]):
        text = ""
        for index, message in enumerate(talk):
            role = chat.role_text(talk[:index], message["role"])
            text += role.before + message["content"] + role.after
            assert text == chat.render(talk[: index + 1], add_generation_prompt=False)
            assert text == theirs(chat.source, talk[: index + 1])
