"""Adapters in an engine: what each request gets, what requests share, and what bad files do to a running engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ramet.errors import BrokenModelFile, ConfigError, InvalidRequest, RametError
from ramet.runtime.engine.engine import Engine
from ramet.runtime.models.build import build_decoder
from ramet.runtime.models.load import LoadedModel, open_weights
from ramet.runtime.models.weights import Weights, expected_tensors
from ramet.runtime.testing.dummy import describe_tiny, tiny_model, tiny_weights, write_dummy_adapter
from ramet.runtime.types import SamplingParams

TINY = describe_tiny()
SHAPES = {
    name.removesuffix(".weight"): shape
    for name, shape in expected_tensors(TINY.config).items()
    if len(shape) == 2 and ".layers." in name
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=0)
PROMPT = list(b"Once upon a time there was a small engine that served eight adapters at once.")
NUM = 8


def merged(changes: dict[str, torch.Tensor]) -> LoadedModel:
    """The tiny model with an adapter's changes in its weights."""
    weights = {n: w + changes.get(n.removesuffix(".weight"), 0) for n, w in tiny_weights(TINY.config).items()}
    decoder = build_decoder(TINY.config, Weights.from_tensors(weights), device="cpu", dtype=torch.float32)
    return LoadedModel("merged", decoder, TINY.tokenizer, TINY.config, TINY.generation)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Eight adapters of several ranks, of several matrices."""
    folder, names = tmp_path_factory.mktemp("adapters"), list(SHAPES)
    for i in range(NUM):
        own = SHAPES if i % 2 else {name: SHAPES[name] for name in names[i::3]}
        write_dummy_adapter(folder / f"a{i}", own, rank=1 + 2 * i, alpha=4.0 + i, seed=i)
    return [folder / f"a{i}" for i in range(NUM)]


@pytest.fixture
def engine(folders: list[Path]) -> Iterator[Engine]:
    lora = tuple(f"a{i}={path}" for i, path in enumerate(folders))
    with Engine(tiny_model(), num_kv_tokens=4096, lora=lora) as engine:
        yield engine
        engine.check_integrity()


def outcome(result: Any) -> tuple[tuple[int, ...], Any]:
    return result.token_ids, np.asarray(result.logprobs)


def test_eight_adapters_in_one_batch_give_what_each_gives_alone_and_merged(engine: Engine, folders: list[Path]) -> None:
    handles = [engine.submit(PROMPT, GREEDY, adapter=name) for name in ["", *engine.adapters]]
    together = [outcome(handle.result(timeout_s=60)) for handle in handles]
    assert len({tokens for tokens, _ in together}) > NUM // 2, "adapters that change nothing show nothing"
    for i, (tokens, logprobs) in enumerate(together):
        engine.flush_cache()
        name = f"a{i - 1}" if i else ""
        alone = outcome(engine.generate(PROMPT, GREEDY, adapter=name))
        changes = {} if not i else changes_of(folders[i - 1])
        with Engine(merged(changes), num_kv_tokens=512) as other:
            exact = outcome(other.generate(PROMPT, GREEDY))
        for theirs, their_logprobs in (alone, exact):
            assert theirs == tokens, name
            np.testing.assert_allclose(their_logprobs, logprobs, atol=1e-4)


def changes_of(folder: Path) -> dict[str, torch.Tensor]:
    settings = json.loads((folder / "adapter_config.json").read_text())
    file, scale = load_file(folder / "adapter_model.safetensors"), settings["lora_alpha"] / settings["r"]
    names = [name.removesuffix(".lora_A.weight") for name in file if name.endswith(".lora_A.weight")]
    return {
        name.removeprefix("base_model.model."): file[f"{name}.lora_B.weight"] @ file[f"{name}.lora_A.weight"] * scale
        for name in names
    }


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # PEFT asks it for a name of before
def test_peft_gives_the_same_log_probabilities(folders: list[Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed; the other tests have its format")
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=TINY.config.vocab_size, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    kinds: list[dict[str, Any]] = [
        {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        {"r": 6, "lora_alpha": 3, "use_rslora": True, "target_modules": "all-linear"},
        {
            "r": 2,
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 5},
            "alpha_pattern": {"layers.1.mlp.down_proj": 7},
        },
    ]
    expected = []
    for i, kind in enumerate(kinds):
        fresh = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model")
        adapted = peft.get_peft_model(fresh, peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **kind))
        adapted.save_pretrained(tmp_path / f"p{i}")
        with torch.no_grad():
            logits = adapted.eval()(torch.tensor([PROMPT])).logits[0]
        expected.append(torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(PROMPT)[1:, None])[:, 0].numpy())
    shapes, weights = open_weights(tmp_path / "model")
    decoder = build_decoder(shapes, weights, device="cpu", dtype=torch.float32)
    loaded = LoadedModel("tiny", decoder, TINY.tokenizer, shapes, TINY.generation)
    with Engine(loaded, num_kv_tokens=2048, max_loras=3) as engine:
        for i in range(len(kinds)):
            engine.load_adapter(f"p{i}", tmp_path / f"p{i}")
        handles = [engine.submit(PROMPT, score_from=1, adapter=f"p{i}") for i in range(len(kinds))]
        for handle, theirs in zip(handles, expected, strict=True):
            np.testing.assert_allclose(np.asarray(handle.result(timeout_s=60).prompt_logprobs), theirs, atol=1e-4)


def test_adapters_share_no_prefixes_with_each_other_or_the_model(engine: Engine) -> None:
    cached = {}
    for round_ in range(2):
        for name in ["", "a0", "a1"]:
            cached[round_, name] = engine.generate(PROMPT, GREEDY, adapter=name).usage.cached_tokens
    assert [cached[0, name] for name in ("", "a0", "a1")] == [0, 0, 0]
    assert all(cached[1, name] > len(PROMPT) // 2 for name in ("", "a0", "a1"))
    assert engine.generate(PROMPT, GREEDY, adapter="a1", cache_salt="other").usage.cached_tokens == 0


def test_an_adapter_loaded_again_under_its_name_has_its_own_prefixes(engine: Engine, folders: list[Path]) -> None:
    before = engine.generate(PROMPT, GREEDY, adapter="a1")
    engine.unload_adapter("a1")
    with pytest.raises(InvalidRequest, match="no adapter 'a1' is loaded"):
        engine.generate(PROMPT, GREEDY, adapter="a1")
    engine.load_adapter("a1", folders[3])
    after = engine.generate(PROMPT, GREEDY, adapter="a1")
    assert after.usage.cached_tokens == 0
    assert after.token_ids != before.token_ids
    assert after.token_ids == engine.generate(PROMPT, GREEDY, adapter="a3").token_ids


def test_a_request_in_flight_keeps_an_adapter_that_is_unloaded(engine: Engine, folders: list[Path]) -> None:
    long = replace_max(200)
    expected = engine.generate(PROMPT, long, adapter="a5").token_ids
    engine.flush_cache()
    handle = engine.submit(PROMPT, long, adapter="a5")
    engine.unload_adapter("a5")
    with pytest.raises(InvalidRequest, match=r"8 adapters are loaded or still in use, and --max-loras is 8"):
        engine.load_adapter("new", folders[0])
    assert handle.result(timeout_s=60).token_ids == expected
    engine.load_adapter("new", folders[0])
    assert (
        engine.generate(PROMPT, GREEDY, adapter="new").token_ids
        == engine.generate(PROMPT, GREEDY, adapter="a0").token_ids
    )


def replace_max(count: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)


def test_engines_without_room_for_adapters_say_so(folders: list[Path]) -> None:
    with Engine(tiny_model(), num_kv_tokens=512) as engine:
        assert engine.adapters == []
        with pytest.raises(InvalidRequest, match="start it with --lora or --max-loras"):
            engine.generate(PROMPT, GREEDY, adapter="a0")
        with pytest.raises(ConfigError, match="no room for adapters"):
            engine.load_adapter("a0", folders[0])
    with pytest.raises(ConfigError, match="lora and max_loras need tp=1"):
        Engine(tiny_model(), tp=2, max_loras=2)
    with pytest.raises(ConfigError, match=r"lora is .* but must be a tuple of texts name=path"):
        Engine(tiny_model(), lora=("a0",))


def damaged(kind: str, good: Path, folder: Path) -> Path:
    """A copy of an adapter with one thing wrong."""
    folder.mkdir()
    config, weights = good / "adapter_config.json", good / "adapter_model.safetensors"
    settings, tensors, data = json.loads(config.read_text()), load_file(weights), weights.read_bytes()
    first = next(name for name in tensors if ".lora_A." in name)
    if kind == "another model's shapes":
        tensors[first] = torch.zeros(tensors[first].shape[0], 7)
    elif kind == "another model's layers":
        tensors = {name.replace("layers.1.", "layers.17."): tensor for name, tensor in tensors.items()}
    elif kind == "rank over the limit":
        write_dummy_adapter(folder, SHAPES, rank=65)
        return folder
    elif kind == "one half is missing":
        del tensors[first]
    elif kind == "not finite":
        tensors[first][0, 0] = torch.nan
    elif kind == "another rank in the configuration":
        settings["r"] = 5
    elif kind == "alpha is no number":
        settings["lora_alpha"] = "8"
    elif kind == "head":
        tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(1, 48)
    elif kind == "embedding":
        tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.zeros(1, 48)
    elif kind == "empty":
        tensors = {}
    elif kind in ("use_dora", "modules_to_save", "bias", "peft_type"):
        settings[kind] = {"use_dora": True, "modules_to_save": ["lm_head"], "bias": "all", "peft_type": "IA3"}[kind]
    save_file(tensors, folder / weights.name)
    if kind == "cut off":
        (folder / weights.name).write_bytes(data[: len(data) // 2])
    elif kind == "no safetensors":
        (folder / weights.name).write_bytes(b"\x00" * 100)
    elif kind == "no weights":
        (folder / weights.name).rename(folder / "adapter_model.bin")
    (folder / config.name).write_text("{" if kind == "no JSON" else json.dumps(settings))
    return folder


BAD: dict[str, tuple[type[RametError], str]] = {
    "another model's shapes": (BrokenModelFile, r"proj has A \[3, 7\] and B .* is it an adapter of another model"),
    "another model's layers": (BrokenModelFile, "layers.17.* is no matrix of this model .* of another model"),
    "rank over the limit": (ConfigError, "has rank 65, but --max-lora-rank is 64; raise it"),
    "one half is missing": (BrokenModelFile, "has a lora_B but no lora_A"),
    "not finite": (BrokenModelFile, "numbers that are not finite"),
    "another rank in the configuration": (BrokenModelFile, "has rank 3, but adapter_config.json says 5"),
    "alpha is no number": (BrokenModelFile, "lora_alpha of .* is 8 but must be a number"),
    "head": (BrokenModelFile, "lm_head, which is no matrix of this model that an adapter can change"),
    "embedding": (ConfigError, "no A or B of a linear layer"),
    "empty": (BrokenModelFile, "has no tensors of an adapter"),
    "use_dora": (ConfigError, "use_dora is True, which Ramet cannot apply"),
    "modules_to_save": (ConfigError, "modules_to_save is"),
    "bias": (ConfigError, "bias is 'all'; only adapters without biases are read"),
    "peft_type": (ConfigError, "peft_type is 'IA3' but must be 'LORA'"),
    "cut off": (BrokenModelFile, "cannot be read, it may be cut off"),
    "no safetensors": (BrokenModelFile, "cannot be read, it may be cut off"),
    "no weights": (BrokenModelFile, "lacks adapter_model.safetensors; pickled weights can run code"),
    "no JSON": (BrokenModelFile, "is not readable JSON"),
}


def test_a_bad_adapter_is_refused_and_the_running_engine_goes_on(folders: list[Path], tmp_path: Path) -> None:
    with Engine(tiny_model(), num_kv_tokens=2048, lora=(f"good={folders[1]}",), max_loras=2) as engine:
        long = replace_max(150)
        expected = [engine.generate(PROMPT, long, adapter=name).token_ids for name in ("", "good")]
        engine.flush_cache()
        handles = [engine.submit(PROMPT, long, adapter=name) for name in ("", "good")]
        for number, (kind, (error, message)) in enumerate(BAD.items()):
            with pytest.raises(error, match=message):
                engine.load_adapter("bad", damaged(kind, folders[1], tmp_path / str(number)))
        with pytest.raises(BrokenModelFile, match="is no folder"):
            engine.load_adapter("bad", tmp_path / "nowhere")
        for name, reason in (
            ("", "printable text"),
            ("a\nb", "printable text"),
            ("good", "is loaded; unload it first"),
        ):
            with pytest.raises(InvalidRequest, match=reason):
                engine.load_adapter(name, folders[1])
        assert [handle.result(timeout_s=60).token_ids for handle in handles] == expected
        assert engine.adapters == ["good"]
        engine.load_adapter("bad", folders[2])
        with pytest.raises(InvalidRequest, match="--max-loras is 2; unload one"):
            engine.load_adapter("third", folders[3])
        engine.check_integrity()


def test_a_bad_adapter_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(BrokenModelFile, match="is no folder"):
        Engine(tiny_model(), num_kv_tokens=512, lora=(f"one={tmp_path / 'nowhere'}",))
