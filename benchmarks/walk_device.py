"""Walk through the engine's GPU path, at a real model's shapes, on a machine without a GPU.

    python benchmarks/walk_device.py                         Llama-3.1-8B and others; kernels are noted, not compiled
    python benchmarks/walk_device.py --compile               each variant that the engine launches is compiled for sm_90
    python benchmarks/walk_device.py --models gemma3-4b --set deterministic=true
    python benchmarks/walk_device.py --models llama-8b --set speculative_draft='"smollm2"'   or a head: eagle, mtp
    python benchmarks/walk_device.py --models llama-70b --layers 80 --set quantization='"fp8"' \
        --set kv_cache_dtype='"fp8_e4m3"' --set mem_fraction_static=0.95 --set chunked_prefill_size=1024 \
        --set max_running_requests=64                        all layers: the memory is that of a card

The engine starts, captures its graphs and serves requests of every kind, and of random mixes of kinds, on a device of
fake tensors (fake_device.py).
What a card would refuse ends the walk. Reported, and an error where the exit status is 1: kernels that are first met
while requests run (a card's users would wait for the compiler) or one after the other at the start, garbage that holds
memory of the device, waits of the host in overlapped steps, and with `--compile` variants that spill or do not fit. Not
here: values, times.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import logging
import os
import random
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, get_args
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is defined

import numpy as np
import torch
from bench_gpu import MadeUpTokenizer
from compile_kernels import Compiled, OfflineDriver, narrow_accesses, resources
from fake_device import DEVICE, READ_BACK, FakeDevice, fake_device
from triton.runtime import driver

from ramet.grammar import Bordered, CompiledGrammar, Vocabulary
from ramet.grammar.service.sources import compile_constraint
from ramet.runtime.engine import factory
from ramet.runtime.engine.config import EngineConfig
from ramet.runtime.engine.core import EngineCore
from ramet.runtime.engine.factory import build_core, build_runner
from ramet.runtime.engine.loading import carry_out
from ramet.runtime.models.adapters import Adapters
from ramet.runtime.models.build import build_decoder
from ramet.runtime.models.config import ModelConfig, llama_3_1_8b, smollm2_135m
from ramet.runtime.models.config_files import config_from_hf
from ramet.runtime.models.decoder import Decoder
from ramet.runtime.models.description import GenerationDefaults
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.models.weights import Part, Weights, expected_tensors
from ramet.runtime.parallel.group import Group
from ramet.runtime.parallel.messages import RankMessage, decoder, encoder
from ramet.runtime.parallel.ranks import FirstRank
from ramet.runtime.parallel.sharded import SharedModel, apply_tensor_parallel
from ramet.runtime.parallel.share import Share, check_size
from ramet.runtime.speculation.heads import Head, head_shapes, make_head
from ramet.runtime.speculation.speculation import Speculation
from ramet.runtime.steps.cuda_graph import VERIFIED_TOKENS
from ramet.runtime.steps.model_runner import ModelRunner
from ramet.runtime.types import Adapter, Grammar, Pooling, Request, SamplingParams, Sequence

QWEN = {
    "architectures": ["Qwen3ForCausalLM"], "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
    "max_position_embeddings": 40_960, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False,
}  # fmt: skip
GEMMA = {
    "architectures": ["Gemma3ForCausalLM"], "hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262_208, "sliding_window": 1024,
    "sliding_window_pattern": 2, "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
}  # fmt: skip
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "tie_word_embeddings": False,
}  # fmt: skip
MODELS: dict[str, Callable[[], ModelConfig]] = {
    "llama-8b": llama_3_1_8b,
    "smollm2": smollm2_135m,
    "qwen3-8b": lambda: config_from_hf(QWEN),
    "gemma3-4b": lambda: config_from_hf(GEMMA),
    "llama-70b": lambda: config_from_hf(LLAMA_70B),
}
MODELS["llama-8b-blocks"] = MODELS["llama-8b"]
IN_BLOCKS = ("llama-8b-blocks",)  # files with FP8 matrices, a scale for each 128 x 128
LAYERS = 2  # of every kind that a model has; the others launch the same
WALKED = "llama-8b,smollm2,qwen3-8b,gemma3-4b,llama-8b-blocks"


class AnyDrafts(Speculation):
    """Up to eight tokens for each of some rows, in three of four steps. A model computes its part for nothing."""

    num_steps = 0

    def pays(self, sequences: Iterable[Sequence]) -> bool:
        self.num_steps += 1
        return self.num_steps % 3 > 0

    def propose(self, sequences: Iterable[Sequence]) -> dict[Sequence, list[int]]:
        self.num_steps += 1
        rows = list(sequences)
        if self._model is not None:
            self._model.draft(rows, 1 + self.num_steps % 8)
        num_drafted = max((VERIFIED_TOKENS[-1] - len(rows)) // 4, 0) if self.num_steps % 4 else 0
        return {sequence: [7] * min(num_drafted, 1 + (self.num_steps + i) % 8) for i, sequence in enumerate(rows[:4])}


class Walk:
    """Requests of every kind for one engine; each kind is a phase of the device's notes."""

    def __init__(self, core: EngineCore, device: FakeDevice, vocabulary: Vocabulary) -> None:
        self.core, self.device, self.vocabulary = core, device, vocabulary
        self.numbers = np.random.default_rng(0)
        self.num_requests = 0
        self.sequences: list[Sequence] = []  # of the phase that runs

    def add(
        self,
        num_prompt: int,
        max_tokens: int,
        *,
        prefix: int = 0,
        grammar: Grammar | None = None,
        score_from: int | None = None,
        pooling: Pooling | None = None,
        adapter: Adapter | None = None,
        **sampling: Any,  # fields of SamplingParams
    ) -> None:
        self.num_requests += 1
        new = self.numbers.integers(100, 40_000, num_prompt)
        prompt = np.concatenate([np.arange(100, 100 + prefix), new]).astype(np.int32)
        params = SamplingParams(**sampling)
        name = f"r{self.num_requests}"
        ends = frozenset[int]() if grammar is None else frozenset(self.vocabulary.eos_ids)
        options = {"score_from": score_from, "pooling": pooling, "adapter": adapter}
        self.sequences.append(self.core.add(Request(name, prompt, params, max_tokens, ends, grammar, **options)))

    def run(self, name: str, arrive: Callable[[], bool] = lambda: False) -> None:
        """Run until nothing is left to do. arrive: called before each step; adds requests, says whether more come."""
        device, core = self.device, self.core
        device.phase = name
        replays, counters = device.replays, core.scheduler.counters
        steps = counters.num_steps
        while arrive() or core.has_work:
            core.step()
        core.scheduler.check_integrity()
        errors = [sequence.error for sequence in self.sequences if sequence.error is not None]
        if errors:
            raise errors[0]
        self.sequences.clear()
        waits = {what: count for (phase, what), count in device.waits.items() if phase == name}
        print(
            f"    {name:10} {counters.num_steps - steps:4d} steps, {device.replays - replays:4d} graphs, "
            f"{device.launches.get(name, 0):5d} launches by the host" + (f", waits {waits}" if waits else "")
        )

    def overlapped(self) -> list[str]:
        """Steps for which the host must not wait; returns their names."""
        self.add(100, 5)
        self.run("alone")
        for i in range(60):
            self.add(50 + i, 20, prefix=3001)
        self.run("shared")
        for i in range(60):
            self.add(700 + i, 20)
        self.run("unique")
        for top_k, top_p in ((0, 1.0), (40, 0.9)):
            self.add(100, 5, temperature=0.7, top_k=top_k, top_p=top_p, min_p=0.05)
        self.run("sampled")
        for _ in range(60):
            self.add(4, 3, prefix=3001)
        self.run("turns")
        for _ in range(4):
            self.add(3, 1, prefix=3001, score_from=3002)
        self.run("choices")
        names = ["alone", "shared", "unique", "sampled", "turns", "choices"]
        if self.core.grammars.device is not None:  # the host computes no mask, and another thread uploads the tables
            for _ in range(3):
                self.add(100, 5, grammar=self.closed())
                self.add(100, 5, grammar=Bordered(self.closed(), self.vocabulary, lead=b" ", after=b" or more"))
            self.run("closed")
            names.append("closed")
        return names

    def closed(self) -> CompiledGrammar:
        grammar = compile_constraint("regex", "[ab]{1,20}", self.vocabulary)
        assert grammar.close()
        return grammar

    def others(self) -> None:
        """Steps for which it may read what the device computed."""
        for grammar in (self.closed(), compile_constraint("json_schema", '{"type": "array"}', self.vocabulary)):
            for _ in range(3):
                self.add(100, 5, grammar=grammar)
        self.run("grammars")
        self.add(100, 5, frequency_penalty=0.5, logit_bias={5: 2.0}, logprobs=3)
        self.add(90, 5, repetition_penalty=1.2, min_tokens=2, temperature=0.5, top_p=0.9)
        self.add(90, 5)
        self.run("edited")
        self.add(100, 1, score_from=20)
        self.run("scored")
        if self.core.speculation is not None:
            self.core.speculation = AnyDrafts(model=self.core.speculation._model)
            for grammar in (
                None,
                self.closed(),
                compile_constraint("json_schema", '{"type": "array"}', self.vocabulary),
            ):
                self.add(100, 20, grammar=grammar, logprobs=2 if grammar is None else None)
                self.add(90, 9, grammar=grammar, temperature=0.5, top_p=0.9)
            self.add(90, 9, temperature=0.5, frequency_penalty=0.5)
            for i in range(20):
                self.add(10 + i, 30, prefix=3001)
            self.run("drafts")
        self.mixed(50)

    def mixed(self, num_requests: int) -> None:
        """Requests of any mix of features, which come while others run."""
        numbers, core = random.Random(0), self.core
        grammars = [
            self.closed(),
            Bordered(self.closed(), self.vocabulary, lead=b" ", after=b" or more"),
            compile_constraint("json_schema", '{"type": "array"}', self.vocabulary),
        ]
        adapters = [None] if core.runner.adapters is None else [None, add_adapter(core.runner.adapters)]
        left = num_requests

        def arrive() -> bool:
            nonlocal left
            for _ in range(min(left, numbers.choice((0, 0, 0, 1, 2, 30)))):
                left -= 1
                self.add_any(numbers, grammars, adapters)
            if numbers.random() < 0.02:
                core.abort(f"r{numbers.randint(1, self.num_requests)}")
            return left > 0

        self.run("mixed", arrive)

    def add_any(
        self, numbers: random.Random, grammars: list[CompiledGrammar | Bordered], adapters: list[Adapter | None]
    ) -> None:
        """Add a request of randomly chosen features."""
        num_prompt = numbers.choice((1, 2, 3, 5, 8, 15, 16, 17, 33, 64, 129, 600, 1500))
        common = {"prefix": numbers.choice((0, 0, 17, 3001, 3008)), "adapter": numbers.choice(adapters)}
        kind = numbers.random()
        if kind < 0.1:
            first = numbers.randint(1, num_prompt)
            self.add(num_prompt, 0, score_from=first, logprobs=numbers.choice((None, 0, 3)), **common)
            return
        if kind < 0.2:
            pooling = numbers.choice(get_args(Pooling))
            self.add(num_prompt, 0, score_from=num_prompt if pooling == "last" else 1, pooling=pooling, **common)
            return
        sampling = {name: numbers.choice(values) for name, values in FEATURES.items() if numbers.random() < 0.2}
        grammar = numbers.choice([None, None, *grammars])
        self.add(num_prompt, numbers.randint(1, 20), grammar=grammar, **{"temperature": 0.5, **common, **sampling})


# Values of sampling parameters that change what a step launches
FEATURES: dict[str, tuple[Any, ...]] = {  # Any: a parameter's value
    "temperature": (0.0, 1.3),
    "top_k": (1, 40),
    "top_p": (0.9,),
    "min_p": (0.05,),
    "frequency_penalty": (0.5,),
    "repetition_penalty": (1.2,),
    "logit_bias": ({5: 2.0}, dict.fromkeys(range(200), -1.0)),
    "min_tokens": (3,),
    "string_tokens": (4,),
    "logprobs": (0, 1, 20),
    "ignore_eos": (True,),
}


def add_adapter(adapters: Adapters) -> Adapter:
    """An adapter of all matrices of the layers."""
    shapes = {name: shape for name, shape in expected_tensors(adapters.config).items() if ".layers." in name}
    pairs = {
        name: (torch.zeros(4, shape[1]), torch.zeros(shape[0], 4)) for name, shape in shapes.items() if len(shape) == 2
    }
    return adapters.add("any", adapters.sendable(pairs))


class AloneGroup(Group):
    """A group whose other ranks exist in name alone; its collectives launch something of the right shape."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(self.size)

    def gather(self, x: torch.Tensor, num_columns: int) -> torch.Tensor:
        return torch.cat([x] * self.size, dim=1)[:, :num_columns].contiguous()

    def share(self, x: torch.Tensor) -> None:
        x.mul_(1)

    def smallest(self, value: int) -> int:
        return value


class OtherRankHere(FirstRank):
    """The first rank's view of another one in this process, which runs each step at once."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._num_plans = 0

    def _send(self, message: RankMessage) -> None:
        carry_out(decoder.decode(encoder.encode(message)), self._runner)

    def fail(self, error: Exception) -> None:
        raise error

    def check(self) -> None:
        return


def decoder_of(rank: int, shapes: ModelConfig, weights: Weights, config: EngineConfig) -> Decoder:
    """The whole decoder, or a rank's part of it."""
    if config.tp == 1:
        return build_decoder(
            shapes, weights, device=config.device, dtype=torch.bfloat16, quantization=config.quantization
        )
    share = Share(rank, config.tp)
    check_size(shapes, config.tp)
    part = build_decoder(share.config(shapes), weights.cut(share.parts(shapes)), device=DEVICE, dtype=torch.bfloat16)
    return apply_tensor_parallel(part, AloneGroup(rank, config.tp), shapes.vocab_size)


def empty(shape: tuple[int, ...], part: Part | None) -> torch.Tensor:
    whole = torch.empty(shape, device=DEVICE, dtype=torch.bfloat16)
    return whole if part is None else part.of(whole)


def empty_blocks(num_rows: int, num_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix of a file in FP8 as `Weights.scaled` gives it."""
    scale = torch.empty((num_rows, -(-num_columns // 128)), device=DEVICE)
    return torch.empty((num_rows, num_columns), device=DEVICE, dtype=torch.float8_e4m3fn), scale


def shapes_of(name: str, num_layers: int) -> ModelConfig:
    shapes = MODELS[name]()
    return dataclasses.replace(shapes, num_layers=num_layers, sliding_layers=shapes.sliding_layers[:num_layers])


def weights_of(name: str, shapes: ModelConfig) -> Weights:
    tensors = expected_tensors(shapes)
    make = {name: partial(empty, shape) for name, shape in tensors.items()}
    matrices = {name: shape for name, shape in tensors.items() if ".layers." in name and len(shape) == 2}
    blocks = {key: partial(empty_blocks, *shape) for key, shape in matrices.items()} if name in IN_BLOCKS else {}
    return Weights(make, scaled=blocks)


def load(name: str, shapes: ModelConfig, config: EngineConfig) -> LoadedModel:
    decoder = decoder_of(0, shapes, weights_of(name, shapes), config)
    return LoadedModel(name, decoder, MadeUpTokenizer(shapes.vocab_size), shapes, GenerationDefaults())


def drafting(num_layers: int, model: LoadedModel, config: EngineConfig) -> LoadedModel | Head | None:
    """What drafts for a model: one of `MODELS` with its vocabulary, or a head: eagle or mtp."""
    name, target = config.speculative_draft, model.config
    if name is None:
        return None
    if name in MODELS:
        return load(name, dataclasses.replace(shapes_of(name, num_layers), vocab_size=target.vocab_size), config)
    needed, _ = head_shapes(target, target, None, is_eagle=name == "eagle")
    return make_head({name: empty(shape, None) for name, shape in needed.items()}, None, target, model.decoder)


def walk(name: str, config: EngineConfig, device: FakeDevice, num_layers: int) -> list[str]:
    """Start an engine and serve; returns what a card's users would notice."""
    device.phase = "start"
    shapes = shapes_of(name, num_layers)
    model = load(name, shapes, config)
    tokenizer = model.tokenizer
    device.alone.clear()  # one kernel rounds weights to FP8 while they are read
    if config.tp > 1:
        part = decoder_of(1, shapes, weights_of(name, shapes), config)
        other = build_runner(part, config, AloneGroup(1, config.tp))
        parts = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
        model = SharedModel(**parts, peers=OtherRankHere(other), group=AloneGroup(0, config.tp))
    gc.disable()
    with mock.patch.object(factory, "load_drafting", partial(drafting, num_layers)):
        core = build_core(model, config)
    before = device.memory.allocated
    gc.enable()
    gc.collect()
    garbage = (before - device.memory.allocated) / 2**20
    tokens = (core.runner.kv_cache.num_pages - 1) * core.runner.kv_cache.page_size
    print(f"    start      {device.launches['start']:5d} launches, {tokens:,} tokens of KV, {device.memory}")
    vocabulary = Vocabulary(
        tokenizer.token_bytes, tokenizer.eos_ids, tokenizer.special_ids, tokenizer.vocab_size, tokenizer
    )
    steps, drafts = Walk(core, device, vocabulary), core.speculation
    core.speculation = None
    names = steps.overlapped()
    core.speculation = drafts
    steps.others()
    found = [
        f"{phase}: the host waits for {what}, {n} times"
        for (phase, what), n in device.waits.items()
        if phase in names or (phase != "start" and what != READ_BACK)
    ]
    found += [f"{phase}: compiles {name}" for phase, name in device.late_variants()]
    if garbage > 1:
        found.append(f"start: {garbage:.0f} MiB of the device are garbage")
    return found + [f"start: waits for {name} alone" for name in sorted(set(device.alone))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=WALKED, help="comma-separated")
    parser.add_argument("--compile", action="store_true", help="compile what is launched (minutes)")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--max-spill", type=int, default=64, help="bytes that a kernel may spill")
    parser.add_argument("--set", action="append", default=[], help="configuration, as max_running_requests=64")
    args = parser.parse_args()
    overrides = {key: json.loads(value) for key, value in (item.split("=", 1) for item in args.set)}
    values = {"device": str(DEVICE), "context_length": 8192, "speculative": "auto", **overrides}
    config = EngineConfig.from_mapping(values)
    driver.set_active(OfflineDriver(args.capability))
    logging.basicConfig(format="    %(message)s")
    logging.getLogger("ramet.runtime.engine.factory").setLevel(logging.INFO)  # the plan of the memory
    found: list[str] = []
    for name in args.models.split(","):
        print(name, flush=True)
        with fake_device(compiles=args.compile, capability=args.capability) as device:
            found += [f"{name}: {what}" for what in walk(name, config, device, args.layers)]
        for kernel, compiled in device.kernels.values():
            metadata, used = compiled.metadata, resources(compiled.asm["cubin"])
            narrow = narrow_accesses(compiled.asm["ptx"])
            record = Compiled(name, kernel, *used, metadata.shared, metadata.num_warps, narrow, in_use=True)
            if record.is_bad(args.max_spill):
                found.append(f"{name}: {record}")
        print(f"    memory: {device.memory}")
        print(f"    {len(device.variants)} variants of kernels, {len(device.kernels)} compiled", flush=True)
    print("\n".join(found) or "nothing found")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
