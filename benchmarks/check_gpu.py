"""Whether a GPU's engine gives the tokens it should: against the CPU, and against itself under other circumstances.

    python benchmarks/check_gpu.py --out OUT/checks.jsonl --seconds 200
    python benchmarks/check_gpu.py --device cpu --tiny          a rehearsal; says nothing about kernels

Sections, in this order: `reference` (greedy tokens and scores against the CPU in fp32, on 20 prompts), `same` (the same
requests alone, together, among 64, from a warm cache, without tree attention, overlap, graphs, mixed graphs: how many
give the same greedy text as the first time; bf16 sums in another order may break ties), `deterministic` (the same under
--deterministic: every difference is an error), `grammar` (texts under a schema are valid JSON, closed within
max_tokens), `soak` (256 at a time with random aborts for --soak seconds, then every page accounted for). One JSON line
each as it ends; exit status 1 where one failed. Weights are random; with `--model FILE` they and the prompts are real.
`--reference FILE` keeps what the CPU gave for a model, for a machine where that takes longer than the rest.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_gpu import MadeUpTokenizer, tiny_shapes
from json_line import commit

from ramet.errors import RequestCancelled
from ramet.grammar import Vocabulary
from ramet.grammar.ir import AS_MODELS_WRITE
from ramet.grammar.service.sources import compile_constraint
from ramet.runtime.engine.config import EngineConfig
from ramet.runtime.engine.engine import Engine
from ramet.runtime.handle import RequestHandle
from ramet.runtime.models.build import build_decoder
from ramet.runtime.models.config import smollm2_135m
from ramet.runtime.models.description import GenerationDefaults, describe_model
from ramet.runtime.models.load import LoadedModel, load_model
from ramet.runtime.testing.dummy import dummy_weights
from ramet.runtime.types import FinishReason, SamplingParams

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 4},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}
Result = dict[str, Any]  # JSON
Tokens = list[tuple[int, ...]]


@dataclass
class Setting:
    """What the sections share."""

    device: str
    tiny: bool
    model: str
    soak_s: float
    reference: Path | None = None
    given: dict[str, object] = field(default_factory=dict)  # configuration of all engines
    models: dict[object, LoadedModel] = field(default_factory=dict)

    def load(self, device: str, dtype: torch.dtype, deterministic: bool) -> LoadedModel:
        """The model, the same weights on every device: random ones are drawn on the CPU. Kept: passes change it."""
        key = device, dtype, deterministic
        if key not in self.models:
            self.models[key] = self.load_anew(device, dtype)
        return self.models[key]

    def load_anew(self, device: str, dtype: torch.dtype) -> LoadedModel:
        if self.model:
            return load_model(self.model, device=device, dtype=dtype)
        shapes = tiny_shapes() if self.tiny else smollm2_135m()
        weights = dummy_weights(shapes, torch.device("cpu"), torch.float32)
        decoder = build_decoder(shapes, weights, device=device, dtype=dtype)
        return LoadedModel("dummy", decoder, MadeUpTokenizer(shapes.vocab_size), shapes, GenerationDefaults())

    def engine(self, device: str | None = None, dtype: torch.dtype | None = None, **values: object) -> Engine:
        device = device or self.device
        dtype = dtype or (torch.float32 if self.device == "cpu" else torch.bfloat16)
        sizes: dict[str, object] = {"context_length": 2048, "num_kv_tokens": 200_000, "max_running_requests": 64}
        if self.tiny or device == "cpu":
            sizes |= {"num_kv_tokens": 32_768}
        gc.collect()  # the engine before, with its graphs
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()
        model = self.load(device, dtype, bool(values.get("deterministic")))
        return Engine(model, EngineConfig.from_mapping({"device": device, **sizes, **values, **self.given}))

    def prompts(self, count: int, seed: int = 0) -> list[list[int]]:
        """Every second one begins with the same 160 tokens; lengths from 20 to 400."""
        rng = random.Random(seed)

        def draw(length: int) -> list[int]:
            if self.text is None:
                high = (tiny_shapes() if self.tiny else smollm2_135m()).vocab_size - 100
                return [rng.randrange(1000, high) for _ in range(length)]
            start = rng.randrange(len(self.text) - length)
            return self.text[start : start + length]

        shared = draw(160)
        drawn = [draw(rng.randrange(20, 240)) for _ in range(count)]
        return [shared + prompt if i % 2 else prompt for i, prompt in enumerate(drawn)]

    @cached_property
    def text(self) -> list[int] | None:
        """Tokens of prose, for a real model: random ones would leave it nearly undecided at every step."""
        if not self.model:
            return None
        tokenizer = describe_model(Path(self.model)).tokenizer
        return tokenizer.encode((Path(__file__).parents[1] / "README.md").read_text())


def greedy(engine: Engine, prompts: list[list[int]], num_tokens: int, *, together: bool = True) -> Tokens:
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)

    def submit(prompt: list[int]) -> RequestHandle:
        return engine.submit(prompt, sampling, detokenize=False)

    if together:
        handles = [submit(prompt) for prompt in prompts]
        return [handle.result(timeout_s=120).token_ids for handle in handles]
    return [submit(prompt).result(timeout_s=120).token_ids for prompt in prompts]


def num_same(text: tuple[int, ...], other: tuple[int, ...]) -> int:
    """The number of tokens up to the first difference."""
    differing = (i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b)
    return next(differing, min(len(text), len(other)))


def agreement(actual: Tokens, expected: Tokens) -> Result:
    """How many texts are equal, and at which token the others part (median)."""
    parts = [num_same(x, y) for x, y in zip(actual, expected, strict=True)]
    differing = [part for part, text in zip(parts, expected, strict=True) if part < len(text)]
    return {
        "texts": len(expected),
        "equal": len(expected) - len(differing),
        "first_difference": float(np.median(differing)) if differing else None,
    }


def reference(setting: Setting) -> Result:
    prompts, num_tokens = setting.prompts(20), 16 if setting.tiny else 32
    sampling = SamplingParams(max_tokens=1)

    def measure(engine: Engine) -> tuple[Tokens, list[float]]:
        scores: list[float] = []
        for prompt in prompts:
            scores += map(
                float, engine.submit(prompt, sampling, score_from=1).result(timeout_s=120).prompt_logprobs or ()
            )
        return greedy(engine, prompts, num_tokens), scores

    file = setting.reference
    if file is not None and file.is_file():
        kept = json.loads(file.read_text())
        prompts, expected_scores = kept["prompts"], kept["scores"]
        expected = [tuple(text) for text in kept["tokens"]]
    else:
        with setting.engine("cpu", torch.float32) as engine:
            expected, expected_scores = measure(engine)
        if file is not None:
            file.write_text(json.dumps({"prompts": prompts, "tokens": expected, "scores": expected_scores}))
    with setting.engine() as engine:
        actual, actual_scores = measure(engine)
    error = np.abs(np.asarray(actual_scores) - np.asarray(expected_scores))
    result = {"score_error_mean": float(error.mean()), "score_error_max": float(error.max())}
    # bf16 has 8 bits: scores of a right engine are off by hundredths (SmolLM2: 0.04 on a CPU), of a wrong one by units.
    ok = result["score_error_mean"] < 0.1 and len(error) == len(expected_scores)
    return {**agreement(actual, expected), **result, "ok": bool(ok)}


def same(setting: Setting, *, deterministic: bool = False) -> Result:
    prompts, num_tokens = setting.prompts(8 if setting.tiny else 16, seed=1), 24 if setting.tiny else 64
    fill = setting.prompts(24 if setting.tiny else 48, seed=2)
    found: dict[str, Result] = {}

    def compare(name: str, tokens: Tokens) -> None:
        found[name] = agreement(tokens, expected)

    with setting.engine(deterministic=deterministic) as engine:
        expected = greedy(engine, prompts, num_tokens, together=False)
        compare("warm, alone", greedy(engine, prompts, num_tokens, together=False))
        compare("warm, together", greedy(engine, prompts, num_tokens))
        engine.flush_cache()
        compare("cold, together", greedy(engine, prompts, num_tokens))
        engine.flush_cache()
        compare("cold, among 64", greedy(engine, prompts + fill, num_tokens)[: len(prompts)])
        engine.check_integrity()
    variants: dict[str, dict[str, object]] = {
        "synchronous": {"overlap": False},
        "no mixed graphs": {"cuda_graph_max_extend": 0},
        "no graphs": {"cuda_graph": False},
    }
    if not deterministic:
        variants |= {"no tree": {"tree_attention": "off"}, "tree everywhere": {"tree_attention": "on"}}
    for name, values in variants.items():
        with setting.engine(deterministic=deterministic, **values) as engine:
            compare(name, greedy(engine, prompts, num_tokens))
    equal = sum(row["equal"] for row in found.values())
    total = sum(row["texts"] for row in found.values())
    # Without --deterministic ties may break otherwise; a wrong kernel makes nearly every text differ, and early.
    ok = equal == total if deterministic else equal >= 0.5 * total
    return {"equal": equal, "texts": total, "rows": found, "ok": ok}


def grammar(setting: Setting) -> Result:
    with setting.engine() as engine:
        tokenizer = engine.tokenizer
        vocabulary = Vocabulary(
            tokenizer.token_bytes, tokenizer.eos_ids, tokenizer.special_ids, tokenizer.vocab_size, tokenizer
        )
        compiled = compile_constraint("json_schema", json.dumps(SCHEMA), vocabulary, **AS_MODELS_WRITE)
        is_closed = compiled.close()
        handles = [
            engine.submit(prompt, SamplingParams(temperature=1.5, max_tokens=48, seed=i), grammar=compiled)
            for i, prompt in enumerate(setting.prompts(16, seed=3))
        ]
        valid = 0
        for handle in handles:
            text = handle.result(timeout_s=120).text
            try:
                value = json.loads(text)
                valid += set(value) == {"name", "tags"} and len(value["tags"]) in range(1, 5)
            except ValueError:
                print(f"not JSON: {text!r}")
        engine.check_integrity()
    return {"texts": len(handles), "valid": valid, "closed": is_closed, "ok": valid == len(handles)}


def soak(setting: Setting) -> Result:
    """Random requests, a tenth of them aborted at a random time; at the end nothing may be missing."""
    rng = random.Random(4)
    slots = 16 if setting.tiny else 256
    counts = {"finished": 0, "aborted": 0, "failed": 0}
    with setting.engine(max_running_requests=slots) as engine:
        prompts = setting.prompts(200, seed=5)
        live: list[tuple[RequestHandle, float | None]] = []
        end_s = time.monotonic() + setting.soak_s
        while time.monotonic() < end_s or live:
            while len(live) < 2 * slots and time.monotonic() < end_s:
                sampling = SamplingParams(
                    temperature=rng.choice([0.0, 1.0]), top_p=rng.choice([1.0, 0.9]), max_tokens=rng.randrange(1, 96),
                    frequency_penalty=rng.choice([0.0, 0.0, 0.0, 0.5]), logprobs=rng.choice([None] * 9 + [2]),
                    seed=rng.randrange(1 << 30), ignore_eos=True,
                )  # fmt: skip
                handle = engine.submit(rng.choice(prompts), sampling, detokenize=False)
                live.append((handle, time.monotonic() + rng.random() if rng.random() < 0.1 else None))
            handle, abort_s = live.pop(0)
            if abort_s is not None:
                time.sleep(max(0.0, min(abort_s - time.monotonic(), 0.05)))
                handle.cancel()
            try:
                reason = handle.result(timeout_s=120).finish_reason
                counts["failed" if reason is FinishReason.ERROR else "finished"] += 1
            except RequestCancelled:
                counts["aborted"] += 1
        engine.check_integrity()
        stats = engine.stats()
        engine.flush_cache()
        left = engine.stats()
    lost = left["num_pages"] - left["num_free_pages"]
    return {**counts, "steps": stats["num_steps"], "pages_lost": lost,
            "ok": lost == 0 and counts["failed"] == 0}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="two small layers: a rehearsal")
    parser.add_argument("--model", default="", help="a model file; default: random weights of SmolLM2-135M's shapes")
    parser.add_argument("--reference", type=Path, help="what the CPU gave: read where it exists, else written")
    parser.add_argument("--sections", default="reference,same,grammar,deterministic,soak")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no section after this time")
    parser.add_argument("--soak", type=float, default=60.0, help="seconds of the soak")
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    parser.add_argument("--set", action="append", default=[], help='configuration, as tree_attention="off"')
    args = parser.parse_args()
    given = {key: json.loads(value) for key, value in (item.split("=", 1) for item in args.set)}
    setting = Setting(args.device, args.tiny, args.model, args.soak, args.reference, given)
    sections: dict[str, Callable[[Setting], Result]] = {
        "reference": reference,
        "same": same,
        "grammar": grammar,
        "deterministic": lambda s: same(s, deterministic=True),
        "soak": soak,
    }
    start_s, failed = time.monotonic(), []
    for name in args.sections.split(","):
        begun_s = time.monotonic()
        if begun_s - start_s > args.seconds:
            print(f"{name}: no time left")
            continue
        try:
            result = sections[name](setting)
        except Exception as error:  # the other sections still tell something
            traceback.print_exc()
            result = {"ok": False, "error": f"{type(error).__name__}: {error}"[:500]}
        seconds = round(time.monotonic() - begun_s, 1)
        record = {"benchmark": "gpu-checks", "section": name, **result, "seconds": seconds, "commit": commit(),
                  "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"}  # fmt: skip
        print(json.dumps(record), flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps(record) + "\n")
        if not result["ok"]:
            failed.append(name)
    print(f"failed: {', '.join(failed) or 'none'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
