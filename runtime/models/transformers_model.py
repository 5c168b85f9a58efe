"""Run a model class of transformers in the engine: for architectures without a family of ours (`families.py`).

transformers computes everything but attention. Its layers call our attention over the paged cache through its attention
interface, so steps, the radix tree, scheduling and sampling are the engine's. Models that do not use the interface, or
whose attention has parts that ours lacks (ALiBi, soft caps, sinks), compute attention themselves: each sequence runs by
itself, with its keys and values copied from the pages, and the new ones are written back. That is slow, and a log line
says so. A model is only served if its logits over pages equal those of its own forward pass, checked when it is loaded.
Source: transformers' documentation of `AttentionInterface`; vLLM's Transformers backend has the same idea.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ramet.errors import BrokenModelFile, ConfigError, UnsupportedArchitecture
from ramet.kernels.attention.extend import ExtendMetadata, gather_pages
from ramet.kernels.cpu.ops import cpu_ops
from ramet.kernels.cpu.program import KernelStream
from ramet.kernels.layers.rope import write_kv_reference
from ramet.kernels.ops import TRITON, Ops
from ramet.kernels.triton_support import use_device
from ramet.runtime.models.config import ModelConfig, Rope, token_ids
from ramet.runtime.models.decoder import Decoder, ForwardContext
from ramet.runtime.models.layers import attend_over_cache
from ramet.runtime.models.linear import Linear, PlainLinear

logger = logging.getLogger(__name__)

_NAME = "ramet"  # of our attention in transformers' interface
# q [T, H, D], k and v [T, K, D], scale, window -> [T, H, D]. A forward pass calls it once for each layer, in order.
Attend = Callable[[Tensor, Tensor, Tensor, float, int | None], Tensor]
# What layers may also pass to attention without a change of its result.
_HARMLESS = {
    "dropout",
    "position_ids",
    "cache_position",
    "is_causal",
    "use_cache",
    "logits_to_keep",
    "position_embeddings",
}
# Set for one forward pass in the thread that runs it: not every model's layers hand arguments on to attention.
_attend: ContextVar[Attend] = ContextVar("ramet_attend")
_CHECK_TOKENS = 9
_CHECK_CUT = 5
_PAGE = 16
# Largest difference of logits between the two ways, as a share of the largest logit.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}


class _OtherAttentionError(Exception):
    """A layer asks for attention that ours does not have."""


@dataclass(slots=True, eq=False)
class TransformersDecoder(Decoder):
    """A decoder whose layers are a base model of transformers: token ids to hidden states after the final norm.

    cache_name: the parameter of its cache. None: its layers call our attention, and it needs no cache.
    """

    model: Any  # a PreTrainedModel without its output layer
    cache_name: str | None = None

    def forward(self, token_ids: Tensor, context: ForwardContext) -> Tensor:
        if self.cache_name is not None:
            return self._one_by_one(token_ids, context, self.cache_name)
        caches = iter(context.kv_caches)

        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
            pages = next(caches)
            write_kv_reference(k.to(self.dtype), v.to(self.dtype), context.kv_slots, pages[0], pages[1])
            return attend_over_cache(self.ops, q, pages, context, scale, window)

        return _with_attention(attend, self.model, token_ids, context.positions)

    def _one_by_one(self, token_ids: Tensor, context: ForwardContext, cache_name: str) -> Tensor:
        """Run each sequence with a cache of its own, filled from its pages."""
        hidden = torch.zeros((token_ids.shape[0], self.config.hidden_size), dtype=self.dtype, device=self.device)
        for tokens, pages, num_cached in _sequences(context):
            cache = _new_cache()
            for layer, (keys, values) in enumerate(context.kv_caches if num_cached else []):
                cached = [gather_pages(part, pages, self.dtype)[None, :, :num_cached] for part in (keys, values)]
                cache.update(*cached, layer)
            positions = context.positions[tokens]
            hidden[tokens] = _hidden(self.model, token_ids[tokens], positions, use_cache=True, **{cache_name: cache})
            for held, pages_of_layer in zip(cache.layers, context.kv_caches, strict=True):
                k, v = (part[0, :, num_cached:].transpose(0, 1).to(self.dtype) for part in (held.keys, held.values))
                write_kv_reference(k, v, context.kv_slots[tokens], *pages_of_layer)
        return hidden


def describe_transformers(folder: Path) -> ModelConfig:
    """The configuration of a model without a family, without its weights: the number of KV heads may be too large.

    Raises: UnsupportedArchitecture, also if transformers is not installed; BrokenModelFile.
    """
    transformers = import_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a strange file can raise anything
        raise UnsupportedArchitecture(f"transformers cannot read {folder}: {_first_line(error)}") from error
    text = config.get_text_config()
    return _config(text, text.hidden_size // text.num_attention_heads, text.num_attention_heads, text.vocab_size)


def load_transformers(folder: Path, device: torch.device, dtype: torch.dtype) -> Decoder:
    """Load a folder's weights by transformers. Code of the folder is never run.

    What the configuration alone shows is refused before a weight is read.
    Raises: UnsupportedArchitecture, BrokenModelFile.
    """
    transformers = import_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            shell = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise UnsupportedArchitecture(
            f"transformers cannot make the model of {folder / 'config.json'}: {reason}"
        ) from error
    _check_kind(shell)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:  # a strange file can raise anything
        raise BrokenModelFile(f"transformers cannot load {folder}: {_first_line(error)}") from error
    return transformers_decoder(model.to(device))


@torch.inference_mode()
def transformers_decoder(model: Any) -> TransformersDecoder:  # Any: a PreTrainedModel with an output layer
    """Make a decoder of a model in memory, on its device and in its dtype. It uses the model's weights, no copies.

    Its attention implementation becomes `ramet`; `model.set_attn_implementation("sdpa")` undoes that.
    Raises: UnsupportedArchitecture naming what the engine cannot run.
    """
    import_transformers()
    use_device(model.device)
    model.eval()
    model.set_attn_implementation("eager")  # also of a model that an engine had before
    _check_kind(model)
    name, head, text = type(model).__name__, model.get_output_embeddings(), model.config.get_text_config()
    if model.dtype not in _TOLERANCE:
        raise ConfigError(f"the model's dtype is {model.dtype} but must be {', '.join(map(str, _TOLERANCE))}")
    ids = torch.arange(1, _CHECK_TOKENS + 1, device=model.device) * 7 % head.weight.shape[0]
    expected = model(ids[None], use_cache=False).logits[0].float()
    reasons = []
    for make in (_with_our_attention, _with_its_own_attention):
        try:
            decoder = make(model, head, text, ids)
            difference = _difference(decoder, ids, expected)
        except torch.OutOfMemoryError:  # which is a RuntimeError, and says nothing of the architecture
            raise
        except (_OtherAttentionError, TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        if difference < _TOLERANCE[model.dtype]:
            if decoder.cache_name is not None:
                logger.warning("%s computes attention itself, one sequence at a time: %s", name, reasons[0])
            return decoder
        reasons.append(f"its logits differ by {difference:.1e} of the largest one")
    raise UnsupportedArchitecture(
        f"{name} cannot be run over paged keys and values. With Ramet's attention: {reasons[0]}. "
        f"With its own: {reasons[1]}"
    )


def _check_kind(model: Any) -> None:  # Any: a PreTrainedModel
    """Raise UnsupportedArchitecture unless this is a causal language model whose layers all have KV pages."""
    name = type(model).__name__
    if model.get_output_embeddings() is None or model.config.is_encoder_decoder:
        raise UnsupportedArchitecture(
            f"{name} has no output layer over a decoder; the engine runs causal language models"
        )
    unknown = sorted({*_layer_types(model.config.get_text_config())} - {"full_attention", "sliding_attention"})
    if unknown:
        raise UnsupportedArchitecture(f"{name} has layers of the kinds {', '.join(unknown)}, which have no KV pages")


def _layer_types(text: Any) -> Sequence[str]:
    """The kinds of layers, where a configuration has them; some compute them, so they are not among its fields."""
    try:
        return text.layer_types or ()
    except AttributeError:
        return ()


def _with_our_attention(model: Any, head: Any, text: Any, ids: Tensor) -> TransformersDecoder:
    """A decoder whose layers call our attention. Raises: _OtherAttentionError."""
    fields = text.to_dict()
    rotary = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    kinds_of_rope = {part.get("rope_type") for part in (rotary, *rotary.values()) if isinstance(part, dict)}
    if kinds_of_rope & {"dynamic", "longrope"}:
        raise _OtherAttentionError("its rotary frequencies depend on the longest sequence of a batch")
    _register()
    model.set_attn_implementation(_NAME)
    try:
        shapes: list[tuple[int, int]] = []
        windows: list[int | None] = []

        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
            if k.shape != v.shape or k.shape[2] != q.shape[2]:
                raise _OtherAttentionError("queries, keys and values have different sizes")
            shapes.append((k.shape[1], k.shape[2]))
            windows.append(window)
            return torch.zeros_like(q)

        _with_attention(attend, model.base_model, ids, torch.arange(len(ids), device=ids.device))
        kinds = _layer_types(text)
        if len(shapes) != text.num_hidden_layers:
            raise _OtherAttentionError(f"{len(shapes)} of {text.num_hidden_layers} layers call the attention interface")
        if kinds and [kind == "sliding_attention" for kind in kinds] != [window is not None for window in windows]:
            raise _OtherAttentionError("its sliding layers do not pass their window")
        return _decoder(model, head, text, shapes, None)
    except Exception:
        model.set_attn_implementation("eager")
        raise


def _with_its_own_attention(model: Any, head: Any, text: Any, ids: Tensor) -> TransformersDecoder:
    """A decoder that gives each sequence a cache of transformers, filled from its pages."""
    parameters = inspect.signature(type(model.base_model).forward).parameters
    cache_name = next(name for name in ("cache", "past_key_values") if name in parameters)
    cache = _new_cache()
    positions = torch.arange(len(ids), device=ids.device)
    _hidden(model.base_model, ids, positions, use_cache=True, **{cache_name: cache})
    shapes = [(layer.keys.shape[1], layer.keys.shape[3]) for layer in cache.layers]
    if any(layer.values.shape != layer.keys.shape for layer in cache.layers):
        raise _OtherAttentionError("keys and values have different sizes")
    return _decoder(model, head, text, shapes, cache_name)


def _decoder(
    model: Any, head: Any, text: Any, shapes: list[tuple[int, int]], cache_name: str | None
) -> TransformersDecoder:
    if len(set(shapes)) != 1:
        raise _OtherAttentionError(f"layers have different numbers or sizes of KV heads: {sorted(set(shapes))}")
    num_kv_heads, head_dim = shapes[0]
    vocab_size, hidden_size = head.weight.shape
    config = _config(text, head_dim, num_kv_heads, vocab_size, len(shapes))
    device, dtype = model.device, model.dtype
    return TransformersDecoder(
        config=config,
        ops=_ops(device, dtype, head_dim),
        device=device,
        dtype=dtype,
        embedding=model.get_input_embeddings(),
        layers=[],
        final_norm=torch.ones(hidden_size, dtype=dtype, device=device),
        output=Linear(("lm_head.weight",), PlainLinear(head.weight), head.bias, hidden_size, vocab_size),
        model=model.base_model,
        cache_name=cache_name,
    )


def _config(text: Any, head_dim: int, num_kv_heads: int, vocab_size: int, num_layers: int | None = None) -> ModelConfig:
    """The sizes that an engine needs. Fields that our own layers alone would read have neutral values."""
    rope = Rope(10000.0)
    names = ("max_position_embeddings", "max_seq_len", "n_positions", "max_sequence_length")
    fields = text.to_dict()
    context = next((fields[name] for name in names if fields.get(name)), 2048)
    return ModelConfig(
        architecture=text.model_type,
        hidden_size=text.hidden_size,
        intermediate_size=1,
        num_layers=num_layers or text.num_hidden_layers,
        num_heads=text.num_attention_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        rms_norm_eps=1e-6,
        max_position_embeddings=context,
        rope=rope,
        local_rope=rope,
        attention_scale=head_dim**-0.5,
        logit_softcap=fields.get("final_logit_softcapping"),
        bos_id=text.bos_token_id,
        eos_ids=token_ids(text.eos_token_id),
        pad_id=text.pad_token_id,
    )


def _difference(decoder: TransformersDecoder, ids: Tensor, expected: Tensor) -> float:
    """Run a prompt in two chunks over pages, as an engine would. Finds the scale of the logits, if the model has one.

    Returns the largest difference to the expected logits [T, V] as a share of the largest of them.
    """
    config, device = decoder.config, decoder.device
    shape = 2, 2, config.num_kv_heads, _PAGE, config.head_dim  # keys and values; page 0 is the dummy
    pages = (torch.zeros(shape, dtype=decoder.dtype, device=device) for _ in range(config.num_layers))
    caches = [(keys, values) for keys, values in pages]
    found = []
    for start, stop in ((0, _CHECK_CUT), (_CHECK_CUT, _CHECK_TOKENS)):
        lengths = [0, stop - start], [stop], [0], [[1]]
        cu_seqlens, kv_lens, rows, table = (torch.tensor(n, dtype=torch.int32, device=device) for n in lengths)
        count = stop - start
        extend = ExtendMetadata(cu_seqlens, kv_lens, rows, table, count, stop, [count], [stop])
        positions = torch.arange(start, stop, dtype=torch.int32, device=device)
        context = ForwardContext(positions, positions + _PAGE, 0, None, extend, caches, 0)
        found.append(decoder.forward(ids[start:stop].int(), context))
    hidden = torch.cat(found)
    if config.logit_softcap is None:
        raw = decoder.output(hidden).float()
        scale = float(f"{float((raw * expected).sum() / raw.square().sum().clamp(min=1e-12)):.5g}")
        if abs(scale - 1) > 1e-3 and scale > 0:
            decoder.config = dataclasses.replace(config, logit_scale=scale)
    return float((decoder.logits(hidden).float() - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


def _hidden(base: Any, token_ids: Tensor, positions: Tensor, **options: Any) -> Tensor:
    """Hidden states [T, hidden] of tokens [T], as one sequence for transformers."""
    parameters = inspect.signature(type(base).forward).parameters
    if "position_ids" in parameters:
        options["position_ids"] = positions.long()[None]
    hidden: Tensor = base(input_ids=token_ids.long()[None], **options).last_hidden_state[0]
    return hidden


def _with_attention(attend: Attend, base: Any, token_ids: Tensor, positions: Tensor) -> Tensor:
    """`_hidden` with this attention in every layer."""
    before = _attend.set(attend)
    try:
        return _hidden(base, token_ids, positions, use_cache=False)
    finally:
        _attend.reset(before)


def _sequences(context: ForwardContext) -> Iterator[tuple[slice, Tensor, int]]:
    """For each sequence of a step: its tokens, its pages and the number of its cached positions."""
    decode, extend = context.decode, context.extend
    if decode is not None:
        lengths = decode.kv_lens.tolist() if decode.kv_lens_host is None else decode.kv_lens_host
        for token, (row, kv_len) in enumerate(zip(decode.rows.tolist(), lengths, strict=True)):
            if kv_len:
                yield slice(token, token + 1), decode.page_table[row], kv_len - 1
    if extend is not None:
        starts = extend.cu_seqlens_q.tolist()
        for i, (row, kv_len) in enumerate(zip(extend.rows.tolist(), extend.kv_lens.tolist(), strict=True)):
            first, last = context.extend_start + starts[i], context.extend_start + starts[i + 1]
            if last > first:
                yield slice(first, last), extend.page_table[row], kv_len - (last - first)


def _ops(device: torch.device, dtype: torch.dtype, head_dim: int) -> Ops:
    """The device's ops. Steps are not recorded: transformers' products are not Ramet's kernels."""
    if device.type == "cuda":
        return TRITON
    return dataclasses.replace(cpu_ops(KernelStream(), dtype, head_dim), make_record=None)


def _new_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()


def _register() -> None:
    """Make our attention known to transformers, under a name that stays the same."""
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attention)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D]."""
    attend = _attend.get(None)
    if attend is None:
        raise ConfigError(
            "an engine runs this model; `model.set_attn_implementation('sdpa')` gives it back to transformers"
        )
    asked = sorted(name for name, value in others.items() if value is not None and name not in _HARMLESS)
    if asked:
        raise _OtherAttentionError(f"its attention takes {', '.join(asked)}")
    q, k, v = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(q, k, v, scale, sliding_window)[None], None


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def import_transformers() -> Any:  # Any: the module
    """Import transformers. Raises: UnsupportedArchitecture with the command that installs it."""
    try:
        import transformers
    except ImportError as error:
        raise UnsupportedArchitecture(
            "transformers runs models without a native family, and is not installed: pip install 'ramet[transformers]'"
        ) from error
    return transformers
