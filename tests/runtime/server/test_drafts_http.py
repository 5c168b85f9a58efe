"""Drafts behind HTTP: the answers of a server without them, and a draft model that cannot serve ends the start."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

Served = Any  # RunningServer and ServedProcess of conftest.py, which importlib mode cannot import by name
_GARBAGE = "".join(random.Random(1).choices([chr(code) for code in range(32, 127)], k=100_000))


@pytest.fixture(scope="module")
def servers(start_server: Callable[..., AbstractContextManager[Served]]) -> Iterator[tuple[Served, Served]]:
    """One without drafts, and one with them."""
    with start_server() as plain, start_server(engine={"speculative": "auto"}) as drafting:
        yield plain, drafting


def ask(server: Served, **body: Any) -> dict[str, Any]:
    repeats = {"97": 6, "98": 6, "32": 4}  # the random model writes few characters, so that its text repeats itself
    messages = [{"role": "user", "content": "abababab ab ab"}]
    values = {"messages": messages, "max_tokens": 60, "seed": 3, "logit_bias": repeats, "ignore_eos": True, **body}
    answer = server.client.post("/v1/chat/completions", json=values)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def texts(answer: dict[str, Any]) -> list[Any]:
    found = [(choice["message"]["content"], choice["finish_reason"]) for choice in answer["choices"]]
    logprobs = [choice["logprobs"] for choice in answer["choices"]]
    return [*found, *([token["token"] for token in part["content"]] for part in logprobs if part)]


def was_drafted(answer: dict[str, Any]) -> bool:
    return "rejected_prediction_tokens" in answer["usage"].get("completion_tokens_details", {})


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_p": 0.9, "logprobs": True, "top_logprobs": 2},
        {"temperature": 0.5, "frequency_penalty": 0.3, "stop": ["aaa"]},
        {"temperature": 0.9, "response_format": {"type": "json_object"}},
    ],
)
def test_four_choices_are_those_of_a_server_without_drafts(
    servers: tuple[Served, Served], values: dict[str, Any]
) -> None:
    plain, drafting = servers
    expected = texts(ask(plain, n=4, **values))
    assert len(expected) >= 4
    for _ in range(3):  # later ones are drafted from earlier answers
        assert texts(ask(drafting, n=4, **values)) == expected


def test_some_of_those_answers_are_drafted(servers: tuple[Served, Served]) -> None:
    drafting = servers[1]
    assert any(was_drafted(ask(drafting, n=4, temperature=0.0)) for _ in range(30))


def test_a_prediction_of_garbage_changes_nothing_and_the_server_goes_on(servers: tuple[Served, Served]) -> None:
    plain, drafting = servers
    expected = texts(ask(plain, temperature=0.0))
    for content in (_GARBAGE, _GARBAGE * 3, "\0" * 100_000, "ab " * 40_000, ""):
        prediction = {"type": "content", "content": content}
        assert texts(ask(drafting, temperature=0.0, prediction=prediction)) == expected
    assert texts(ask(drafting, temperature=0.0)) == expected


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose tokens are not those of the tiny one."""
    folder = tmp_path_factory.mktemp("other")
    tokenizer = Tokenizer(models.BPE(vocab={chr(33 + index): index for index in range(90)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = transformers.LlamaConfig(
        vocab_size=90, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def test_a_server_whose_draft_model_cannot_serve_says_so_and_ends(
    serve_command: Callable[..., Served], other_model: Path
) -> None:
    missing = serve_command("--speculative", "auto", "--speculative-draft", "no-such-model")
    other = serve_command("--speculative", "auto", "--speculative-draft", str(other_model))
    off = serve_command("--speculative-draft", "tiny-random")
    for server, words in (
        (missing, "no-such-model"),
        (other, "has another vocabulary: token 0 is b'!' there and"),
        (off, "speculative_draft is 'tiny-random' but must be None with speculative=off"),
    ):
        assert server.process.wait(120) == 1
        log = server.log.read_text()
        assert words in log.splitlines()[-1], log
        assert "Traceback" not in log
