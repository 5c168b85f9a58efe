"""Asks another engine the questions of the quality benchmark; run by a Python that has it installed.

    python benchmarks/quality_peers.py --peer llama.cpp --model model.gguf --asks asks.json --answers answers.json

`asks.json` is a list of {"prompt", "kind", "source", "stop", "max_tokens"}. Kinds: `free` (`stop` ends the text),
`json` (a JSON schema), `choice` (a list of texts), `regex` (a pattern; the server alone takes it). `answers.json`: the
packages' versions, and for each ask its text, the number of generated tokens (without the end of text), seconds, and
the error if the engine refused. Greedy, one question at a time. Imports nothing of Ramet, so that the engines' needs
don't meet. The peer `server` is Ramet's own server, asked by OpenAI's API with its defaults.
"""

from __future__ import annotations

import argparse
import atexit
import importlib.metadata
import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

Json = Any  # a decoded JSON value
Ask = dict[str, Json]
Answer = Callable[[Ask], tuple[str, int]]

NEEDS = {
    "llama.cpp": ("llama-cpp-python",),
    "guidance": ("guidance", "llama-cpp-python"),
    "outlines": ("outlines", "transformers", "torch", "gguf", "accelerate"),
    "server": ("ramet",),
}


def llama_cpp(model: str, threads: int) -> Answer:
    from llama_cpp import Llama, LlamaGrammar

    llama = Llama(model, n_ctx=4096, n_threads=threads, n_threads_batch=threads, verbose=False)

    def ask(one: Ask) -> tuple[str, int]:
        grammar = None
        if one["kind"] == "json":
            grammar = LlamaGrammar.from_json_schema(json.dumps(one["source"]), verbose=False)
        elif one["kind"] == "choice":
            rules = " | ".join(json.dumps(text, ensure_ascii=False) for text in one["source"])
            grammar = LlamaGrammar.from_string(f"root ::= {rules}", verbose=False)
        found = llama.create_completion(
            one["prompt"], max_tokens=one["max_tokens"], temperature=0.0, stop=one["stop"], grammar=grammar
        )
        return found["choices"][0]["text"], found["usage"]["completion_tokens"]

    return ask


def guidance(model: str, threads: int) -> Answer:
    import guidance as library
    from guidance.models import LlamaCpp

    start = LlamaCpp(model, echo=False, n_ctx=4096, n_threads=threads, n_threads_batch=threads)

    def ask(one: Ask) -> tuple[str, int]:
        if one["kind"] == "json":
            asked = library.json(name="answer", schema=one["source"], temperature=0.0, max_tokens=one["max_tokens"])
        elif one["kind"] == "choice":
            asked = library.select(one["source"], name="answer")
        else:
            asked = library.gen(name="answer", stop=one["stop"], max_tokens=one["max_tokens"], temperature=0.0)
        before = start + one["prompt"]
        after = before + asked
        tokens = after._get_usage().output_tokens - before._get_usage().output_tokens
        return after["answer"], tokens

    return ask


def outlines(model: str, threads: int) -> Answer:
    import outlines as library
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(threads)
    folder, name = str(Path(model).parent), Path(model).name
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    asked = library.from_transformers(loaded, tokenizer)
    compiled: dict[str, Any] = {}

    def generator(one: Ask) -> Any:
        key = json.dumps([one["kind"], one["source"]])
        if key not in compiled:
            if one["kind"] == "json":
                compiled[key] = library.Generator(asked, library.json_schema(json.dumps(one["source"])))
            elif one["kind"] == "choice":
                compiled[key] = library.Generator(asked, library.types.Choice(one["source"]))
            else:
                compiled[key] = library.Generator(asked)
        return compiled[key]

    def ask(one: Ask) -> tuple[str, int]:
        more: dict[str, Json] = {"max_new_tokens": one["max_tokens"], "do_sample": False}
        if one["stop"]:
            more |= {"stop_strings": one["stop"], "tokenizer": tokenizer}
        text = generator(one)(one["prompt"], **more)
        for stop in one["stop"]:
            text = text.split(stop)[0]
        return text, len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return ask


def server(model: str, threads: int) -> Answer:
    command = [sys.executable, "-m", "ramet.cli", "serve", model, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    url = next(found[0] for line in process.stdout if (found := re.search(r"http://[0-9.]+:[0-9]+", line)))
    atexit.register(process.wait)
    atexit.register(process.terminate)

    def ask(one: Ask) -> tuple[str, int]:
        constraint = {
            "json": {"json_schema": one["source"]},
            "choice": {"guided_choice": one["source"]},
            "regex": {"regex": one["source"]},
            "free": {"stop": one["stop"]},
        }[one["kind"]]
        body = {"prompt": one["prompt"], "max_tokens": one["max_tokens"], "temperature": 0, **constraint}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        found = json.load(urllib.request.urlopen(request))
        return found["choices"][0]["text"], found["usage"]["completion_tokens"]

    return ask


MAKERS: dict[str, Callable[[str, int], Answer]] = {
    "llama.cpp": llama_cpp,
    "guidance": guidance,
    "outlines": outlines,
    "server": server,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, choices=sorted(MAKERS))
    parser.add_argument("--model", required=True, help="a .gguf file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--asks", type=Path, required=True)
    parser.add_argument("--answers", type=Path, required=True)
    arguments = parser.parse_args()
    missing = [name for name in NEEDS[arguments.peer] if not _is_installed(name)]
    if missing:
        arguments.answers.write_text(json.dumps({"missing": missing}))
        return
    ask = MAKERS[arguments.peer](arguments.model, arguments.threads)
    answers = []
    for one in json.loads(arguments.asks.read_text()):
        begin, text, tokens, error = time.perf_counter(), "", 0, ""
        try:
            text, tokens = ask(one)
        except Exception as refused:  # any engine's error is that question's answer
            error = f"{type(refused).__name__}: {refused}"
        seconds = time.perf_counter() - begin
        answers.append({"text": text, "tokens": tokens, "seconds": seconds, "error": error})
    versions = {name: importlib.metadata.version(name) for name in NEEDS[arguments.peer]}
    arguments.answers.write_text(json.dumps({"versions": versions, "answers": answers}))


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
