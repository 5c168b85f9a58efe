"""Several engines behind the router, beside one engine with as much cache: hit rates, and what a killed engine costs.

    python benchmarks/bench_replicas.py                          two engines, one thread each, 64 chains
    python benchmarks/bench_replicas.py --kills 100              an engine is killed so often, under load
    python benchmarks/bench_replicas.py --http                   what requests and streams cost the HTTP process
    python benchmarks/bench_replicas.py --autoscale              1 -> 3 -> 1 engines under a load that rises and falls
    python benchmarks/bench_replicas.py --prefill                long prompts beside chats: 2 engines, or prefill apart
    python benchmarks/bench_replicas.py --moves                  KV pages from one engine to another, and computing them

Workloads are those of workloads.py at an eighth of their lengths (RAG: with eight documents), with more chains than
replicas. Random and round-robin placement run for contrast. The hit rate is the cached share of all prompt tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from json_line import commit, print_record
from workloads import Chain, Turn

from ramet.errors import EngineStopped, RametError
from ramet.runtime.cluster.autoscaler import ScalingRule
from ramet.runtime.cluster.router import Placement, RoutedRequest, Router, RouterConfig
from ramet.runtime.engine.config import EngineConfig
from ramet.runtime.server.link.moving import Moves, move
from ramet.runtime.server.link.on_ray import RayLauncher, connect
from ramet.runtime.server.link.protocol import Submit
from ramet.runtime.server.link.proxy import EngineProxy, Listener
from ramet.runtime.server.link.replicas import Replicas
from ramet.runtime.types import SamplingParams


class RandomRouter(Router):
    """Any replica, and no pages move."""

    def __init__(self, config: RouterConfig) -> None:
        super().__init__(replace(config, least_moved=1 << 30))

    def place(self, request: RoutedRequest, now_s: float, avoid: Collection[int] = ()) -> Placement:
        chosen = self.choose([replica for replica in self.replicas if replica not in avoid])
        return super().place(request, now_s, {*avoid, *self.replicas} - {chosen})

    def choose(self, replicas: list[int]) -> int:
        return random.choice(replicas)


class RoundRobinRouter(RandomRouter):
    """One after the other."""

    number = 0

    def choose(self, replicas: list[int]) -> int:
        self.number += 1
        return replicas[self.number % len(replicas)]


def chains(kind: str, count: int, seed: int, vocab_size: int) -> list[Chain]:
    rng = random.Random(f"{kind}{seed}")

    def draw(num: int) -> list[int]:
        return [rng.randrange(vocab_size // 8, vocab_size) for _ in range(num)]

    if kind == "rag":
        documents = [draw(256) for _ in range(8)]
        return [[Turn(documents[n % 8] + draw(16), 16)] for n in rng.sample(range(count), count)]
    if kind == "multiturn":
        return [[Turn(draw(16), 16) for _ in range(4)] for _ in range(count)]
    tools = draw(128)
    return [[Turn((tools + draw(64) if turn == 0 else []) + draw(16), 16) for turn in range(3)] for _ in range(count)]


async def drive(engines: EngineProxy | Replicas, work: list[Chain], concurrency: int) -> dict[str, Any]:
    """Run all chains, `concurrency` at a time. Counts tokens, failures and times to the first token."""
    waiting, times = list(reversed(work)), list[float]()
    counts = {"prompt": 0, "cached": 0, "requests": 0, "cut": 0, "lost": 0}

    async def worker() -> None:
        while waiting:
            history: list[int] = []
            for turn in waiting.pop():
                history = history + turn.new
                sampling = SamplingParams(temperature=0.0, max_tokens=turn.out, ignore_eos=True)
                sent_s, first_s, num_cached = time.perf_counter(), None, 0
                counts["requests"] += 1
                try:
                    async for output in engines.submit(Submit(engines.new_id("bench"), history, sampling)):
                        first_s = first_s or time.perf_counter() - sent_s
                        num_cached = output.cached_tokens
                        history = history + output.token_ids
                except EngineStopped:
                    counts["lost" if first_s is None else "cut"] += 1
                    break
                counts["prompt"] += len(history) - turn.out
                counts["cached"] += num_cached
                times.append(first_s or 0.0)

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    times.sort()
    return {
        **counts,
        "hit_rate": round(counts["cached"] / max(counts["prompt"], 1), 4),
        "ttft_p50_ms": round(1e3 * times[len(times) // 2], 1),
        "ttft_p99_ms": round(1e3 * times[int(len(times) * 0.99)], 1),
    }


def make(
    arguments: argparse.Namespace,
    count: int,
    router: Callable[[RouterConfig], Router],
    scaling: ScalingRule | None = None,
    num_prefill: int = 0,
) -> EngineProxy | Replicas:
    """One engine with the whole cache, or several with a part each."""
    config = {"device": "cpu", "num_threads": 1, "num_kv_tokens": arguments.kv_tokens // count}
    if arguments.prefill:
        config["chunked_prefill_size"] = 512  # so that pages move while later ones are computed

    def proxy(replica: int | None = None, listener: Listener | None = None) -> EngineProxy:
        return EngineProxy(
            arguments.model,
            config,
            launcher=None if arguments.ray_address is None else RayLauncher(EngineConfig.from_mapping(config)),
            replica=replica,
            listener=listener,
            max_engine_failures=1000,  # killed on purpose; pauses before restarts grow all the same
            log_level="ERROR",
        )

    if count == 1 and scaling is None and not num_prefill:
        return proxy()
    return Replicas(count, proxy, make_router=router, scaling=scaling, num_prefill=num_prefill)


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    systems: dict[str, tuple[int, Callable[[RouterConfig], Router]]] = {
        "one engine": (1, Router),
        "router": (arguments.replicas, Router),
        "random": (arguments.replicas, RandomRouter),
        "round robin": (arguments.replicas, RoundRobinRouter),
    }
    rows: dict[str, Any] = {}
    for name, (count, router) in systems.items():
        engines = make(arguments, count, router)
        await engines.start()
        hello = await engines.wait_ready(600)
        for kind in ("multiturn", "rag", "agentic"):
            await engines.ask("flush_cache")
            rows[f"{kind} / {name}"] = row = await drive(
                engines, chains(kind, arguments.chains, 0, hello.vocab_size), arguments.concurrency
            )
            one = rows.get(f"{kind} / one engine")
            row["of_one_engine"] = round(row["hit_rate"] / one["hit_rate"], 3) if one else 1.0
            print(f"{kind:10} {name:12}", "  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
        await engines.stop()
    return rows


async def kill(arguments: argparse.Namespace) -> dict[str, Any]:
    """Kill an engine under load, again and again, while another one is there. What had not begun must be answered."""
    engines = make(arguments, arguments.replicas, Router)
    assert isinstance(engines, Replicas)
    await engines.start()
    vocab_size = (await engines.wait_ready(600)).vocab_size
    total: dict[str, int] = {"requests": 0, "cut": 0, "lost": 0}
    recoveries: list[float] = []

    async def recovered(proxy: EngineProxy, pid: int) -> None:
        killed_s = time.perf_counter()
        while proxy.hello is None or proxy.hello.pid == pid:
            await asyncio.sleep(0.02)
        recoveries.append(time.perf_counter() - killed_s)

    def ready() -> list[EngineProxy]:
        return [proxy for _, proxy in engines.engines() if proxy.hello is not None]

    waiting: list[asyncio.Task[None]] = []
    for number in range(arguments.kills):
        while len(ready()) < 2:  # what has not begun goes to another one
            await asyncio.sleep(0.02)
        load = asyncio.create_task(drive(engines, chains("multiturn", 16, number, vocab_size), arguments.concurrency))
        await asyncio.sleep(0.2 + random.random())
        victim = random.choice(ready())
        assert victim.hello is not None
        pid = victim.hello.pid
        os.kill(pid, signal.SIGKILL)
        waiting.append(asyncio.create_task(recovered(victim, pid)))
        counts = await load
        while victim.hello is not None and victim.hello.pid == pid:  # its end has not been noticed
            await asyncio.sleep(0.02)
        for name in total:
            total[name] += counts[name]
        print(f"kill {number + 1}: {total}, {engines.num_retries} sent again", flush=True)
    await asyncio.gather(*waiting)
    await engines.stop()
    recoveries.sort()
    return {
        **total,
        "kills": arguments.kills,
        "retries": engines.num_retries,
        "recovery_s_p50": round(recoveries[len(recoveries) // 2], 2),
        "recovery_s_max": round(recoveries[-1], 2),
    }


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def http(arguments: argparse.Namespace) -> dict[str, Any]:
    """CPU time of the HTTP process for a request, and for a token that is streamed alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["serve", arguments.model, "--port", str(port), "--dp", str(arguments.replicas), "--device", "cpu"]
    command += ["--num-threads", "1", "--log-level", "error"]
    server = await asyncio.create_subprocess_exec(sys.executable, "-m", "ramet.cli", *command)
    found: dict[str, Any] = {}
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as client:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get("/ready")).json()["ready"]:
                        break
                await asyncio.sleep(0.2)

            async def ask(number: int, max_tokens: int, *, stream: bool) -> int:
                body = {"prompt": f"{number} " * 100, "max_tokens": max_tokens, "ignore_eos": True, "stream": stream}
                if not stream:
                    (await client.post("/v1/completions", json=body)).raise_for_status()
                    return 1
                async with client.stream("POST", "/v1/completions", json=body) as answer:
                    return sum([line.startswith("data: {") async for line in answer.aiter_lines()])

            for name, count, max_tokens, stream in (("request", 400, 1, False), ("streamed_event", 16, 400, True)):
                await asyncio.gather(*(ask(n, max_tokens, stream=stream) for n in range(8)))
                before_s, events = cpu_s(server.pid), 0
                for start in range(0, count, 8):
                    asked = (ask(start + n, max_tokens, stream=stream) for n in range(8))
                    events += sum(await asyncio.gather(*asked))
                found[f"{name}_us"] = round(1e6 * (cpu_s(server.pid) - before_s) / events, 1)
                found[f"{name}s"] = events
    finally:
        server.terminate()
        await server.wait()
    return found


async def autoscale(arguments: argparse.Namespace) -> dict[str, Any]:
    """Let the number of engines follow a load that rises and falls. Windows are short; the model is a small one."""
    rule = ScalingRule(1, 3, ttft_s=arguments.ttft, up_s=3.0, down_s=10.0)
    engines = make(arguments, 1, Router, scaling=rule)
    assert isinstance(engines, Replicas)
    await engines.start()
    vocab_size = (await engines.wait_ready(600)).vocab_size
    started_s, changes = time.perf_counter(), list[tuple[float, int]]()
    counts, rng = {"requests": 0, "failed": 0}, random.Random(0)
    num_clients, is_over = 0, False

    async def client(number: int) -> None:
        while number < num_clients and not is_over:
            prompt = [rng.randrange(vocab_size // 8, vocab_size) for _ in range(64)]
            sampling = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
            counts["requests"] += 1
            try:
                await engines.submit(Submit(engines.new_id("bench"), prompt, sampling), is_whole=True).collect()
            except RametError as error:
                counts["failed"] += 1
                print("failed:", error, flush=True)

    async def until(count: int, clients: int) -> float:
        """Let so many clients ask without a pause until there are so many engines. Returns the seconds."""
        nonlocal num_clients
        begun_s, before, num_clients = time.perf_counter(), num_clients, clients
        tasks.extend(asyncio.create_task(client(n)) for n in range(before, clients))
        while sum(proxy.hello is not None for _, proxy in engines.engines()) != count:
            await asyncio.sleep(0.1)
        changes.append((round(time.perf_counter() - started_s, 1), count))
        print(f"{changes[-1][0]:6.1f} s: {count} engines, {clients} clients, {counts}", flush=True)
        return round(time.perf_counter() - begun_s, 1)

    tasks: list[asyncio.Task[None]] = []
    await until(1, 1)
    up_s = await until(3, arguments.clients)
    down_s = await until(1, 1)
    is_over = True
    await asyncio.gather(*tasks)
    await engines.stop()
    return {**counts, "up_s": up_s, "down_s": down_s, "changes": changes, "up_window_s": 3.0, "down_window_s": 10.0}


async def beside_chats(arguments: argparse.Namespace, num_prefill: int) -> dict[str, Any]:
    """Long prompts arrive in equal intervals while chats run, on two engines. Times between the chats' tokens."""
    engines = make(arguments, 2 - num_prefill, Router, num_prefill=num_prefill)
    assert isinstance(engines, Replicas)
    await engines.start()
    vocab_size = (await engines.wait_ready(600)).vocab_size
    rng, gaps, firsts = random.Random(0), list[float](), list[float]()
    counts = {"tokens": 0, "chats": 0, "failed": 0}
    is_over = False

    async def ask(num_prompt: int, num_out: int, times: list[float] | None) -> None:
        prompt = [rng.randrange(vocab_size // 8, vocab_size) for _ in range(num_prompt)]
        sampling = SamplingParams(temperature=0.0, max_tokens=num_out, ignore_eos=True)
        last_s, is_first = time.perf_counter(), True
        async for output in engines.submit(Submit(engines.new_id("bench"), prompt, sampling)):
            now_s = time.perf_counter()
            if is_first and times is None:
                firsts.append(now_s - last_s)
            elif not is_first and times is not None:
                times.append(now_s - last_s)
            last_s, is_first = now_s, False
            counts["tokens"] += len(output.token_ids)
        counts["tokens"] += num_prompt

    async def chat() -> None:
        while not is_over:
            await ask(32, arguments.chat_tokens, gaps)
            counts["chats"] += 1

    for num_tokens in (64, arguments.prompt_tokens, arguments.prompt_tokens):
        await ask(num_tokens, 4, None)
    firsts.clear()
    counts["tokens"] = 0
    begun_s = time.perf_counter()
    chats = [asyncio.create_task(chat()) for _ in range(arguments.chats)]
    prompts: list[asyncio.Task[None]] = []
    for _ in range(arguments.prompts):
        await asyncio.sleep(arguments.interval)
        prompts.append(asyncio.create_task(ask(arguments.prompt_tokens, 8, None)))
    await asyncio.gather(*prompts)
    seconds, tokens, is_over = time.perf_counter() - begun_s, counts["tokens"], True
    await asyncio.gather(*chats)
    moves = engines.moves
    await engines.stop()
    gaps.sort()
    firsts.sort()
    return {
        "itl_p50_ms": round(1e3 * gaps[len(gaps) // 2], 1),
        "itl_p99_ms": round(1e3 * gaps[int(len(gaps) * 0.99)], 1),
        "tokens_s": round(tokens / seconds, 1),
        "prompts_ttft_p50_s": round(firsts[len(firsts) // 2], 2),
        "seconds": round(seconds, 1),
        "moved_mb": round(moves.num_bytes / 1e6, 1),
        "moved_tokens": moves.num_tokens,
        "moving_s": round(moves.seconds, 2),
        "moves_failed": moves.num_failed,
    }


async def prefill(arguments: argparse.Namespace) -> dict[str, Any]:
    """Two ordinary engines, and one for prompts with one that decodes, in turns."""
    rows: dict[str, list[dict[str, Any]]] = {"two engines": [], "prefill apart": []}
    for _ in range(arguments.rounds):
        for num_prefill, (name, runs) in enumerate(rows.items()):
            runs.append(await beside_chats(arguments, num_prefill))
            print(f"{name:14}", "  ".join(f"{k} {v}" for k, v in runs[-1].items()), flush=True)
    both, apart = (sorted(runs, key=lambda run: float(run["itl_p99_ms"]))[len(runs) // 2] for runs in rows.values())
    return {
        **rows,
        "chat_tokens": arguments.chat_tokens,
        "itl_p99_better": round(both["itl_p99_ms"] / apart["itl_p99_ms"], 2),
        "throughput_of": round(apart["tokens_s"] / both["tokens_s"], 3),
    }


async def moves(arguments: argparse.Namespace) -> dict[str, Any]:
    """Move prefixes of several lengths between two idle engines, beside computing them there."""
    engines = make(arguments, 2, Router)
    assert isinstance(engines, Replicas)
    await engines.start()
    vocab_size = (await engines.wait_ready(600)).vocab_size
    (_, source), (_, target) = engines.engines()
    rng, found = random.Random(0), dict[str, Any]()
    for num_tokens in (256, 1024, 2048, 4096):
        rows = []
        for _ in range(arguments.rounds + 1):  # the first one warms up
            prompt = [rng.randrange(vocab_size // 8, vocab_size) for _ in range(num_tokens)]
            once = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
            begun_s = time.perf_counter()
            await source.submit(Submit(engines.new_id("bench"), prompt, once), is_whole=True).collect()
            computed_s, totals = time.perf_counter() - begun_s, Moves()
            begun_s = time.perf_counter()
            await move(source, target, np.asarray(prompt, dtype=np.int32), "", totals)
            rows.append((time.perf_counter() - begun_s, computed_s, totals.num_bytes))
        moved_s, computed_s = (sorted(row[n] for row in rows[1:])[len(rows) // 2 - 1] for n in (0, 1))
        found[str(num_tokens)] = {
            "mb": round(rows[0][2] / 1e6, 1),
            "moved_ms": round(1e3 * moved_s, 1),
            "computed_ms": round(1e3 * computed_s, 1),
        }
        print(num_tokens, found[str(num_tokens)], flush=True)
    await engines.stop()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--chains", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--kv-tokens", type=int, default=8_192, help="of all engines together")
    parser.add_argument("--kills", type=int, default=0, help="kill an engine so often instead")
    parser.add_argument("--autoscale", action="store_true", help="let the number of engines follow the load instead")
    parser.add_argument("--http", action="store_true", help="measure the HTTP process instead")
    parser.add_argument("--prefill", action="store_true", help="compare with prefill apart from decode instead")
    parser.add_argument("--moves", action="store_true", help="measure moves of KV pages instead")
    parser.add_argument("--chats", type=int, default=6, help="of --prefill: that run at once")
    parser.add_argument("--chat-tokens", type=int, default=512, help="of --prefill: that each chat writes")
    parser.add_argument("--prompts", type=int, default=16, help="of --prefill: long ones, one after the other")
    parser.add_argument("--prompt-tokens", type=int, default=2000, help="of --prefill: of a long one")
    parser.add_argument("--interval", type=float, default=3.0, help="of --prefill: seconds between two long ones")
    parser.add_argument("--rounds", type=int, default=3, help="of --prefill and --moves")
    parser.add_argument("--clients", type=int, default=24, help="of --autoscale, at most")
    parser.add_argument("--ttft", type=float, default=0.5, help="of --autoscale: seconds to the first token")
    parser.add_argument("--ray-address", help="Ray cluster on whose nodes the engines run; default: this machine")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    record = {
        "benchmark": "bench_replicas",
        "commit": commit(),
        "model": arguments.model,
        "replicas": arguments.replicas,
    }
    if arguments.ray_address is not None:
        connect(arguments.ray_address)
    if arguments.prefill or arguments.moves:
        arguments.kv_tokens = max(arguments.kv_tokens, 32_768)
    if arguments.autoscale:
        record["autoscale"] = asyncio.run(autoscale(arguments))
        print(record["autoscale"])
    elif arguments.prefill:
        record["prefill"] = asyncio.run(prefill(arguments))
        print({name: value for name, value in record["prefill"].items() if not isinstance(value, list)})
    elif arguments.moves:
        record["moves"] = asyncio.run(moves(arguments))
    elif arguments.http:
        record["http"] = asyncio.run(http(arguments))
        print(record["http"])
    elif arguments.kills:
        record["kills"] = asyncio.run(kill(arguments))
        print(record["kills"])
    else:
        record["rows"] = asyncio.run(measure(arguments))
    print_record(record, arguments.out)


if __name__ == "__main__":
    main()
