"""Heads that draft from hidden states: their tokens beside a reference written from the papers, on random weights."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from ramet.errors import BrokenModelFile, ConfigError
from ramet.runtime.engine.engine import Engine
from ramet.runtime.speculation.draft_model import DraftModel
from ramet.runtime.speculation.speculation import Speculation, StepTimes
from ramet.runtime.types import SamplingParams, Sequence

HIDDEN, HEADS, KV_HEADS, DIM, VOCAB, LAYERS = 32, 4, 2, 8, 257, 8
SETTINGS: dict[str, Any] = {"dtype": "float32", "num_kv_tokens": 2048, "max_running_requests": 4, "max_step_ms": 0}
Tensors = dict[str, Tensor]


def head_tensors(kind: str) -> Tensors:
    """A random layer, with the names of its kind."""
    width = 2 * HIDDEN if kind == "eagle" else HIDDEN
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (HEADS * DIM, width),
        "self_attn.k_proj": (KV_HEADS * DIM, width),
        "self_attn.v_proj": (KV_HEADS * DIM, width),
        "self_attn.o_proj": (HIDDEN, HEADS * DIM),
        "mlp.gate_proj": (48, HIDDEN),
        "mlp.up_proj": (48, HIDDEN),
        "mlp.down_proj": (HIDDEN, 48),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    if kind == "eagle":
        shapes |= {"hidden_norm": (HIDDEN,)}
        others = {"fc": (HIDDEN, 3 * HIDDEN), "norm": (HIDDEN,), "lm_head": (100, HIDDEN)}
    else:
        shapes |= {
            "eh_proj": (HIDDEN, 2 * HIDDEN),
            "enorm": (HIDDEN,),
            "hnorm": (HIDDEN,),
            "shared_head.norm": (HIDDEN,),
        }
        others = {}
    prefix = "midlayer." if kind == "eagle" else f"model.layers.{LAYERS}."
    named = {prefix + name: shape for name, shape in shapes.items()} | others
    torch.manual_seed(5)
    made = {f"{name}.weight": torch.randn(shape) * (0.3 if len(shape) > 1 else 1) for name, shape in named.items()}
    if kind == "eagle":
        target = torch.randperm(VOCAB)[:100].sort().values
        made["d2t"] = target - torch.arange(100)
        made["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, target, value=True)
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model; an EAGLE-3 head for it; the same model with an MTP layer."""
    found = {kind: tmp_path_factory.mktemp(kind) for kind in ("model", "eagle", "mtp")}
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=DIM, max_position_embeddings=512, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for kind in ("model", "mtp"):
        model.save_pretrained(found[kind])
        tokenizer.save(str(found[kind] / "tokenizer.json"))
    fields = json.loads((found["mtp"] / "config.json").read_text())
    (found["mtp"] / "config.json").write_text(json.dumps(fields | {"num_nextn_predict_layers": 1}))
    weights = load_file(found["mtp"] / "model.safetensors")
    save_file(weights | head_tensors("mtp"), found["mtp"] / "model.safetensors", {"format": "pt"})
    head = fields | {"architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "draft_vocab_size": 100}
    (found["eagle"] / "config.json").write_text(json.dumps(head))
    save_file(head_tensors("eagle"), found["eagle"] / "model.safetensors")
    return found


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotated(x: Tensor) -> Tensor:
    """x [T, heads, D] as complex numbers, turned by their positions."""
    angles = torch.arange(len(x))[:, None] * 10_000.0 ** (-torch.arange(0, DIM, 2) / DIM)
    turned = torch.complex(*x.float().chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


def layer_of_the_paper(of: Tensors, attended: Tensor, residual: Tensor) -> Tensor:
    """Attention of every position to all before it, head by head, and the feed-forward part."""
    count = len(attended)
    q, k, v = (attended @ of[f"self_attn.{name}_proj.weight"].T for name in "qkv")
    q, k = rotated(q.view(count, HEADS, DIM)), rotated(k.view(count, KV_HEADS, DIM))
    v, out = v.view(count, KV_HEADS, DIM), torch.zeros(count, HEADS, DIM)
    for head in range(HEADS):
        other = head * KV_HEADS // HEADS
        for row in range(count):
            weights = torch.softmax(k[: row + 1, other] @ q[row, head] / DIM**0.5, dim=0)
            out[row, head] = weights @ v[: row + 1, other]
    x = residual + out.view(count, -1) @ of["self_attn.o_proj.weight"].T
    normed = norm(x, of["post_attention_layernorm.weight"])
    gate = normed @ of["mlp.gate_proj.weight"].T
    return x + (gate * gate.sigmoid() * (normed @ of["mlp.up_proj.weight"].T)) @ of["mlp.down_proj.weight"].T


@functools.cache
def loaded(folder: Path) -> Any:  # Any: of transformers
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def drafted_by_the_paper(kind: str, folders: dict[str, Path], known: list[int], count: int) -> list[int]:
    """Everything is computed anew for each drafted token."""
    model = loaded(folders["model"])
    with torch.no_grad():
        states = model(torch.tensor([known]), output_hidden_states=True).hidden_states
    tensors = head_tensors(kind)
    prefix = "midlayer." if kind == "eagle" else f"model.layers.{LAYERS}."
    of = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if kind == "eagle":
        features = torch.cat([states[i][0] for i in (2, LAYERS // 2, LAYERS - 3)], dim=-1) @ of["fc.weight"].T
    else:
        features = states[-1][0]
    features, drafted = features[:-1], list[int]()
    embedding, output = model.model.embed_tokens.weight.detach(), model.lm_head.weight.detach()
    for _ in range(count):
        embedded = embedding[torch.tensor([*known[1:], *drafted])]
        if kind == "eagle":
            pair = norm(embedded, of["input_layernorm.weight"]), norm(features, of["hidden_norm.weight"])
            last = layer_of_the_paper(of, torch.cat(pair, -1), features)[-1:]
            logits = norm(last, of["norm.weight"]) @ of["lm_head.weight"].T
        else:
            pair = norm(embedded, of["enorm.weight"]), norm(features, of["hnorm.weight"])
            x = torch.cat(pair, -1) @ of["eh_proj.weight"].T
            last = layer_of_the_paper(of, norm(x, of["input_layernorm.weight"]), x)[-1:]
            logits = norm(last, of["shared_head.norm.weight"]) @ output.T
        token = int(logits.argmax())
        drafted.append(token if kind == "mtp" else token + int(of["d2t"][token]))
        features = torch.cat((features, last))
    return drafted


class Free(StepTimes):
    """Steps that take the same time whatever they verify; drafts that take none."""

    def __init__(self, one: float) -> None:
        super().__init__()
        self.one = one

    def knows(self, num_tokens: int, kv_len: float) -> bool:
        return True

    def seconds(self, num_tokens: int, kv_len: float) -> float:
        return self.one


def head_of(engine: Engine) -> DraftModel:
    speculation = engine._core.speculation
    assert speculation is not None
    assert isinstance(speculation._model, DraftModel)
    return speculation._model


@pytest.mark.parametrize("kind", ["eagle", "mtp"])
def test_a_head_drafts_what_the_paper_drafts_and_changes_no_answer(
    kind: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = str(folders["mtp" if kind == "mtp" else "model"])
    # The second is longer than what is read at once; the third has all but the end of its last page from the second.
    prompts = ["once more ", "a second prompt " * 20, "a second prompt " * 19 + "a second pr, other "]
    sampling = [SamplingParams(temperature=t, max_tokens=14, seed=3, ignore_eos=True) for t in (0.0, 0.8, 0.0)]
    with Engine(target, **SETTINGS) as engine:
        expected = [engine.generate(prompt, values) for prompt, values in zip(prompts, sampling, strict=True)]
    with Engine(target, speculative="auto", speculative_draft=str(folders[kind]), **SETTINGS) as engine:
        head = head_of(engine)
        speculation = engine._core.speculation = Speculation(Free(1.0), model=head)
        speculation._model_times = Free(0.0)
        seen: list[tuple[list[int], list[int]]] = []
        draft, cache, num_copied = head.draft, engine._core.runner.kv_cache, list[int]()
        copy = cache.copy_pages

        def copied(source: Tensor, target: Tensor, num_tokens: Tensor) -> None:
            num_copied.extend(num_tokens.tolist())
            copy(source, target, num_tokens)

        monkeypatch.setattr(cache, "copy_pages", copied)

        def noted(sequences: Seq[Sequence], count: int) -> dict[Sequence, list[int]]:
            found = draft(sequences, count)
            seen.extend((s.tokens(0, s.num_tokens).tolist(), tokens) for s, tokens in found.items())
            return found

        head.draft = noted  # type: ignore[method-assign]
        for prompt, values, wanted in zip(prompts, sampling, expected, strict=True):
            for _ in range(2):  # the prompt is cached
                assert engine.generate(prompt, values).token_ids == wanted.token_ids
        engine.check_integrity()
        assert num_copied
        assert not head.num_sequences
        head.check_integrity()
        assert speculation.drafted["model"] > 0
    assert len(seen) > 20
    for known, tokens in seen[::2]:
        assert tokens == drafted_by_the_paper(kind, folders, known, len(tokens))
    assert max(len(tokens) for _, tokens in seen) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.weight": torch.zeros(HIDDEN, HIDDEN)}, r"fc is \[32, 32\], not \[32, 96\]"),
        ({"d2t": torch.full((100,), 5_000)}, "d2t leads to tokens beyond the model's 257"),
        ({"midlayer.more.weight": torch.zeros(2)}, "not read: more"),
        ({"midlayer.mlp.up_proj.weight": None}, "missing mlp.up_proj"),
        ({"midlayer.self_attn.o_proj.bias": torch.zeros(HIDDEN)}, "not read: self_attn.o_proj.bias"),
        ({"lm_head.weight": torch.zeros(99, HIDDEN)}, r"lm_head is \[99, 32\], not \[100, 32\]"),
        ({"d2t": torch.zeros(100, 2)}, r"d2t is \[100, 2\], not \[100\]"),
    ],
)
def test_a_head_that_does_not_fit_is_refused_by_what_is_wrong(
    change: dict[str, Tensor | None], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    tensors = {name: tensor for name, tensor in (head_tensors("eagle") | change).items() if tensor is not None}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folders["eagle"] / "config.json").read_text())
    with pytest.raises(ConfigError, match=message):
        Engine(str(folders["model"]), speculative="auto", speculative_draft=str(tmp_path), **SETTINGS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}}, r"it reads layers \[1, 2, 3\]"),
        ({"norm_before_residual": True}, "norm_before_residual"),
    ],
)
def test_a_head_of_another_form_is_refused(
    fields: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    save_file(head_tensors("eagle"), tmp_path / "model.safetensors")
    known = json.loads((folders["eagle"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(known | fields))
    with pytest.raises(ConfigError, match=message):
        Engine(str(folders["model"]), speculative="auto", speculative_draft=str(tmp_path), **SETTINGS)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(BrokenModelFile, match="cannot be read"):
        Engine(str(folders["model"]), speculative="auto", speculative_draft=str(tmp_path), **SETTINGS)


def test_a_head_has_no_part_for_adapters(folders: dict[str, Path]) -> None:
    head: dict[str, Any] = {"speculative": "auto", "speculative_draft": str(folders["eagle"])}
    with pytest.raises(ConfigError, match="speculative_draft is a head"):
        Engine(str(folders["model"]), **head, **SETTINGS, max_loras=1)
