"""Token ids against llama.cpp's, bytes of tokens, and tokenizers of every supported kind built small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from ramet.errors import BrokenModelFile
from ramet.runtime.models.catalog import CATALOG, cached_path, is_cached
from ramet.runtime.models.config import ModelConfig, smollm2_135m
from ramet.runtime.models.description import describe_model
from ramet.runtime.models.tokenizer_files import tokenizer_from_folder
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer
from ramet.runtime.text.tokenizer import SubwordTokenizer, Tokenizer, byte_alphabet

# Made by llama.cpp (llama-cpp-python 0.3.36, add_bos=False, special=False) from the catalogue's two files. The same
# comparison over 866 texts (sources, prose, random Unicode) had no difference for either model.
REFERENCE = json.loads((Path(__file__).parent / "data" / "token_ids.json").read_text(encoding="utf-8"))
TEXTS = [item["text"] for item in REFERENCE]


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return describe_model(smollm2_path).tokenizer


@pytest.mark.model
def test_smollm2_ids_equal_those_of_llama_cpp(smollm2: Tokenizer) -> None:
    for item in REFERENCE:
        assert smollm2.encode(item["text"]) == item["smollm2"], item["text"]


@pytest.mark.model
@pytest.mark.skipif(
    not is_cached(CATALOG["gemma3-270m"]), reason="gemma3-270m is not in the cache: ramet pull gemma3-270m"
)
def test_gemma3_ids_equal_those_of_llama_cpp() -> None:
    gemma = describe_model(cached_path(CATALOG["gemma3-270m"])).tokenizer
    for item in REFERENCE:
        assert gemma.encode(item["text"]) == item["gemma3"], item["text"]
        assert gemma.decode(item["gemma3"]) == item["text"]
    assert gemma.encode("hi", add_special=True)[0] == gemma.bos_id == 2
    assert gemma.encode("<bos>hi", add_special=True, parse_special=True).count(2) == 1


@pytest.mark.model
def test_smollm2_token_bytes_add_up_to_the_text(smollm2: Tokenizer) -> None:
    for text in TEXTS:
        ids = smollm2.encode(text)
        assert b"".join(smollm2.token_bytes[token] for token in ids) == text.encode()
        assert smollm2.decode(ids) == text


@pytest.mark.model
def test_smollm2_special_tokens_are_parsed_only_when_asked(smollm2: Tokenizer) -> None:
    text = "<|im_start|>user\nhi<|im_end|>"
    assert smollm2.encode(text, parse_special=True)[0] == smollm2.token_id("<|im_start|>") == 1
    plain = smollm2.encode(text)
    assert not set(plain) & smollm2.special_ids
    assert smollm2.decode(plain) == text
    parsed = smollm2.encode(text, parse_special=True)
    assert smollm2.decode(parsed) == text
    assert smollm2.decode(parsed, skip_special=True) == "user\nhi"


@pytest.mark.model
def test_smollm2_vocabulary_is_described_whole(smollm2: Tokenizer) -> None:
    assert len(smollm2.token_bytes) == smollm2.vocab_size == smollm2_135m().vocab_size
    assert smollm2.eos_ids == {2}
    assert smollm2.special_ids == {token for token, text in enumerate(smollm2.token_bytes) if not text}
    # A few control characters and bytes that UTF-8 never has are in no token.
    missing = {value for value in range(256) if bytes([value]) not in set(smollm2.token_bytes)}
    assert all(value < 0x20 or value in (0xC0, 0xC1) or value > 0xF0 for value in missing)


# ---- Tokenizers of each kind, small ----


def byte_level() -> tokenizers.Tokenizer:
    alphabet = {character: index for index, character in enumerate(sorted(byte_alphabet()))}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=alphabet | {"he": 256, "Ġhe": 257}, merges=[("h", "e"), ("Ġ", "he")])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    backend.add_tokens([AddedToken("<think>", special=False)])
    return backend


def sentencepiece(prefix: str) -> tokenizers.Tokenizer:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), "▁", "h", "i", "hi", "▁hi"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("h", "i"), ("▁", "hi")]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    strip = []
    if prefix == "normalizer":  # Llama 2's files
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        strip = [decoders.Strip(" ", 1, 0)]
    elif prefix == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        strip = [decoders.Strip(" ", 1, 0)]
    else:  # Gemma's files
        backend.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<unk>", "<s>", "</s>")])
    return backend


@given(st.text(max_size=20))
def test_byte_level_text_survives_a_round_trip(text: str) -> None:
    tokenizer = SubwordTokenizer(byte_level())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, parse_special=True)) == text


@pytest.mark.parametrize("prefix", ["normalizer", "metaspace", "none"])
@given(st.text(alphabet="hi é🎉x\n", max_size=12))
def test_sentencepiece_text_survives_a_round_trip_and_equals_the_packages_decoding(prefix: str, text: str) -> None:
    backend = sentencepiece(prefix)
    tokenizer = SubwordTokenizer(backend)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == backend.decode(ids, skip_special_tokens=False)
    if prefix != "metaspace" or not text.startswith(" "):  # Metaspace takes such a space for its own
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("prefix", ["normalizer", "metaspace"])
def test_text_that_continues_gets_no_prefix_space(prefix: str) -> None:
    tokenizer = SubwordTokenizer(sentencepiece(prefix))
    spelled = [tokenizer.token_text(token) for token in tokenizer.encode("hi")]
    assert spelled == ["▁hi"]
    assert [tokenizer.token_text(token) for token in tokenizer.encode("hi", continues=True)] == ["hi"]


def test_added_tokens_that_are_not_special_are_text() -> None:
    tokenizer = SubwordTokenizer(byte_level())
    ids = tokenizer.encode("<think>he<|end|>", parse_special=True)
    assert [tokenizer.token_bytes[token] for token in ids] == [b"<think>", b"he", b""]
    assert tokenizer.special_tokens == {"<|end|>": ids[-1]}


def test_ids_that_only_pad_the_vocabulary_are_special_and_empty() -> None:
    tokenizer = SubwordTokenizer(byte_level(), vocab_size=300)
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size == 300
    assert set(range(260, 300)) <= tokenizer.special_ids
    assert tokenizer.token_bytes[299] == b""


def test_begin_of_text_is_added_once_and_only_when_asked() -> None:
    tokenizer = SubwordTokenizer(sentencepiece("normalizer"), bos_id=1, add_bos=True)
    assert tokenizer.encode("hi")[0] != 1
    assert tokenizer.encode("hi", add_special=True)[0] == 1
    assert tokenizer.encode("<s>hi", add_special=True, parse_special=True).count(1) == 1
    assert tokenizer.encode("", add_special=True) == [1]


def test_a_tokenizer_whose_bytes_are_not_known_is_refused() -> None:
    backend = tokenizers.Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(BrokenModelFile, match="WordPiece"):
        SubwordTokenizer(backend)


# ---- Folders ----

CONFIG = smollm2_135m()


def write_folder(
    folder: Path, settings: dict[str, Any] | None = None, backend: tokenizers.Tokenizer | None = None
) -> None:
    (backend or byte_level()).save(str(folder / "tokenizer.json"))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def small_config(**changes: Any) -> ModelConfig:
    fields = {name: getattr(CONFIG, name) for name in CONFIG.__slots__}
    return ModelConfig(**fields | {"vocab_size": 270, "eos_ids": (), "bos_id": None} | changes)


def test_end_tokens_come_from_every_file_that_names_one(tmp_path: Path) -> None:
    backend = byte_level()
    backend.add_special_tokens(["<|turn|>", "<|doc|>"])
    write_folder(tmp_path, {"eos_token": {"content": "<|end|>"}}, backend)
    turn, doc = backend.token_to_id("<|turn|>"), backend.token_to_id("<|doc|>")
    assert turn is not None
    assert doc is not None
    tokenizer = tokenizer_from_folder(tmp_path, small_config(eos_ids=(turn,)), eos_ids=[doc])
    assert tokenizer.eos_ids == {turn, doc, backend.token_to_id("<|end|>")}


def test_chat_template_file_wins_over_the_tokenizers_settings(tmp_path: Path) -> None:
    write_folder(tmp_path, {"chat_template": "settings", "eos_token": "<|end|>"})
    assert tokenizer_from_folder(tmp_path, small_config()).chat_template.source == "settings"
    (tmp_path / "chat_template.jinja").write_text("file {{ eos_token }}")
    chat = tokenizer_from_folder(tmp_path, small_config()).chat_template
    assert chat.render([{"role": "user", "content": ""}], add_generation_prompt=False) == "file <|end|>"


def test_of_several_templates_the_tool_one_serves_calls_with_tools(tmp_path: Path) -> None:
    both = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    write_folder(tmp_path, {"chat_template": both})
    chat = tokenizer_from_folder(tmp_path, small_config()).chat_template
    message = [{"role": "user", "content": ""}]
    assert chat.render(message, add_generation_prompt=False) == "plain"
    assert chat.render(message, add_generation_prompt=False, tools=[{"type": "function"}]) == "with tools"


def test_post_processor_decides_about_begin_of_text_unless_the_settings_do(tmp_path: Path) -> None:
    backend = byte_level()
    end = backend.token_to_id("<|end|>")
    backend.post_processor = processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", end)])
    write_folder(tmp_path, {"bos_token": "<|end|>"}, backend)
    assert tokenizer_from_folder(tmp_path, small_config()).encode("a", add_special=True)[0] == end
    write_folder(tmp_path, {"bos_token": "<|end|>", "add_bos_token": False}, backend)
    assert tokenizer_from_folder(tmp_path, small_config()).encode("a", add_special=True)[0] != end


def test_a_folder_without_a_template_gets_the_plain_default(tmp_path: Path) -> None:
    write_folder(tmp_path)
    assert tokenizer_from_folder(tmp_path, small_config()).chat_template.stop_strings


@pytest.mark.parametrize("content", ["{", '{"version": "1.0"}', ""])
def test_a_damaged_tokenizer_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(BrokenModelFile, match=r"tokenizer\.json"):
        tokenizer_from_folder(tmp_path, small_config())


def test_a_folder_with_only_a_sentencepiece_model_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(BrokenModelFile, match="AutoTokenizer"):
        tokenizer_from_folder(tmp_path, small_config())


# ---- The byte tokenizer ----


@given(st.text(max_size=30))
def test_byte_tokenizer_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, parse_special=True)) == text


def test_byte_tokenizer_is_a_tokenizer_with_a_chat_template() -> None:
    tokenizer: Tokenizer = ByteTokenizer(vocab_size=320, add_bos=True)
    text = tokenizer.chat_template.render([{"role": "user", "content": "é"}], add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special=True, parse_special=True)
    assert ids[0] == tokenizer.bos_id
    assert ids[1] == tokenizer.token_id("<|im_start|>")
    assert tokenizer.decode(ids, skip_special=True) == "user\né\nassistant\n"
    assert len(tokenizer.token_bytes) == 320
    assert tokenizer.eos_ids <= tokenizer.special_ids
    with pytest.raises(ValueError, match="vocab_size"):
        ByteTokenizer(vocab_size=256)
