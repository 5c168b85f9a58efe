"""From a name to a model that runs."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from ramet.errors import BrokenModelFile, ConfigError, ModelNotFound
from ramet.runtime.engine.engine import Engine
from ramet.runtime.models import load
from ramet.runtime.models.load import load_model, open_model, parse_dtype
from ramet.runtime.text.tokenizer import byte_alphabet
from ramet.runtime.types import SamplingParams


def write_model(folder: Path, num_extra_tokens: int = 0, **fields: Any) -> LlamaForCausalLM:
    """A tiny random Llama of bytes, as a Hugging Face folder."""
    vocabulary = {character: index for index, character in enumerate(sorted(byte_alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", *(f"<|extra{i}|>" for i in range(num_extra_tokens))])
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 264}
    config = LlamaConfig(**sizes | heads | {"bos_token_id": None, "eos_token_id": 256} | fields)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model


def test_a_folder_becomes_a_model_with_its_tokenizer_and_defaults(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [256, 255], "temperature": 0.5}')
    model = load_model(tmp_path, device="cpu", dtype="float32")
    assert model.name == str(tmp_path)
    assert model.decoder.config is model.config
    assert model.tokenizer.eos_ids == {255, 256}
    assert model.tokenizer.vocab_size == model.config.vocab_size == 264
    assert model.generation.temperature == 0.5


def test_reading_tells_how_much_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path)
    monkeypatch.setattr(load, "_TELL_S", 0.0)
    told: list[str] = []
    load_model(tmp_path, device="cpu", on_stage=told.append)
    parts = [re.fullmatch(r"reading weights: ([\d.]+) (bytes|kB) of ([\d.]+) kB, [\d.]+ \S+/s", line) for line in told]
    sizes = [float(part[1]) * (1 if part[2] == "kB" else 1e-3) for part in parts if part is not None]
    assert len(sizes) == len(told)
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 10
    (whole,) = {float(part[3]) for part in parts if part is not None}
    assert sizes[-1] == whole == round((tmp_path / "model.safetensors").stat().st_size / 1000, 1)


def bytes_read() -> int:
    """Of this process, by its calls to the system."""
    return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])


def test_files_are_read_ahead_by_threads_that_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / name for name in ("a", "b")]
    for file in files:
        file.write_bytes(bytes(20 << 20))
    before = bytes_read()
    with load.read_ahead(files):
        while bytes_read() - before < 40 << 20:
            time.sleep(0.001)
    with load.read_ahead([*files, *files]):
        files[1].unlink()
    with pytest.raises(ZeroDivisionError), load.read_ahead(files[:1]):
        raise ZeroDivisionError
    assert not [thread for thread in threading.enumerate() if "read-ahead" in thread.name]
    monkeypatch.setattr(os, "sysconf", lambda name: 4096)  # 16 MiB of memory
    before = bytes_read()
    with load.read_ahead(files[:1]):
        assert not [thread for thread in threading.enumerate() if "read-ahead" in thread.name]
    assert bytes_read() - before < 1 << 20


def test_a_tokenizer_that_is_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, num_extra_tokens=20)
    with pytest.raises(BrokenModelFile, match="277 tokens but the model embeds 264"):
        open_model(tmp_path)


def test_an_end_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [256, 999]}')
    with pytest.raises(BrokenModelFile, match=r"\[999\]"):
        open_model(tmp_path)


@pytest.mark.parametrize("quantization", [None, "int8", "fp8"])
def test_dummy_weights_need_no_files(tmp_path: Path, quantization: str | None) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    texts = []
    for _ in range(2):
        with Engine(str(tmp_path), load_format="dummy", quantization=quantization, num_kv_tokens=512) as engine:
            texts.append(
                engine.generate("once", SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)).token_ids
            )
    assert len(texts[0]) == 8
    assert texts[0] == texts[1]
    with pytest.raises(BrokenModelFile, match="holds neither"):
        Engine(str(tmp_path))


def test_dtypes_have_names() -> None:
    assert parse_dtype("bfloat16") is torch.bfloat16
    assert parse_dtype(torch.float16) is torch.float16
    assert parse_dtype("auto") == "auto"
    with pytest.raises(ConfigError, match="int7"):
        parse_dtype("int7")


def test_an_unknown_model_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ModelNotFound, match="no-such-model"):
        load_model("no-such-model")


@pytest.mark.model
def test_smollm2_opens_with_everything_that_a_chat_needs(smollm2_path: Path) -> None:
    files, _ = open_model(smollm2_path)
    assert files.config.num_layers == 30
    assert files.config.eos_ids == (2,)
    text = files.tokenizer.chat_template.render([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    ids = files.tokenizer.encode(text, parse_special=True)
    assert files.tokenizer.decode(ids[:3]) == "<|im_start|>system\n"
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
