"""The GPU's way through a step, on a CPU: every kernel is the Triton one, in its interpreter, and graphs are recorded.

A record is what a CUDA graph would be: operations and launches with the arguments and tensors they had when captured.
It refuses what a graph could not hold (reading a value back, shapes that depend on data), and before a replay its
intermediate tensors are filled with garbage: between replays their memory is other graphs'.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from ramet.grammar import Vocabulary
from ramet.grammar.service.sources import compile_constraint
from ramet.kernels.grammar.arena import GrammarArena
from ramet.kernels.grammar.mask import TokenTable
from ramet.kernels.ops import TRITON
from ramet.kernels.sampling.logit_edits import EditTables
from ramet.kernels.triton_support import HAS_TRITON
from ramet.runtime.constraints.states import GrammarStates
from ramet.runtime.engine.core import Update
from ramet.runtime.engine.engine import Engine
from ramet.runtime.engine.factory import make_device_grammars
from ramet.runtime.handle import RequestResult
from ramet.runtime.models.decoder import Decoder
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.speculation.draft_model import DraftModel
from ramet.runtime.speculation.heads import Features, Head, load_head, tapped
from ramet.runtime.speculation.speculation import Speculation
from ramet.runtime.steps import cuda_graph
from ramet.runtime.steps.cuda_graph import GraphKey, StepGraphs
from ramet.runtime.steps.kv_cache import KVCache
from ramet.runtime.steps.logit_edits import LogitEdits
from ramet.runtime.steps.model_runner import ModelRunner
from ramet.runtime.steps.slots import RunningSlots
from ramet.runtime.steps.tree_planner import TreePlanner
from ramet.runtime.testing.dummy import tiny_model as make_tiny_model
from ramet.runtime.types import Batch, Request, SamplingParams, ScheduledSequence, Sequence, Status

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON or torch.cuda.is_available(), reason="needs Triton's interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

SYNCHRONISING = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::item",
    "aten::equal",
    "aten::is_pinned",
}


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes operations and their results; fails on those that wait for the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []  # what runs, its arguments, its result
        self.in_kernel = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        assert self.in_kernel or name not in SYNCHRONISING, f"{name} inside a capture"
        if name == "aten::index" or name == "aten::index_put_":
            indices = [i for i in args[1] if i is not None]
            assert not any(i.dtype in (torch.bool, torch.uint8) for i in indices), f"{name} by a mask inside a capture"
        result = func(*args, **(kwargs or {}))
        if not self.in_kernel:
            self.calls.append((func, args, kwargs or {}, result))
        return result

    def launch(self, kernel: Any, args: Any, kwargs: Any, run: Callable[..., Any]) -> Any:
        self.in_kernel = True
        try:
            return run(kernel, *args, **kwargs)
        finally:
            self.in_kernel = False
            self.calls.append((kernel, args, kwargs, None))


class Record:
    """A capture whose replay does the same again to the same tensors."""

    def __call__(self, body: Callable[[], None]) -> Callable[[], None]:
        from triton.runtime.interpreter import InterpretedFunction

        recorder, run = Recorder(), InterpretedFunction.run
        with pytest.MonkeyPatch.context() as patch, recorder:
            patch.setattr(InterpretedFunction, "run", lambda self, *a, **k: recorder.launch(self, a, k, run))
            body()
        steps: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []  # the last: what takes the result
        intermediates: list[torch.Tensor] = []
        for what, args, kwargs, result in recorder.calls:
            if isinstance(what, InterpretedFunction):
                steps.append((what.run, args, kwargs, []))
            elif what._schema.is_mutable:
                steps.append((what, args, kwargs, []))
            elif storages(result).isdisjoint(storages((args, kwargs))):  # no view
                intermediates += tensors(result)
                if "empty" not in what._schema.name:
                    steps.append((what, args, kwargs, tensors(result)))

        def replay() -> None:
            for tensor in intermediates:
                tensor.fill_(torch.nan if tensor.is_floating_point() else 113)
            for what, args, kwargs, targets in steps:
                result = tensors(what(*args, **kwargs))
                for target, value in zip(targets, result, strict=False):
                    target.copy_(value)

        return replay


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in a value of nested lists, tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return tensors(list(value.values()))
    return [t for part in value for t in tensors(part)] if isinstance(value, list | tuple) else []


def storages(value: Any) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors(value)}


def test_a_replay_knows_nothing_that_came_after_the_capture() -> None:
    out, source, factor = torch.zeros(2), torch.ones(2), 3

    def body() -> None:
        out.copy_(source * factor)

    replay = Record()(body)
    source.fill_(2.0)
    factor = 4
    replay()
    assert out.tolist() == [6.0, 6.0], "tensors are read again, the host's values are not"


@pytest.fixture
def device_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernel functions that look at their tensors' device take their Triton path, on CPU tensors.

    The interpreter runs one kernel at a time, and a grammar's tables are made on a thread beside the steps.
    """
    from triton.runtime.interpreter import InterpretedFunction

    run, lock = InterpretedFunction.run, threading.RLock()

    def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        with lock:
            return run(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", alone)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)


@pytest.fixture(scope="module")
def triton_model() -> LoadedModel:
    """The tiny model, whose ops are the Triton kernels."""
    return make_tiny_model(TRITON)


def make_engine(model: LoadedModel, *, graphs: bool, num_edits: int = 2, verifies: bool = False) -> Engine:
    engine = Engine(model, num_kv_tokens=1024, max_running_requests=2, chunked_prefill_size=64, page_size=8)
    if graphs:
        tokenizer, given = model.tokenizer, engine._core.runner
        tokens = TokenTable.create(
            tokenizer.token_bytes, tokenizer.eos_ids, tokenizer.special_ids, tokenizer.vocab_size, "cpu"
        )
        arena = GrammarArena(tokens, 2, max_states=64, max_transitions=1 << 12, max_mask_rows=32)
        runner = engine._core.runner = ModelRunner(
            model.decoder,
            given.kv_cache,
            given.slots,
            device=given.device,
            max_kv_len=given.max_kv_len,
            arena=arena,
            edits=LogitEdits(EditTables.create(num_edits, tokenizer.vocab_size)),
            tree=TreePlanner(model.config, 8, 2, mode="on", num_sms=4, device=given.device, dtype=torch.float32),
            num_sms=4,  # few processors: rows of every length are split
            verifies=verifies,
        )
        device_grammars = make_device_grammars(model, arena)
        engine._core.grammars = GrammarStates(tokenizer.vocab_size, runner.computes_run, device_grammars)
        runner.capture_graphs(16, Record())
        engine._core.overlap = True
    return engine


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the kernels that Triton's interpreter ran."""
    from triton.runtime.interpreter import InterpretedFunction

    names: set[str] = set()
    run = InterpretedFunction.run

    def note(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.add(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", note)
    return names


EDITED: list[dict[str, Any]] = [
    {"frequency_penalty": 0.9, "presence_penalty": 0.3},
    {"repetition_penalty": 1.4, "logit_bias": {97: 4.0, 98: 4.0}, "logprobs": 2, "temperature": 0.8, "top_p": 0.9},
    {"min_tokens": 4, "logit_bias": {101: 100.0}, "stop_token_ids": (101,)},
    {"logprobs": 1},
]


def run_edited(engine: Engine) -> list[RequestResult]:
    handles = []
    for i, options in enumerate(EDITED):
        values: dict[str, Any] = {"temperature": 0.0, "max_tokens": 5, "seed": i, "ignore_eos": True, **options}
        sampling = SamplingParams(**values)
        handles.append(engine.submit("ab" * (i + 1), sampling))
    return [handle.result(timeout_s=300) for handle in handles]


@pytest.mark.parametrize("num_edits", [2, 1, 0])
def test_edited_logits_and_log_probabilities_give_the_tokens_of_the_host(
    tiny_model: LoadedModel,
    triton_model: LoadedModel,
    device_kernels: None,
    monkeypatch: pytest.MonkeyPatch,
    num_edits: int,
) -> None:
    """Without enough rows on the device the host edits those that are left."""
    with make_engine(triton_model, graphs=True, num_edits=num_edits) as engine:
        core = engine._core
        informed: list[int] = []
        step_informed = core.step_informed

        def note(updates: list[Update]) -> None:
            informed.append(core.scheduler.counters.num_steps)
            step_informed(updates)

        monkeypatch.setattr(core, "step_informed", note)
        actual = run_edited(engine)
        engine.check_integrity()
        assert core.runner.edits is not None
        assert core.runner.edits.num_free == num_edits
    assert bool(informed) == (num_edits < 2), "two run at once, so with two rows nothing waits for the host"
    monkeypatch.undo()
    with make_engine(tiny_model, graphs=False) as engine:
        expected = run_edited(engine)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert (ours.logprobs is None) == (theirs.logprobs is None)
        if theirs.logprobs is not None:
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
            assert [[t for t, _ in top] for top in ours.top_logprobs or ()] == [
                [t for t, _ in top] for top in theirs.top_logprobs or ()
            ]


def run_all(engine: Engine) -> list[list[int]]:
    handles = []
    for i, prompt in enumerate(["a prompt", "a prompt longer than sixteen", "a prompt longer than these"]):
        sampling = SamplingParams(temperature=0.7 * (i % 2), max_tokens=3 + i, seed=i, ignore_eos=True)
        handles.append(engine.submit(prompt, sampling))
    return [list(handle.result(timeout_s=120).token_ids) for handle in handles]


def test_steps_of_triton_kernels_give_the_tokens_of_the_references(
    tiny_model: LoadedModel,
    triton_model: LoadedModel,
    device_kernels: None,
    launched: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with make_engine(triton_model, graphs=True) as engine:
        actual = run_all(engine)
        engine.check_integrity()
        tree = engine._core.runner.tree
        assert tree is not None
        assert tree.num_plans > 0
    monkeypatch.undo()
    names = [
        "prepare",
        "commit",
        "scatter",
        "rms_norm",
        "rope",
        "gated",
        "decode",
        "extend",
        "tree",
        "scan",
        "choose",
        "advance",
    ]
    assert launched >= {f"_{name}_kernel" for name in names}
    with make_engine(tiny_model, graphs=False) as engine:
        assert run_all(engine) == actual


@pytest.mark.parametrize("prompts", [("ab", "cdef"), ("a prompt of 24 characters",) * 2])
def test_tokens_that_must_follow_are_computed_together_unless_rows_read_a_prefix_together(
    tiny_model: LoadedModel,
    triton_model: LoadedModel,
    device_kernels: None,
    monkeypatch: pytest.MonkeyPatch,
    prompts: tuple[str, str],
) -> None:
    tokenizer = tiny_model.tokenizer
    words = Vocabulary(tokenizer.token_bytes, tokenizer.eos_ids, tokenizer.special_ids, tokenizer.vocab_size)
    grammar = compile_constraint("regex", "[0-9]{3}(abcd|xyzw)", words)
    assert grammar.close()
    asked: list[tuple[bool, bool]] = []  # whether the last step used the tree, and whether to compute several tokens
    is_tree = [False]
    gather, computes_run = ModelRunner._gather, ModelRunner.computes_run

    def note(self: ModelRunner, batch: Batch, *args: Any, **options: Any) -> Any:
        step = gather(self, batch, *args, **options)
        is_tree[0] = step.uses_tree
        return step

    def note_answer(self: ModelRunner, *sizes: int) -> bool:
        answer = computes_run(self, *sizes)
        asked.append((is_tree[0], answer))
        return answer

    def run(engine: Engine) -> list[tuple[int, ...]]:
        params = [SamplingParams(temperature=1.0, max_tokens=9, seed=seed) for seed in range(2)]
        handles = [engine.submit(p, s, grammar=grammar) for p, s in zip(prompts, params, strict=True)]
        return [tuple(handle.result(timeout_s=300).token_ids) for handle in handles]

    monkeypatch.setattr(ModelRunner, "_gather", note)
    monkeypatch.setattr(ModelRunner, "computes_run", note_answer)
    with make_engine(triton_model, graphs=True) as engine:
        actual = run(engine)
        engine.check_integrity()
    assert asked
    assert all(answer != used_tree for used_tree, answer in asked)
    assert any(used_tree for used_tree, _ in asked) == (len(set(prompts)) == 1)
    monkeypatch.undo()
    with make_engine(tiny_model, graphs=False) as engine:
        assert run(engine) == actual


class Drafts(Speculation):
    """Drafts that are right for a while and then wrong, of some rows, in about half of the steps."""

    def __init__(self, answers: dict[bytes, list[int]], seed: int) -> None:
        super().__init__()
        self.answers, self.rng = answers, random.Random(seed)
        self.num_drafted = 0

    def pays(self, sequences: Iterable[Sequence]) -> bool:
        return self.rng.random() < 0.7

    def propose(self, sequences: Iterable[Sequence]) -> dict[Sequence, list[int]]:
        if self.rng.random() < 0.3:
            return {}
        return {sequence: self.guess(sequence) for sequence in sequences if self.rng.random() < 0.8}

    def guess(self, sequence: Sequence) -> list[int]:
        answer = self.answers[sequence.request.prompt_ids.tobytes()][len(sequence.output_ids) :]
        return [*answer[: self.rng.randrange(5)], *self.rng.choices(range(97, 123), k=self.rng.randrange(2))]

    def note_step(self, batch: Batch, seconds: float) -> None:
        self.num_drafted += sum(max(item.num_samples - 1, 0) for item in batch.items)


DRAFTED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "logprobs": 2},
    {"frequency_penalty": 0.9, "repetition_penalty": 1.3, "temperature": 0.0},
    {"logit_bias": {97: 5.0, 98: 5.0}, "presence_penalty": 0.8, "temperature": 0.7, "logprobs": 1},
    {"min_tokens": 4, "logit_bias": {101: 9.0}, "stop_token_ids": (101,), "ignore_eos": False},
    {"temperature": 1.0, "grammar": "[a-c]{2,9}(xy|z){1,3}"},
    {"temperature": 0.7, "grammar": "(yes|no)(, (yes|no)){0,2}", "frequency_penalty": 0.5, "logprobs": 1},
    {"temperature": 1.3, "grammar": '{"type": "array", "items": {"type": "array"}}'},
]


def run_drafted(engine: Engine, seed: int) -> list[RequestResult]:
    """Requests of all kinds, some with grammars that the device holds or the host masks."""
    tokenizer = engine.tokenizer
    words = Vocabulary(tokenizer.token_bytes, tokenizer.eos_ids, tokenizer.special_ids, tokenizer.vocab_size)
    handles = []
    for i, options in enumerate(DRAFTED):
        values: dict[str, Any] = {"max_tokens": 7, "seed": seed + i, "ignore_eos": "grammar" not in options, **options}
        source = values.pop("grammar", None)
        kind = "json_schema" if source and source[0] == "{" else "regex"
        grammar = None if source is None else compile_constraint(kind, source, words)
        if grammar is not None and kind == "regex":
            assert grammar.close()
        handles.append(engine.submit("ab" * (i + 1), SamplingParams(**values), grammar=grammar))
    return [handle.result(timeout_s=300) for handle in handles]


LONG = [pytest.param(seed, seed % 3, marks=pytest.mark.slow) for seed in range(1, 12)]


@pytest.mark.parametrize(("seed", "num_edits"), [(0, 1), *LONG])
def test_drafts_change_no_answer_of_the_device(
    tiny_model: LoadedModel,
    triton_model: LoadedModel,
    device_kernels: None,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    num_edits: int,
) -> None:
    """Graphs and eager steps verify some; others overlap. Without rows for edits the host edits."""
    monkeypatch.setattr(cuda_graph, "VERIFIED_TOKENS", (8,))  # few graphs: the interpreter takes long
    monkeypatch.setattr(cuda_graph, "VERIFIED_DRAFTS", (3, 6))
    with monkeypatch.context() as reference:
        reference.setattr(torch.Tensor, "is_cuda", property(lambda tensor: False))
        with make_engine(tiny_model, graphs=False) as engine:
            expected = run_drafted(engine, seed)
    answers = {}
    for i, result in enumerate(expected):
        prompt = np.asarray(triton_model.tokenizer.encode("ab" * (i + 1), parse_special=True), dtype=np.int32)
        answers[prompt.tobytes()] = list(result.token_ids)
    replayed: list[GraphKey] = []
    replay = StepGraphs.replay

    def note(self: StepGraphs, key: GraphKey, *rest: Any) -> torch.Tensor:
        replayed.append(key)
        return replay(self, key, *rest)

    monkeypatch.setattr(StepGraphs, "replay", note)
    with make_engine(triton_model, graphs=True, num_edits=num_edits, verifies=True) as engine:
        drafts = engine._core.speculation = Drafts(answers, seed)
        actual = run_drafted(engine, seed)
        engine.check_integrity()
    assert drafts.num_drafted > 10
    assert any(key.num_drafted for key in replayed)
    assert any(not key.num_drafted for key in replayed)
    for ours, theirs, options in zip(actual, expected, DRAFTED, strict=True):
        assert ours.token_ids == theirs.token_ids, options
        assert (ours.finish_reason, ours.incomplete) == (theirs.finish_reason, theirs.incomplete), options
        if theirs.logprobs is not None:
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4), options


def head_of(model: LoadedModel, folder: Path) -> Head:
    """A random layer of multi-token prediction for the model."""
    config = model.config
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "eh_proj": (hidden, 2 * hidden),
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (config.num_kv_heads * config.head_dim, hidden),
        "self_attn.v_proj": (config.num_kv_heads * config.head_dim, hidden),
        "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    norms = ("enorm", "hnorm", "shared_head.norm", "input_layernorm", "post_attention_layernorm")
    random_ = torch.Generator().manual_seed(3)
    made = {name: torch.randn(shape, generator=random_) * 0.2 for name, shape in shapes.items()}
    made |= {name: torch.rand(hidden, generator=random_) + 0.5 for name in norms}
    prefix = f"model.layers.{config.num_layers}."
    save_file({f"{prefix}{name}.weight": tensor for name, tensor in made.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"num_nextn_predict_layers": 1}')
    return load_head(folder, model.decoder)


class Drafting:
    """A model and what drafts for it, each with a runner of its own, and two sequences of prompts that it has read."""

    def __init__(self, model: LoadedModel, head: Head | None, capture: Record | None) -> None:
        self.model = self.runner(model.decoder if head is None else tapped(model.decoder, head.before), capture)
        small = self.runner(model.decoder if head is None else head.decoder, capture)
        cache = self.model.kv_cache
        self.drafter = DraftModel(small, None if head is None else Features(cache, small.kv_cache, head.combine))
        self.sequences = []
        for slot, length in enumerate((9, 5)):
            prompt = (np.arange(length, dtype=np.int32) * 37 + 11 * slot) % 90 + 33
            request = Request(f"r{slot}", prompt, SamplingParams(temperature=0.0), 40)
            pages = list(range(1 + 9 * slot, 10 + 9 * slot))
            self.sequences.append(Sequence(request, page_ids=pages, slot=slot, status=Status.RUNNING))
        self.step([ScheduledSequence(s, 0, s.num_tokens, 1) for s in self.sequences], 0)

    def runner(self, decoder: Decoder, capture: Record | None) -> ModelRunner:
        cpu = torch.device("cpu")
        noted = [torch.float32] * decoder.num_noted
        cache = KVCache(decoder.config, 32, 8, device=cpu, dtype=torch.float32, noted=noted)
        slots = RunningSlots(2, 12, device=cpu)
        num_sms = None if capture is None else 4
        runner = ModelRunner(decoder, cache, slots, device=cpu, max_kv_len=96, num_sms=num_sms)
        if capture is not None:
            runner.capture_graphs(16, capture)
        return runner

    def step(self, items: list[ScheduledSequence], num_decode: int) -> None:
        batch = Batch(1, tuple(items), num_decode, sum(item.num_tokens for item in items))
        for item, output in zip(items, self.model.launch(batch).read(), strict=True):
            item.sequence.num_computed = item.start + item.num_tokens
            item.sequence.output_ids += output.token_ids

    def run(self) -> list[list[int]]:
        """Draft, and let the model go on by several tokens, with other sequences in between."""
        drafts = list[list[int]]()
        for number, count in enumerate((3, 1, 5, 4)):
            asking = self.sequences[number % 2 :] if number < 3 else self.sequences
            drafts += self.drafter.draft(asking, count).values()
            for _ in range(number + 1):
                rows = [ScheduledSequence(s, s.num_computed, 1, 1) for s in self.sequences]
                self.step(rows, len(rows))
        self.drafter.check_integrity()
        for sequence in self.sequences:
            self.drafter.release(sequence)
        assert not self.drafter.num_sequences
        return drafts


@pytest.mark.parametrize("has_head", [True, False])
def test_a_model_and_a_head_draft_in_graphs_what_the_references_draft(
    tiny_model: LoadedModel,
    triton_model: LoadedModel,
    device_kernels: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    has_head: bool,
) -> None:
    """Pages of 8 tokens: drafts cross their borders."""
    with monkeypatch.context() as reference:
        reference.setattr(torch.Tensor, "is_cuda", property(lambda tensor: False))
        expected = Drafting(tiny_model, head_of(tiny_model, tmp_path) if has_head else None, None).run()
    replayed: list[GraphKey] = []
    replay = StepGraphs.replay

    def note(self: StepGraphs, key: GraphKey, *rest: Any) -> torch.Tensor:
        replayed.append(key)
        return replay(self, key, *rest)

    monkeypatch.setattr(StepGraphs, "replay", note)
    on_device = Drafting(triton_model, head_of(triton_model, tmp_path) if has_head else None, Record())
    num_steps = len(replayed)
    found = on_device.run()
    assert found == expected
    assert [len(draft) for draft in found] == [3, 3, 1, 5, 5, 4, 4]
    assert len({token for draft in found for token in draft}) > 3
    assert len(replayed) - num_steps == 3 + 1 + 5 + 4 + (1 + 2 + 3 + 4), "a graph for each token, and for the model's"
