"""The GPU path on a CUDA device that computes nothing, with the real torch and Triton (benchmarks/null_device).

The suite's torch has no CUDA as a rule: these tests run where somebody has one that has, and no GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
RUN = ROOT / "benchmarks" / "null_device" / "run"
# The device stands in for CUDA where torch has it and no GPU is here; else
# test_device_walk.py and check_gpu.py ask the same. Its driver is compiled here.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: check_gpu.py asks it"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
]

# An engine of real shapes meets requests of all kinds, and random mixes of them. Prints the variants of kernels
# that were first met, and so compiled, while they ran.
SERVE = """
import ctypes, sys
from types import SimpleNamespace
import triton
sys.path.insert(0, "benchmarks")
from bench_gpu import dummy_model
from walk_device import Walk
from ramet.grammar import Vocabulary
from ramet.runtime.engine.config import EngineConfig
from ramet.runtime.engine.factory import build_core
from ramet.runtime.models.config import smollm2_135m

variants = []
triton.knobs.runtime.jit_post_compile_hook = lambda *, repr, **others: variants.append(repr.split("[")[0])
model = dummy_model(smollm2_135m(), "cuda")
core = build_core(model, EngineConfig.from_mapping({"device": "cuda", "context_length": 8192, **eval(sys.argv[1])}))
text = model.tokenizer
vocabulary = Vocabulary(text.token_bytes, text.eos_ids, text.special_ids, text.vocab_size, text)
walk = Walk(core, SimpleNamespace(phase="", replays=0, waits={}, launches={}), vocabulary)
num_at_start = len(variants)
walk.overlapped()
walk.others()
num_graphs = ctypes.CDLL(None).null_device_count(b"graphs launched")
print(f"{num_at_start} variants, {num_graphs} graphs, late: {variants[num_at_start:]}")
"""

# A small engine with all that only a GPU has: graphs, tree attention, grammars and edits on the device, drafts verified
# in graphs, overlapped steps. Prints the results that are not those of a CPU.
COMPARE = """
import dataclasses, json, sys
import torch
sys.path.insert(0, "benchmarks")
from bench_gpu import MadeUpTokenizer, tiny_shapes
from ramet.grammar import Vocabulary
from ramet.grammar.ir import AS_MODELS_WRITE
from ramet.grammar.service.sources import compile_constraint
from ramet.runtime.engine.engine import Engine
from ramet.runtime.models.build import build_decoder
from ramet.runtime.models.description import GenerationDefaults
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.testing.dummy import dummy_weights
from ramet.runtime.types import SamplingParams

SHAPES = dataclasses.replace(tiny_shapes(), vocab_size=512)
PROPERTIES = {"a": {"type": "integer"}, "b": {"enum": ["x", "yy"]}}
SCHEMA = {"type": "object", "properties": PROPERTIES, "required": ["a", "b"]}
SHARED = [9, 8, 7, 6, 5, 4, 3, 2] * 5


def results(device, **options):
    text = MadeUpTokenizer(SHAPES.vocab_size)
    weights = dummy_weights(SHAPES, torch.device("cpu"), torch.float32)
    decoder = build_decoder(SHAPES, weights, device=torch.device(device), dtype=torch.float32)
    model = LoadedModel("dummy", decoder, text, SHAPES, GenerationDefaults())
    engine = Engine(model, context_length=512, num_kv_tokens=2048, max_running_requests=4, **options)
    vocabulary = Vocabulary(text.token_bytes, text.eos_ids, text.special_ids, text.vocab_size)
    schema = compile_constraint("json_schema", json.dumps(SCHEMA), vocabulary, **AS_MODELS_WRITE)
    found = []

    def ask(*requests):
        handles = []
        for prompt, values in requests:
            options = {name: values.pop(name) for name in ("grammar", "score_from") if name in values}
            sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **values})
            handles.append(engine.submit(prompt, sampling, detokenize=False, **options))
        for handle in handles:
            result = handle.result(timeout_s=3000)
            numbers = [list(values) for values in (result.logprobs, result.prompt_logprobs) if values is not None]
            found.append((result.token_ids, [[round(float(x), 3) for x in values] for values in numbers]))

    ask(*((SHARED + [i], {}) for i in range(4)))
    ask(*((SHARED + [i], {"max_tokens": 6}) for i in range(4)))
    constrained = {"grammar": schema, "max_tokens": 25, "ignore_eos": False}
    ask(*((SHARED + [40 + i], dict(constrained) if i % 2 else {"max_tokens": 25}) for i in range(4)))
    penalised = {"repetition_penalty": 1.3, "presence_penalty": 0.4}
    others = (SHARED, {"logprobs": 2}), ([3] * 9, {"logit_bias": {7: 4.0}})
    ask(*((SHARED + [i], dict(penalised)) for i in range(2)), *others)
    drawn = {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "min_p": 0.01}
    ask(*((SHARED + [i], {**drawn, "seed": i}) for i in range(3)))
    ask((SHARED + [77, 78, 79], {"max_tokens": 1, "score_from": 38}), (SHARED + [5], {}))
    ask(*(([i] * 3, {"max_tokens": 4}) for i in range(1, 9)))
    engine.check_integrity()
    engine.shutdown()
    return found


expected = results("cpu")
on_device = {"tree_attention": "on", "cuda_graph_max_extend": 32, "speculative": "auto"}
pairs = list(zip(expected, results("cuda", **on_device), strict=True))
print(f"{len(pairs)} results, different: {[pair for pair in pairs if pair[0] != pair[1]]}")
"""


def run(*command: str, log: Path, **settings: str) -> str:
    """Run a command on the device; returns what it printed. It must end well, and the driver refuse nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "NULL_DEVICE_LOG": str(log), **settings}
    done = subprocess.run([str(RUN), *command], capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    errors = [line for line in log.read_text().splitlines() if re.match(r"\d+ [\d.]+ error ", line)]
    assert not errors, errors
    return done.stdout


@pytest.mark.parametrize("settings", ["{}", "{'speculative': 'auto', 'max_loras': 2, 'kv_cache_dtype': 'fp8_e4m3'}"])
def test_no_kernel_is_compiled_while_requests_of_all_kinds_run(settings: str, tmp_path: Path) -> None:
    printed = run(sys.executable, "-W", "ignore", "-c", SERVE, settings, log=tmp_path / "log")
    numbers = re.search(r"(\d+) variants, (\d+) graphs, late: \[\]", printed)
    assert numbers, printed
    num_variants, num_graphs = map(int, numbers.groups())
    assert num_variants > 20
    assert num_graphs > 20  # how many steps run in one depends on when requests come


def test_a_small_engine_on_the_device_gives_the_results_of_a_cpu(tmp_path: Path) -> None:
    """Its kernels are interpreted, and its graphs replay what they recorded."""
    printed = run("--compute", sys.executable, "-W", "ignore", "-c", COMPARE, log=tmp_path / "log", NULL_DEVICE_SMS="2")
    assert "29 results, different: []" in printed, printed
