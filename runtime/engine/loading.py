"""Load an engine's model, whole or divided among processes, and the machine code of a CPU. Also what the other ranks'
processes do.

Not here: how a model is divided (`runtime/parallel/`), memory and steps (`factory.py`).
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ramet.errors import ConfigError, OutOfMemory
from ramet.grammar.machine import walker
from ramet.kernels.cpu.functions import load_functions
from ramet.loops import are_compiled
from ramet.runtime.engine.config import EngineConfig
from ramet.runtime.engine.factory import build_runner
from ramet.runtime.models.build import build_decoder
from ramet.runtime.models.catalog import TINY_MODEL, resolve_model
from ramet.runtime.models.config import ModelConfig
from ramet.runtime.models.decoder import Decoder
from ramet.runtime.models.description import describe_model
from ramet.runtime.models.load import (
    LoadedModel,
    is_for_transformers,
    load_model,
    model_in_memory,
    open_weights,
    parse_dtype,
)
from ramet.runtime.models.weights import Weights
from ramet.runtime.parallel.group import check_unused
from ramet.runtime.parallel.messages import RankMessage
from ramet.runtime.parallel.ranks import FirstRank, OtherRank
from ramet.runtime.parallel.sharded import SharedModel, apply_tensor_parallel
from ramet.runtime.parallel.share import Share, check_size
from ramet.runtime.steps.model_runner import ModelRunner
from ramet.runtime.testing.dummy import describe_tiny, dummy_weights, tiny_model, tiny_weights

logger = logging.getLogger(__name__)

OnStage = Callable[[str], None]
STAGE = "compiling for this CPU, once per machine"


def choose_device(name: str, rank: int = 0, size: int = 1) -> torch.device:
    """Return the device of this name for a rank. Raises ConfigError if the machine does not have one for every rank."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type != "cuda" and name != "cpu":  # torch knows others, which Ramet does not
            raise RuntimeError
    except RuntimeError as error:
        raise ConfigError(f"device is {name!r} but must be auto, cpu, cuda or cuda:N") from error
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ConfigError(f"device is {name!r} but torch sees no CUDA device; use --device cpu, or run `ramet doctor`")
    count = torch.cuda.device_count()
    if size == 1:
        # With its number: which device is current is each thread's own matter.
        index = torch.cuda.current_device() if device.index is None else device.index
        if index >= count:
            raise ConfigError(
                f"device is {name!r} but torch sees {count} CUDA devices, cuda:0 to cuda:{count - 1}; "
                "CUDA_VISIBLE_DEVICES may hide some"
            )
        return torch.device("cuda", index)
    first = device.index or 0
    if first + size > count:
        raise ConfigError(
            f"tp is {size} from device cuda:{first} on, but torch sees {count} CUDA devices; lower --tp to "
            f"{max(count - first, 1)} or less"
        )
    return torch.device("cuda", first + rank)


def config_of_replica(config: EngineConfig, replica: int, num_gpus: int) -> EngineConfig:
    """Return the configuration of one engine among several: each takes the next `tp` GPUs, where there are any.

    Raises ConfigError if there are too few.
    """
    kind, _, index = config.device.partition(":")
    if kind not in ("auto", "cuda") or not num_gpus or not (index.isdecimal() or not index):
        return config  # whoever chooses the device refuses a wrong name
    first = int(index or 0) + replica * config.tp
    if first + config.tp > num_gpus:
        raise ConfigError(
            f"engine {replica} needs {config.tp} GPUs from number {first} on, but this machine has {num_gpus}; "
            f"lower --dp{' or --tp' if config.tp > 1 else ''}"
        )
    return config.changed({"device": f"cuda:{first}"})


def load(
    model: Any,  # see `Engine`
    config: EngineConfig,
    tokenizer: Any = None,  # as above
    on_stage: OnStage | None = None,
) -> LoadedModel:
    """Load a model on the configuration's device, or its parts on one device for each rank.

    A LoadedModel is returned unchanged. With tp > 1 this also starts the other ranks' processes, which the engine ends.
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        gc.collect()  # graphs of an engine that has ended refer to their steps, and hold all of its memory
    if isinstance(model, LoadedModel):
        return model
    if isinstance(model, os.PathLike):
        model = os.fspath(model)
    if model is not None and not isinstance(model, str):
        return model_in_memory(model, tokenizer, config.quantization)
    if tokenizer is not None:
        raise ConfigError("a tokenizer can be given only with a model in memory; others have their own")
    try:
        return _load_named(model, config, on_stage)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"the weights of {model} do not fit on {config.device}; free its memory, take "
            f"--quantization fp8, --tp or a smaller model (`ramet size` says what fits): {error}"
        ) from error


def _load_named(model: str | None, config: EngineConfig, on_stage: OnStage | None) -> LoadedModel:
    if config.tp > 1:
        return _load_parts(model, config)
    if model == TINY_MODEL:
        return tiny_model()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    if config.load_format == "dummy":
        return _load_dummy(model, config)
    return load_model(
        model,
        device=choose_device(config.device),
        dtype=config.dtype,
        quantization=config.quantization,
        model_impl=config.model_impl,
        on_stage=on_stage,
    )


def _load_dummy(model: str | None, config: EngineConfig) -> LoadedModel:
    """Make a model of random weights, from its configuration and tokenizer alone."""
    path, device = resolve_model(model), choose_device(config.device)
    if is_for_transformers(path, config.model_impl, device):
        raise ConfigError(f"load_format is 'dummy', but transformers would compute the layers of {path}; use auto")
    whole = describe_model(path)
    weights = dummy_weights(whole.config, device, torch.bfloat16)
    decoder = build_decoder(
        whole.config, weights, device=device, dtype=parse_dtype(config.dtype), quantization=config.quantization
    )
    return LoadedModel(model or path.stem, decoder, whole.tokenizer, whole.config, whole.generation)


def _load_parts(model: str | None, config: EngineConfig) -> SharedModel:
    """Start the other ranks, and load the first rank's part meanwhile. What cannot work is refused before that."""
    start_s = time.monotonic()
    path = None if model == TINY_MODEL else resolve_model(model)
    if path is not None and is_for_transformers(path, config.model_impl):
        raise ConfigError(
            f"tp is {config.tp}, but transformers computes the layers of {path}, in one process; leave out --tp"
        )
    check_size(_open(path)[0], config.tp)
    device = choose_device(config.device, 0, config.tp)
    check_unused()
    threads = config.num_threads or max(torch.get_num_threads() // config.tp, 1)
    config = replace(config, num_threads=threads)
    peers = FirstRank(run_rank, (path, config, logging.getLogger().getEffectiveLevel()), config.tp)
    try:
        whole = describe_tiny() if path is None else describe_model(path)
        part = _load_part(path, config, Share(0, config.tp), device)
        group = peers.join(device)
        decoder = apply_tensor_parallel(part, group, whole.config.vocab_size)
    except BaseException as error:
        peers.close_after(error)
        raise
    name = model or (TINY_MODEL if path is None else path.stem)
    logger.info("loaded %s in %d parts in %.1f s", name, config.tp, time.monotonic() - start_s)
    return SharedModel(name, decoder, whole.tokenizer, whole.config, whole.generation, peers, group)


def _open(path: Path | None) -> tuple[ModelConfig, Weights]:
    """The whole model's configuration and its weights, of which nothing is read yet. None: the tiny model."""
    if path is not None:
        return open_weights(path)
    config = describe_tiny().config
    return config, tiny_weights(config)


def _load_part(path: Path | None, config: EngineConfig, share: Share, device: torch.device) -> Decoder:
    """Read a rank's part of the weights and put it on its device."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    whole, weights = _open(path)
    if config.load_format == "dummy":
        weights = dummy_weights(whole, torch.device("cpu"), torch.bfloat16)
    return build_decoder(
        share.config(whole),
        weights.cut(share.parts(whole)),
        device=device,
        dtype=torch.float32 if path is None else parse_dtype(config.dtype),
        quantization=config.quantization,
    )


def run_rank(
    index: int, pipes: Sequence[Connection], folder: str, path: Path | None, config: EngineConfig, log_level: int
) -> None:
    """A whole life of rank index + 1: load its part, then run the steps that the first rank sends."""
    own = OtherRank(index, pipes, folder)
    line = f"%(asctime)s %(levelname)s rank {own.rank} %(name)s: %(message)s"
    logging.basicConfig(level=log_level, format=line)
    try:
        device = choose_device(config.device, own.rank, config.tp)
        part = _load_part(path, config, Share(own.rank, config.tp), device)
        group = own.join(device)
        decoder = apply_tensor_parallel(part, group, _open(path)[0].vocab_size)
        runner = build_runner(decoder, config, group=group)
        while (message := own.receive()) is not None:
            carry_out(message, runner)
    except Exception as error:  # whatever it is, the first rank must learn of it
        own.fail(error)
        raise
    group.close()
    logging.shutdown()
    os._exit(0)  # nothing is left to be done, and torch's own ending takes half a second


def carry_out(message: RankMessage, runner: ModelRunner) -> None:
    """Do what the first rank says."""
    if message.work is not None and runner.tree is not None:
        runner.tree.load(message.work)
    if message.step is not None:
        runner.run(message.step)
    if message.last:
        runner.store_last(message.last)


def prepare_compiled_code(device: torch.device, on_stage: OnStage | None) -> None:
    """Load the CPU kernels and the grammars' loops, and compile those that are not on this machine's disk yet.

    Compiling takes about 15 s. `on_stage` is told how far it is; without one, a log line is written once.
    """
    start_s = time.monotonic()
    is_told = False

    def tell(num_done: int = 0, num_all: int = 0) -> None:
        nonlocal is_told
        if on_stage is not None:
            on_stage(f"{STAGE}: {num_done} of {num_all}" if num_all else STAGE)
        elif not is_told:
            logger.warning(STAGE)
        is_told = True

    if device.type == "cpu":
        load_functions(tell)
    if not are_compiled(walker.walk):
        from ramet.grammar.service.warm_up import load_loops  # 0.2 s, which most starts need not spend

        tell()
        load_loops()
    if is_told:
        logger.info("compiled for this CPU in %.1f s", time.monotonic() - start_s)
