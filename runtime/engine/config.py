"""The engine's configuration: one frozen dataclass, whose fields are also the command line's flags."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from ramet.errors import ConfigError
from ramet.lang.graph.json_form import KNOWN, JsonForm, whitespace_named


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
    page_size: int = _doc(16, "token positions in a KV page")
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
        "verify several drafted tokens in a step: auto does where it is faster (on a CPU, with tp=1), off never does; "
        "the text is the same",
    )
    deterministic: bool = _doc(
        False, "the same tokens for a request whatever runs beside it (on a GPU; no tree attention, slower products)"
    )
    kernel_table: str | None = _doc(
        None, "file of kernel choices measured on this card; None: the one that comes with Ramet, if there is one"
    )
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
        def check(ok: bool, name: str, limit: str) -> None:
            if not ok:
                raise ConfigError(f"{name} is {getattr(self, name)!r} but must be {limit}")

        check(type(self.tp) is int and self.tp >= 1, "tp", "an integer of at least 1")
        check(
            self.tp == 1 or not self.deterministic,
            "deterministic",
            "False with tp > 1, where the order of sums over ranks depends on the batch",
        )
        check(self.page_size in (8, 16, 32, 64), "page_size", "8, 16, 32 or 64")
        check(0.1 <= self.mem_fraction_static <= 0.99, "mem_fraction_static", "in [0.1, 0.99]")
        check(self.max_running_requests >= 1, "max_running_requests", "at least 1")
        check(self.max_queued_requests >= 1, "max_queued_requests", "at least 1")
        check(
            self.chunked_prefill_size is None or self.chunked_prefill_size >= 1,
            "chunked_prefill_size",
            "at least 1, or None",
        )
        check(self.max_step_ms is None or self.max_step_ms >= 0, "max_step_ms", "at least 0, or None")
        check(self.cuda_graph_max_extend >= 0, "cuda_graph_max_extend", "at least 0")
        check(self.context_length is None or self.context_length >= 2, "context_length", "at least 2, or None")
        check(
            self.num_kv_tokens is None or self.num_kv_tokens >= 2 * self.page_size,
            "num_kv_tokens",
            "at least two pages",
        )
        check(self.dtype in ("auto", "float32", "bfloat16", "float16"), "dtype", "auto, float32, bfloat16 or float16")
        check(self.model_impl in ("auto", "ramet", "transformers"), "model_impl", "auto, ramet or transformers")
        check(
            self.quantization in (None, "fp8", "int8", "int4", "gguf"), "quantization", "fp8, int8, int4, gguf or None"
        )
        check(self.tree_attention in ("auto", "on", "off"), "tree_attention", "auto, on or off")
        check(self.speculative in ("off", "auto"), "speculative", "off or auto")
        check(0 <= self.reservation_ratio <= 1, "reservation_ratio", "in [0, 1]")
        check(self.default_max_tokens >= 1, "default_max_tokens", "at least 1")
        check(
            self.json_whitespace is None or whitespace_named(self.json_whitespace) is not None,
            "json_whitespace",
            f"one of {', '.join(KNOWN['whitespace'])}",
        )
        for name in ("order", "additional_properties"):
            check(getattr(self, f"json_{name}") in KNOWN[name], f"json_{name}", f"one of {', '.join(KNOWN[name])}")

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
        try:
            return replace(self, **values)  # type: ignore[arg-type]
        except TypeError as error:
            raise ConfigError(f"a configuration value has the wrong type: {error}") from error
