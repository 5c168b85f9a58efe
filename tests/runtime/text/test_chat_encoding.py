"""Messages cannot forge special tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet.runtime.models.description import describe_model
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer
from ramet.runtime.text.chat_encoding import encode_marked, render_marked
from ramet.runtime.text.chat_template import ChatTemplate
from ramet.runtime.text.tokenizer import Tokenizer

TOKENIZER = ByteTokenizer()


def encode_chat(tokenizer: Tokenizer, messages: list[dict[str, str]], **options: Any) -> list[int]:
    return encode_marked(tokenizer, render_marked(tokenizer, messages, **options))


def with_template(source: str) -> ByteTokenizer:
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = ChatTemplate(source)
    return tokenizer


pieces = st.sampled_from(["<|im_end|>", "<|im_start|>", "<|im_", "end|>", "a", "é", "\n", "\uf8f0", "\uf8f1", "system"])
contents = st.lists(pieces, max_size=8).map("".join)


@given(st.lists(contents, min_size=1, max_size=3))
def test_special_tokens_are_the_templates_alone_and_the_text_is_unchanged(talk: list[str]) -> None:
    messages = [{"role": "user", "content": text} for text in talk]
    ids = encode_chat(TOKENIZER, messages, add_generation_prompt=True)
    specials = [token for token in ids if token in TOKENIZER.special_ids]
    start, end = TOKENIZER.special_tokens["<|im_start|>"], TOKENIZER.special_tokens["<|im_end|>"]
    assert specials == [start, end] * len(talk) + [start]
    rendered = TOKENIZER.chat_template.render(messages, add_generation_prompt=True)
    assert TOKENIZER.decode(ids) == rendered.replace("\uf8f0", "").replace("\uf8f1", "")


def test_a_template_that_cuts_contents_cannot_join_a_special_token() -> None:
    tokenizer = with_template(
        "{% for m in messages %}{{ m.content.split('|')[0] }}{{ m.content.split('|')[-1] }}{% endfor %}"
    )
    for content in ("<|im_end|>", "<|x<|im_end|>|im_end|>"):
        ids = encode_chat(tokenizer, [{"role": "user", "content": content}], add_generation_prompt=False)
        assert not set(ids) & TOKENIZER.special_ids


def test_arguments_of_tools_are_text_too() -> None:
    tokenizer = with_template("{{ tools | tojson }}{{ messages[0].content }}")
    tools = [{"type": "function", "function": {"name": "f", "description": "<|im_end|>"}}]
    ids = encode_chat(tokenizer, [{"role": "user", "content": ""}], add_generation_prompt=False, tools=tools)
    assert not set(ids) & TOKENIZER.special_ids
    assert "<|im_end|>" in TOKENIZER.decode(ids)


@pytest.mark.model
def test_ordinary_messages_have_the_ids_of_the_parsed_text(smollm2_path: Path) -> None:
    tokenizer = describe_model(smollm2_path).tokenizer
    messages = [
        {"role": "system", "content": "Be brief: 12 words."},
        {"role": "user", "content": "Why is  it\n\nblue?"},
    ]
    text = tokenizer.chat_template.render(messages, add_generation_prompt=True)
    ids = encode_chat(tokenizer, messages, add_generation_prompt=True)
    assert ids == tokenizer.encode(text, parse_special=True)
    assert ids[0] == 1
