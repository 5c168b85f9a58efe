"""A server of a tiny model under nice and nasty clients, whose engine is killed and stopped now and then.

    python tests/adversary/soak.py --seconds 1800
    python tests/adversary/soak.py --overload --seconds 60 [--model smollm2-135m]
    python tests/adversary/soak.py --table --model smollm2-135m

Afterwards, nothing may be left: no request, no page, no program, and little memory. Nice clients may get an error only
while the engine is away, or 429. Prints what was done, and ends with 1 if something was left or wrong.

With --overload, the engine is left alone, and ten times as many clients as it runs sequences ask for more all the time,
a third of them nasty. They run in a process of their own, which leaves the processor to the server where both want it:
elsewhere, clients are on other machines. A few well-behaved clients of a key of their own read streams beside them.
Their gaps between tokens must stay small, nobody may get a 5xx, and memory must stay flat.

With --table, one client after the other asks for what once made everybody wait, while a well-behaved one reads a
stream. Prints the longest gap of its tokens for each, beside its gap alone, and what the HTTP process grew by.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx

KEYS = ("nice", "other", "nasty")
MAX_GROWTH_BYTES = 100 << 20
MAX_OVERLOAD_GROWTH_BYTES = 32 << 20
MAX_GAP_S = 0.3  # 99 of 100 gaps between a well-behaved client's tokens under overload
NUM_RUNNING = 16  # sequences that the engine runs at once
NUM_STREAMS = 4  # well-behaved clients under overload
LOAD_NICENESS = 10  # of the process with the other clients
SETTLE_S = 120.0  # for the requests in flight to end
ENDLESS = "(?:(?!foo%d|bar|baz).){0,2000}"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a"]}


@dataclass
class Soak:
    """What happened. `wrong`: what must not."""

    url: str
    pid: int
    rng: random.Random
    end_s: float
    asked: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    gaps_s: list[float] = field(default_factory=list)  # between the tokens of well-behaved clients' streams
    firsts_s: list[float] = field(default_factory=list)  # from a stream's request to its first token
    num_kills: int = 0
    num_stops: int = 0
    away_until_s: float = 0.0  # the engine was killed, or has not been ready again for long

    def client(self, key: str) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.AsyncClient(base_url=self.url, timeout=180, trust_env=False, headers=headers)

    def note(self, who: str, status: int) -> None:
        self.statuses[f"{who} {status}"] += 1
        is_away = time.monotonic() < self.away_until_s
        if status >= 500 and not (status == 503 and is_away):
            self.wrong[f"{who} got {status}"] += 1


Ask = Callable[[Soak, httpx.AsyncClient], Awaitable[int]]


def words(soak: Soak, most: int) -> str:
    return " ".join(f"word{soak.rng.randrange(50)}" for _ in range(soak.rng.randrange(1, most)))


async def post(client: httpx.AsyncClient, path: str, body: object) -> int:
    return (await client.post(path, json=body)).status_code


async def generate(soak: Soak, client: httpx.AsyncClient) -> int:
    sampling = {"max_new_tokens": soak.rng.randrange(1, 40), "temperature": 1.0, "ignore_eos": True}
    return await post(client, "/generate", {"text": words(soak, 40), "sampling_params": sampling})


async def chat(soak: Soak, client: httpx.AsyncClient) -> int:
    messages = [{"role": "user", "content": words(soak, 20)}]
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    body = {"messages": messages, "max_tokens": 60, "response_format": shape, "n": soak.rng.randrange(1, 4)}
    return await post(client, "/v1/chat/completions", body)


async def program(soak: Soak, client: httpx.AsyncClient) -> int:
    nodes = [
        {"kind": "text", "id": 0, "parts": [words(soak, 10)]},
        {"kind": "fork", "id": 1, "parent": 0, "group": 1, "index": 0, "width": 2},
        {"kind": "fork", "id": 2, "parent": 0, "group": 1, "index": 1, "width": 2},
        {"kind": "generate", "id": 3, "parent": 1, "name": "x", "sampling": {"max_tokens": 12}},
        {"kind": "generate", "id": 4, "parent": 2, "name": "x", "sampling": {"max_tokens": 12}},
    ]
    return await post(client, "/v1/programs", {"graph": {"version": 1, "nodes": nodes}, "arguments": {}})


async def tokenize(soak: Soak, client: httpx.AsyncClient) -> int:
    return await post(client, "/v1/tokenize", {"prompt": words(soak, 50)})


async def leave_stream(soak: Soak, client: httpx.AsyncClient) -> int:
    body = {"prompt": words(soak, 9), "max_tokens": 300, "ignore_eos": True, "stream": True, "n": 4}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        async for _ in answer.aiter_lines():
            if soak.rng.random() < 0.2:
                break
        return answer.status_code


async def leave_body(soak: Soak, client: httpx.AsyncClient) -> int:
    host, port = soak.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = b"POST /generate HTTP/1.1\r\nhost: x\r\nauthorization: Bearer nasty\r\ncontent-length: 900\r\n\r\n{"
    writer.write(head[: soak.rng.randrange(1, len(head) + 1)])
    await writer.drain()
    writer.close()
    return 0


async def flood(soak: Soak, client: httpx.AsyncClient) -> int:
    body = {"prompt": words(soak, 60), "max_tokens": 100, "n": 32, "logprobs": 5, "frequency_penalty": 1.0}
    return await post(client, "/v1/completions", body)


async def endless_grammar(soak: Soak, client: httpx.AsyncClient) -> int:
    sampling = {"max_new_tokens": 20, "regex": ENDLESS % soak.rng.randrange(1000)}
    with_limit = {"text": "x", "sampling_params": sampling, "timeout_s": 5}
    return await post(client, "/generate", with_limit if soak.rng.random() < 0.5 else {**with_limit, "timeout_s": 1})


async def garbage(soak: Soak, client: httpx.AsyncClient) -> int:
    data = bytearray(json.dumps({"text": words(soak, 9), "sampling_params": {"max_new_tokens": 3, "n": 2}}).encode())
    for _ in range(soak.rng.randrange(1, 6)):
        data[soak.rng.randrange(len(data))] = soak.rng.randrange(256)
    paths = ("/generate", "/v1/completions", "/v1/chat/completions", "/v1/programs", "/v1/responses", "/v1/messages")
    headers = {"content-type": "application/json"}
    return (await client.post(soak.rng.choice(paths), content=bytes(data), headers=headers)).status_code


async def large_body(soak: Soak, client: httpx.AsyncClient) -> int:
    return await post(client, "/v1/tokenize", {"prompt": "a " * soak.rng.randrange(1 << 20)})


async def read_stream(soak: Soak, client: httpx.AsyncClient) -> int:
    body = {"prompt": words(soak, 40), "max_tokens": 100, "ignore_eos": True, "stream": True, "stream_options": None}
    heard_s, is_first = time.monotonic(), True
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                now_s = time.monotonic()
                (soak.firsts_s if is_first else soak.gaps_s).append(now_s - heard_s)
                heard_s, is_first = now_s, False
                if '"error"' in line:
                    soak.wrong["an error in a well-behaved client's stream"] += 1
        return answer.status_code


def schema_of(schema: object, **fields: object) -> Ask:
    """A constrained answer of up to 100 tokens, with a schema that no other request has."""

    async def ask(soak: Soak, client: httpx.AsyncClient) -> int:
        source = {"description": f"{soak.rng.random()}", **json.loads(json.dumps(schema))}
        sampling = {"max_new_tokens": 100, "temperature": 1.0, "json_schema": json.dumps(source), **fields}
        return await post(client, "/generate", {"text": words(soak, 9), "sampling_params": sampling})

    return ask


def optional(count: int) -> object:
    return {"type": "object", "properties": {f"property_{i}": {"type": ["string", "integer"]} for i in range(count)}}


def nested(depth: int) -> object:
    schema: object = {"type": "integer"}
    for i in range(depth):
        schema = {"type": "object", "properties": {f"k{i}": schema}, "required": [f"k{i}"]}
    return schema


async def ambiguous(soak: Soak, client: httpx.AsyncClient) -> int:
    sampling = {"max_new_tokens": 100, "ebnf": 'root ::= e\ne ::= e e | e "a" | "a" e | "a"', "temperature": 1.0}
    return await post(client, "/generate", {"text": words(soak, 9), "sampling_params": sampling})


async def long_prompts(soak: Soak, client: httpx.AsyncClient) -> int:
    """Two prompts of about 8,000 tokens."""
    ids = [[soak.rng.randrange(100, 40_000) for _ in range(7900)] for _ in range(2)]
    sampling = {"max_new_tokens": 4, "ignore_eos": True}
    asked = [post(client, "/generate", {"input_ids": one, "sampling_params": sampling}) for one in ids]
    return max(await asyncio.gather(*asked))


def edited(count: int) -> Ask:
    """Answers with penalties, biases and log-probabilities, all at once."""

    async def ask(soak: Soak, client: httpx.AsyncClient) -> int:
        edits = {"logprobs": 5, "frequency_penalty": 0.3, "repetition_penalty": 1.1}
        bias = {str(token): 1 for token in range(100, 130)}
        body = {"prompt": words(soak, 40), "max_tokens": 40, "n": count, "ignore_eos": True, "logit_bias": bias}
        return await post(client, "/v1/completions", {**body, **edits})

    return ask


async def large_texts(soak: Soak, client: httpx.AsyncClient) -> int:
    text = "".join(f"word{soak.rng.randrange(1 << 30)} " for _ in range(60_000))[:900_000]
    return max(await asyncio.gather(*(post(client, "/v1/tokenize", {"prompt": text}) for _ in range(4))))


async def four_endless(soak: Soak, client: httpx.AsyncClient) -> int:
    """Four endless regexes. Beside them, another key's integer must not wait: see `small_s`."""
    asked = [endless_grammar(soak, client) for _ in range(4)]
    return max(await asyncio.gather(*asked))


async def head_lines(soak: Soak, client: httpx.AsyncClient) -> int:
    """Up to 96 MB of header lines, without a key."""
    host, port = soak.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /health HTTP/1.1\r\n")
    for _ in range(96):
        if writer.is_closing():
            break
        writer.write((b"x-%08d: " % soak.rng.randrange(10**8) + b"y" * 1000 + b"\r\n") * 1000)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
    writer.close()
    return 0


async def many_rows(soak: Soak, client: httpx.AsyncClient) -> int:
    """A program of 600 rows, with 1 MB of text."""
    nodes = [
        {"kind": "text", "id": 0, "parts": ["a " * 500_000]},
        {"kind": "generate", "id": 1, "parent": 0, "name": "x", "sampling": {"max_tokens": 2}},
    ]
    return await post(client, "/v1/programs", {"graph": {"version": 1, "nodes": nodes}, "rows": [{}] * 600})


TABLE: dict[str, Ask] = {
    "1,000 optional properties": schema_of(optional(1000)),
    "two prompts of 8,000 tokens": long_prompts,
    "unique strings": schema_of({"type": "array", "items": {"type": "string"}, "uniqueItems": True, "minItems": 55}),
    "64 edited answers": edited(64),
    "128 edited answers": edited(128),
    "four texts of 900 kB": large_texts,
    "an ambiguous grammar": ambiguous,
    "150 nested objects": schema_of(nested(150)),
    "four endless regexes": four_endless,
    "96 MB of header lines": head_lines,
    "600 rows of 1 MB": many_rows,
}
NICE: tuple[Ask, ...] = (generate, chat, program, tokenize)
NASTY: tuple[Ask, ...] = (leave_stream, leave_body, flood, endless_grammar, garbage, large_body)


async def tenant(soak: Soak, key: str, asks: tuple[Ask, ...]) -> None:
    async with soak.client(key) as client:
        while time.monotonic() < soak.end_s:
            ask = soak.rng.choice(asks)
            soak.asked[key] += 1
            try:
                status = await ask(soak, client)
            except httpx.HTTPError as error:
                soak.statuses[f"{key} {type(error).__name__} in {ask.__name__}"] += 1
                if key != "nasty" and time.monotonic() > soak.away_until_s:
                    soak.wrong[f"{key}: {error!r} in {ask.__name__}"] += 1
                status = 503
            else:
                soak.note(key, status)
            if status in (429, 503):
                await asyncio.sleep(0.2)


async def trouble(soak: Soak, every_s: float) -> None:
    """Stop the engine for a moment, or kill it, again and again."""
    async with soak.client("nice") as client:
        while time.monotonic() < soak.end_s - every_s:
            await asyncio.sleep(every_s * soak.rng.uniform(0.5, 1.5))
            pid = (await client.get("/get_server_info")).json()["engine"]["pid"]
            if soak.rng.random() < 0.5:
                soak.num_stops += 1
                os.kill(pid, signal.SIGSTOP)
                await asyncio.sleep(soak.rng.uniform(0.1, 2))
                os.kill(pid, signal.SIGCONT)
                continue
            soak.num_kills += 1
            soak.away_until_s = time.monotonic() + 600
            os.kill(pid, signal.SIGKILL)
            while (info := (await client.get("/get_server_info")).json()["engine"]) is None or info["pid"] == pid:
                await asyncio.sleep(0.2)
            while (await client.get("/ready")).status_code != 200:
                await asyncio.sleep(0.2)
            soak.away_until_s = time.monotonic() + 5  # answers that were on their way


async def leftovers(soak: Soak) -> dict[str, float]:
    """What is left once all clients are gone: requests, programs, and pages that nobody has."""
    async with soak.client("nice") as client:
        found: dict[str, float] = {}
        deadline_s = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline_s:
            await asyncio.sleep(1.5)  # the engine reports now and then
            await client.post("/flush_cache")
            metrics = (await client.get("/metrics")).text
            values = dict(re.findall(r"(?m)^(ramet_\w+) ([0-9.e+]+)$", metrics))
            found = {
                name: float(values[f"ramet_{name}"])
                for name in ("in_flight", "running_requests", "waiting_requests", "running_programs")
            }
            found["pages"] = float(values["ramet_kv_pages"]) - float(values["ramet_kv_free_pages"])
            if not any(found.values()):
                break
        return found


def rss_bytes(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(text.split("VmRSS:")[1].split()[0])


async def run(soak: Soak, clients: int, every_s: float) -> int:
    whole_s = soak.end_s - time.monotonic()
    tenants = [tenant(soak, key, NICE) for key in KEYS[:2] for _ in range(clients)]
    tenants += [tenant(soak, "nasty", NASTY) for _ in range(clients)]
    tasks = [asyncio.ensure_future(one) for one in (*tenants, trouble(soak, every_s))]
    await asyncio.sleep(min(60.0, whole_s / 4))
    early = rss_bytes(soak.pid)
    await asyncio.gather(*tasks)
    left = await leftovers(soak)
    grown = rss_bytes(soak.pid) - early
    print(f"requests: {sum(soak.asked.values()):,} ({dict(soak.asked)})")
    print(f"answers: {dict(sorted(soak.statuses.items()))}")
    print(f"kills: {soak.num_kills}, stops: {soak.num_stops}")
    print(f"leftovers: {int(sum(left.values()))} {left}; the HTTP process grew by {grown / 2**20:.1f} MiB")
    print(f"wrong: {dict(soak.wrong) or 'nothing'}")
    return int(bool(soak.wrong) or any(left.values()) or grown > MAX_GROWTH_BYTES)


def spread(values_s: list[float]) -> str:
    """p50, p99 and the largest, in milliseconds."""
    ordered = sorted(values_s) or [0.0]
    at = [ordered[min(int(len(ordered) * share), len(ordered) - 1)] for share in (0.5, 0.99, 1.0)]
    return " ".join(f"{1000 * value:9.1f}" for value in at)


def load(soak: Soak, num_clients: int) -> Soak:
    """Load the server until the end, from a process of its own. Returns what happened."""
    os.nice(LOAD_NICENESS)

    async def main() -> None:
        tenants = [tenant(soak, "other", NICE) for _ in range(num_clients - num_clients // 3)]
        await asyncio.gather(*tenants, *(tenant(soak, "nasty", NASTY) for _ in range(num_clients // 3)))

    asyncio.run(main())
    return soak


async def overload(soak: Soak) -> int:
    async with soak.client("nice") as client:
        pids = {"http": soak.pid, "engine": (await client.get("/get_server_info")).json()["engine"]["pid"]}
        start_s, end_s, soak.end_s = time.monotonic(), soak.end_s, time.monotonic() + 3
        await asyncio.gather(*(tenant(soak, "nice", (read_stream,)) for _ in range(NUM_STREAMS)))
    alone, soak.gaps_s, soak.firsts_s = (spread(soak.gaps_s), spread(soak.firsts_s)), [], []
    soak.end_s = end_s + time.monotonic() - start_s
    whole_s, num_clients = soak.end_s - time.monotonic(), 10 * NUM_RUNNING
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as processes:
        others = Soak(soak.url, soak.pid, soak.rng, soak.end_s)
        loaded = asyncio.get_running_loop().run_in_executor(processes, load, others, num_clients)
        readers = [asyncio.ensure_future(tenant(soak, "nice", (read_stream,))) for _ in range(NUM_STREAMS)]
        await asyncio.sleep(whole_s / 4)  # buffers and caches reach their size
        early = {name: rss_bytes(pid) for name, pid in pids.items()}
        await asyncio.gather(*readers)
        others = await loaded
    for own, other in ((soak.asked, others.asked), (soak.statuses, others.statuses), (soak.wrong, others.wrong)):
        own.update(other)
    grown = {name: rss_bytes(pid) - early[name] for name, pid in pids.items()}
    left = await leftovers(soak)
    print(f"{num_clients} clients for {whole_s:.0f} s, {num_clients // 3} of them nasty, beside {NUM_STREAMS} readers")
    print(f"{'well-behaved, ms':28}       p50       p99       max")
    rows = {"gap alone": alone[0], "gap under overload": spread(soak.gaps_s)}
    rows |= {"first token alone": alone[1], "first token under overload": spread(soak.firsts_s)}
    for name, values in rows.items():
        print(f"{name:28} {values}")
    print(f"requests: {dict(soak.asked)}; tokens of well-behaved clients: {len(soak.gaps_s) + len(soak.firsts_s):,}")
    print(f"answers: {dict(sorted(soak.statuses.items()))}")
    print("memory: " + ", ".join(f"{name} {size / 2**20:+.1f} MiB" for name, size in grown.items()))
    print(f"leftovers: {int(sum(left.values()))} {left}")
    gap_s = sorted(soak.gaps_s)[int(len(soak.gaps_s) * 0.99)] if soak.gaps_s else MAX_GAP_S
    if gap_s >= MAX_GAP_S:
        soak.wrong[f"99 of 100 gaps are up to {1000 * gap_s:.0f} ms"] += 1
    print(f"wrong: {dict(soak.wrong) or 'nothing'}")
    return int(bool(soak.wrong) or any(left.values()) or max(grown.values()) > MAX_OVERLOAD_GROWTH_BYTES)


async def table(soak: Soak) -> int:
    """Ask for each row of `TABLE` beside a reader."""

    async def beside(ask: Ask | None) -> tuple[float, float, int]:
        """Returns the reader's longest gap, the longest time of another key's integer, and the answer's status."""
        soak.end_s, small_s = time.monotonic() + 600, 0.0
        reader = asyncio.ensure_future(tenant(soak, "nice", (read_stream,)))
        async with soak.client("nasty") as nasty, soak.client("other") as other:
            await asyncio.sleep(3)
            soak.gaps_s = []
            asked = asyncio.ensure_future(asyncio.sleep(3, 0) if ask is None else ask(soak, nasty))
            while not asked.done() and ask is four_endless:
                begin_s, source = time.monotonic(), {"type": "integer", "minimum": soak.rng.randrange(1 << 30)}
                sampling = {"max_new_tokens": 1, "json_schema": json.dumps(source)}
                await post(other, "/generate", {"text": "x", "sampling_params": sampling})
                small_s = max(small_s, time.monotonic() - begin_s)
            status = await asked
        soak.end_s = 0.0
        await reader
        return max(soak.gaps_s, default=0.0), small_s, status

    alone_s, _, _ = await beside(None)
    print(f"{'a client beside':30} {'gap, ms':>9} {'memory, MiB':>12}  status")
    print(f"{'alone':30} {1000 * alone_s:9.0f}")
    for name, ask in TABLE.items():
        early = rss_bytes(soak.pid)
        gap_s, small_s, status = await beside(ask)
        small = f"; an integer took at most {1000 * small_s:.0f} ms" if small_s else ""
        grown = (rss_bytes(soak.pid) - early) / 2**20
        print(f"{name:30} {1000 * gap_s:9.0f} {grown:12.1f}  {status}{small}", flush=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--clients", type=int, default=4, help="of each of the three keys")
    parser.add_argument("--trouble-every", type=float, default=30, metavar="SECONDS", help="between kills and stops")
    parser.add_argument("--overload", action="store_true", help="ten times the load, and what it does to nice clients")
    parser.add_argument("--table", action="store_true", help="what once made everybody wait, one after the other")
    parser.add_argument("--model", default="tiny-random")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "ramet.cli", "serve", arguments.model, "--port", "0", "--device", "cpu"]
        size = ["32768", "160"] if arguments.table else ["16384", str(NUM_RUNNING)]
        command += ["--num-kv-tokens", size[0], "--max-running-requests", size[1], "--max-in-flight", "256"]
        command += ["--max-engine-failures", "1000000"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAMET_API_KEY": ",".join(KEYS)}
        with log.open("wb") as file:
            server = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        try:
            while not (found := re.search(r"ready in .* at (http://\S+)", log.read_text())):
                if server.poll() is not None:
                    print(log.read_text())
                    return 1
                time.sleep(0.1)
            end_s = time.monotonic() + arguments.seconds
            soak = Soak(found[1], server.pid, random.Random(arguments.seed), end_s)
            if arguments.table:
                code = asyncio.run(table(soak))
            elif arguments.overload:
                code = asyncio.run(overload(soak))
            else:
                code = asyncio.run(run(soak, arguments.clients, arguments.trouble_every))
            text = log.read_text(errors="replace")
            num_tracebacks = text.count("Traceback (most recent call last)")
            print(f"tracebacks in the log: {num_tracebacks}")
            if num_tracebacks:
                print(text[text.index("Traceback (most recent call last)") :][:4000])
            return int(code or num_tracebacks > 0)
        finally:
            server.terminate()
            server.wait(60)


if __name__ == "__main__":
    sys.exit(main())
