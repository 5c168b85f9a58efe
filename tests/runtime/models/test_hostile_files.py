"""Model files are input from strangers: whatever is in them, they load or end with a typed error, in little memory."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import gguf
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ramet.errors import BrokenModelFile, ModelError
from ramet.runtime.models.config_files import config_from_hf
from ramet.runtime.models.description import describe_folder, describe_gguf
from ramet.runtime.models.gguf_file import GgufFile
from ramet.runtime.models.json_file import read_json
from ramet.runtime.models.loader_gguf import load_gguf
from ramet.runtime.models.loader_safetensors import load_safetensors
from ramet.runtime.models.weights import expected_tensors
from ramet.runtime.text.tokenizer import byte_alphabet

MOST_BYTES = 150 << 20  # more than any of these small files may take
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 16,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "tie_word_embeddings": False,
    "vocab_size": 259,
    "bos_token_id": 257,
    "eos_token_id": [258],
}
TOKENS = [*byte_alphabet(), "ab", "<bos>", "<eos>"]
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def write_folder(folder: Path) -> None:
    """A model of Hugging Face's layout with zeros for weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(TOKENS)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "chat_template": TEMPLATE}
    settings["added_tokens_decoder"] = {"258": {"content": "<eos>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "eos_token_id": [258]}))
    shapes = expected_tensors(config_from_hf(CONFIG))
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, folder / "model.safetensors")


def write_gguf(path: Path, change: Callable[[gguf.GGUFWriter], None] = lambda writer: None) -> None:
    """The same model as a GGUF file."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(24)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * 257 + [3, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_chat_template(TEMPLATE)
    for name, shape in {
        "token_embd": (259, 16),
        "output": (259, 16),
        "output_norm": (16,),
        "blk.0.attn_norm": (16,),
        "blk.0.ffn_norm": (16,),
        "blk.0.attn_q": (16, 16),
        "blk.0.attn_k": (8, 16),
        "blk.0.attn_v": (8, 16),
        "blk.0.attn_output": (16, 16),
        "blk.0.ffn_gate": (24, 16),
        "blk.0.ffn_up": (24, 16),
        "blk.0.ffn_down": (16, 24),
    }.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, dtype=np.float32))
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def open_gguf(path: Path) -> None:
    file = GgufFile(path)
    described = describe_gguf(file)
    weights = load_gguf(file, described.config)
    for name in expected_tensors(described.config):
        weights[name]


def open_folder(folder: Path) -> None:
    described = describe_folder(folder)
    weights = load_safetensors(folder, described.config)
    for name in expected_tensors(described.config):
        weights[name]


@contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MOST_BYTES, f"{peak:,} bytes"


def test_the_files_that_are_changed_below_load(tmp_path: Path) -> None:
    write_folder(tmp_path / "m")
    open_folder(tmp_path / "m")
    write_gguf(tmp_path / "m.gguf")
    open_gguf(tmp_path / "m.gguf")


# -- GGUF ------------------------------------------------------------------------------------------------------------


def header(num_tensors: int, num_keys: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_keys)


def text(value: bytes, claimed: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if claimed is None else claimed) + value


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: bytes, shape: tuple[int, ...], offset: int, kind: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


NESTED = b"".join(struct.pack("<IQ", 9, 1) for _ in range(200_000))
HOSTILE = {
    "alignment 0": header(0, 1) + key(b"general.alignment", 4, struct.pack("<I", 0)),
    "alignment 3": header(0, 1) + key(b"general.alignment", 4, struct.pack("<I", 3)),
    "alignment of 4 GB": header(0, 1) + key(b"general.alignment", 4, struct.pack("<I", 1 << 31)),
    "alignment a text": header(0, 1) + key(b"general.alignment", 8, text(b"32")),
    "nested arrays": header(0, 1) + key(b"a", 9, NESTED),
    "24 MB of empty arrays": header(0, 1) + key(b"a", 9, struct.pack("<IQ", 9, 2_000_000)) + bytes(24_000_000),
    "40 MB of empty texts": header(0, 1) + key(b"a", 9, struct.pack("<IQ", 8, 5_000_000)) + bytes(40_000_000),
    "an array of 2^60 texts": header(0, 1) + key(b"a", 9, struct.pack("<IQ", 8, 1 << 60)),
    "an array of 2^60 numbers": header(0, 1) + key(b"a", 9, struct.pack("<IQ", 4, 1 << 60)),
    "40 MB of numbers": header(0, 1) + key(b"a", 9, struct.pack("<IQ", 0, 40_000_000)) + bytes(40_000_000),
    "a text of 2^63 bytes": header(0, 1) + key(b"a", 8, text(b"", 1 << 63)),
    "a key of 2^64 - 1 bytes": header(0, 1) + text(b"", (1 << 64) - 1),
    "2^64 - 1 keys": header(0, (1 << 64) - 1),
    "2^64 - 1 tensors": header((1 << 64) - 1, 0),
    "a key twice": header(0, 2) + key(b"a", 0, b"\x01") * 2,
    "a tensor twice": header(2, 0) + tensor(b"t", (1,), 0) + tensor(b"t", (1,), 32) + bytes(200),
    "tensors that overlap": header(2, 0) + tensor(b"t", (32,), 0) + tensor(b"u", (32,), 64) + bytes(400),
    "a tensor past the end": header(1, 0) + tensor(b"t", (32,), 1 << 40) + bytes(200),
    "a tensor at an odd place": header(1, 0) + tensor(b"t", (1,), 3) + bytes(200),
    "a shape of 2^62": header(1, 0) + tensor(b"t", (1 << 62,), 0) + bytes(200),
    "a shape of 2^62 by 4": header(1, 0) + tensor(b"t", (1 << 62, 4), 0) + bytes(200),
    "a shape with 0": header(1, 0) + tensor(b"t", (0, 1 << 63), 0) + bytes(200),
    "five dimensions": header(1, 0) + tensor(b"t", (1, 1, 1, 1, 1), 0) + bytes(200),
    "an unknown tensor type": header(1, 0) + tensor(b"t", (32,), 0, 4_000_000_000) + bytes(200),
    "an unknown value type": header(0, 1) + key(b"a", 99, bytes(8)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_gguf_file_is_refused_in_little_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(HOSTILE[name])
    with little_memory(), pytest.raises(BrokenModelFile, match=r"m\.gguf"):
        GgufFile(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("llama.block_count", 10**9),
        ("llama.block_count", 0),
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count", [2, 2]),
        ("llama.attention.head_count_kv", 0),
        ("llama.embedding_length", 2**32 - 1),
        ("llama.context_length", 0),
        ("llama.context_length", "64"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan")),
        ("llama.attention.layer_norm_rms_epsilon", 0.0),
        ("llama.rope.freq_base", float("inf")),
        ("llama.rope.freq_base", -1.0),
        ("llama.rope.scaling.type", "linear"),
        ("llama.attention.sliding_window", 0),
        ("llama.attention.sliding_window_pattern", 0),
        ("tokenizer.ggml.eos_token_id", 2**32 - 1),
        ("tokenizer.ggml.bos_token_id", [1]),
        ("tokenizer.ggml.unknown_token_id", "x"),
        ("tokenizer.ggml.tokens", ["a"] * 259),
        ("tokenizer.ggml.tokens", [1] * 259),
        ("tokenizer.ggml.token_type", ["x"] * 259),
        ("tokenizer.ggml.merges", ["nospace"]),
        ("tokenizer.ggml.merges", [1, 2]),
        ("tokenizer.ggml.pre", 7),
        ("tokenizer.ggml.model", ["gpt2"]),
        ("tokenizer.chat_template", "{% for %}"),
        ("split.count", "2"),
        ("general.architecture", 7),
    ],
)
def test_a_wrong_value_of_a_gguf_file_is_a_typed_error(tmp_path: Path, name: str, value: Any) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop(name, None)
        add = {str: writer.add_string, list: writer.add_array, float: writer.add_float32, int: writer.add_uint32}
        add[type(value)](name, value)

    write_gguf(tmp_path / "m.gguf", change)
    try:
        with little_memory():
            open_gguf(tmp_path / "m.gguf")
    except ModelError:
        return
    assert name in ("llama.attention.sliding_window", "tokenizer.ggml.unknown_token_id"), "it is used without a look"


# -- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 2.0),
        ("num_hidden_layers", True),
        ("hidden_size", 10**18),
        ("num_attention_heads", 0),
        ("num_attention_heads", [2]),
        ("num_key_value_heads", 0),
        ("head_dim", 10**9),
        ("vocab_size", 2**40),
        ("intermediate_size", -1),
        ("max_position_embeddings", 0),
        ("max_position_embeddings", 10**30),
        ("rms_norm_eps", "tiny"),
        ("rms_norm_eps", float("inf")),
        ("rope_theta", 0),
        ("rope_theta", float("nan")),
        ("rope_theta", 10**400),
        ("rope_scaling", {"rope_type": "llama3", "factor": 0}),
        ("rope_scaling", {"rope_type": "linear", "factor": "x"}),
        ("rope_scaling", [1]),
        ("hidden_act", ["silu"]),
        ("hidden_act", {}),
        ("bos_token_id", 10**12),
        ("bos_token_id", "x"),
        ("eos_token_id", [[1]]),
        ("eos_token_id", 300),
        ("text_config", [1]),
        ("quantization_config", 1),
        ("architectures", 1),
        ("architectures", [["x"]]),
    ],
)
def test_a_wrong_field_of_a_configuration_is_a_typed_error(tmp_path: Path, field: str, value: Any) -> None:
    write_folder(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps(CONFIG | {field: value}))
    with little_memory(), pytest.raises(ModelError):
        open_folder(tmp_path / "m")


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 200_000,
        b'{"a": ' * 100_000,
        b'{"a": [' + b"[]," * 8_000_000 + b"[]]}",
        b'{"a": ' + b"9" * 10_000 + b"}",
        b"\xff\xfe{}",
        b"[]",
        b"",
    ],
    ids=["deep lists", "deep objects", "24 MB of empty arrays", "a long number", "no UTF-8", "a list", "nothing"],
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_a_hostile_json_file_is_refused_in_little_memory(tmp_path: Path, name: str, content: bytes) -> None:
    write_folder(tmp_path / "m")
    (tmp_path / "m" / name).write_bytes(content)
    with little_memory(), pytest.raises(BrokenModelFile, match=name):
        open_folder(tmp_path / "m")


def test_a_json_file_of_many_megabytes_is_refused_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(BrokenModelFile, match="the limit is"):
        read_json(path)


@pytest.mark.parametrize(
    "change",
    [
        {"added_tokens": [{"id": 4_000_000_000, "content": "x", "special": True}]},
        {"model": {"type": "BPE", "vocab": {"a": 4_000_000_000}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}},
        {"model": 1},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
        {"pre_tokenizer": None, "decoder": None},
    ],
    ids=range(6),
)
def test_a_hostile_tokenizer_is_a_typed_error(tmp_path: Path, change: dict[str, Any]) -> None:
    write_folder(tmp_path / "m")
    path = tmp_path / "m" / "tokenizer.json"
    spec = json.loads(path.read_text()) | change
    path.write_text(json.dumps(spec))
    with little_memory(), pytest.raises(ModelError):
        open_folder(tmp_path / "m")


@pytest.mark.parametrize(
    "settings_",
    [
        {"added_tokens_decoder": {"x": {"special": True}}},
        {"added_tokens_decoder": {"1": 7}},
        {"added_tokens_decoder": [1]},
        {"chat_template": 7},
        {"chat_template": "{% for %}"},
        {"chat_template": [{"name": "default", "template": 7}]},
    ],
    ids=range(6),
)
def test_wrong_settings_of_a_tokenizer_are_a_typed_error(tmp_path: Path, settings_: dict[str, Any]) -> None:
    write_folder(tmp_path / "m")
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(settings_))
    with little_memory(), pytest.raises(ModelError):
        open_folder(tmp_path / "m")


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 67) + b'{"model.norm.weight":{"dtype":"F32","shape":[99],"data_offsets":[0]}}',
        b"",
        bytes(7),
    ],
    ids=range(6),
)
def test_hostile_weights_are_a_typed_error(tmp_path: Path, content: bytes) -> None:
    write_folder(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(content)
    with little_memory(), pytest.raises(ModelError):
        open_folder(tmp_path / "m")


# -- anything --------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
ONCE = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_folder(folder / "m")
    write_gguf(folder / "m.gguf")
    return folder


@ONCE
@given(st.data())
def test_a_gguf_file_with_other_bytes_loads_or_is_a_typed_error(
    whole: Path, tmp_path: Path, data: st.DataObject
) -> None:
    content = bytearray((whole / "m.gguf").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 6000))
        content[at : at + 1] = data.draw(st.binary(max_size=9))
    path = tmp_path / "m.gguf"
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))]))
    with suppress(ModelError):
        open_gguf(path)


@ONCE
@given(st.data())
def test_a_folder_with_other_values_loads_or_is_a_typed_error(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    name = data.draw(
        st.sampled_from(("config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json"))
    )
    source = whole / "m"
    folder = tmp_path / "m"
    folder.mkdir(exist_ok=True)
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    content = json.loads((source / name).read_text())
    place = content
    while isinstance(place, dict) and place:
        field = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[field], dict) or data.draw(st.booleans()):
            place[field] = data.draw(JSON)
            break
        place = place[field]
    (folder / name).write_text(json.dumps(content))
    with suppress(ModelError):
        open_folder(folder)
