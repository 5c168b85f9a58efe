"""A program as one graph inside the engine against the same program as separate requests.

    python benchmarks/bench_programs.py [--rtt 0 10 50] [--out benchmarks/results/programs.jsonl]

The alternative is measured in the same run: every generation is a request with the whole text so far, as a client of a
completion API sends it; the text is tokenised anew, and the round trip is waited for. The graph is sent once, and waits
for one round trip in all. Both in this process, and over HTTP to a server of the same model (`POST /v1/programs` and
`POST /v1/completions`); the round trip is added by waiting, half before a request is sent and half after its answer.
SmolLM2-135M-Instruct, greedy, as many tokens in all modes; before every measurement the cache is emptied. Bytes: the
JSON of what is sent. Tokens computed: of prompts, by the engine's own count.
"""

from __future__ import annotations

import argparse
import json
import platform
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ramet import Engine, Function, State, function, gen, select
from ramet.lang.backend import EngineBackend
from ramet.lang.primitives import Gen
from ramet.runtime.types import FinishReason, Grammar, RequestOutput, SamplingParams, Usage

TOKENS = 12


RULES = (
    "You work for a small town. You are patient and exact, and you never repeat yourself. You answer in one sentence "
    "of plain words. You do not guess: where you don't know a thing you say so, and name who might. You give numbers "
    "with their units, dates with their year, and names in full when they come up for the first time. You do not "
    "apologise, you do not promise, and you do not talk about yourself. When somebody is in danger you say what to do "
    "first, and only then why. When a question is about money you say what is included. When it is about time you say "
    "when it begins and when it ends. When it is about a place you say how to get there on foot. What you are told by "
    "the people of the town stays between you and them.\n"
)


def text() -> Gen:
    return gen("x", max_tokens=TOKENS, ignore_eos=True)


@function(temperature=0)
def chat(s: State) -> None:
    s.system(RULES)
    for question in (
        "When do I sow beans?",
        "And peas?",
        "How deep?",
        "How much water?",
        "In the shade?",
        "Until when?",
    ):
        s.user(question)
        s.assistant(text())


@function(temperature=0)
def react(s: State) -> None:
    s += (
        RULES + "Answer with the tools search(words) and read(page).\nQuestion: Who built the old bridge of the town?\n"
    )
    for i, found in enumerate(["3 pages", "a page about bridges", "a page about the town", "built in 1788"]):
        s += f"Thought {i}:" + text() + f"\nAction {i}: " + select("tool", ["search", "read"]) + "(" + text() + ")\n"
        s += f"Observation {i}: {found}\n"
    s += "Answer:" + text()


@function(temperature=0)
def debate(s: State) -> None:
    s += RULES + "A debate about the motion: cities should be free of cars. Each side speaks one sentence at a time.\n"
    for _ in range(4):
        s += "For:" + text() + "\nAgainst:" + text() + "\n"
    s += "The better side was " + select("winner", ["for", "against"])


@function(temperature=0)
def map_reduce(s: State) -> None:
    s += RULES + "You write summaries of one short sentence, in plain words, and you leave out what does not matter.\n"
    branches = s.fork(8)
    branches += lambda i: f"Text: On day {i} the ship sailed {7 * i + 3} miles to the north.\nSummary:"
    branches += text()
    branches.join()
    s += "".join(f"-{summary}\n" for summary in s["x"]) + "All in one sentence:" + gen("all", max_tokens=TOKENS)


PROGRAMS: Sequence[Function] = (chat, react, debate, map_reduce)


class SeparateRequests:
    """The engine as a client of a completion API has it: text in, text out, a round trip each."""

    def __init__(self, engine: Engine, rtt_s: float) -> None:
        self.tokenizer = engine.tokenizer
        self.context_length = engine.context_length
        self.bytes_sent = 0
        self._engine = engine
        self.rtt_s = rtt_s

    def submit(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        *,
        grammar: Grammar | None = None,
        cache_salt: str = "",
        program_id: str | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
        score_from: int | None = None,
        on_output: Callable[[RequestOutput], None] | None = None,
    ) -> Uncancellable:
        assert on_output is not None
        sent = self.tokenizer.decode(prompt)
        body = {"prompt": sent, "max_tokens": sampling.max_tokens, "temperature": sampling.temperature}
        self.bytes_sent += len(json.dumps(body))
        tokens = self.tokenizer.encode(sent, parse_special=True)
        if score_from is not None:
            score_from = min(score_from, len(tokens) - 1)
        self.send(sent, tokens, sampling, score_from, on_output)
        return Uncancellable()

    def send(
        self,
        text: str,
        tokens: list[int],
        sampling: SamplingParams,
        score_from: int | None,
        on_output: Callable[[RequestOutput], None],
    ) -> None:
        """Half a round trip, the request, half a round trip."""

        def receive(output: RequestOutput) -> None:
            if output.finish_reason is None:
                on_output(output)
            else:
                after(self.rtt_s / 2, lambda: on_output(output))

        def submit() -> None:
            self._engine.submit(tokens, sampling, on_output=receive, score_from=score_from)

        after(self.rtt_s / 2, submit)


class Uncancellable:
    def cancel(self) -> None:
        raise NotImplementedError("nothing is cancelled in this benchmark")


def after(seconds: float, work: Callable[[], None]) -> None:
    if seconds == 0:
        work()
    else:
        threading.Timer(seconds, work).start()


class Server:
    """`ramet serve` in a process of its own."""

    def __init__(self, model: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.model = model
        command = [sys.executable, "-m", "ramet.cli", "serve", model, "--port", str(port), "--context-length", "2048"]
        self.process = subprocess.Popen([*command, "--log-level", "error"])
        self.http = httpx.Client(base_url=self.url, timeout=120)

    def __enter__(self) -> Server:
        for _ in range(600):
            try:
                if self.http.get("/ready").status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            if self.process.poll() is not None:
                raise RuntimeError("the server ended before it was ready")
            time.sleep(0.2)
        raise RuntimeError("the server is not ready after two minutes")

    def __exit__(self, *exc: object) -> None:
        self.process.terminate()
        self.process.wait(30)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:  # Any: JSON
        answer = self.http.post(path, json=body)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found


class HttpRequests(SeparateRequests):
    """A client of a completion API: one POST a generation."""

    def __init__(self, engine: Engine, rtt_s: float, server: Server) -> None:
        super().__init__(engine, rtt_s)
        self.computed = 0
        self._server = server
        self._threads = ThreadPoolExecutor(16)

    def send(
        self,
        text: str,
        tokens: list[int],
        sampling: SamplingParams,
        score_from: int | None,
        on_output: Callable[[RequestOutput], None],
    ) -> None:
        body: dict[str, Any] = {
            "model": self._server.model,
            "prompt": text,
            "max_tokens": sampling.max_tokens,
            "temperature": 0,
        }
        if score_from is None:
            body["ignore_eos"] = sampling.ignore_eos
        else:
            body |= {"max_tokens": 0, "echo": True, "logprobs": 1}
        self._threads.submit(self._post, body, tokens, score_from, on_output)

    def _post(
        self,
        body: dict[str, Any],
        tokens: list[int],
        score_from: int | None,
        on_output: Callable[[RequestOutput], None],
    ) -> None:
        time.sleep(self.rtt_s / 2)
        answer = self._server.post("/v1/completions", body)
        time.sleep(self.rtt_s / 2)
        choice, usage = answer["choices"][0], answer["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        self.computed += usage["prompt_tokens"] - cached
        counts = Usage(usage["prompt_tokens"], cached, usage["completion_tokens"])
        if score_from is None:
            text = choice["text"]
            written = tuple(self.tokenizer.encode(text, continues=True))
            reason = FinishReason(choice["finish_reason"])
            on_output(RequestOutput("http", text, written, counts, reason))
            return
        logprobs = choice["logprobs"]["token_logprobs"][score_from - len(tokens) :]
        scored = np.asarray(logprobs, dtype=np.float32)
        on_output(RequestOutput("http", "", (), counts, FinishReason.LENGTH, prompt_logprobs=scored))


class Measured(NamedTuple):
    """One run. `computed`: tokens of prompts."""

    seconds: float
    computed: int
    bytes_sent: int


def graph_in_process(program: Function, engine: Engine, server: Server | None, rtt_s: float) -> Measured:
    compiled = program.compile()
    sent = len(compiled.graph.to_json())
    start_s = time.perf_counter()
    time.sleep(rtt_s)  # its one round trip
    state = finished(compiled.run(backend=engine))
    return Measured(time.perf_counter() - start_s, state.usage.computed_tokens, sent)


def requests_in_process(program: Function, engine: Engine, server: Server | None, rtt_s: float) -> Measured:
    client = SeparateRequests(engine, rtt_s)
    start_s = time.perf_counter()
    state = finished(program.run(backend=EngineBackend(client)))
    return Measured(time.perf_counter() - start_s, state.usage.computed_tokens, client.bytes_sent)


def graph_over_http(program: Function, engine: Engine, server: Server | None, rtt_s: float) -> Measured:
    assert server is not None
    body = {"graph": json.loads(program.compile().graph.to_json())}
    start_s = time.perf_counter()
    time.sleep(rtt_s)
    answer = server.post("/v1/programs", body)
    seconds = time.perf_counter() - start_s
    if answer["status"] != "done":
        raise RuntimeError(f"the program is {answer['status']}: {answer['rows'][0]['error']}")
    usages = [node["usage"] for node in answer["rows"][0]["nodes"] if node.get("usage")]
    computed = sum(usage.get("prompt_tokens", 0) - usage.get("cached_tokens", 0) for usage in usages)
    return Measured(seconds, computed, len(json.dumps(body)))


def requests_over_http(program: Function, engine: Engine, server: Server | None, rtt_s: float) -> Measured:
    assert server is not None
    client = HttpRequests(engine, rtt_s, server)
    start_s = time.perf_counter()
    finished(program.run(backend=EngineBackend(client)))
    return Measured(time.perf_counter() - start_s, client.computed, client.bytes_sent)


def finished(state: State) -> State:
    error = state.error()
    if error is not None:
        raise error
    return state


Mode = Callable[[Function, Engine, "Server | None", float], Measured]
MODES: dict[str, Mode] = {
    "graph": graph_in_process,
    "requests": requests_in_process,
    "graph, HTTP": graph_over_http,
    "requests, HTTP": requests_over_http,
}


def measure(
    program: Function, engine: Engine, server: Server | None, mode: str, rtt_s: float, repeats: int
) -> dict[str, Any]:
    runs = []
    for _ in range(repeats):
        engine.flush_cache()
        if server is not None:
            server.http.get("/flush_cache").raise_for_status()
        runs.append(MODES[mode](program, engine, server, rtt_s))
    times = [run.seconds for run in runs]
    return {
        "program": program.name,
        "mode": mode,
        "rtt_ms": round(1000 * rtt_s),
        "latency_s": round(statistics.median(times), 3),
        "spread_s": round(max(times) - min(times), 3),
        "computed_tokens": runs[-1].computed,
        "bytes_sent": runs[-1].bytes_sent,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rtt", type=float, nargs="+", default=[0, 10, 50], help="milliseconds")
    parser.add_argument("--no-http", dest="http", action="store_false", help="leave the server out")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    modes = list(MODES) if args.http else [mode for mode in MODES if "HTTP" not in mode]
    with (
        Engine(args.model, context_length=2048) as engine,
        Server(args.model) if args.http else nullcontext() as server,
    ):
        for program in PROGRAMS:
            for mode in modes:
                measure(program, engine, server, mode, 0, 1)  # warm-up
            for rtt in args.rtt:
                rows += [measure(program, engine, server, mode, rtt / 1000, args.repeats) for mode in modes]
    table = Table(title=f"programs on {args.model}, {torch.get_num_threads()} threads, cache emptied before each run")
    for column in ("program", "round trip", "mode", "latency", "tokens computed", "bytes sent"):
        table.add_column(column, justify="left" if column in ("program", "mode") else "right")
    for row in rows:
        table.add_row(
            row["program"],
            f"{row['rtt_ms']} ms",
            row["mode"],
            f"{row['latency_s']:.2f} s",
            f"{row['computed_tokens']:,}",
            f"{row['bytes_sent']:,}",
        )
    Console().print(table)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    line = json.dumps(
        {
            "benchmark": "programs",
            "commit": commit.stdout.strip(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "model": args.model,
            "repeats": args.repeats,
            "rows": rows,
        }
    )
    if args.out is not None:
        with args.out.open("a") as file:
            file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
