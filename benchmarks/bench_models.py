"""Quality of weight formats, and the speed of Ramet's layers beside those of transformers, on this machine's CPU.

    python benchmarks/bench_models.py quality [--model gemma3-270m] [--tokens 4096] [--text FILE] [--only W4A16]
    python benchmarks/bench_models.py speed [--tokens 64] [--out benchmarks/results/models.jsonl]

quality: perplexity of passages of 512 tokens of a text; how often the likeliest next token is that of exact products;
and of 20 greedy answers of 32 tokens, how many tokens come before the first that differs. The text is the GNU General
Public License, version 3, as Debian's package base-files has it; prompts are passages of it. The exact products are in
fp32 with the dequantised weights of the model's GGUF file; fp8 rounds those weights by rows and activations by tokens,
as a GPU does, and keys and values where the name says so. W4A16 rounds weights to 4 bits in groups of 128 columns,
whose ranges are searched for the least error, or by GPTQ (gptq.py), calibrated with 24 windows of other licences
(Apache, Artistic, Creative Commons, GFDL, MPL, OFL). speed: greedy tokens a second of one request and of eight, native
and with `--model-impl transformers`, in alternation; both have fp32 weights.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gptq import calibrate, in_4_bits
from json_line import commit, print_record
from rich.console import Console
from rich.table import Table

from ramet.kernels.layers.quantize_fp8 import FP8, quantize_fp8
from ramet.runtime.engine.engine import Engine
from ramet.runtime.models.build import apply_fp8_cache, build_decoder
from ramet.runtime.models.catalog import resolve_model
from ramet.runtime.models.config import ModelConfig
from ramet.runtime.models.description import ModelDescription
from ramet.runtime.models.load import LoadedModel, open_model
from ramet.runtime.models.weights import Weights
from ramet.runtime.testing.bare_cache import BareCache
from ramet.runtime.testing.dummy import llama_of_transformers
from ramet.runtime.types import SamplingParams

WINDOW = 512
LICENSES = Path("/usr/share/common-licenses")
CALIBRATION = ("Apache-2.0", "Artistic-2.0", "CC-BY-4.0", "CC-BY-SA-3.0", "GFDL-1.3", "MPL-1.1", "MPL-2.0", "OFL-1.1")
CALIBRATION_WINDOWS = 24
BLOCK = 128
NUM_PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 20, 48, 32
FORMATS: dict[str, dict[str, Any]] = {  # Any: arguments of build_decoder
    "exact (fp32)": {"dtype": torch.float32},
    "as the file (CPU default)": {},
    "fp8": {"quantization": "fp8"},
    "fp8, of weights alone": {"dtype": torch.float32},
    "fp8 KV alone": {"dtype": torch.float32},
    "fp8, fp8 KV": {"quantization": "fp8"},
    "fp8 of weights, fp8 KV": {"dtype": torch.float32},
    "fp8 blocks of weights": {"dtype": torch.float32},
    "fp8 blocks, then rows, of weights": {"dtype": torch.float32},
    "W4A16": {"dtype": torch.float32},
    "W4A16, GPTQ": {"dtype": torch.float32},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
}


@torch.inference_mode()
def judged(
    name: str,
    config: ModelConfig,
    weights: Weights,
    windows: list[list[int]],
    prompts: list[list[int]],
    arguments: dict[str, Any],  # Any: see FORMATS
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """The mean loss of the windows' tokens, the likeliest token at each position, and greedy answers [20, 32]."""
    decoder = build_decoder(config, weights, device="cpu", **arguments)
    kv_dtype = FP8 if "KV" in name else None
    decoder = decoder if kv_dtype is None else apply_fp8_cache(decoder)
    losses, chosen = [], []
    for window in windows:
        logits = BareCache(decoder, 1, WINDOW, kv_dtype=kv_dtype).step([], [(0, window)])[:-1].float()
        losses.append(float(F.cross_entropy(logits, torch.tensor(window[1:]))))
        chosen.append(logits.argmax(-1))
    rows = BareCache(decoder, NUM_PROMPTS, PROMPT_TOKENS + ANSWER_TOKENS, kv_dtype=kv_dtype)
    answers = [rows.step([], list(enumerate(prompts)))[PROMPT_TOKENS - 1 :: PROMPT_TOKENS].argmax(-1)]
    while len(answers) < ANSWER_TOKENS:
        answers.append(rows.step(list(enumerate(answers[-1].tolist())), []).argmax(-1))
    return statistics.mean(losses), torch.cat(chosen), torch.stack(answers, dim=1)


def in_fp8(tensor: torch.Tensor) -> torch.Tensor:
    values, scale = quantize_fp8(tensor)
    return values.float() * scale


def in_fp8_blocks(tensor: torch.Tensor) -> torch.Tensor:
    """As DeepSeek's files hold a matrix: a scale for 128 rows and columns."""
    rows, columns = tensor.shape
    padded = F.pad(tensor.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).transpose(1, 2)
    whole = in_fp8(blocks.reshape(-1, BLOCK * BLOCK)).view(blocks.shape)
    return whole.transpose(1, 2).reshape(padded.shape)[:rows, :columns].contiguous()


def in_fp8_blocks_then_rows(tensor: torch.Tensor) -> torch.Tensor:
    return in_fp8(in_fp8_blocks(tensor))


def rounded(weights: Weights, round_matrix: Callable[[torch.Tensor], torch.Tensor]) -> Weights:
    """The weights, those of layers' matrices after a rounding."""
    is_matrix = {name: ".layers." in name and tensor.ndim == 2 for name, tensor in weights.items()}
    return Weights.from_tensors(
        {name: round_matrix(weights[name]) if is_matrix[name] else weights[name] for name in weights}
    )


def calibrated(model: ModelDescription, stored: Weights) -> Weights:
    """The weights with the layers' matrices rounded by GPTQ."""
    text = "".join((LICENSES / name).read_text(encoding="utf-8") for name in CALIBRATION)
    decoder = build_decoder(model.config, stored, device="cpu", dtype=torch.float32)
    rounded_matrices = calibrate(decoder, passages(model, text, WINDOW, CALIBRATION_WINDOWS))
    return Weights.from_tensors({name: stored[name] for name in stored} | rounded_matrices)


def passages(model: ModelDescription, text: str, num_tokens: int, count: int) -> list[list[int]]:
    """Passages from all over a text, each behind the token that begins a text, if the model's tokenizer adds one."""
    head, ids = model.tokenizer.encode("", add_special=True), model.tokenizer.encode(text)
    length = num_tokens - len(head)
    assert 1 < count <= len(ids) // length, f"the text has {len(ids)} tokens, not {count} passages of {length}"
    step = (len(ids) - length) // (count - 1)
    return [head + ids[start : start + length] for start in range(0, step * count, step)]


ROUNDINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "fp8, of weights alone": in_fp8,
    "fp8 of weights, fp8 KV": in_fp8,
    "fp8 blocks of weights": in_fp8_blocks,
    "fp8 blocks, then rows, of weights": in_fp8_blocks_then_rows,
    "W4A16": in_4_bits,
}


def quality(
    model: ModelDescription, stored: Weights, text: str, num_tokens: int, only: list[str]
) -> dict[str, Any]:  # Any: JSON
    windows = passages(model, text, WINDOW, num_tokens // WINDOW)
    prompts = passages(model, text, PROMPT_TOKENS, NUM_PROMPTS)
    rows: dict[str, Any] = {}
    exact, *others = FORMATS
    first: tuple[torch.Tensor, torch.Tensor] | None = None
    for name in [exact, *[name for name in others if not only or name in only]]:
        weights = stored
        if name in ROUNDINGS:
            weights = rounded(weights, ROUNDINGS[name])
        elif "GPTQ" in name:
            weights = calibrated(model, stored)
        loss, chosen, answers = judged(name, model.config, weights, windows, prompts, FORMATS[name])
        first = (chosen, answers) if first is None else first
        agreed = (answers == first[1]).cummin(1).values
        rows[name] = {
            "perplexity": round(math.exp(loss), 3),
            "same": round(float((chosen == first[0]).float().mean()), 4),
            "greedy": f"{int(agreed.sum())}/{agreed.numel()}",
            "change": round(math.exp(loss) / rows[exact]["perplexity"] - 1, 4) if rows else 0.0,
        }
        print(name, rows[name], file=sys.stderr, flush=True)
    return {"tokens": len(windows) * (WINDOW - 1), "rows": rows}


def tokens_per_s(engine: Engine, num_requests: int, num_tokens: int) -> float:
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    engine.flush_cache()
    start_s = time.perf_counter()
    handles = [engine.submit(f"Request {i}: the river runs past", sampling) for i in range(num_requests)]
    for handle in handles:
        handle.result()
    return num_requests * num_tokens / (time.perf_counter() - start_s)


def speed(model: ModelDescription, weights: Weights, num_tokens: int, repeats: int) -> dict[str, Any]:  # Any: JSON
    native = build_decoder(model.config, weights, device="cpu", dtype=torch.float32)
    loaded = LoadedModel("native", native, model.tokenizer, model.config, model.generation)
    theirs_in_memory = llama_of_transformers(model.config, weights)
    found: dict[str, dict[int, list[float]]] = {"ramet": {}, "transformers": {}}
    with Engine(loaded) as ours, Engine(theirs_in_memory, tokenizer=model.tokenizer) as theirs:
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
    parser.add_argument("--text", type=Path, default=LICENSES / "GPL-3")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--only", action="append", choices=FORMATS, default=[], help="formats; may be repeated")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, weights = open_model(resolve_model(args.model))
    if args.part == "quality":
        result = quality(model, weights, args.text.read_text(encoding="utf-8"), args.tokens or 4096, args.only)
        rows: dict[str, dict[str, Any]] = result["rows"]  # Any: JSON
    else:
        result = {"rows": (rows := speed(model, weights, args.tokens or 64, args.repeats))}
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
