"""Every example runs on the scripted model, and gives the same tokens however it is cut into stages."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ramet import Function, MockBackend, State, use_backend
from ramet.lang.graph.ir import Generate, Select
from ramet.runtime.testing.scripted_model import ScriptedEngine, ScriptedHandle
from ramet.runtime.types import NO_OPTIONS, RequestOptions, SamplingParams

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
PROGRAMS = sorted((EXAMPLES / "programs").glob("*.py"))


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the names in annotations
    spec.loader.exec_module(module)
    return module


def program_of(module: ModuleType) -> Function:
    """The module's main program: the one whose parameters are the example's."""
    found = [
        f
        for f in vars(module).values()
        if isinstance(f, Function) and {p.name for p in f.parameters} == set(module.EXAMPLE)
    ]
    assert len(found) == 1, f"{module.__name__} has {len(found)} programs that take its EXAMPLE"
    return found[0]


class RecordingEngine(ScriptedEngine):
    """Remembers the tokens of every prompt."""

    def submit(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        options: RequestOptions = NO_OPTIONS,
        **more: Any,
    ) -> ScriptedHandle:
        self.prompts: list[tuple[Any, ...]] = getattr(self, "prompts", [])
        self.prompts.append((tuple(prompt), options.score_from))
        return super().submit(prompt, sampling, options, **more)


def run(module: ModuleType, **options: Any) -> tuple[State, RecordingEngine]:
    program = program_of(module)
    engine = RecordingEngine()
    with engine:
        state = program.run(**module.EXAMPLE, backend=engine, seed=11, **options)
        error = state.error()
        if error is not None:
            raise error
        return state, engine


def test_there_are_at_least_25_programs() -> None:
    assert len(PROGRAMS) >= 25


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_a_program_runs_on_the_scripted_model(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = load(path)
    with use_backend(MockBackend(module.SCRIPT)) as backend:
        module.main()
    assert capsys.readouterr().out.strip()
    assert isinstance(backend, MockBackend)
    backend.engine.shutdown()


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_traced_and_staged_runs_compute_the_same_tokens(path: Path) -> None:
    if path.stem == "fastest_answer":
        pytest.skip("which branch is cancelled depends on time")
    module = load(path)
    needed, first = run(module)
    always, second = run(module, stage="always")
    assert Counter(first.prompts) == Counter(second.prompts)
    assert needed.text() == always.text()
    assert repr(needed.variables) == repr(always.variables)
    assert first.stats().completion_tokens == second.stats().completion_tokens


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_a_generation_computes_only_what_no_node_before_it_computed(path: Path) -> None:
    """Turn k + 1 computes its new tokens, and nothing of what turn k knew."""
    module = load(path)
    state, engine = run(module, stage="always")
    record = state.record
    text: dict[int, str] = {}  # of the branch, up to and with each node
    last: dict[int, int | None] = {}  # the nearest generation or selection on the branch
    num_checked = 0
    for node in record.graph.nodes:
        event = record.events[node.id]
        before = "" if node.parent is None else text[node.parent]
        previous = None if node.parent is None else last[node.parent]
        text[node.id], last[node.id] = before + event.text, previous
        if isinstance(node, Generate | Select):
            last[node.id] = node.id
        if isinstance(node, Generate) and previous is not None:
            assert event.usage is not None
            already = len(engine.tokenizer.encode(text[previous], parse_special=True))
            # The last token of a choice, or of a text that max_tokens cut, was not computed: it comes with the rest.
            already -= record.events[previous].finish_reason == "length"
            already -= isinstance(record.graph.nodes[previous], Select)
            assert event.usage.computed_tokens <= max(1, event.usage.prompt_tokens - already)
            num_checked += 1
    if num_checked == 0:
        pytest.skip("no branch has two generations")


def test_the_quickstart_runs_on_the_scripted_model(capsys: pytest.CaptureFixture[str]) -> None:
    load(EXAMPLES / "quickstart.py").main(["--mock"])
    out = capsys.readouterr().out
    assert "time to first token" in out
    assert "taken from the cache" in out


def test_async_examples_run_on_a_loop_as_well() -> None:
    module = load(EXAMPLES / "programs" / "async_research.py")
    with use_backend(MockBackend(module.SCRIPT)):
        state = asyncio.run(program_of(module).arun(**module.EXAMPLE))
    assert state["keyword"] == [" flights", " strength"]


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Iterator[Any]:
    from ramet import Engine

    with Engine(str(smollm2_path), context_length=2048) as engine:
        yield engine


@pytest.mark.model
@pytest.mark.parametrize(
    "name", ["chain_of_thought", "extract_to_schema", "few_shot_classification", "debate", "fill_a_form", "router"]
)
def test_an_example_runs_on_a_real_model(name: str, smollm2: Any, capsys: pytest.CaptureFixture[str]) -> None:
    module = load(EXAMPLES / "programs" / f"{name}.py")
    with use_backend(smollm2):
        module.main()
        state = program_of(module).run(**module.EXAMPLE)
    assert capsys.readouterr().out.strip()
    assert state.error() is None
    assert state.usage.cached_tokens > state.usage.computed_tokens
    smollm2.check_integrity()
