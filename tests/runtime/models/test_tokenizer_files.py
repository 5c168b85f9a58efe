"""Tokenizers rebuilt from GGUF metadata: splitting rules, SentencePiece scores, token types, end tokens, damage."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet.errors import BrokenModelFile
from ramet.runtime.models.config import ModelConfig, smollm2_135m
from ramet.runtime.models.gguf_file import GgufFile
from ramet.runtime.models.tokenizer_files import tokenizer_from_gguf
from ramet.runtime.text.tokenizer import SubwordTokenizer, byte_alphabet

NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6
MERGES = ["1 2", "12 3", "123 4", "h e", "l l", "he ll", "hell o", "Ġ hello", "Ġ Ġ", "ĠĠ ĠĠ", "' s", "' S", "Ċ Ċ"]
CHAT = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"


def config(**changes: Any) -> ModelConfig:
    base = smollm2_135m()
    fields = {name: getattr(base, name) for name in base.__slots__}
    return ModelConfig(**fields | {"vocab_size": 400, "eos_ids": (), "bos_id": None, "pad_id": None} | changes)


def metadata_file(path: Path, fields: dict[str, Any]) -> GgufFile:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        name = f"tokenizer.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_string(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path)


def byte_level_fields(rule: str) -> dict[str, Any]:
    tokens = [
        *sorted(byte_alphabet()),
        *(merge.replace(" ", "") for merge in MERGES),
        "<|im_start|>",
        "<|im_end|>",
        "<think>",
    ]
    types = [NORMAL] * (len(tokens) - 3) + [CONTROL, CONTROL, USER]
    fields = {"ggml.model": "gpt2", "ggml.pre": rule, "ggml.tokens": tokens, "ggml.token_type": types}
    return fields | {"ggml.merges": MERGES}


def byte_level(tmp_path: Path, rule: str, **changes: Any) -> SubwordTokenizer:
    fields = byte_level_fields(rule) | changes.pop("fields", {})
    return tokenizer_from_gguf(metadata_file(tmp_path / "m.gguf", fields), config(**changes))


def spelled(tokenizer: SubwordTokenizer, text: str, **options: Any) -> list[str]:
    return [tokenizer.token_text(token) for token in tokenizer.encode(text, **options)]


@pytest.mark.parametrize(
    ("rule", "numbers", "possessive"),
    [
        ("gpt-2", ["1234", "1"], ["'", "S"]),
        ("smollm", ["1", "2", "3", "4", "1"], ["'", "S"]),
        ("llama-bpe", ["123", "4", "1"], ["'S"]),
        ("qwen2", ["1", "2", "3", "4", "1"], ["'S"]),
        ("tekken", ["1", "2", "3", "4", "1"], ["'S"]),
        ("refact", ["1", "2", "3", "4", "1"], ["'", "S"]),
        ("dbrx", ["123", "4", "1"], ["'S"]),
        ("smaug-bpe", ["123", "4", "1"], ["'S"]),
        ("gpt-4o", ["123", "4", "1"], ["'S"]),
        ("seed-coder", ["1", "2", "3", "4", "1"], ["'S"]),
    ],
)
def test_each_rule_splits_numbers_and_endings_in_its_own_way(
    tmp_path: Path, rule: str, numbers: list[str], possessive: list[str]
) -> None:
    tokenizer = byte_level(tmp_path, rule)
    assert spelled(tokenizer, "12341") == numbers
    assert spelled(tokenizer, "'S") == possessive
    assert spelled(tokenizer, "hello hello") == ["hello", "Ġhello"]


@pytest.mark.parametrize("rule", ["qwen2", "llama-bpe", "tekken", "dbrx", "gpt-4o"])
def test_rules_agree_with_those_of_transformers(tmp_path: Path, rule: str) -> None:
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")  # transformers 5
    fields = byte_level_fields(rule)
    theirs, _ = mapping.convert_gguf_tokenizer(
        "llama",
        {
            "tokenizer_type": "gpt2",
            "pre_tokenizer_type": rule,
            "tokens": fields["ggml.tokens"],
            "token_type": fields["ggml.token_type"],
            "merges": MERGES,
        },
    )
    ours = byte_level(tmp_path, rule)

    @given(st.text(alphabet="hello1234' \n\t.,SéÀ日!३/", max_size=24))
    def check(text: str) -> None:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids

    check()


@pytest.mark.parametrize("rule", ["smollm", "llama-bpe", "qwen2"])
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=16))
def test_byte_level_text_survives_a_round_trip(tmp_path_factory: pytest.TempPathFactory, rule: str, text: str) -> None:
    tokenizer = byte_level(tmp_path_factory.mktemp("gguf"), rule)
    expected = unicodedata.normalize("NFC", text) if rule == "qwen2" else text  # Qwen's tokenizer composes characters
    assert tokenizer.decode(tokenizer.encode(text)) == expected


def test_control_tokens_are_special_and_user_defined_ones_are_text(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path, "qwen2")
    assert spelled(tokenizer, "<think>he<|im_end|>", parse_special=True) == ["<think>", "he", "<|im_end|>"]
    assert "<|im_end|>" not in spelled(tokenizer, "<|im_end|>")
    assert spelled(tokenizer, "<think>") == ["<think>"]
    think = tokenizer.token_id("<think>")
    assert think is not None
    assert tokenizer.token_bytes[think] == b"<think>"
    assert set(tokenizer.special_tokens) == {"<|im_start|>", "<|im_end|>"}


def test_a_turn_end_that_the_chat_template_writes_ends_generation(tmp_path: Path) -> None:
    end = byte_level_fields("qwen2")["ggml.tokens"].index("<|im_end|>")
    assert byte_level(tmp_path, "qwen2", eos_ids=(7,)).eos_ids == {7}
    assert byte_level(tmp_path, "qwen2", eos_ids=(7,), fields={"chat_template": CHAT}).eos_ids == {7, end}


def test_an_unknown_rule_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BrokenModelFile, match=r"'klingon' \(tokenizer\.ggml\.pre\)"):
        byte_level(tmp_path, "klingon")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ggml.model": "bert"}, "'bert' is not supported"),
        ({"ggml.token_type": [1, 1]}, "token_type must have one number"),
        ({"ggml.merges": ["q q"]}, "cannot be built"),
    ],
)
def test_damage_is_named(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BrokenModelFile, match=message):
        byte_level(tmp_path, "qwen2", fields=fields)


def test_more_tokens_than_logits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BrokenModelFile, match="logits for 100"):
        byte_level(tmp_path, "qwen2", vocab_size=100)


# ---- SentencePiece ----

PIECES = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
PIECES += [(f"<0x{value:02X}>", 0.0, BYTE) for value in range(256)]
PIECES += [(piece, -20.0, NORMAL) for piece in "▁abc"]
PIECES += [("ab", -3.0, NORMAL), ("bc", -1.0, NORMAL), ("abc", -2.0, NORMAL), ("▁a", -4.0, NORMAL), ("  ", 0.0, USER)]


def sentencepiece(tmp_path: Path, **extra: Any) -> SubwordTokenizer:
    fields: dict[str, Any] = {"ggml.model": "llama", "ggml.unknown_token_id": 0}
    fields["ggml.tokens"] = [piece for piece, _, _ in PIECES]
    fields["ggml.scores"] = [score for _, score, _ in PIECES]
    fields["ggml.token_type"] = [kind for _, _, kind in PIECES]
    return tokenizer_from_gguf(metadata_file(tmp_path / "m.gguf", fields | extra), config(bos_id=1, eos_ids=(2,)))


def test_pieces_are_joined_best_score_first(tmp_path: Path) -> None:
    tokenizer = sentencepiece(tmp_path, **{"ggml.add_space_prefix": False})
    assert spelled(tokenizer, "abc") == ["abc"]  # bc first, then a + bc
    assert spelled(tokenizer, "abab") == ["ab", "ab"]
    assert spelled(tokenizer, " ab") == ["▁", "ab"]  # ab scores better than ▁a


def test_unknown_characters_fall_back_to_bytes(tmp_path: Path) -> None:
    tokenizer = sentencepiece(tmp_path, **{"ggml.add_space_prefix": False})
    assert spelled(tokenizer, "é") == ["<0xC3>", "<0xA9>"]
    assert [tokenizer.token_bytes[token] for token in tokenizer.encode("aé")] == [b"a", b"\xc3", b"\xa9"]
    assert tokenizer.decode(tokenizer.encode("a é\n🎉")) == "a é\n🎉"


def test_runs_of_spaces_that_the_file_defines_are_taken_whole(tmp_path: Path) -> None:
    tokenizer = sentencepiece(tmp_path, **{"ggml.add_space_prefix": False})
    assert spelled(tokenizer, "a   b") == ["a", "  ", "▁", "b"]


def test_prefix_space_is_added_unless_the_file_or_the_caller_says_otherwise(tmp_path: Path) -> None:
    tokenizer = sentencepiece(tmp_path)
    assert spelled(tokenizer, "ac") == ["▁a", "c"]
    assert spelled(tokenizer, "ac", continues=True) == ["a", "c"]
    assert tokenizer.decode(tokenizer.encode("ac")) == "ac"
    assert spelled(sentencepiece(tmp_path, **{"ggml.add_space_prefix": False}), "ac") == ["a", "c"]


def test_begin_of_text_is_added_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    assert sentencepiece(tmp_path).encode("a", add_special=True)[0] == 1
    assert sentencepiece(tmp_path, **{"ggml.add_bos_token": False}).encode("a", add_special=True)[0] != 1
