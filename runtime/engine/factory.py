"""Build an engine core from a model and a configuration: device, dtype, memory, scheduler, graphs."""

from __future__ import annotations

import gc
import logging
import time
from pathlib import Path

import numpy as np
import torch

from ramet.errors import ConfigError, OutOfMemory
from ramet.kernels.card_table import CardTable, load_card_table
from ramet.kernels.grammar.arena import GrammarArena, arena_sizes
from ramet.kernels.grammar.mask import TokenTable
from ramet.kernels.layers.kv_fp8 import FP8
from ramet.kernels.sampling.logit_edits import EditTables
from ramet.kernels.triton_support import use_device
from ramet.runtime.cache.page_pool import PagePool
from ramet.runtime.cache.radix_cache import RadixCache
from ramet.runtime.constraints.device_grammars import DeviceGrammars
from ramet.runtime.constraints.states import GrammarStates
from ramet.runtime.engine.config import DEFAULT_PAGE_SIZE, EngineConfig
from ramet.runtime.engine.core import EngineCore
from ramet.runtime.models.adapters import Adapters
from ramet.runtime.models.build import apply_fp8_cache
from ramet.runtime.models.decoder import Decoder
from ramet.runtime.models.linear_cpu import BlockLinear
from ramet.runtime.models.linear_gpu import apply_batch_invariance, apply_card_table
from ramet.runtime.models.load import LoadedModel, load_model
from ramet.runtime.models.transformers_model import TransformersDecoder
from ramet.runtime.parallel.group import Group
from ramet.runtime.parallel.sharded import SharedModel
from ramet.runtime.scheduling.config import SchedulerConfig
from ramet.runtime.scheduling.scheduler import Scheduler
from ramet.runtime.speculation.draft_model import DRAFT_KV_TOKENS, MOST_NEW, DraftModel, check_vocabulary
from ramet.runtime.speculation.heads import Features, Head, HeadLayer, has_head, load_head, tapped
from ramet.runtime.speculation.speculation import MOST_DRAFTED, MOST_IN_STEP, Speculation
from ramet.runtime.steps.cuda_graph import VERIFIED_DRAFTS, GraphKey
from ramet.runtime.steps.kv_cache import KVCache, bytes_per_token
from ramet.runtime.steps.logit_edits import NUM_EDIT_ROWS, LogitEdits
from ramet.runtime.steps.memory import (
    MemoryPlan,
    logits_bytes,
    lower_fraction,
    plan_memory,
    read_cuda_memory,
)
from ramet.runtime.steps.model_runner import ModelRunner, Peers
from ramet.runtime.steps.slots import RunningSlots
from ramet.runtime.steps.tree_planner import TreePlanner
from ramet.runtime.types import Batch, Request, SamplingParams, ScheduledSequence, Sequence, Status

logger = logging.getLogger(__name__)


def build_core(model: LoadedModel, config: EngineConfig) -> EngineCore:
    """Size the KV pool by the remaining memory, and assemble the engine core."""
    start_s = time.monotonic()
    ranks = model if isinstance(model, SharedModel) else None
    if config.tp != (1 if ranks is None else ranks.group.size):
        raise ConfigError(
            f"tp is {config.tp}, but the given model was loaded {'whole' if ranks is None else 'in parts'}; give the "
            "model's name or path, so that each rank reads its own part"
        )
    device = model.decoder.device
    use_device(device)
    arena, edits = make_arena(model, config, device), make_edits(model, config, device)
    drafting = load_drafting(model, config)  # before the model's KV pages, which take all memory that is left
    head = drafting if isinstance(drafting, Head) else None
    small = None if drafting is None else build_runner(drafting.decoder, draft_config(config, drafting.decoder))
    parts = (None, None) if ranks is None else (ranks.group, ranks.peers)
    held_bytes = 0 if small is None else pooled_bytes(device)
    before = () if head is None else head.before
    runner = build_runner(
        model.decoder, config, *parts, arena=arena, edits=edits, held_bytes=held_bytes, noted_before=before
    )
    kv_cache, context = runner.kv_cache, runner.max_kv_len
    features = None if small is None or head is None else Features(kv_cache, small.kv_cache, head.combine)
    drafter = None if small is None else DraftModel(small, features)
    pool = PagePool(kv_cache.num_pages, kv_cache.page_size)
    cache = RadixCache(pool)
    scheduler = Scheduler(scheduler_config(config, context, model.decoder), pool, cache)
    logger.info(
        "engine ready in %.1f s: %s %s, KV %.2f GiB for %d tokens, context %d%s",
        time.monotonic() - start_s,
        device,
        model.decoder.dtype,
        kv_cache.num_bytes / 2**30,
        (kv_cache.num_pages - 1) * kv_cache.page_size,
        context,
        "" if ranks is None else f", each of {config.tp} ranks",
    )
    on_device = None if arena is None else make_device_grammars(model, arena)
    grammars = GrammarStates(model.config.vocab_size, runner.computes_run, on_device, model.tokenizer.token_bytes)
    return EngineCore(
        scheduler,
        runner,
        grammars,
        overlap=config.overlap and device.type == "cuda",
        context_length=context,
        speculation=make_speculation(config, device, cache, drafter),
    )


def make_speculation(
    config: EngineConfig, device: torch.device, cache: RadixCache, drafter: DraftModel | None
) -> Speculation | None:
    """Make what drafts tokens; None where no drafts are verified."""
    if not verifies(config):
        if config.speculative != "off":
            logger.info("no drafts are verified with tp > 1")
        return None
    is_gpu = device.type == "cuda"
    return Speculation(
        cache=cache if config.radix_cache else None,
        model=drafter,
        most_drafted=VERIFIED_DRAFTS[-1] if is_gpu else MOST_DRAFTED,
        clock=time.monotonic if is_gpu else time.thread_time,
    )


def verifies(config: EngineConfig) -> bool:
    """Return whether some steps verify drafts."""
    return config.speculative == "auto" and config.tp == 1


def load_drafting(model: LoadedModel, config: EngineConfig) -> LoadedModel | Head | None:
    """Load the head or the small model of `speculative_draft`.

    Raises: the errors of `load_model`; ConfigError: it cannot serve, and why.
    """
    name, decoder = config.speculative_draft, model.decoder
    if name is None:
        return None
    if config.tp > 1:
        raise ConfigError(f"speculative_draft is {name!r} but must be None with tp > 1, where no model drafts")
    if not has_head(Path(name), model.name):
        draft = load_model(name, device=decoder.device)
        check_vocabulary(draft, model)
        return draft
    if config.num_loras or isinstance(decoder, TransformersDecoder):
        raise ConfigError(f"speculative_draft is a head, {name!r}; it needs Ramet's own layers and no adapters")
    return load_head(Path(name), decoder)


def draft_config(config: EngineConfig, decoder: Decoder) -> EngineConfig:
    """The configuration of the runner of what drafts: a small pool, and nothing that belongs to the larger model."""
    longest = decoder.config.max_position_embeddings
    small: dict[str, object] = {
        "context_length": longest if config.context_length is None else min(config.context_length, longest),
        "num_kv_tokens": DRAFT_KV_TOKENS[decoder.device.type],
        "max_running_requests": min(config.max_running_requests, MOST_IN_STEP),
        "chunked_prefill_size": MOST_NEW,
        "cuda_graph_max_extend": min(config.cuda_graph_max_extend, MOST_NEW),
    }
    none: dict[str, object] = {"lora": (), "max_loras": None, "tree_attention": "off", "deterministic": False}
    none |= {"speculative": "off", "speculative_draft": None, "kv_cache_dtype": "auto"}
    return config.changed(small | none)


def pooled_bytes(device: torch.device) -> int:
    """Bytes of a GPU that graphs hold though no tensor does."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    reading = read_cuda_memory(device)
    return reading.reserved - reading.allocated


def build_runner(
    decoder: Decoder,
    config: EngineConfig,
    group: Group | None = None,
    peers: Peers | None = None,
    *,
    arena: GrammarArena | None = None,
    edits: LogitEdits | None = None,
    held_bytes: int = 0,
    noted_before: tuple[int, ...] = (),
) -> ModelRunner:
    """Make what runs steps: the KV pages that fit beside the weights, slots, graphs. Every rank of a group does so.

    The ranks take as many pages as fit on each of them. peers, arena, edits: the first rank's alone. held_bytes: what
    graphs of another runner hold of a GPU's memory. noted_before: layers whose input is noted for a head.
    """
    device, dtype = decoder.device, decoder.dtype
    use_device(device)
    longest = decoder.config.max_position_embeddings
    wanted = config.context_length or longest
    if wanted > longest:
        raise ConfigError(
            f"context_length is {wanted:,} but the model was trained for {longest:,}; lower --context-length"
        )
    kv_dtype = FP8 if config.kv_cache_dtype == "fp8_e4m3" else dtype
    decoder = prepare_decoder(decoder, config, device)
    if noted_before:
        decoder = tapped(decoder, noted_before)
    if isinstance(decoder, TransformersDecoder):  # its layers may read the host in a step
        config = config.changed({"cuda_graph": False})
    adapters = Adapters(decoder, config.num_loras, config.max_lora_rank) if config.num_loras else None
    tree = make_tree_planner(decoder, config, device, kv_dtype)
    page_size = page_size_of(config, device)
    noted = [decoder.dtype] * decoder.num_noted
    token_bytes = bytes_per_token(decoder.config, kv_dtype)
    token_bytes += decoder.num_noted * decoder.config.hidden_size * decoder.dtype.itemsize
    page_bytes = token_bytes * page_size
    num_pages = None if config.num_kv_tokens is None else -(-config.num_kv_tokens // page_size) + 1
    plan: MemoryPlan | None = None
    if device.type == "cuda":
        workspace, graphs = measure_steps(decoder, config, wanted, kv_dtype, arena, edits, tree, adapters)
        plan = plan_memory(
            read_cuda_memory(device),
            workspace=workspace,
            graphs=graphs + held_bytes,
            fraction=config.mem_fraction_static,
            page_bytes=page_bytes,
            num_pages=num_pages,
        )
        logger.info("memory: %s", plan)
        num_pages = plan.num_pages
    elif num_pages is None:
        num_pages = max(config.kv_cpu_bytes // config.tp // page_bytes, 2) + 1
    if group is not None:
        num_pages = group.smallest(num_pages)
    context = min(wanted, (num_pages - 1) * page_size)
    try:
        kv_cache = KVCache(decoder.config, num_pages, page_size, device=device, dtype=kv_dtype, noted=noted)
        slots = RunningSlots(config.max_running_requests, -(-context // page_size), device=device)
        runner = ModelRunner(
            decoder,
            kv_cache,
            slots,
            device=device,
            max_kv_len=context,
            arena=arena,
            edits=edits,
            tree=tree,
            is_deterministic=config.deterministic and device.type == "cuda",
            tiles=card_table(config, device).tiles if device.type == "cuda" else None,
            share=None if group is None else group.share,
            peers=peers,
            adapters=adapters,
            verifies=verifies(config),
        )
        if device.type == "cuda" and config.cuda_graph:
            runner.capture_graphs(config.cuda_graph_max_extend)
            torch.cuda.empty_cache()  # frees memory that the captures' first runs left
    except torch.OutOfMemoryError as error:
        assert plan is not None
        raise OutOfMemory(
            f"the GPU ran out of memory at start; {lower_fraction(config.mem_fraction_static, plan)}"
        ) from error
    return runner


def make_arena(model: LoadedModel, config: EngineConfig, device: torch.device) -> GrammarArena | None:
    """Make the arena of closed automata on a GPU. On a CPU the result is None: the host computes the masks."""
    if device.type != "cuda" or not config.grammar_on_device:
        return None
    tokenizer = model.tokenizer
    tokens = TokenTable.create(
        tokenizer.token_bytes, tokenizer.eos_ids, tokenizer.special_ids, model.config.vocab_size, device
    )
    return GrammarArena(
        tokens,
        config.max_running_requests,
        **arena_sizes(torch.cuda.get_device_properties(device).total_memory, model.config.vocab_size),
        max_grammars=max(256, 2 * config.max_running_requests),
    )


def make_device_grammars(model: LoadedModel, arena: GrammarArena) -> DeviceGrammars:
    tokenizer = model.tokenizer
    return DeviceGrammars(arena, tokenizer.token_bytes, tokenizer.eos_ids, tokenizer.special_ids)


def make_edits(model: LoadedModel, config: EngineConfig, device: torch.device) -> LogitEdits | None:
    """Make the tables of penalties and biases on a GPU. On a CPU the result is None: the host edits the logits."""
    if device.type != "cuda":
        return None
    rows = min(config.max_running_requests, NUM_EDIT_ROWS)
    return LogitEdits(EditTables.create(rows, model.config.vocab_size, device))


def make_tree_planner(
    decoder: Decoder, config: EngineConfig, device: torch.device, kv_dtype: torch.dtype
) -> TreePlanner | None:
    """Make the planner of tree attention on a GPU. On a CPU the result is None: tree attention has no CPU kernels."""
    if device.type != "cuda" or config.tree_attention == "off" or config.deterministic:
        return None
    return TreePlanner(
        decoder.config,
        page_size_of(config, device),
        config.max_running_requests,
        mode=config.tree_attention,
        num_sms=torch.cuda.get_device_properties(device).multi_processor_count,
        device=device,
        dtype=kv_dtype,
        costs=card_table(config, device).tree_costs,
        tiles=card_table(config, device).tiles,
    )


def step_tokens(config: EngineConfig, device: torch.device) -> int:
    """Maximum number of tokens in a step."""
    if config.chunked_prefill_size is not None:
        return config.chunked_prefill_size
    return 4096 if device.type == "cuda" else 2048


def max_step_s(config: EngineConfig, device: torch.device) -> float:
    """Seconds that a step with decode rows should take at most; 0: there is no such limit."""
    return (config.max_step_ms if config.max_step_ms is not None else 30 if device.type == "cuda" else 60) / 1000


def num_few_tokens(decoder: Decoder) -> int:
    """Tokens of a step up to which its products have kernels of their own; 0: all steps have the same."""
    methods = [linear.method for linear in decoder.linears() if isinstance(linear.method, BlockLinear)]
    return max((method.max_few for method in methods if method.many is not method.few), default=0)


def scheduler_config(config: EngineConfig, context_length: int, decoder: Decoder) -> SchedulerConfig:
    """Return the scheduler's part of the engine's configuration."""
    device = decoder.device
    return SchedulerConfig(
        context_length=context_length,
        max_running=config.max_running_requests,
        max_num_tokens_per_step=max(step_tokens(config, device), config.max_running_requests),
        max_step_s=max_step_s(config, device),
        first_mixed_tokens=512 if device.type == "cuda" else 64,
        num_few=num_few_tokens(decoder),
        max_waiting=config.max_queued_requests,
        reservation_ratio=config.reservation_ratio,
        prefix_cache=config.radix_cache,
    )


def measure_steps(
    decoder: Decoder,
    config: EngineConfig,
    context_length: int,
    kv_dtype: torch.dtype,
    arena: GrammarArena | None,
    edits: LogitEdits | None,
    tree: TreePlanner | None,
    adapters: Adapters | None,
) -> tuple[int, int]:
    """Measure a GPU's memory for steps: run the largest step of each kind in a small pool.

    Returns the bytes of an eager step's workspace and of all CUDA graphs, as `plan_memory` takes them.

    Raises:
        OutOfMemory: these steps do not fit beside the weights.
    """
    device = decoder.device
    num_tokens = min(step_tokens(config, device), context_length)
    page_size = page_size_of(config, device)
    num_pages = -(-num_tokens // page_size) + 1
    noted = [decoder.dtype] * decoder.num_noted
    try:
        kv_cache = KVCache(decoder.config, num_pages, page_size, device=device, dtype=kv_dtype, noted=noted)
        slots = RunningSlots(config.max_running_requests, -(-context_length // page_size), device=device)
        runner = ModelRunner(
            decoder,
            kv_cache,
            slots,
            device=device,
            max_kv_len=context_length,
            arena=arena,
            edits=edits,
            tree=tree,
            is_deterministic=config.deterministic,
            tiles=card_table(config, device).tiles,
            adapters=adapters,
            verifies=verifies(config),
        )
        if not isinstance(decoder, TransformersDecoder):
            runner.compile_kernels()
        request = Request("workspace", np.zeros(num_tokens, dtype=np.int32), SamplingParams(), 1)
        sequence = Sequence(request, page_ids=list(range(1, num_pages)), slot=0, status=Status.RUNNING)
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        item = ScheduledSequence(sequence, 0, num_tokens, num_samples=1)
        runner.launch(Batch(0, (item,), 0, num_tokens)).read()
        peak = torch.cuda.max_memory_allocated(device) - before
        graphs = measure_graphs(runner, config) if config.cuda_graph else 0
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"a prefill step of {num_tokens:,} tokens does not fit beside the weights; lower --chunked-prefill-size to "
            f"{max(num_tokens // 4, 256):,}, or --max-running-requests from {config.max_running_requests}"
        ) from error
    del runner, kv_cache, slots
    gc.collect()  # graphs and their steps refer to each other, and hold memory that KV pages should get
    torch.cuda.empty_cache()
    return peak + logits_bytes(config.max_running_requests, decoder.config.vocab_size), graphs


@torch.inference_mode()
def measure_graphs(runner: ModelRunner, config: EngineConfig) -> int:
    """Bytes of all graphs together: the shared pool, which the largest graphs fill, and the driver's part of each."""
    graphs = runner.make_graphs(config.cuda_graph_max_extend).graphs
    keys = graphs.keys(with_tree=runner.tree is not None)
    kinds: dict[object, list[GraphKey]] = {}
    for key in keys:
        kinds.setdefault((key.num_tokens > 0, key.uses_tree, key.num_drafted > 0), []).append(key)
    torch.cuda.empty_cache()
    before = read_cuda_memory(runner.device)
    graphs.capture([sizes[0] for sizes in kinds.values()])
    torch.cuda.empty_cache()
    between = read_cuda_memory(runner.device)
    # The first captures also load libraries' kernels, which happens once; later captures show the size of a graph.
    others = [sizes[-1] for sizes in kinds.values() if len(sizes) > 1]
    graphs.capture(others)
    torch.cuda.empty_cache()
    after = read_cuda_memory(runner.device)
    pool = after.reserved - before.reserved
    each = (after.used_by_others - between.used_by_others) // max(len(others), 1)
    return pool + max(each, 0) * len(keys)


def prepare_decoder(decoder: Decoder, config: EngineConfig, device: torch.device) -> Decoder:
    """Apply the passes that the configuration requires to the finished model."""
    if isinstance(decoder, TransformersDecoder) and (config.kv_cache_dtype != "auto" or config.num_loras):
        name = "kv_cache_dtype fp8_e4m3" if config.kv_cache_dtype != "auto" else "max_loras"
        raise ConfigError(f"{name} needs Ramet's own layers, but transformers computes those of this model")
    if config.kv_cache_dtype != "auto":
        decoder = apply_fp8_cache(decoder)
    if device.type != "cuda":
        return decoder
    if any(isinstance(layer, HeadLayer) for layer in decoder.layers):
        return decoder  # the passes know a model's layers
    if isinstance(decoder, TransformersDecoder):
        if config.deterministic:
            raise ConfigError("deterministic needs Ramet's own layers, but transformers computes those of this model")
        return decoder
    if config.deterministic:
        return apply_batch_invariance(decoder)
    return apply_card_table(decoder, card_table(config, device), has_adapters=config.num_loras > 0)


def page_size_of(config: EngineConfig, device: torch.device) -> int:
    """Token positions in a KV page: as configured, else as the table of a GPU has it, else the default."""
    if config.page_size is not None:
        return config.page_size
    measured = card_table(config, device).page_size if device.type == "cuda" else None
    return measured or DEFAULT_PAGE_SIZE


def card_table(config: EngineConfig, device: torch.device) -> CardTable:
    return load_card_table(torch.cuda.get_device_name(device), config.kernel_table)
