"""Every example runs on the scripted model, and gives the same tokens however it is cut into stages."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ramet import MockBackend, State, use_backend
from ramet.lang.graph.ir import Generate, Select

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
PROGRAMS = sorted((EXAMPLES / "programs").glob("*.py"))
Load = Callable[[Path], Any]  # Any: the Example of conftest.py
Record = Callable[[], Any]  # Any: the RecordingEngine of conftest.py


def run(example: Any, engine: Any, **options: Any) -> State:  # Any: an Example, a RecordingEngine
    with engine:
        state: State = example.program.run(**example.arguments, backend=engine, seed=11, **options)
        error = state.error()
        if error is not None:
            raise error
        return state


def test_there_are_at_least_25_programs() -> None:
    assert len(PROGRAMS) >= 25


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_a_program_runs_on_the_scripted_model(
    path: Path, load_example: Load, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load_example(path).module
    with use_backend(MockBackend(module.SCRIPT)) as backend:
        module.main()
    assert capsys.readouterr().out.strip()
    assert isinstance(backend, MockBackend)
    backend.engine.shutdown()


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_traced_and_staged_runs_compute_the_same_tokens(
    path: Path, load_example: Load, recording_engine: Record
) -> None:
    if path.stem == "fastest_answer":
        pytest.skip("which branch is cancelled depends on time")
    example, first, second = load_example(path), recording_engine(), recording_engine()
    needed, always = run(example, first), run(example, second, stage="always")
    assert Counter(first.prompts) == Counter(second.prompts)
    assert needed.text() == always.text()
    assert repr(needed.variables) == repr(always.variables)
    assert first.stats().completion_tokens == second.stats().completion_tokens


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_a_generation_computes_only_what_no_node_before_it_computed(
    path: Path, load_example: Load, recording_engine: Record
) -> None:
    """Turn k + 1 computes its new tokens, and nothing of what turn k knew."""
    engine = recording_engine()
    record = run(load_example(path), engine, stage="always").record
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


def test_the_quickstart_runs_on_the_scripted_model(
    load_module: Callable[[Path], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    load_module(EXAMPLES / "quickstart.py").main(["--mock"])
    out = capsys.readouterr().out
    assert "time to first token" in out
    assert "taken from the cache" in out


def test_async_examples_run_on_a_loop_as_well(load_example: Load) -> None:
    example = load_example(EXAMPLES / "programs" / "async_research.py")
    with use_backend(MockBackend(example.module.SCRIPT)):
        state = asyncio.run(example.program.arun(**example.arguments))
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
def test_an_example_runs_on_a_real_model(
    name: str, smollm2: Any, load_example: Load, capsys: pytest.CaptureFixture[str]
) -> None:
    example = load_example(EXAMPLES / "programs" / f"{name}.py")
    with use_backend(smollm2):
        example.module.main()
        state = example.program.run(**example.arguments)
    assert capsys.readouterr().out.strip()
    assert state.error() is None
    assert state.usage.cached_tokens > state.usage.computed_tokens
    smollm2.check_integrity()
