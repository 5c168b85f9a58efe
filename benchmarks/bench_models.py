"""Quality of weight formats, and the speed of Ramet's layers beside those of transformers, on this machine's CPU.

    python benchmarks/bench_models.py quality [--tokens 4096] [--text FILE] [--out benchmarks/results/models.jsonl]
    python benchmarks/bench_models.py speed [--tokens 64] [--out benchmarks/results/models.jsonl]

quality: perplexity of a text in windows of 512 tokens, and how often the likeliest next token is that of exact
products. The text is the GNU General Public License, version 3, as Debian's package base-files has it. The exact
products are in fp32 with the dequantised weights of the model's GGUF file; fp8 rounds those weights by rows and
activations by tokens, as a GPU does, and keys and values where the name says so. W4A16 rounds weights to 4 bits in
groups of 128 columns, whose ranges are searched for the least error. speed: greedy tokens a second of one request and
of eight, native and with `--model-impl transformers`, in alternation; both have fp32 weights.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from json_line import commit, print_record
from rich.console import Console
from rich.table import Table

from ramet.kernels.layers.quantize_fp8 import FP8, quantize_fp8
from ramet.runtime.engine.engine import Engine
from ramet.runtime.models.build import apply_fp8_cache, build_decoder
from ramet.runtime.models.catalog import resolve_model
from ramet.runtime.models.load import LoadedModel, ModelFiles, open_model
from ramet.runtime.models.weights import Weights
from ramet.runtime.testing.bare_cache import BareCache
from ramet.runtime.types import SamplingParams

WINDOW = 512
LICENSE = Path("/usr/share/common-licenses/GPL-3")
FORMATS: dict[str, dict[str, Any]] = {  # Any: arguments of build_decoder
    "exact (fp32)": {"dtype": torch.float32},
    "as the file (CPU default)": {},
    "fp8": {"quantization": "fp8"},
    "fp8, of weights alone": {"dtype": torch.float32},
    "fp8 KV alone": {"dtype": torch.float32},
    "fp8, fp8 KV": {"quantization": "fp8"},
    "fp8 of weights, fp8 KV": {"dtype": torch.float32},
    "W4A16": {"dtype": torch.float32},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
}
GROUP = 128  # columns of a scale in W4A16


@torch.inference_mode()
def judged(
    name: str,
    files: ModelFiles,
    weights: Weights,
    ids: list[int],
    arguments: dict[str, Any],  # Any: see FORMATS
) -> tuple[float, torch.Tensor]:
    """The mean loss of the windows' tokens, and the likeliest token at each position."""
    decoder = build_decoder(files.config, weights, device="cpu", **arguments)
    kv_dtype = FP8 if "KV" in name else None
    decoder = decoder if kv_dtype is None else apply_fp8_cache(decoder)
    losses, chosen = [], []
    for start in range(0, len(ids) - WINDOW + 1, WINDOW):
        window = ids[start : start + WINDOW]
        logits = BareCache(decoder, 1, WINDOW, kv_dtype=kv_dtype).step([], [(0, window)])[:-1].float()
        losses.append(float(F.cross_entropy(logits, torch.tensor(window[1:]))))
        chosen.append(logits.argmax(-1))
    return statistics.mean(losses), torch.cat(chosen)


def in_fp8(tensor: torch.Tensor) -> torch.Tensor:
    values, scale = quantize_fp8(tensor)
    return values.float() * scale


def in_4_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Round to 16 steps in groups of columns, with a 16-bit scale: of 20 ranges, the one with the smallest error."""
    groups = tensor.float().unflatten(1, (-1, math.gcd(GROUP, tensor.shape[1])))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    best, least = groups, torch.full_like(low, torch.inf)
    for share in torch.linspace(0.62, 1.0, 20).tolist():
        scale = ((high - low) * share / 15).clamp(min=1e-8).half().float()
        zero = (-low * share / scale).round()
        values = ((groups / scale + zero).round().clamp(0, 15) - zero) * scale
        error = (values - groups).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, values, best), torch.minimum(error, least)
    return best.flatten(1)


def rounded(weights: Weights, round_matrix: Callable[[torch.Tensor], torch.Tensor]) -> Weights:
    """The weights, those of layers' matrices after a rounding."""
    is_matrix = {name: ".layers." in name and tensor.ndim == 2 for name, tensor in weights.items()}
    return Weights.from_tensors(
        {name: round_matrix(weights[name]) if is_matrix[name] else weights[name] for name in weights}
    )


def quality(files: ModelFiles, text: str, num_tokens: int) -> dict[str, Any]:  # Any: JSON
    ids = files.tokenizer.encode(text)[: num_tokens // WINDOW * WINDOW]
    assert len(ids) >= WINDOW, f"the text has {len(ids)} tokens; {WINDOW} are one window"
    rows: dict[str, Any] = {}
    best: torch.Tensor | None = None
    for name, arguments in FORMATS.items():
        weights = files.weights
        if "of weights" in name or name == "W4A16":
            weights = rounded(weights, in_4_bits if name == "W4A16" else in_fp8)
        loss, chosen = judged(name, files, weights, ids, arguments)
        best = chosen if best is None else best
        rows[name] = {"perplexity": round(math.exp(loss), 3), "same": round(float((chosen == best).float().mean()), 4)}
    first = next(iter(rows.values()))["perplexity"]
    for row in rows.values():
        row["change"] = round(row["perplexity"] / first - 1, 4)
    return {"tokens": len(ids) // WINDOW * (WINDOW - 1), "rows": rows}


def in_memory(files: ModelFiles) -> Any:  # Any: a model of transformers
    """The same Llama as a model of transformers."""
    config = files.config
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope.theta,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    )
    model.load_state_dict(dict(files.weights), strict=False)
    model.tie_weights()
    return model.eval()


def tokens_per_s(engine: Engine, num_requests: int, num_tokens: int) -> float:
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    engine.flush_cache()
    start_s = time.perf_counter()
    handles = [engine.submit(f"Request {i}: the river runs past", sampling) for i in range(num_requests)]
    for handle in handles:
        handle.result()
    return num_requests * num_tokens / (time.perf_counter() - start_s)


def speed(files: ModelFiles, num_tokens: int, repeats: int) -> dict[str, Any]:  # Any: JSON
    native = build_decoder(files.config, files.weights, device="cpu", dtype=torch.float32)
    loaded = LoadedModel("native", native, files.tokenizer, files.config, files.generation)
    found: dict[str, dict[int, list[float]]] = {"ramet": {}, "transformers": {}}
    with Engine(loaded) as ours, Engine(in_memory(files), tokenizer=files.tokenizer) as theirs:
        for turn in range(repeats + 1):  # the first warms up
            for name, engine in (("ramet", ours), ("transformers", theirs)):
                for num_requests in (1, 8):
                    rate = tokens_per_s(engine, num_requests, num_tokens)
                    if turn:
                        found[name].setdefault(num_requests, []).append(rate)
    return {
        name: {f"tok_s@{count}": round(statistics.median(rates), 1) for count, rates in by_count.items()}
        for name, by_count in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["quality", "speed"])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", type=Path, default=LICENSE)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    files = open_model(resolve_model(args.model))
    if args.part == "quality":
        result = quality(files, args.text.read_text(encoding="utf-8"), args.tokens or 4096)
        rows: dict[str, dict[str, Any]] = result["rows"]  # Any: JSON
    else:
        result = {"rows": (rows := speed(files, args.tokens or 64, args.repeats))}
    table = Table("", *next(iter(rows.values())), title=f"{args.part}: {args.model}, {torch.get_num_threads()} threads")
    for name, row in rows.items():
        table.add_row(name, *map(str, row.values()))
    Console().print(table)
    print_record(
        {
            "benchmark": f"models {args.part}",
            "commit": commit(),
            "cpu": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "model": args.model,
            **result,
        },
        args.out,
    )


if __name__ == "__main__":
    main()
