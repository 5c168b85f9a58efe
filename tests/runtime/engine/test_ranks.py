"""Engines whose model is divided among processes: gloo, one thread each."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ramet import Engine, State, function, gen, select
from ramet.errors import ConfigError
from ramet.grammar import Vocabulary
from ramet.grammar.service.sources import compile_constraint
from ramet.runtime.handle import RequestResult
from ramet.runtime.models.catalog import TINY_MODEL
from ramet.runtime.types import RequestOutput, SamplingParams

SIZES: dict[str, Any] = {"num_kv_tokens": 1024, "max_running_requests": 4, "device": "cpu", "num_threads": 1}


@pytest.fixture(scope="module")
def whole() -> Iterator[Engine]:
    with Engine(TINY_MODEL, **SIZES) as engine:
        yield engine


@pytest.fixture(scope="module")
def divided() -> Iterator[Engine]:
    with Engine(TINY_MODEL, tp=2, **SIZES) as engine:
        yield engine


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, **fields})


def answers(engine: Engine) -> list[RequestResult]:
    """More requests than slots, of every kind that steps treat in their own way."""
    tokenizer = engine.tokenizer
    vocabulary = Vocabulary(
        tokenizer.token_bytes, tokenizer.eos_ids, tokenizer.special_ids, tokenizer.vocab_size, tokenizer
    )
    asked: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("the quick brown fox", {}, {}),
        ("the quick brown fox jumps " * 12, {}, {}),
        ("the quick brown fox jumps " * 12 + "over", {}, {}),
        ("sampled", {"temperature": 0.9, "top_p": 0.8, "top_k": 40, "seed": 5}, {}),
        ("penalties", {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "logit_bias": {101: 3.0}}, {}),
        ("early ends", {"min_tokens": 3, "ignore_eos": False, "stop": ("e", "a")}, {}),
        ("likely tokens", {"logprobs": 3}, {}),
        ("masked", {"ignore_eos": False}, {"grammar": compile_constraint("regex", "[ab]{3,9}c", vocabulary)}),
        ("what is this text worth?", {"max_tokens": 1}, {"score_from": 3}),
        ("and what else could stand there?", {"max_tokens": 1, "logprobs": 2}, {"score_from": 3}),
    ]
    handles = [engine.submit(prompt, params(**fields), **options) for prompt, fields, options in asked]
    return [handle.result(timeout_s=120) for handle in handles]


def test_ranks_give_the_texts_of_one_process(whole: Engine, divided: Engine) -> None:
    for expected, found in zip(answers(whole), answers(divided), strict=True):
        assert found.token_ids == expected.token_ids
        assert found.text == expected.text
        assert found.finish_reason == expected.finish_reason
        if expected.logprobs is not None:
            assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        if expected.prompt_logprobs is not None:
            assert found.prompt_logprobs == pytest.approx(expected.prompt_logprobs, abs=1e-4)
    divided.check_integrity()


def test_programs_with_forks_and_choices_run_on_ranks(whole: Engine, divided: Engine) -> None:
    @function
    def program(s: State) -> None:
        s += "Once upon a time " * 4
        branches = s.fork(3)
        for i, branch in enumerate(branches):
            branch += f"{i}: " + gen("text", max_tokens=6)
        s += select("best", ["yes", "no", "perhaps"])
        s += gen("number", int, max_tokens=8)

    states = [program.run(backend=engine) for engine in (whole, divided)]
    assert states[0]["best"] == states[1]["best"]
    assert states[0]["number"] == states[1]["number"]


def test_ranks_listen_on_the_loopback_interface_alone(divided: Engine) -> None:
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    assert divided._peers is not None
    addresses = []
    for pid in (os.getpid(), *(process.pid for process in divided._peers._processes)):
        sockets = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                address, state, inode = (line.split()[i] for i in (1, 3, 9))
                if f"socket:[{inode}]" in sockets and state == "0A":  # listening
                    addresses.append(address.split(":")[0])
    assert addresses
    assert {*addresses} <= {"0100007F", "00000000000000000000000001000000"}


def test_an_aborted_request_ends_and_others_go_on(divided: Engine) -> None:
    gone, kept = threading.Event(), divided.submit("go on", params(max_tokens=40))

    def on_output(output: RequestOutput) -> None:
        if output.finish_reason is None:
            divided.abort("to be aborted")
        else:
            gone.set()

    divided.submit("stop soon", params(max_tokens=1000), request_id="to be aborted", on_output=on_output)
    assert gone.wait(60)
    assert len(kept.result(timeout_s=60).token_ids) == 40


def test_a_second_group_in_a_process_is_refused(divided: Engine) -> None:
    with pytest.raises(ConfigError, match=r"already has a torch.distributed group, of another engine with tp > 1"):
        Engine(TINY_MODEL, tp=2, **SIZES)
