# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "sglang>=0.5,<0.5.4", "orjson", "aiohttp", "pybase64", "requests", "tqdm", "pillow", "datasets", "psutil", "pyzmq",
#   "ipython",
# ]
# [tool.ramet]
# beside_torch = true
# ///
"""SGLang's benchmark against the server, as it is pointed at SGLang's, vLLM's and OpenAI's."""

import json
import runpy
import sys
import tempfile
from pathlib import Path

import transformers
from tour import run


class Bytes:
    """A tokenizer whose tokens are the bytes of a text, as the scripted engine's are."""

    vocab_size, bos_token, chat_template = 128, None, None

    def encode(self, text, **options):
        return list(text.encode())

    def decode(self, ids, **options):
        return bytes(97 + number % 26 for number in ids).decode()


def benchmark(url):
    transformers.AutoTokenizer.from_pretrained = lambda *names, **options: Bytes()
    host, port = url.removeprefix("http://").split(":")
    for backend in ("sglang", "sglang-oai", "vllm"):
        with tempfile.TemporaryDirectory() as folder:
            prompts, out = Path(folder, "prompts.json"), Path(folder, "out.jsonl")
            turns = [[{"value": f"Question {number}: why?"}, {"value": "Because it is so."}] for number in range(4)]
            prompts.write_text(json.dumps([{"conversations": turn} for turn in turns]))
            fields = {
                "backend": backend,
                "host": host,
                "port": port,
                "model": "scripted",
                "tokenizer": "none",
                "dataset-name": "sharegpt",
                "dataset-path": prompts,
                "num-prompts": 4,
                "sharegpt-output-len": 8,
                "output-file": out,
                "seed": 1,
            }
            sys.argv = ["bench_serving"]
            for name, value in fields.items():
                sys.argv += [f"--{name}", str(value)]
            runpy.run_module("sglang.bench_serving", run_name="__main__")
            found = json.loads(out.read_text().splitlines()[-1])
            assert found["completed"] == 4, (backend, found)
            assert found["total_output_tokens"] > 0, (backend, found)


run()
