"""Grammars come, go and are evicted on a device while requests of all kinds run: no token may differ from the host's.

The arena is so small that grammars take each other's places and the host masks some rows. Requests are cancelled and
preempted, drafts are verified, and tokens that must follow are appended.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable
from typing import Any

import pytest

from ramet.grammar import Bordered, CompiledGrammar, Vocabulary
from ramet.grammar.service.sources import compile_constraint
from ramet.kernels.grammar.arena import GrammarArena
from ramet.kernels.grammar.mask import TokenTable
from ramet.runtime.constraints.states import GrammarStates
from ramet.runtime.engine.core import Update
from ramet.runtime.engine.engine import Engine
from ramet.runtime.engine.factory import make_device_grammars
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.speculation.speculation import Speculation
from ramet.runtime.steps.model_runner import ModelRunner
from ramet.runtime.types import Batch, Grammar, SamplingParams, Sequence

PATTERNS = (
    *("[a-c]{3,8}(xy|z){1,6}", "(yes|no)", '"[^"]{0,20}"', "[0-9]{1,3}(,[0-9]{1,3}){2,5}", "an only choice", "x*"),
    *('\\{"a name": "[a-c]{1,4}", "b": [0-9]{1,2}, "active": (true|false)\\}', "(ab|cd)+(end)?", "a{0,9} then b{0,9}"),
)
OPEN = (
    '{"type": "array", "items": {"type": "array"}}',
    '{"type": "object", "additionalProperties": {"enum": [1, "a"]}}',
)
BORDERS: tuple[dict[str, bytes], ...] = (
    {"after": b"zz"},
    {"after": b" or", "lead": b" "},
    {"after": b'"', "before": b"a"},
)


def make_engine(model: LoadedModel, *, on_device: bool) -> Engine:
    """on_device: steps overlap, and eight rows share an arena for three grammars."""
    engine = Engine(model, num_kv_tokens=160, max_running_requests=8, page_size=8, reservation_ratio=0.1)
    if on_device:
        tokenizer, core = model.tokenizer, engine._core
        names = tokenizer.token_bytes, tokenizer.eos_ids, tokenizer.special_ids
        tokens = TokenTable.create(*names, tokenizer.vocab_size, "cpu")
        sizes = {"max_states": 150, "max_transitions": 4000, "max_mask_rows": 40, "max_grammars": 3}
        arena, given = GrammarArena(tokens, 8, **sizes), core.runner
        parts = model.decoder, given.kv_cache, given.slots
        runner = core.runner = ModelRunner(*parts, device=given.device, max_kv_len=given.max_kv_len, arena=arena)
        device = make_device_grammars(model, arena)
        core.grammars = GrammarStates(tokenizer.vocab_size, runner.computes_run, device, tokenizer.token_bytes)
        core.overlap = True
    return engine


class Drafts(Speculation):
    """The answers, with some wrong tokens among them, in about half of the steps."""

    def __init__(self, answers: dict[str, list[int]], rng: random.Random) -> None:
        super().__init__()
        self.answers, self.rng = answers, rng

    def propose(self, sequences: Iterable[Sequence]) -> dict[Sequence, list[int]]:
        if self.rng.random() < 0.5:
            return {}
        return {sequence: self._guess(sequence) for sequence in sequences if self.rng.random() < 0.5}

    def _guess(self, sequence: Sequence) -> list[int]:
        answer = self.answers.get(sequence.request.request_id, [])[len(sequence.output_ids) :]
        return [*answer[: self.rng.randrange(5)], *self.rng.choices(range(97, 123), k=self.rng.randrange(2))]

    def note_step(self, batch: Batch, seconds: float) -> None: ...


def make_grammars(model: LoadedModel) -> list[Grammar]:
    tokenizer = model.tokenizer
    words = Vocabulary(tokenizer.token_bytes, tokenizer.eos_ids, tokenizer.special_ids, tokenizer.vocab_size)
    closed = [compile_constraint("regex", pattern, words) for pattern in PATTERNS]
    assert all(grammar.close() for grammar in closed)
    opened = [compile_constraint("json_schema", schema, words) for schema in OPEN]
    return [*closed, *opened, *(Bordered(closed[i], words, **border) for i, border in enumerate(BORDERS))]


def make_requests(rng: random.Random, num_grammars: int, count: int) -> list[dict[str, Any]]:
    requests = []
    for i in range(count):
        values: dict[str, Any] = {"temperature": rng.choice((0.0, 1.0)), "max_tokens": rng.choice((2, 7, 20, 50, 50))}
        values |= {"seed": rng.randrange(1000), "ignore_eos": rng.random() < 0.2}
        if rng.random() < 0.1:
            values["stop"] = (rng.choice(("b", "no", "then")),)
        if rng.random() < 0.1:
            values |= rng.choice(({"frequency_penalty": 0.5}, {"logprobs": 1}))
        requests.append(
            {
                "prompt": "ab " * rng.randrange(1, 12),
                "sampling": SamplingParams(**values),
                "grammar": rng.choice((None, 4, 6, 7, 6, 7, *range(num_grammars))),
                "request_id": f"r{i}",
                "cancelled_after": rng.choice((1, 3)) if rng.random() < 0.15 else None,
            }
        )
    return requests


def is_allowed(grammar: Grammar, tokens: list[int], model: LoadedModel, ignores_end: bool) -> bool:
    """Whether the host's automaton allows each token, up to an end token, which it must allow."""
    state: int | None = 0
    for token in tokens:
        assert state is not None
        if token in model.tokenizer.eos_ids:
            return grammar.is_accepting(state)
        state = grammar.advance(state, token)
        if state is None:
            return False
    return True


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))])
@pytest.mark.parametrize("drafts", [False, True])
def test_tokens_are_the_hosts_whatever_comes_and_goes(tiny_model: LoadedModel, drafts: bool, seed: int) -> None:
    rng = random.Random(seed)
    grammars = make_grammars(tiny_model)
    requests = make_requests(rng, len(grammars), 60)
    expected = {}
    with make_engine(tiny_model, on_device=False) as engine:
        for request in requests:
            grammar = None if request["grammar"] is None else grammars[request["grammar"]]
            result = engine.generate(request["prompt"], request["sampling"], grammar=grammar)
            expected[request["request_id"]] = result
    with make_engine(tiny_model, on_device=True) as engine:
        core, waiting = engine._core, []
        delayed: list[str] = []  # rows whose steps could have overlapped
        step_informed = core.step_informed

        def note(updates: list[Update]) -> None:
            running = core.scheduler.running() if core.speculation is None else []
            delayed.extend(s.request.request_id for s in running if s not in core.scheduler.held)
            step_informed(updates)

        core.step_informed = note  # type: ignore[method-assign]
        if drafts:
            core.speculation = Drafts({name: list(result.token_ids) for name, result in expected.items()}, rng)
        for request in requests:
            enough = threading.Event()
            counted = 0

            def count(output: Any, limit: int | None = request["cancelled_after"], enough: Any = enough) -> None:
                nonlocal counted
                counted += len(output.token_ids)
                if output.finish_reason is not None or (limit is not None and counted >= limit):
                    enough.set()

            grammar = None if request["grammar"] is None else grammars[request["grammar"]]
            options = {"grammar": grammar, "request_id": request["request_id"]}
            if request["cancelled_after"] is not None:
                handle = engine.submit(request["prompt"], request["sampling"], on_output=count, **options)
                assert enough.wait(60)
                handle.cancel()
            else:
                waiting.append((request, engine.submit(request["prompt"], request["sampling"], **options)))
            if len(waiting) > rng.choice((2, 24, 24)):
                request, handle = waiting.pop(rng.randrange(len(waiting)))
                compare(request, handle, expected, grammars, tiny_model)
        for request, handle in waiting:
            compare(request, handle, expected, grammars, tiny_model)
        engine.check_integrity()
        assert not core.scheduler.held
        assert not delayed
        device = core.grammars.device
        assert device is not None
        users = sum(resident.num_users for resident in device.arena._resident.values())
        assert users == len(device._released), "each use was ended"


def compare(
    request: dict[str, Any], handle: Any, expected: dict[str, Any], grammars: list[Grammar], model: LoadedModel
) -> None:
    ours, theirs = handle.result(timeout_s=60), expected[request["request_id"]]
    ends = [i for i, token in enumerate(theirs.token_ids, 1) if token in model.tokenizer.eos_ids]
    known = ends[0] if ends else None  # past an end token that is ignored, a device allows end tokens alone
    assert ours.token_ids[:known] == theirs.token_ids[:known], request
    assert len(ours.token_ids) == len(theirs.token_ids), request
    assert ours.finish_reason == theirs.finish_reason, request
    grammar = None if request["grammar"] is None else grammars[request["grammar"]]
    if isinstance(grammar, CompiledGrammar):
        assert is_allowed(grammar, list(ours.token_ids), model, request["sampling"].ignore_eos)
