"""Time to first token over HTTP, cold and warm: the check that deployment guides of SGLang describe.

    python benchmarks/bench_ttft.py [--url http://127.0.0.1:30000] [--requests 20] [--out benchmarks/results/ttft.jsonl]

One system prompt of about 512 tokens (one sentence, repeated), another question each time, 20 tokens, streamed over
/v1/chat/completions. Without --url a server with SmolLM2-135M-Instruct is started for the run, and given its first
request (compilation, page faults) with an unrelated prompt, so that the first measured one differs by the cache alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import httpx
from json_line import commit, print_record

from ramet.lang.backends.sse import DONE, events_of

SENTENCE = "You are a careful assistant who answers every question about the river and its old mill in few words. "
SYSTEM = SENTENCE * 24  # 21 tokens each with SmolLM2's tokenizer


@contextlib.contextmanager
def served(url: str | None, model: str, flags: Sequence[str] = ()) -> Iterator[str]:
    """The URL of a server: the one that was given, or one of its own."""
    if url is not None:
        yield url
        return
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "ramet.cli", "serve", model, "--port", "0", *flags]
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            while " at http://" not in log.read_text():
                if process.poll() is not None:
                    raise SystemExit(log.read_text())
                time.sleep(0.2)
            yield "http://" + log.read_text().split(" at http://", 1)[1].split()[0]
        finally:
            process.terminate()
            process.wait(60)


def first_token_ms(client: httpx.Client, model: str, system: str, question: str) -> tuple[float, int]:
    """Milliseconds to the first text of a streamed answer, and the prompt tokens that came from the cache."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    options = {"max_tokens": 20, "temperature": 0.0, "stream": True, "stream_options": {"include_usage": True}}
    start_s, first_s, cached = time.perf_counter(), None, 0
    with client.stream("POST", "/v1/chat/completions", json={"model": model, "messages": messages, **options}) as found:
        if found.status_code != 200:
            raise SystemExit(f"status {found.status_code}: {found.read().decode()}")
        for chunk in (json.loads(event.data) for event in events_of(found.iter_bytes()) if event.data != DONE):
            if first_s is None and chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                first_s = time.perf_counter()
            if chunk.get("usage"):
                cached = chunk["usage"]["prompt_tokens_details"]["cached_tokens"]
    if first_s is None:
        raise SystemExit("the answer had no text")
    return 1000 * (first_s - start_s), cached


def main() -> None:
    parser = argparse.ArgumentParser(description="Time to first token, cold and warm")
    parser.add_argument("--url")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--out", type=Path, help="append the JSON line to this file")
    arguments = parser.parse_args()
    with (
        served(arguments.url, arguments.model) as url,
        httpx.Client(base_url=url, timeout=120, trust_env=False) as http,
    ):
        model = http.get("/v1/models").json()["data"][0]["id"]
        first_token_ms(http, model, "Numbers only. " * 40, "Begin.")
        times, cached = [], []
        for i in range(arguments.requests):
            ms, tokens = first_token_ms(http, model, SYSTEM, f"Question {i}: where does the water go?")
            times.append(ms)
            cached.append(tokens)
    cold, warm = times[0], statistics.mean(times[1:])
    print(f"First request TTFT: {cold:.0f} ms")
    print(f"Subsequent requests avg TTFT: {warm:.0f} ms")
    result = {
        "benchmark": "ttft",
        "commit": commit(),
        "device": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"python": platform.python_version(), "ramet": metadata.version("ramet")},
        "model": model,
        "requests": arguments.requests,
        "cold_ms": round(cold, 1),
        "warm_mean_ms": round(warm, 1),
        "warm_p50_ms": round(statistics.median(times[1:]), 1),
        "warm_p80_ms": round(sorted(times[1:])[int(0.8 * len(times[1:]))], 1),
        "warm_over_cold": round(warm / cold, 3),
        "cached_tokens": cached,
    }
    print_record(result, arguments.out)


if __name__ == "__main__":
    main()
