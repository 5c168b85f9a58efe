"""A decoder divided among ranks computes what the whole decoder computes. The ranks are threads here, for speed."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from ramet.grammar import Vocabulary
from ramet.grammar.service.sources import compile_constraint
from ramet.runtime.cache.page_pool import PagePool
from ramet.runtime.cache.radix_cache import RadixCache
from ramet.runtime.constraints.states import GrammarStates
from ramet.runtime.engine.config import EngineConfig
from ramet.runtime.engine.core import EngineCore
from ramet.runtime.engine.factory import build_runner
from ramet.runtime.engine.loading import carry_out
from ramet.runtime.models.build import build_decoder
from ramet.runtime.models.config import ModelConfig
from ramet.runtime.models.decoder import Decoder
from ramet.runtime.models.load import open_weights
from ramet.runtime.models.weights import Weights
from ramet.runtime.parallel.group import Group
from ramet.runtime.parallel.messages import RankMessage, encoder
from ramet.runtime.parallel.messages import decoder as message_decoder
from ramet.runtime.parallel.sharded import apply_tensor_parallel
from ramet.runtime.parallel.share import Share
from ramet.runtime.scheduling.config import SchedulerConfig
from ramet.runtime.scheduling.scheduler import Scheduler
from ramet.runtime.steps.inputs import LastToken, Step
from ramet.runtime.steps.kv_cache import KVCache
from ramet.runtime.steps.model_runner import ModelRunner
from ramet.runtime.steps.slots import RunningSlots
from ramet.runtime.steps.tree_planner import TreePlanner
from ramet.runtime.testing.bare_cache import BareCache
from ramet.runtime.testing.dummy import describe_tiny, dummy_weights, tiny_weights
from ramet.runtime.types import Request, SamplingParams

TOLERANCE = 1e-4
T = TypeVar("T")
TINY: dict[str, Any] = {
    "vocab_size": 261,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
LAYERS = ["sliding_attention", "full_attention"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "mistral": ("MistralConfig", {"sliding_window": 7, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": False}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "layer_types": LAYERS,
            "sliding_window": 7,
            "query_pre_attn_scalar": 24,
            "num_key_value_heads": 1,
            "final_logit_softcapping": 3.0,
        },
    ),
    "phi3": ("Phi3Config", {"pad_token_id": 0}),
    "granite": ("GraniteConfig", {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
}


class Room:
    """Where ranks that are threads lay down a tensor each and read those of all."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._tensors: list[Tensor] = [torch.empty(0)] * size
        self._barrier = threading.Barrier(size, timeout=60)

    def all_of(self, rank: int, x: Tensor) -> list[Tensor]:
        self._tensors[rank] = x.clone()
        self._barrier.wait()
        found = list(self._tensors)
        self._barrier.wait()
        return found


class ThreadGroup(Group):
    """The group of one thread."""

    def __init__(self, rank: int, room: Room) -> None:
        self.rank, self.size, self._room = rank, room.size, room

    def sum(self, x: Tensor) -> Tensor:
        return x.copy_(torch.stack(self._room.all_of(self.rank, x)).sum(0))

    def gather(self, x: Tensor, num_columns: int) -> Tensor:
        return torch.cat(self._room.all_of(self.rank, x), dim=1)[:, :num_columns]

    def smallest(self, value: int) -> int:
        return min(int(x) for x in self._room.all_of(self.rank, torch.tensor(value)))

    def share(self, x: Tensor) -> None:
        x.copy_(self._room.all_of(self.rank, x)[0])


def write_model(name: str, folder: Path) -> None:
    class_name, fields = MODELS[name]
    torch.manual_seed(list(MODELS).index(name))
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, class_name)(**(TINY | fields)), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(("norm.weight", "bias")):  # ones and zeros would hide a missing one
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)


@pytest.fixture(scope="module", params=list(MODELS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    write_model(request.param, path)
    return path


def logits_of(decoder: Decoder) -> Tensor:
    """Prompts in chunks, decode rows, and both in one step."""
    tokens = torch.randint(0, 261, (30,), generator=torch.Generator().manual_seed(1)).tolist()
    cache = BareCache(decoder, 3, 64, page_size=8)
    steps = [
        cache.step([], [(0, tokens[:9]), (1, tokens[:17])]),
        cache.step([(0, tokens[9])], [(1, tokens[17:20]), (2, tokens[3:8])]),
        cache.step([(0, 260), (1, 0), (2, tokens[8])], []),
    ]
    return torch.cat(steps)


def on_ranks(size: int, work: Callable[[int, Room], T]) -> list[T]:
    """Run `work(rank, room)` in one thread for each rank."""
    room, results, errors = Room(size), {}, []

    def run(rank: int) -> None:
        try:
            with torch.inference_mode():
                results[rank] = work(rank, room)
        except Exception as error:  # raised below, in the test's thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(size)]


@pytest.mark.parametrize("options", [{"dtype": torch.float32}, {"quantization": "int8"}], ids=["fp32", "int8"])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_compute_the_logits_of_the_whole_model(folder: Path, size: int, options: dict[str, Any]) -> None:
    whole, weights = open_weights(folder)

    def work(rank: int, room: Room) -> Tensor:
        share = Share(rank, room.size)
        part = build_decoder(share.config(whole), weights.cut(share.parts(whole)), device="cpu", **options)
        decoder = apply_tensor_parallel(part, ThreadGroup(rank, room), whole.vocab_size)
        assert decoder.config.num_heads * size == whole.num_heads
        return logits_of(decoder)

    expected = logits_of(build_decoder(whole, weights, device="cpu", **options))
    assert float(expected.std()) > 0.1, "the logits are too flat to show a mistake"
    # Rounded activations differ where a sum of parts differs in its last bits.
    tolerance = TOLERANCE if "dtype" in options else 0.05 * float(expected.abs().max())
    for found in on_ranks(size, work):
        assert found.shape == expected.shape
        assert float((found - expected).abs().max()) < tolerance


# ---- memory


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_ranks_share_the_memory_of_pages_which_hold_their_own_heads(kv_heads: int) -> None:
    """All have as many pages as the one with the fewest; repeated KV heads take their room twice."""
    config = dataclasses.replace(describe_tiny().config, num_kv_heads=kv_heads)
    weights = dummy_weights(config, torch.device("cpu"), torch.float32)

    def runner(config: ModelConfig, weights: Weights, group: Group | None, **options: int) -> ModelRunner:
        decoder = build_decoder(config, weights, device="cpu", dtype=torch.float32)
        return build_runner(decoder, EngineConfig.from_mapping({"max_running_requests": 2, **options}), group)

    def work(rank: int, room: Room) -> tuple[int, tuple[int, ...]]:
        share = Share(rank, room.size)
        options = {"tp": 2, "kv_cpu_bytes": (1 << 20) + rank * (1 << 18)}
        part = runner(share.config(config), weights.cut(share.parts(config)), ThreadGroup(rank, room), **options)
        return part.kv_cache.num_pages, tuple(part.kv_cache.layers[0][0].shape)

    pages, shape = runner(config, weights, None, kv_cpu_bytes=1 << 20).kv_cache.num_pages, (1, 16, config.head_dim)
    expected = pages if kv_heads == 2 else (pages - 1) // 2 + 1  # page 0 is nobody's
    assert on_ranks(2, work) == [(expected, (expected, *shape))] * 2


# ---- steps


class QueuePeers:
    """The other ranks of the first one, which are threads: messages go through queues."""

    def __init__(self, size: int) -> None:
        self.queues: list[queue.SimpleQueue[bytes]] = [queue.SimpleQueue() for _ in range(size - 1)]
        self.kinds: set[str] = set()
        self._num_plans = 0

    def send_step(self, step: Step, tree: TreePlanner | None) -> None:
        work = None
        if tree is not None and tree.num_plans != self._num_plans:
            self._num_plans, work = tree.num_plans, tree.work
        self.kinds.add("plan" if step.uses_tree else "masked" if step.needs_host else "plain")
        self._send(RankMessage.of(step, work))

    def send_last(self, rows: Sequence[LastToken]) -> None:
        self.kinds.add("last")
        self._send(RankMessage(last=list(rows)))

    def _send(self, message: RankMessage) -> None:
        for waiting in self.queues:
            waiting.put(encoder.encode(message))

    def end(self) -> None:
        for waiting in self.queues:
            waiting.put(b"")

    def fail(self, error: Exception) -> None:
        self.end()

    def check(self) -> None:
        return


PAGE, CONTEXT = 8, 256


def make_runner(decoder: Decoder, graphs: bool, **parts: Any) -> ModelRunner:
    config, cpu = decoder.config, torch.device("cpu")
    kv_cache = KVCache(config, 100, PAGE, device=cpu, dtype=torch.float32)
    tree = TreePlanner(config, PAGE, 4, mode="on", num_sms=4, device=cpu, dtype=torch.float32) if graphs else None
    slots = RunningSlots(4, CONTEXT // PAGE, device=cpu)
    runner = ModelRunner(decoder, kv_cache, slots, device=cpu, max_kv_len=CONTEXT, tree=tree, **parts)
    if graphs:
        runner.capture_graphs(16, lambda body: body)
    return runner


def tokens_of(runner: ModelRunner, vocabulary: Vocabulary) -> list[list[int]]:
    """Requests that share pages, more than there are slots, a constrained one among them."""
    pool = PagePool(100, PAGE)
    scheduler = Scheduler(SchedulerConfig(CONTEXT, max_running=4, max_num_tokens_per_step=40), pool, RadixCache(pool))
    grammars = GrammarStates(runner.decoder.config.vocab_size, runner.computes_run)
    core = EngineCore(scheduler, runner, grammars, overlap=True, context_length=CONTEXT)
    start = list(range(30, 80))
    grammar = compile_constraint("regex", "[a-c]{4,6}de", vocabulary)
    sequences = []
    for i in range(7):
        ids = np.asarray(start + [i] * (i + 1), dtype=np.int32)
        params = SamplingParams(temperature=0.0, max_tokens=12, repetition_penalty=1.1 if i == 3 else 1.0)
        ends = frozenset({256})
        sequences.append(core.add(Request(f"r{i}", ids, params, 12, ends, grammar if i == 4 else None)))
    while core.has_work:
        core.step()
    core.scheduler.check_integrity()
    core.grammars.close()
    return [sequence.output_ids for sequence in sequences]


@pytest.mark.parametrize("graphs", [False, True])
def test_steps_of_every_kind_give_the_same_tokens_on_ranks(graphs: bool) -> None:
    tiny = describe_tiny()
    weights, tokenizer = tiny_weights(tiny.config), tiny.tokenizer
    vocabulary = Vocabulary(
        tokenizer.token_bytes, tokenizer.eos_ids, tokenizer.special_ids, tokenizer.vocab_size, tokenizer
    )
    peers, runners = QueuePeers(2), {}

    def work(rank: int, room: Room) -> list[list[int]]:
        share, group = Share(rank, room.size), ThreadGroup(rank, room)
        part = build_decoder(
            share.config(tiny.config), weights.cut(share.parts(tiny.config)), device="cpu", dtype=torch.float32
        )
        decoder = apply_tensor_parallel(part, group, tiny.config.vocab_size)
        if rank == 0:
            try:
                runners[0] = make_runner(decoder, graphs, share=group.share, peers=peers)
                found = tokens_of(runners[0], vocabulary)
                runners[0].override_last([(2, 99, 5)])
                return found
            finally:
                peers.end()
        runners[rank] = make_runner(decoder, graphs, share=group.share)
        while said := peers.queues[rank - 1].get():
            carry_out(message_decoder.decode(said), runners[rank])
        return []

    whole = build_decoder(tiny.config, weights, device="cpu", dtype=torch.float32)
    expected = tokens_of(make_runner(whole, graphs), vocabulary)
    assert on_ranks(2, work)[0] == expected
    assert {"plain", "masked", "last"} <= peers.kinds
    tables = [runner.slots.tables for runner in runners.values()]
    torch.testing.assert_close(tables[0].page_table, tables[1].page_table)
    torch.testing.assert_close(tables[0].last_token, tables[1].last_token)
    assert int(tables[1].last_token[2]) == 99
    if graphs:
        plans = [runner.tree.plan for runner in runners.values() if runner.tree is not None]
        assert "plan" in peers.kinds
        torch.testing.assert_close(plans[0].items, plans[1].items)
