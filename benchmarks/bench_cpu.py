"""Decode and prefill speed on a CPU beside transformers, llama.cpp and OpenVINO: SmolLM2-135M-Instruct, greedy.

    python benchmarks/bench_cpu.py [--systems engine,decoder,transformers-bf16] [--threads 2] [--rounds 3]
    python benchmarks/bench_cpu.py --python llama.cpp=~/llama/bin/python --python openvino=~/ov/bin/python

Every system runs in a process of its own, so that their threads don't meet; rounds go around all systems, so that a
noisy machine is unfair to none. Step times of all rounds make the percentiles. `--clock cpu --threads 1` counts CPU
time instead of wall time, which is what can be compared while others use the machine. llama.cpp and OpenVINO take part
if a Python is named that has llama-cpp-python (pip compiles it) or openvino-genai; llama.cpp decodes a batch as one
`llama_decode` of as many sequences, OpenVINO in its continuous batching without its prefix cache. Decode: tokens per
second of the steps after a 64-token prompt. Prefill: 1,000 new tokens until the first token.
engine: the whole runtime with scheduler and sampling; decoder: the model and an argmax in a bare loop.

The floor of a decode step at batch 1 is reading the weights once: about 96 MB in the file's blocks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from json_line import commit, print_record

PROMPT, STEPS, PREFILL = 64, 32, 1000
BATCHES = (1, 8, 32)
SYSTEMS = ("engine", "decoder", "decoder-bf16", "decoder-fp32", "transformers", "transformers-bf16")
FOREIGN = {"llama.cpp": "llama-cpp-python", "openvino": "openvino-genai"}  # with the package that each needs


def prompt(length: int, seed: int) -> list[int]:
    """Token ids without meaning, the same everywhere."""
    return [(seed * 7919 + i * 104_729) % 40_000 + 100 for i in range(length)]


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = CLOCKS[os.environ.get("BENCH_CPU_CLOCK", "wall")]


class System(Protocol):
    """What is measured, in seconds."""

    def decode(self, batch: int) -> list[float]:
        """STEPS decode steps of `batch` sequences."""

    def prefill(self) -> float:
        """From PREFILL unknown tokens to the first new one."""


def steps(moments: list[float]) -> list[float]:
    """The last STEPS of the intervals between moments."""
    intervals = [after - before for before, after in itertools.pairwise(moments)]
    assert len(intervals) >= STEPS, len(intervals)
    return intervals[-STEPS:]


class DecoderSystem:
    """Our model, driven by hand."""

    def __init__(self, path: Path, dtype: str) -> None:
        import torch

        from ramet.runtime.models.load import load_model
        from ramet.runtime.testing.bare_cache import BareCache

        self.torch, self.cache = torch, BareCache
        self.decoder = load_model(path, device="cpu", dtype=dtype).decoder

    def decode(self, batch: int) -> list[float]:
        with self.torch.inference_mode():
            cache = self.cache(self.decoder, batch, PROMPT + STEPS + 2)
            for row in range(batch):
                cache.step([], [(row, prompt(PROMPT, row))])
            tokens, moments = [1] * batch, []
            for _ in range(STEPS + 2):
                logits = cache.step([(row, tokens[row]) for row in range(batch)], [])
                tokens = logits.argmax(-1).tolist()
                moments.append(clock())
            return steps(moments)

    def prefill(self) -> float:
        with self.torch.inference_mode():
            cache = self.cache(self.decoder, 1, PREFILL)
            ids = self.torch.tensor(prompt(PREFILL, 0), dtype=self.torch.int32)
            context = cache.context([], [(0, PREFILL)])
            start = clock()
            hidden = self.decoder.forward(ids, context)
            int(self.decoder.logits(hidden[-1:]).argmax())
            return clock() - start


class EngineSystem:
    """The whole runtime, in process."""

    def __init__(self, path: Path, threads: int) -> None:
        from ramet.runtime.engine.config import EngineConfig
        from ramet.runtime.engine.engine import Engine
        from ramet.runtime.types import SamplingParams

        self.engine = Engine(str(path), EngineConfig(device="cpu", num_threads=threads, num_kv_tokens=8192))
        self.sampling = SamplingParams

    def decode(self, batch: int) -> list[float]:
        self.engine.flush_cache()
        arrivals: list[list[float]] = [[] for _ in range(batch)]
        sampling = self.sampling(temperature=0.0, max_tokens=STEPS + 8, ignore_eos=True)

        finished = threading.Semaphore(0)

        def note(times: list[float]) -> Callable[[Any], None]:
            def on_output(output: Any) -> None:  # Any: RequestOutput, imported where the engine is
                times.extend([clock()] * len(output.token_ids))
                if output.finish_reason is not None:
                    finished.release()

            return on_output

        for row, times in enumerate(arrivals):  # with `on_output`, outputs go there alone
            self.engine.submit(prompt(PROMPT, row), sampling, on_output=note(times))
        for _ in arrivals:
            finished.acquire()
        # The row that started last, until the first one ends: all rows run.
        last = max(arrivals, key=lambda times: times[0])
        return steps([moment for moment in last if moment <= min(times[-1] for times in arrivals)])

    def prefill(self) -> float:
        self.engine.flush_cache()
        sampling = self.sampling(temperature=0.0, max_tokens=1, ignore_eos=True)
        start = clock()
        self.engine.submit(prompt(PREFILL, 0), sampling).result()
        return clock() - start


class TransformersSystem:
    """transformers' `generate` with a KV cache, on the same dequantised weights."""

    def __init__(self, path: Path, dtype: str) -> None:
        import torch

        from ramet.runtime.models.load import open_weights
        from ramet.runtime.testing.dummy import llama_of_transformers

        self.torch = torch
        # transformers would need accelerate to read the file itself
        self.model = llama_of_transformers(*open_weights(path)).to(getattr(torch, dtype))

    def _generate(self, prompts: list[list[int]], num_tokens: int) -> list[float]:
        """Moments: the start, then each token's logits."""
        ids = self.torch.tensor(prompts)
        moments = [clock()]

        def note(_: Any, logits: Any) -> Any:  # Any: tensors; called as a logits processor
            moments.append(clock())
            return logits

        with self.torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=self.torch.ones_like(ids),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
                logits_processor=[note],
            )
        assert out.shape[1] == len(prompts[0]) + num_tokens
        return moments

    def decode(self, batch: int) -> list[float]:
        return steps(self._generate([prompt(PROMPT, row) for row in range(batch)], STEPS + 2))

    def prefill(self) -> float:
        start, first = self._generate([prompt(PREFILL, 0)], 1)
        return first - start


class LlamaCppSystem:
    """llama.cpp through llama-cpp-python's C interface."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp
        import numpy

        self.api, self.numpy, self.threads = llama_cpp, numpy, threads
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def _context(self, num_sequences: int, num_tokens: int) -> Any:  # Any: a C pointer
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = num_tokens * num_sequences, 2048, 512
        params.n_seq_max, params.n_threads, params.n_threads_batch = num_sequences, self.threads, self.threads
        return self.api.llama_init_from_model(self.model, params)

    def _run(self, context: Any, items: list[tuple[int, int, int, bool]]) -> None:
        """items: (token, position, sequence, wants logits)."""
        batch = self.api.llama_batch_init(len(items), 0, 1)
        batch.n_tokens = len(items)
        for i, (token, position, sequence, wants_logits) in enumerate(items):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wants_logits
        assert self.api.llama_decode(context, batch) == 0
        self.api.llama_batch_free(batch)

    def _best(self, context: Any, index: int) -> int:
        logits = self.api.llama_get_logits_ith(context, index)
        return int(self.numpy.ctypeslib.as_array(logits, (self.vocab,)).argmax())

    def decode(self, batch: int) -> list[float]:
        context = self._context(batch, 256)
        for row in range(batch):
            ids = prompt(PROMPT, row)
            self._run(context, [(token, i, row, i == PROMPT - 1) for i, token in enumerate(ids)])
        tokens, moments = [1] * batch, []
        for step in range(STEPS + 2):
            self._run(context, [(tokens[row], PROMPT + step, row, True) for row in range(batch)])
            tokens = [self._best(context, row) for row in range(batch)]
            moments.append(clock())
        self.api.llama_free(context)
        return steps(moments)

    def prefill(self) -> float:
        context = self._context(1, 2048)
        start = clock()
        ids = prompt(PREFILL, 0)
        self._run(context, [(token, i, 0, i == PREFILL - 1) for i, token in enumerate(ids)])
        self._best(context, PREFILL - 1)
        seconds = clock() - start
        self.api.llama_free(context)
        return seconds


class OpenVinoSystem:
    """OpenVINO GenAI's continuous batching, which reads the file itself."""

    def __init__(self, path: Path, threads: int) -> None:
        import numpy
        import openvino
        import openvino_genai

        self.api, self.numpy, self.openvino = openvino_genai, numpy, openvino
        options = openvino_genai.SchedulerConfig()
        options.enable_prefix_caching = False
        options.max_num_batched_tokens = 2048
        properties = {"INFERENCE_NUM_THREADS": threads}
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(str(path), options, "CPU", properties=properties)
        self.requests = itertools.count()

    def _add(self, ids: list[int], num_tokens: int) -> Any:  # Any: a handle
        config = self.api.GenerationConfig(max_new_tokens=num_tokens, ignore_eos=True, do_sample=False)
        tensor = self.openvino.Tensor(self.numpy.array([ids], dtype=self.numpy.int64))
        return self.pipeline.add_request(next(self.requests), tensor, config)

    def decode(self, batch: int) -> list[float]:
        handles = [self._add(prompt(PROMPT, row), STEPS + 8) for row in range(batch)]
        moments = []
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            moments.append(clock())
        del handles
        return steps(moments[: STEPS + 4])

    def prefill(self) -> float:
        start = clock()
        handle = self._add(prompt(PREFILL, 0), 1)
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
        del handle
        return clock() - start


def make_system(name: str, path: Path, threads: int) -> System:
    if name == "llama.cpp":
        return LlamaCppSystem(path, threads)
    if name == "openvino":
        return OpenVinoSystem(path, threads)
    import torch

    torch.set_num_threads(threads)
    if name == "engine":
        return EngineSystem(path, threads)
    dtype = {"bf16": "bfloat16", "fp32": "float32"}.get(name.rpartition("-")[2])
    if name.startswith("transformers"):
        return TransformersSystem(path, dtype or "float32")
    return DecoderSystem(path, dtype or "auto")


def serve(name: str, path: Path, threads: int) -> None:
    """Worker: answer each line of standard input (0: prefill, n: decode a batch of n) with seconds."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print must not get between the answers
    system = make_system(name, path, threads)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        batch = int(line)
        print(json.dumps(system.decode(batch) if batch else [system.prefill()]), file=answers, flush=True)


class Worker:
    """A system in its own process."""

    def __init__(self, name: str, python: str, path: Path, threads: int, clock_name: str) -> None:
        command = [python, __file__, "--worker", name, "--file", str(path), "--threads", str(threads)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "BENCH_CPU_CLOCK": clock_name}
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (a pipe would fill up: llama.cpp logs every tensor)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment
        )
        self.name = name

    def read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            raise SystemExit(f"{self.name} failed:\n{self.log.read()[-2000:]}")
        return line

    def ask(self, batch: int) -> list[float]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{batch}\n")
        self.process.stdin.flush()
        return [float(value) for value in json.loads(self.read())]


def measure(workers: list[Worker], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every step, by system and kind; the first round is warm-up."""
    seconds: dict[str, dict[str, list[float]]] = {worker.name: {} for worker in workers}
    for turn in range(rounds + 1):
        for batch in (*BATCHES, 0):
            for worker in workers:
                kind, values = f"decode_{batch}" if batch else "prefill", worker.ask(batch)
                print(
                    f"round {turn} of {rounds}: {worker.name} {kind} {min(values):.4f} s", file=sys.stderr, flush=True
                )
                if turn:
                    seconds[worker.name].setdefault(kind, []).extend(values)
    return seconds


def percentiles(values: list[float], num_tokens: int) -> dict[str, float]:
    """Tokens per second at the 20th, 50th and 80th percentile of step times, and at the shortest."""
    ordered = sorted(values)
    at = {"best": 0.0, "p20": 0.2, "p50": 0.5, "p80": 0.8}
    return {name: round(num_tokens / ordered[int(share * (len(ordered) - 1))], 1) for name, share in at.items()}


def report(speeds: dict[str, dict[str, dict[str, float]]], threads: int, clock_name: str) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"SmolLM2-135M-Instruct, {threads} threads, tokens per {clock_name} second: median step (p80 to p20)"
    table = Table(title=title)
    table.add_column("system")
    kinds = [f"decode_{batch}" for batch in BATCHES] + ["prefill"]
    for kind in kinds:
        table.add_column(kind.replace("_", ", batch "), justify="right")
    for name, by_kind in speeds.items():
        table.add_row(name, *("{p50:,.0f} ({p80:,.0f} to {p20:,.0f})".format(**by_kind[kind]) for kind in kinds))
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", help=f"comma-separated, of {', '.join((*SYSTEMS, *FOREIGN))}; all that can run")
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="SYSTEM=PATH",
        help=f"a Python that has the package of {' or '.join(FOREIGN)}, which takes part then",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="append the JSON line to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help="a GGUF file; the default is the catalogue's SmolLM2")
    arguments = parser.parse_args()
    if arguments.worker:
        serve(arguments.worker, arguments.file, arguments.threads)
        return

    import torch

    from ramet.runtime.models.catalog import resolve_model

    path = arguments.file or resolve_model("smollm2-135m")
    names = arguments.systems.split(",") if arguments.systems else list(SYSTEMS)
    pythons = dict(entry.split("=", 1) for entry in arguments.python)
    if not arguments.systems:
        names += [name for name in FOREIGN if name in pythons]
    workers = []
    for name in names:
        workers.append(Worker(name, pythons.get(name, sys.executable), path, arguments.threads, arguments.clock))
        workers[-1].read()  # one after the other: loading competes for the same cores
    load_before = os.getloadavg()[0]
    seconds = measure(workers, arguments.rounds)
    for worker in workers:
        worker.process.communicate("")
    num_tokens = {f"decode_{batch}": batch for batch in BATCHES} | {"prefill": PREFILL}
    speeds = {
        name: {kind: percentiles(values, num_tokens[kind]) for kind, values in by_kind.items()}
        for name, by_kind in seconds.items()
    }
    report(speeds, arguments.threads, arguments.clock)
    record = {
        "benchmark": "cpu",
        "commit": commit(),
        "device": platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "configuration": {
            "threads": arguments.threads,
            "clock": arguments.clock,
            "rounds": arguments.rounds,
            "prompt": PROMPT,
            "steps": STEPS,
            "prefill": PREFILL,
            "file": path.name,
        },
        "load_average": load_before,
        "tokens_per_s": speeds,
    }
    print_record(record, arguments.out)


if __name__ == "__main__":
    main()
