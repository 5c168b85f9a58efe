"""The GPU's way through a step, on a CPU: every kernel is the Triton one, in its interpreter, and graphs are recorded.

The record of a capture refuses what a CUDA graph could not hold: reading a value back, and shapes that depend on data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ramet.kernels import activation, attention_decode_cpu, cpu_pointwise
from ramet.kernels.grammar_arena import GrammarArena
from ramet.kernels.grammar_mask import TokenTable
from ramet.kernels.triton_support import HAS_TRITON
from ramet.runtime.client import Engine
from ramet.runtime.factory import make_device_grammars
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.types import SamplingParams

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


class Refuse(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails on operations that wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        assert name not in SYNCHRONISING, f"{name} inside a capture"
        if name == "aten::index" or name == "aten::index_put_":
            indices = [i for i in args[1] if i is not None]
            assert not any(i.dtype in (torch.bool, torch.uint8) for i in indices), f"{name} by a mask inside a capture"
        return func(*args, **(kwargs or {}))


class Record:
    """A capture whose replay runs the body again; no buffer that the host knows may move."""

    def __call__(self, body: Callable[[], None]) -> Callable[[], None]:
        with Refuse():  # type: ignore[no-untyped-call]
            body()
        return body


@pytest.fixture
def device_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every public kernel function takes its Triton path, on CPU tensors."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    for module in (cpu_pointwise, attention_decode_cpu, activation):
        for name in ("takes", "takes_rope"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda *args, **kwargs: False)


def make_engine(model: LoadedModel, *, graphs: bool) -> Engine:
    engine = Engine(model, num_kv_tokens=1024, max_running_requests=2, chunked_prefill_size=64)
    if graphs:
        runner = engine._core.runner
        runner._merge_counters = torch.zeros(2 * model.config.num_kv_heads, dtype=torch.int32)
        runner.num_sms = 4  # few processors: rows of every length are split
        tokenizer = model.tokenizer
        tokens = TokenTable.create(
            tokenizer.token_bytes, tokenizer.eos_ids, tokenizer.special_ids, tokenizer.vocab_size, "cpu"
        )
        arena = GrammarArena(tokens, 2, max_states=64, max_transitions=1 << 12, max_mask_rows=32)
        runner.arena = arena
        runner.device_grammars = make_device_grammars(model)
        runner.sampling = runner.tables.sampling(arena.mask_index, arena.mask_rows)
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


def run_all(engine: Engine) -> list[list[int]]:
    handles = []
    for i, prompt in enumerate(["a prompt", "a prompt longer than sixteen", "b"]):
        sampling = SamplingParams(temperature=0.7 * (i % 2), max_tokens=2 + i, seed=i, ignore_eos=True)
        handles.append(engine.submit(prompt, sampling))
    return [list(handle.result(timeout_s=120).token_ids) for handle in handles]


def test_steps_of_triton_kernels_give_the_tokens_of_the_references(
    tiny_model: LoadedModel, device_kernels: None, launched: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with make_engine(tiny_model, graphs=True) as engine:
        actual = run_all(engine)
        engine.check_integrity()
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
        "scan",
        "choose",
        "advance",
    ]
    assert launched >= {f"_{name}_kernel" for name in names}
    with make_engine(tiny_model, graphs=False) as engine:
        assert run_all(engine) == actual
