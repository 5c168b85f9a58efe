"""Models that transformers runs inside the engine, without a native family or in memory: the tokens of `generate`."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ramet.errors import BrokenModelFile, ConfigError, UnsupportedArchitecture
from ramet.lang.program.function import function
from ramet.lang.recording.primitives import gen
from ramet.lang.recording.state import State
from ramet.runtime.engine.engine import Engine
from ramet.runtime.models.load import is_for_transformers
from ramet.runtime.models.transformers_model import TransformersDecoder
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer
from ramet.runtime.types import SamplingParams

TOKENIZER = ByteTokenizer()
SIZES: dict[str, Any] = {
    "vocab_size": TOKENIZER.vocab_size,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# name: (configuration class, fields beside SIZES, do its layers call our attention)
MODELS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "olmo2": ("Olmo2Config", {"num_key_value_heads": 2}, True),
    "phi3": ("Phi3Config", {"num_key_value_heads": 2}, True),
    "granite": (
        "GraniteConfig",
        {"num_key_value_heads": 2, "logits_scaling": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5},
        True,
    ),
    "stablelm": ("StableLmConfig", {"num_key_value_heads": 2}, True),
    "gpt_neox": ("GPTNeoXConfig", {}, True),
    "falcon": ("FalconConfig", {"alibi": False}, False),
    "cohere": ("CohereConfig", {"num_key_value_heads": 2, "logit_scale": 0.25}, True),
    "opt": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64}, True),
    "mpt": ("MptConfig", {"max_seq_len": 512}, False),
    "olmoe": ("OlmoeConfig", {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}, True),
    # Beyond the ten: windows that layers hand on, a soft cap, sinks.
    "cohere2": ("Cohere2Config", {"num_key_value_heads": 2, "sliding_window": 16}, True),
    "gemma2": ("Gemma2Config", {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16}, False),
    "gpt_oss": (
        "GptOssConfig",
        {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "sliding_window": 16, "rope_scaling": None},
        False,
    ),
}
NUM_NEW = 12
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True)


def model_of(name: str) -> Any:
    class_name, fields, _ = MODELS[name]
    torch.manual_seed(list(MODELS).index(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers about its own defaults
        config = getattr(transformers, class_name)(**(SIZES | fields))
        return transformers.AutoModelForCausalLM.from_config(config).eval()


class Served:
    """A model in an engine, and what transformers' `generate` makes of ten prompts of 50 tokens."""

    def __init__(self, name: str) -> None:
        model = model_of(name)
        self.prompts = torch.randint(0, 256, (10, 50)).tolist()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.expected = [
                model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NUM_NEW, use_cache=True)[0, 50:]
                for prompt in self.prompts
            ]
        self.expected = [tuple(tokens.tolist()) for tokens in self.expected]
        self.engine = Engine(model, tokenizer=TOKENIZER, num_kv_tokens=4096, max_running_requests=16)


@pytest.fixture(scope="module", params=list(MODELS))
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    served = Served(request.param)
    with served.engine:
        decoder = served.engine.model.decoder
        assert isinstance(decoder, TransformersDecoder)
        assert (decoder.cache_name is None) == MODELS[request.param][2]
        yield served


def test_greedy_tokens_equal_those_of_generate_in_one_batch_alone_and_from_the_cache(served: Served) -> None:
    engine = served.engine
    handles = [engine.submit(prompt, GREEDY) for prompt in served.prompts]
    results = [handle.result(timeout_s=60) for handle in handles]
    assert [result.token_ids for result in results] == served.expected
    again = [engine.submit(prompt, GREEDY).result(timeout_s=60) for prompt in served.prompts[:3]]
    assert [result.token_ids for result in again] == served.expected[:3]
    assert [result.usage.cached_tokens for result in again] == [49, 49, 49]
    assert engine.flush_cache()
    alone = [engine.submit(prompt, GREEDY).result(timeout_s=60) for prompt in served.prompts[:3]]
    assert [result.token_ids for result in alone] == served.expected[:3]
    assert [result.usage.cached_tokens for result in alone] == [0, 0, 0]


@function(temperature=0)
def forked(s: State) -> None:
    s += "The beginning that all branches share."
    branches = s.fork(3)
    for branch, letter in zip(branches, "abc", strict=True):
        branch += letter + gen("said", max_tokens=8, ignore_eos=True)
    branches.join()
    s += gen("number", regex="[1-9][0-9]{2}")


def test_forks_and_constraints_give_what_single_requests_give(served: Served) -> None:
    engine = served.engine
    state = forked.run(backend=engine)
    assert re.fullmatch("[1-9][0-9]{2}", state["number"])
    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    for letter, said in zip("abc", state["said"], strict=True):
        prompt = f"The beginning that all branches share.{letter}"
        assert engine.submit(prompt, sampling).result(timeout_s=60).text == said


def tokenizer_of_bytes() -> Any:
    """A tokenizer of transformers with one token for each byte."""
    vocabulary = {text: index for index, text in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="~")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of an architecture that only transformers has."""
    path: Path = tmp_path_factory.mktemp("gpt_neox")
    model_of("gpt_neox").save_pretrained(path)
    tokenizer_of_bytes().save_pretrained(path)
    return path


def test_a_folder_without_a_native_family_is_served_by_its_path(folder: Path) -> None:
    memory = Engine(model_of("gpt_neox"), tokenizer=tokenizer_of_bytes(), num_kv_tokens=512)
    with memory, Engine(folder, num_kv_tokens=512) as engine:
        assert isinstance(engine.model.decoder, TransformersDecoder)
        assert engine.context_length == 512
        result = engine.submit("the same text", GREEDY).result(timeout_s=60)
        assert result.token_ids == memory.submit("the same text", GREEDY).result(timeout_s=60).token_ids


def test_a_native_family_may_be_run_by_transformers_and_gives_the_same_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES | {"num_key_value_heads": 2})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer_of_bytes().save_pretrained(tmp_path)
    tokens = []
    for model_impl in ("ramet", "transformers"):
        with Engine(str(tmp_path), model_impl=model_impl, num_kv_tokens=512) as engine:
            assert isinstance(engine.model.decoder, TransformersDecoder) == (model_impl == "transformers")
            tokens.append(engine.submit("once upon a time", GREEDY).result(timeout_s=60).token_ids)
    assert tokens[0] == tokens[1]


def test_rotary_scalings_that_the_native_family_lacks_are_left_to_transformers(tmp_path: Path) -> None:
    fields = {"architectures": ["LlamaForCausalLM"], **SIZES, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert is_for_transformers(tmp_path, "auto")
    assert not is_for_transformers(tmp_path, "ramet")
    (tmp_path / "config.json").write_text(json.dumps(fields | {"quantization_config": {"quant_method": "gptq"}}))
    assert not is_for_transformers(tmp_path, "auto")


def test_frequencies_that_depend_on_a_batchs_longest_sequence_run_one_sequence_at_a_time() -> None:
    rotary = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, rope_parameters=rotary))
    with Engine(model, tokenizer=TOKENIZER, num_kv_tokens=512) as engine:
        assert isinstance(engine.model.decoder, TransformersDecoder)
        assert engine.model.decoder.cache_name is not None


@pytest.mark.parametrize(
    ("class_name", "fields", "message"),
    [
        ("MambaConfig", {}, "linear_attention, which have no KV pages"),
        ("T5Config", {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}, "causal language models"),
    ],
)
def test_what_has_no_kv_pages_is_refused_by_name(class_name: str, fields: dict[str, Any], message: str) -> None:
    config = getattr(transformers, class_name)(vocab_size=300, hidden_size=32, num_hidden_layers=1, **fields)
    kind = transformers.T5ForConditionalGeneration if class_name == "T5Config" else transformers.MambaForCausalLM
    with pytest.raises(UnsupportedArchitecture, match=message):
        Engine(kind(config), tokenizer=TOKENIZER)


def test_wrong_arguments_say_what_is_wanted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="model is a list but must be a name, a path or a model of transformers"):
        Engine([1, 2])
    with pytest.raises(ConfigError, match="give Engine its `tokenizer=`"):
        Engine(model_of("opt"))
    with pytest.raises(ConfigError, match="only with a model in memory"):
        Engine(str(folder), tokenizer=TOKENIZER)
    with pytest.raises(ConfigError, match="'int8' but models that transformers runs are not quantised"):
        Engine(str(folder), quantization="int8")
    for option in ({"kv_cache_dtype": "fp8_e4m3"}, {"max_loras": 1}):
        with pytest.raises(ConfigError, match=r"need.? Ramet's own layers"):
            Engine(model_of("olmo2"), tokenizer=TOKENIZER, num_kv_tokens=512, **option)
    with pytest.raises(ConfigError, match="tp is 2, but transformers computes the layers"):
        Engine(str(folder), tp=2)
    with pytest.raises(ConfigError, match="model_impl is 'vllm' but must be auto, ramet or transformers"):
        Engine(str(folder), model_impl="vllm")
    with pytest.raises(UnsupportedArchitecture, match="'GPTNeoXForCausalLM' is not supported"):
        Engine(str(folder), model_impl="ramet")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="a GGUF file; give a Hugging Face folder"):
        Engine(str(tmp_path / "m.gguf"), model_impl="transformers")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnsupportedArchitecture, match=r"'GPTNeoX.*pip install 'ramet\[transformers\]'"):
        Engine(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": {"rope_type": "klingon", "rope_theta": 10_000.0}}, "config.json: KeyError: 'klingon'"),
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "which have no KV pages"),
    ],
)
def test_what_the_configuration_shows_is_refused_before_a_weight_is_read(
    folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UnsupportedArchitecture, match=message):
        Engine(str(tmp_path))


def test_damaged_files_of_such_models_are_typed_errors(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BrokenModelFile, match="transformers cannot load"):
        Engine(str(tmp_path))
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchForCausalLM"], "model_type": "no-such"}')
    with pytest.raises(
        UnsupportedArchitecture, match=r"'NoSuchForCausalLM' is not supported.*transformers cannot read"
    ):
        Engine(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox", "hidden_size": "many"}')
    with pytest.raises(UnsupportedArchitecture, match="transformers cannot read"):
        Engine(str(tmp_path))


def test_an_engines_model_outside_it_says_how_to_get_it_back() -> None:
    model = model_of("gpt_neox")
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        expected = model(ids).logits
        for _ in range(2):  # an engine may take over what another one had
            engine = Engine(model, tokenizer=TOKENIZER, num_kv_tokens=512)
            with engine, pytest.raises(ConfigError, match="set_attn_implementation"):
                model(ids)
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(model(ids).logits, expected)
