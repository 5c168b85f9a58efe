"""A program as one graph inside the engine against the same program as separate requests.

    python benchmarks/bench_programs.py [--programs chat react] [--rtt 0 10 50] [--out FILE.jsonl]

Four ways, in one run, on SmolLM2-135M-Instruct, greedy, with the cache emptied before every measurement:

    graph            in this process: the graph is submitted once (`Engine`)
    requests         in this process: a request for each generation and each choice, with the whole text so far
    graph, HTTP      `Remote`: the graph goes to a server of the same model in a process of its own
    requests, HTTP   `OpenAI`: the same server's /v1/completions and /v1/chat/completions, a request each

The round trip is added by a proxy on the loopback address that delays bytes, half of it each way; connections are kept
open, so opening one costs nothing more. Bytes are those that the proxy saw go to the server. Tokens computed: by the
engine's own count. `same text`: whether the run wrote what the graph in process wrote; a client that sends text may
split it into other tokens. Spread: between the slowest and the fastest run. Torch's threads spin while they wait for
one another, so where other processes want the same cores a run may take ten times as long and more; far less with
OMP_WAIT_POLICY=passive.
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch
from bench_ttft import served
from json_line import commit, print_record
from program_cases import PROGRAMS
from rich.console import Console
from rich.table import Table

from ramet import Engine, Function, OpenAI, Remote, State
from ramet.lang.backends.in_process import EngineBackend
from ramet.runtime.types import Grammar, RequestOptions, RequestOutput, SamplingParams


class SeparateRequests:
    """The engine as a client of a completion API has it: the text so far is tokenised anew for each request."""

    def __init__(self, engine: Engine) -> None:
        self.tokenizer = engine.tokenizer
        self._engine = engine

    def __getattr__(self, name: str) -> Any:  # Any: the engine's own
        return getattr(self._engine, name)

    def submit(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        options: RequestOptions,
        *,
        grammar: Grammar | None = None,
        on_output: Callable[[RequestOutput], None] | None = None,
    ) -> Any:  # Any: a handle
        tokens = self.tokenizer.encode(self.tokenizer.decode(prompt), parse_special=True)
        score_from = None if options.score_from is None else min(options.score_from, len(tokens) - 1)
        return self._engine.submit(tokens, sampling, on_output=on_output, score_from=score_from)


class DelayingProxy:
    """Hands bytes on after half a round trip, on a thread of its own; counts those that go to the server."""

    def __init__(self, url: str) -> None:
        host, port = url.removeprefix("http://").split(":")
        self._target = (host, int(port))
        self.delay_s = 0.0
        self.bytes_sent = 0
        self._loop = asyncio.new_event_loop()
        is_up = threading.Event()

        async def start() -> None:
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            is_up.set()

        def run() -> None:
            self._loop.create_task(start())
            self._loop.run_forever()

        threading.Thread(target=run, name="proxy", daemon=True).start()
        is_up.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection(*self._target)
        await asyncio.gather(
            self._pass_on(reader, server_writer, up=True), self._pass_on(server_reader, writer, up=False)
        )

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool) -> None:
        try:
            while data := await reader.read(1 << 16):
                self.bytes_sent += len(data) if up else 0
                if self.delay_s:
                    self._loop.call_later(self.delay_s, writer.write, data)
                else:
                    writer.write(data)
        except ConnectionError:
            pass  # the other side is told below
        self._loop.call_later(self.delay_s, writer.close)


class Setting(NamedTuple):
    """What the ways to run a program need."""

    engine: Engine
    direct: httpx.Client  # to the server, past the proxy
    proxy: DelayingProxy
    backends: dict[str, object]


class Measured(NamedTuple):
    """One run. `computed`: tokens of prompts."""

    seconds: float
    computed: int
    bytes_sent: int
    text: str


@contextmanager
def setting(model: str) -> Iterator[Setting]:
    flags = ("--context-length", "2048", "--log-level", "error")
    with Engine(model, context_length=2048) as engine, served(None, model, flags) as url:
        proxy = DelayingProxy(url)
        backends = {
            "graph": engine,
            "requests": EngineBackend(SeparateRequests(engine)),
            "graph, HTTP": Remote(proxy.url),
            "requests, HTTP": OpenAI(proxy.url + "/v1", "none", extensions=True),
        }
        with httpx.Client(base_url=url, timeout=60) as direct:
            yield Setting(engine, direct, proxy, backends)
        for name in ("graph, HTTP", "requests, HTTP"):
            backends[name].close()  # type: ignore[attr-defined]


def computed_by(found: Setting, mode: str) -> int:
    """Prompt tokens that the engine behind a mode has computed so far."""
    if "HTTP" not in mode:
        return int(found.engine.stats()["num_computed_tokens"])
    time.sleep(0.7)  # the server's counters come with the engine's heartbeat
    return int(found.direct.get("/get_server_info").json()["stats"]["num_computed_tokens"])


def run(program: Function, found: Setting, mode: str) -> Measured:
    if "HTTP" in mode:
        found.direct.post("/flush_cache").raise_for_status()
    else:
        found.engine.flush_cache()
    computed, sent = computed_by(found, mode), found.proxy.bytes_sent
    start_s = time.perf_counter()
    state = program.run(backend=found.backends[mode])
    seconds = time.perf_counter() - start_s
    error = state.error()
    if error is not None:
        raise error
    sent = found.proxy.bytes_sent - sent
    return Measured(seconds, computed_by(found, mode) - computed, sent, said(state))


def said(state: State) -> str:
    """What the model wrote and chose."""
    events = state.record.events
    return "|".join(events[node.id].text for node in state.record.graph.nodes if getattr(node, "name", None))


def measure(program: Function, found: Setting, mode: str, rtt_ms: float, repeats: int, expected: str) -> dict[str, Any]:
    found.proxy.delay_s = rtt_ms / 2000
    runs = [run(program, found, mode) for _ in range(repeats)]
    times = [one.seconds for one in runs]
    return {
        "program": program.name,
        "mode": mode,
        "rtt_ms": rtt_ms if "HTTP" in mode else None,
        "latency_s": round(statistics.median(times), 3),
        "spread_s": round(max(times) - min(times), 3),
        "computed_tokens": runs[-1].computed,
        "bytes_sent": runs[-1].bytes_sent if "HTTP" in mode else None,
        "is_same_text": runs[-1].text == expected,
    }


def table_of(rows: Sequence[dict[str, Any]], title: str) -> Table:
    table = Table(title=title)
    for column in ("program", "way", "round trip", "latency", "spread", "tokens computed", "bytes sent", "same text"):
        table.add_column(column, justify="left" if column in ("program", "way") else "right")
    for row in rows:
        table.add_row(
            row["program"],
            row["mode"],
            "-" if row["rtt_ms"] is None else f"{row['rtt_ms']:g} ms",
            f"{row['latency_s']:.2f} s",
            f"{row['spread_s']:.2f} s",
            f"{row['computed_tokens']:,}",
            "-" if row["bytes_sent"] is None else f"{row['bytes_sent']:,}",
            "yes" if row["is_same_text"] else "no",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {program.name: program for program in PROGRAMS}
    parser.add_argument("--programs", nargs="+", choices=names, default=list(names))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rtt", type=float, nargs="+", default=[0, 10, 50], help="milliseconds")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with setting(args.model) as found:
        for program in (names[name] for name in args.programs):
            found.proxy.delay_s = 0.0
            warm = [run(program, found, mode) for mode in found.backends]
            for mode in found.backends:
                for rtt in args.rtt if "HTTP" in mode else [0.0]:
                    rows.append(measure(program, found, mode, rtt, args.repeats, warm[0].text))
    threads = torch.get_num_threads()
    Console().print(table_of(rows, f"programs on {args.model}, {threads} threads, cache emptied before each run"))
    versions = {"commit": commit(), "torch": torch.__version__, "python": platform.python_version()}
    config = {"threads": threads, "model": args.model, "repeats": args.repeats}
    print_record({"benchmark": "programs", **versions, **config, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
