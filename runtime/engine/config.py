"""The engine's configuration: one frozen dataclass, whose fields are also the command line's flags."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ramet.errors import ConfigError
from ramet.lang.graph.json_form import KNOWN, JsonForm, whitespace_named
from ramet.lang.graph.sampling import MAX_INT32

MAX_INT64 = 2**63 - 1
DEFAULT_PAGE_SIZE = 16


def _doc(default: Any, text: str) -> Any:  # Any: what dataclasses.field returns is typed as the field it stands for
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The engine's configuration. Each field has its help text. Unknown or impossible values raise ConfigError."""

    device: str = _doc("auto", "where the model runs: auto, cpu, cuda, cuda:1")
    dtype: str = _doc("auto", "auto, float32, bfloat16 or float16")
    model_impl: Literal["auto", "ramet", "transformers"] = _doc(
        "auto", "who computes the layers: ramet, transformers; auto: Ramet where it has the family, else transformers"
    )
    load_format: Literal["auto", "dummy"] = _doc(
        "auto",
        "weights: auto: those of the files; dummy: random ones, of which no file is read (speed and memory alone)",
    )
    quantization: str | None = _doc(
        None,
        "fp8: weights and activations in FP8; on a CPU also int8, int4 or gguf, of weights alone; None: as the files "
        "and dtype say",
    )
    tp: int = _doc(
        1, "tensor parallel: processes (and GPUs) among which the model is divided; it must divide the model's heads"
    )
    context_length: int | None = _doc(
        None, "tokens a sequence may have; None: what the model was trained for, capped by memory"
    )
    kv_cache_dtype: Literal["auto", "fp8_e4m3"] = _doc(
        "auto",
        "keys and values: auto: in the model's dtype; fp8_e4m3: in one byte, with a scale for each head's vector",
    )
    page_size: int | None = _doc(
        None, f"token positions in a KV page; None: what is fastest on a measured GPU, else {DEFAULT_PAGE_SIZE}"
    )
    num_kv_tokens: int | None = _doc(None, "token positions in the KV pool; None: by memory")
    mem_fraction_static: float = _doc(0.9, "share of the device's memory for weights, KV and workspace together")
    kv_cpu_bytes: int = _doc(
        2 << 30, "bytes of the KV pool on a CPU, of all ranks together, where num_kv_tokens is not given"
    )
    max_running_requests: int = _doc(256, "sequences that run at once; each has a slot")
    max_queued_requests: int = _doc(100_000, "requests that may wait; one more is refused with Overloaded")
    chunked_prefill_size: int | None = _doc(
        None, "tokens of a step, at most (fewer beside few decode rows); None: 4,096 on a GPU, 2,048 on a CPU"
    )
    max_step_ms: int | None = _doc(
        None,
        "milliseconds that a step should take at most while requests decode, to which prompts beside them are cut; "
        "None: 60 on a CPU, 30 on a GPU; 0: throughput first",
    )
    cuda_graph: bool = _doc(True, "replay decode steps as CUDA graphs")
    cuda_graph_max_extend: int = _doc(
        512,
        "tokens of a step with prompts, decode rows included, that a CUDA graph may hold; 0: such steps run eagerly",
    )
    overlap: bool = _doc(True, "plan step t+1 while step t runs (on a GPU)")
    tree_attention: Literal["auto", "on", "off"] = _doc(
        "auto", "read shared prefixes once a group: auto asks the cost model"
    )
    speculative: Literal["off", "auto"] = _doc(
        "off",
        "verify several drafted tokens in a step: auto does where it is faster (with tp=1), off never does; "
        "the text is the same",
    )
    speculative_draft: str | None = _doc(
        None,
        "what drafts, too, with speculative=auto: the name or path of a small model with the same vocabulary, "
        "the folder of an EAGLE-3 head, or the model's own folder, for its layer of multi-token prediction",
    )
    deterministic: bool = _doc(
        False, "the same tokens for a request whatever runs beside it (on a GPU; no tree attention, slower products)"
    )
    kernel_table: str | None = _doc(
        None, "file of kernel choices measured on this card; None: the one that comes with Ramet, if there is one"
    )
    lora: tuple[str, ...] = _doc(
        (), "an adapter (LoRA) to load at start, as name=path of a PEFT folder; a request chooses it as its model"
    )
    max_loras: int | None = _doc(
        None, "adapters that may be loaded at once, also while the engine runs; None: 8 with lora, else none"
    )
    max_lora_rank: int = _doc(64, "the largest rank of an adapter")
    grammar_on_device: bool = _doc(True, "keep closed automata on the GPU")
    json_whitespace: str | None = _doc(
        None,
        "white space of JSON that a schema asks for, where a request does not say: model (a space after commas and "
        "colons), compact, any, or indent=0 to indent=8; None: model, and in tool calls as the chat template writes it",
    )
    json_order: Literal["declared", "any"] = _doc(
        "declared", "order of properties, where a request does not say: the schema's, or any"
    )
    json_additional_properties: Literal["closed", "schema"] = _doc(
        "closed",
        "whether an object with `properties` may have others if its schema does not speak of them: closed, or as the "
        "letter of the schema says",
    )
    default_max_tokens: int = _doc(1024, "max_tokens of a request that names none (capped by the context)")
    reservation_ratio: float = _doc(1.0, "share of max_tokens that admission reserves memory for; below 1 may preempt")
    radix_cache: bool = _doc(True, "reuse KV between requests")
    num_threads: int | None = _doc(None, "CPU threads of the model; None: torch's choice")
    seed: int = _doc(0, "seed of the seeds drawn for requests that name none")

    def __post_init__(self) -> None:
        for name, (is_right, limit) in _limits().items():
            value = getattr(self, name)
            if not is_right(value):
                raise ConfigError(f"{name} is {value!r} but must be {limit}")
        if self.speculative_draft is not None and self.speculative == "off":
            raise ConfigError(
                f"speculative_draft is {self.speculative_draft!r} but must be None with speculative=off; "
                "set speculative=auto"
            )
        if self.deterministic and self.tp > 1:
            raise ConfigError(
                "deterministic is True but must be False with tp > 1, where the order of sums over ranks depends on "
                "the batch"
            )
        if self.num_loras and self.tp > 1:
            raise ConfigError(
                f"lora and max_loras need tp=1, but tp is {self.tp}; adapters are not divided among ranks"
            )
        if len(self.lora) > self.num_loras:
            raise ConfigError(f"lora names {len(self.lora)} adapters but max_loras is {self.max_loras}; raise it")
        two_pages = 2 * (self.page_size or DEFAULT_PAGE_SIZE)
        if self.num_kv_tokens is not None and self.num_kv_tokens < two_pages:
            raise ConfigError(f"num_kv_tokens is {self.num_kv_tokens} but must be at least two pages: {two_pages}")

    @property
    def num_loras(self) -> int:
        """How many adapters may be loaded at once."""
        return self.max_loras if self.max_loras is not None else max(8, len(self.lora)) if self.lora else 0

    @property
    def json_form(self) -> JsonForm:
        """The form of JSON where a request does not say."""
        whitespace = None if self.json_whitespace is None else whitespace_named(self.json_whitespace)
        return JsonForm(whitespace, self.json_order, self.json_additional_properties)

    @classmethod
    def from_mapping(cls, values: dict[str, object]) -> EngineConfig:
        """Make a configuration from named values. Raises ConfigError naming the unknown keys and all known ones."""
        return cls().changed(values)

    def changed(self, values: dict[str, object]) -> EngineConfig:
        """Return a copy with other values. Raises ConfigError naming the unknown keys and all known ones."""
        known = {f.name for f in fields(self)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"unknown configuration {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        if isinstance(values.get("lora"), list):  # as it comes from another process
            values = {**values, "lora": tuple(values["lora"])}  # type: ignore[arg-type]
        try:
            return replace(self, **values)  # type: ignore[arg-type]
        except TypeError as error:
            raise ConfigError(f"a configuration value has the wrong type: {error}") from error


Limit = tuple[Callable[[Any], bool], str]  # what a value must be: a check of any value, and its words


def _whole(least: int, most: int | None = None) -> Limit:
    limit = f"an integer of at least {least:,}" if most is None else f"an integer from {least:,} to {most:,}"
    most = MAX_INT64 if most is None else most
    return lambda value: _is_number(value, Integral) and least <= int(value) <= most, limit


def _part(least: float, most: float) -> Limit:
    limit = f"a number in [{least}, {most}]"
    return lambda value: _is_number(value, Real) and least <= float(value) <= most, limit


def _is_number(value: Any, kind: type) -> bool:  # Any: what a user gave
    return isinstance(value, kind) and not isinstance(value, bool)


def _one_of(*values: object) -> Limit:
    *first, last = map(str, values)
    return lambda value: type(value) in (str, int) and value in values, f"{', '.join(first)} or {last}"


_SPACES = ", ".join(KNOWN["whitespace"])
# What the types of the fields do not say. Where None is the default, it is right, too.
_LIMITS: dict[str, Limit] = {
    "dtype": _one_of("auto", "float32", "bfloat16", "float16"),
    "quantization": _one_of("fp8", "int8", "int4", "gguf"),
    "tp": _whole(1),
    "context_length": _whole(2, MAX_INT32),
    "page_size": _one_of(8, 16, 32, 64),
    "num_kv_tokens": _whole(1),
    "mem_fraction_static": _part(0.1, 0.99),
    "kv_cpu_bytes": _whole(1),
    "max_running_requests": _whole(1, 1 << 16),
    "max_queued_requests": _whole(1),
    "chunked_prefill_size": _whole(1, MAX_INT32),
    "max_step_ms": _whole(0, 1_000_000),
    "lora": (
        lambda value: type(value) is tuple and all(type(part) is str and all(part.partition("=")) for part in value),
        "a tuple of texts name=path",
    ),
    "max_loras": _whole(0, 1024),
    "max_lora_rank": _whole(1, 1024),
    "cuda_graph_max_extend": _whole(0, MAX_INT32),
    "json_whitespace": (lambda value: type(value) is str and whitespace_named(value) is not None, f"one of {_SPACES}"),
    "default_max_tokens": _whole(1, MAX_INT32),
    "reservation_ratio": _part(0, 1),
    "num_threads": _whole(1, 4096),
    "seed": _whole(-MAX_INT64, MAX_INT64),
}


@cache
def _limits() -> dict[str, Limit]:
    """Return the limit of each field: that of the table, or that of its type."""
    found: dict[str, Limit] = {}
    hints = get_type_hints(EngineConfig)
    for one in fields(EngineConfig):
        limit = _LIMITS.get(one.name) or _limit_of_type(hints[one.name])
        found[one.name] = _or_none(*limit) if one.default is None else limit
    return found


def _limit_of_type(hint: Any) -> Limit:  # Any: a type
    if get_origin(hint) is Literal:
        return _one_of(*get_args(hint))
    if hint is bool:
        return lambda value: type(value) is bool, "True or False"
    return lambda value: type(value) is str, "text"


def _or_none(is_right: Callable[[Any], bool], limit: str) -> Limit:
    return lambda value: value is None or is_right(value), f"{limit}, or None"
