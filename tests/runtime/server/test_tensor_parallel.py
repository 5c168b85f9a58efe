"""Servers whose model is divided among processes answer as one process does, also after one of these was killed."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ramet import Remote, State, function, gen, select
from ramet.runtime.models.catalog import TINY_MODEL
from ramet.runtime.text.tokenizer import byte_alphabet

Served = Any  # ServedProcess of conftest.py, which importlib mode cannot import by name
Serve = Callable[..., Served]
SMALL: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": None,
}
GEMMA = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7, "query_pre_attn_scalar": 24}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": 7, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": False}),
    "gemma3": ("Gemma3TextConfig", {**GEMMA, "num_key_value_heads": 1}),
}
GREEDY = {"max_new_tokens": 12, "temperature": 0.0, "ignore_eos": True}
ASKS: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"text": "Once upon a time", "sampling_params": GREEDY}),
    ("/generate", {"text": ["a word", "a word and another " * 20], "sampling_params": GREEDY}),
    (
        "/generate",
        {"text": "name:", "sampling_params": {"max_new_tokens": 9, "temperature": 0.0, "regex": "[A-Z][a-z]+"}},
    ),
    (
        "/generate",
        {
            "text": "value: ",
            "sampling_params": {"max_new_tokens": 30, "temperature": 0.0, "json_schema": '{"enum": [true, null, 17]}'},
        },
    ),
    (
        "/v1/completions",
        {
            "prompt": "again and again and again",
            "max_tokens": 12,
            "temperature": 0,
            "frequency_penalty": 0.7,
            "presence_penalty": 0.4,
            "logit_bias": {"101": 2},
            "logprobs": 2,
        },
    ),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "temperature": 0.7, "seed": 3, "n": 2},
    ),
]


@function
def program(s: State) -> None:
    s += "Which one is it? "
    for branch in s.fork(2):
        branch += "It is " + gen("text", max_tokens=5, temperature=0)
    s += select("best", ["the first", "the second", "neither"])
    s += gen("number", int, max_tokens=6, temperature=0)


def texts(answer: Any) -> list[str]:
    """The texts of an answer of any of the endpoints."""
    found = []
    if isinstance(answer, list):
        found = [text for part in answer for text in texts(part)]
    elif "choices" in answer:
        found = [c["text"] if "text" in c else c["message"]["content"] for c in answer["choices"]]
    else:
        found = [answer["text"]]
    return found


def answers(server: Served) -> list[Any]:
    """What a server answers to everything above. Chats are left out where the model has no template for them."""
    found: list[Any] = []
    with server.client() as client:
        for path, body in ASKS:
            if path.startswith("/v1"):
                body = {"model": client.get("/v1/models").json()["data"][0]["id"], **body}
            answer = client.post(path, json=body)
            if path == "/v1/chat/completions" and answer.status_code == 400:
                continue
            assert answer.status_code == 200, answer.text
            found.append(texts(answer.json()))
    with Remote(server.url) as remote:
        state = program.run(backend=remote)
        found.append((state["best"], state["number"]))
    return found


def compare(serve: Serve, size: int, *flags: str, model: str = TINY_MODEL) -> Served:
    """Compare a server of `size` ranks with one of one rank, and return the former."""
    one, several = serve(*flags, model=model), serve("--tp", str(size), *flags, model=model)
    for server in (one, several):
        server.wait_ready()
    expected = answers(one)
    one.process.terminate()
    assert answers(several) == expected
    return several


@pytest.fixture(scope="module")
def divided(serve_command: Serve) -> Served:
    """A server of two ranks, after its answers were compared with those of one."""
    return compare(serve_command, 2, "--max-running-requests", "8")


def children(pid: int) -> list[int]:
    """The processes of the other ranks: the engine process's children, but for Python's own tracker of resources."""
    found = [int(p) for task in Path(f"/proc/{pid}/task").iterdir() for p in (task / "children").read_text().split()]
    return [p for p in found if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]


@dataclass
class Cut:
    """A stream that ended in an error. seconds: from the kill to the first answer of the next engine."""

    error: str
    seconds: float


def kill_a_rank(server: Served) -> Cut:
    """Kill a rank while a stream runs, and wait until the server takes requests again."""
    ranks = children(server.engine_pid())
    body = {"text": "go on", "stream": True, "sampling_params": {"max_new_tokens": 900, "ignore_eos": True}}
    error = ""
    with server.client() as client:
        with client.stream("POST", "/generate", json=body) as stream:
            killed_s = 0.0
            for line in stream.iter_lines():
                if not line.startswith("data: {"):
                    continue
                if not killed_s:
                    os.kill(ranks[-1], signal.SIGKILL)
                    killed_s = time.monotonic()
                error = json.loads(line.removeprefix("data: ")).get("error", {}).get("message", "")
        while client.post("/generate", json=ASKS[0][1]).status_code == 503:
            assert time.monotonic() < killed_s + 120, "the engine does not come back"
            time.sleep(0.02)
        return Cut(error, time.monotonic() - killed_s)


def test_two_ranks_answer_as_one_process(divided: Served) -> None:
    """The fixture has compared them."""
    assert len(children(divided.engine_pid())) == 1


def test_an_aborted_stream_ends_and_the_server_goes_on(divided: Served) -> None:
    body = {"rid": "gone", "text": "go on", "stream": True}
    sampling = {"sampling_params": {"max_new_tokens": 900, "ignore_eos": True}}
    with divided.client() as client, divided.client() as other:
        with client.stream("POST", "/generate", json={**body, **sampling}) as stream:
            lines = stream.iter_lines()
            next(lines)
            assert other.post("/abort_request", json={"rid": "gone"}).status_code == 200
            assert "cancelled" in "".join(lines)
        assert client.post("/generate", json=ASKS[0][1]).status_code == 200


def test_a_killed_rank_is_named_to_what_was_in_flight_and_the_server_serves_again(divided: Served) -> None:
    before, pid = answers(divided), divided.engine_pid()
    cut = kill_a_rank(divided)
    assert "rank 1 (process" in cut.error
    assert "was killed by SIGKILL" in cut.error
    assert divided.engine_pid() != pid
    assert answers(divided) == before


def test_a_size_that_does_not_divide_the_model_ends_the_start_with_the_sizes_that_do(serve_command: Serve) -> None:
    server = serve_command("--tp", "3")
    assert server.process.wait(60) == 1
    assert "--tp may be 1, 2 or 4" in server.log.read_text().splitlines()[-1]


def write_model(name: str, folder: Path) -> None:
    """A random model of this architecture over bytes."""
    vocabulary = {character: index for index, character in enumerate(sorted(byte_alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    class_name, fields = MODELS[name]
    torch.manual_seed(list(MODELS).index(name))
    config = getattr(transformers, class_name)(**(SMALL | fields))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(("norm.weight", "bias")):  # ones and zeros would hide a missing one
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", list(MODELS))
def test_every_architecture_answers_as_one_process(serve_command: Serve, tmp_path: Path, name: str, size: int) -> None:
    write_model(name, tmp_path)
    server = compare(serve_command, size, "--dtype", "float32", model=str(tmp_path))
    server.process.terminate()


@pytest.mark.slow
@pytest.mark.model
def test_smollm2_on_three_ranks_answers_as_one_process_and_survives_the_loss_of_one(
    serve_command: Serve, smollm2_path: Path
) -> None:
    server = compare(serve_command, 3, "--dtype", "float32", model=str(smollm2_path))
    cut = kill_a_rank(server)
    assert "was killed by SIGKILL" in cut.error
    first_s, again_s = (float(s) for s in re.findall(r"in 3 parts in ([\d.]+) s", server.log.read_text()))
    print(f"loaded in {first_s:.1f} s, again in {again_s:.1f} s; served {cut.seconds:.1f} s after the kill")
    server.process.terminate()
