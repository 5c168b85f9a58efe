"""From a model and a configuration to an engine core: device, dtype, memory, scheduler, graphs."""

from __future__ import annotations

import logging
import time

import torch

from ramet.errors import ConfigError, OutOfMemory
from ramet.kernels.grammar_arena import GrammarArena
from ramet.kernels.grammar_mask import TokenTable
from ramet.runtime.config import EngineConfig
from ramet.runtime.engine import EngineCore
from ramet.runtime.kv_cache import KVCache, choose_num_pages
from ramet.runtime.model_runner import ModelRunner
from ramet.runtime.models.dummy import TINY_MODEL, tiny_model
from ramet.runtime.models.load import LoadedModel, load_model
from ramet.runtime.page_pool import PagePool
from ramet.runtime.radix_cache import RadixCache
from ramet.runtime.scheduler import Scheduler, SchedulerConfig
from ramet.runtime.slots import RunningSlots
from ramet.runtime.tree_planner import TreePlanner
from ramet.runtime.types import Batch, Request, SamplingParams, ScheduledSequence, Sequence, Status

logger = logging.getLogger(__name__)

_GRAPH_WORKSPACE_BYTES = 1 << 30  # decode graphs' private pool, beside the measured peak of a prefill step


def choose_device(name: str) -> torch.device:
    """Turn a device's name into a device. Raises ConfigError where there is none such."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device is {name!r} but must be auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {name!r} but torch sees no CUDA device; use --device cpu, or run `ramet doctor`")
    return device


def load(model: str | LoadedModel | None, config: EngineConfig) -> LoadedModel:
    """Load a model on the configuration's device; a LoadedModel is taken as it is."""
    if isinstance(model, LoadedModel):
        return model
    if model == TINY_MODEL:
        return tiny_model()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    return load_model(model, device=choose_device(config.device), dtype=config.dtype, quantization=config.quantization)


def build_core(model: LoadedModel, config: EngineConfig) -> EngineCore:
    """Size the KV pool by what is left of the memory, and put the parts together."""
    start_s = time.monotonic()
    device, dtype = model.decoder.device, model.decoder.dtype
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread: kernels are launched on the current device
    wanted = config.context_length or model.config.max_position_embeddings
    if wanted > model.config.max_position_embeddings:
        raise ConfigError(
            f"context_length is {wanted:,} but the model was trained for {model.config.max_position_embeddings:,}; "
            f"lower --context-length"
        )
    peak = measure_workspace(model, config, wanted) if device.type == "cuda" else 0
    num_pages = choose_num_pages(
        model.config, config, device=device, dtype=dtype, peak_workspace_bytes=peak + _GRAPH_WORKSPACE_BYTES
    )
    context = min(wanted, (num_pages - 1) * config.page_size)
    kv_cache = KVCache(model.config, num_pages, config.page_size, device=device, dtype=dtype)
    pool = PagePool(num_pages, config.page_size)
    scheduler = Scheduler(scheduler_config(config, context), pool, RadixCache(pool))
    slots = RunningSlots(config.max_running_requests, -(-context // config.page_size), device=device)
    runner = ModelRunner(
        model.decoder,
        kv_cache,
        slots,
        device=device,
        max_kv_len=context,
        arena=make_arena(model, config, device),
        tree=make_tree_planner(model, config, device),
    )
    if device.type == "cuda" and config.cuda_graph:
        runner.capture_graphs(config.cuda_graph_max_extend)
        torch.cuda.synchronize(device)
    logger.info(
        "engine ready in %.1f s: %s %s, KV %.2f GiB for %d tokens, context %d, workspace %.2f GiB",
        time.monotonic() - start_s,
        device,
        dtype,
        kv_cache.num_bytes / 2**30,
        (num_pages - 1) * config.page_size,
        context,
        peak / 2**30,
    )
    return EngineCore(
        scheduler,
        runner,
        overlap=config.overlap and device.type == "cuda",
        vocab_words=-(-model.config.vocab_size // 32),
        context_length=context,
    )


def make_arena(model: LoadedModel, config: EngineConfig, device: torch.device) -> GrammarArena | None:
    """Room for closed automata on a GPU. On a CPU the host computes masks: it is the device."""
    if device.type != "cuda" or not config.grammar_on_device:
        return None
    tokenizer = model.tokenizer
    tokens = TokenTable.create(
        tokenizer.token_bytes, tokenizer.eos_ids, tokenizer.special_ids, model.config.vocab_size, device
    )
    return GrammarArena(tokens, config.max_running_requests)


def make_tree_planner(model: LoadedModel, config: EngineConfig, device: torch.device) -> TreePlanner | None:
    """Tree attention on a GPU; its kernels have no counterpart on a CPU, where nothing is shared by reading once."""
    if device.type != "cuda" or config.tree_attention == "off":
        return None
    return TreePlanner(
        model.config,
        config.page_size,
        config.max_running_requests,
        mode=config.tree_attention,
        num_sms=torch.cuda.get_device_properties(device).multi_processor_count,
        device=device,
        dtype=model.decoder.dtype,
    )


def scheduler_config(config: EngineConfig, context_length: int) -> SchedulerConfig:
    """What the scheduler needs of the engine's configuration."""
    return SchedulerConfig(
        context_length=context_length,
        max_running=config.max_running_requests,
        max_num_tokens_per_step=max(config.chunked_prefill_size, config.max_running_requests),
        max_waiting=config.max_queued_requests,
        reservation_ratio=config.reservation_ratio,
        prefix_cache=config.radix_cache,
    )


def measure_workspace(model: LoadedModel, config: EngineConfig, context_length: int) -> int:
    """Bytes that the largest prefill step takes beside weights and KV, measured by running one."""
    device = model.decoder.device
    num_tokens = min(config.chunked_prefill_size, context_length)
    num_pages = -(-num_tokens // config.page_size) + 1
    try:
        kv_cache = KVCache(model.config, num_pages, config.page_size, device=device, dtype=model.decoder.dtype)
        slots = RunningSlots(1, num_pages, device=device)
        runner = ModelRunner(model.decoder, kv_cache, slots, device=device, max_kv_len=num_tokens)
        request = Request("workspace", torch.zeros(num_tokens, dtype=torch.int32).numpy(), SamplingParams(), 1)
        sequence = Sequence(request, page_ids=list(range(1, num_pages)), slot=0, status=Status.RUNNING)
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        item = ScheduledSequence(sequence, 0, num_tokens, samples=True, is_decode=False)
        runner.launch(Batch(0, (item,), 0, num_tokens)).read()
        peak = torch.cuda.max_memory_allocated(device) - before
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"a prefill step of {num_tokens:,} tokens does not fit beside the weights; lower --chunked-prefill-size"
        ) from error
    # A decode step's logits in fp32, twice, for every slot: what sampling needs at most.
    return peak + 2 * 4 * config.max_running_requests * model.config.vocab_size
