"""Programs written for SGLang's frontend run after one changed import."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import ramet
from ramet import Engine, MockBackend
from ramet.compat import sglang as sgl
from ramet.errors import InvalidRequest, NotSupported


def _loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("programs_of_sglang", Path(__file__).parent / "programs_of_sglang.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


programs = _loaded()


@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_a_program_runs_after_one_changed_import(name: str) -> None:
    run, script = programs.PROGRAMS[name]
    with MockBackend(script):
        run()


def test_there_are_forty_five_programs_and_ten_for_a_model() -> None:
    assert len(programs.PROGRAMS) >= 45
    assert len(programs.WITH_A_MODEL) >= 10


@pytest.fixture(scope="module")
def engine() -> Any:
    engine = Engine("smollm2-135m", device="cpu")
    yield engine
    engine.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("name", programs.WITH_A_MODEL)
def test_a_program_runs_on_a_model(engine: Engine, name: str) -> None:
    run, _ = programs.PROGRAMS[name]
    with ramet.use_backend(engine):
        run()


def test_what_is_done_otherwise_is_an_error_that_names_the_way() -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += sgl.gen("x")

    for raises, way in (
        (lambda: sgl.image("cat.png"), "text only"),
        (lambda: sgl.Engine("m"), r"ramet\.Engine"),
        (lambda: sgl.Anthropic("m"), r"ramet\.OpenAI"),
        (lambda: sgl.gen("x", logprob_start_len=0), "/generate"),
        (lambda: sgl.select("x", ["a"], choices_method="mine"), "input_token_logprobs"),
        (lambda: sgl.RuntimeEndpoint("http://h", chat_template_name="llama"), "chat template"),
        (program.trace, r"trace\(\)"),
        (program.compile, r"compile\(\)"),
        (lambda: sgl.gen("x", max_tokens=0), "return_logprob"),
    ):
        with pytest.raises(NotSupported, match=way):
            raises()
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = sgl.nothing_of_the_kind
    with pytest.raises(InvalidRequest, match="dtype"):
        sgl.gen("x", dtype=list)
    with pytest.raises(InvalidRequest, match="n is"):
        sgl.gen("x", n=0)


def test_a_wrong_step_of_a_program_is_an_error() -> None:
    @sgl.function
    def nothing(s: Any) -> None:
        s += None

    @sgl.function
    def unopened(s: Any) -> None:
        s += sgl.user_begin() + "a" + sgl.assistant_end()

    @sgl.function
    def joined(s: Any) -> None:
        s.fork(2).join("at_once")

    with MockBackend():
        for program, message in ((nothing, "None"), (unopened, "assistant_begin"), (joined, "join mode")):
            with pytest.raises(ValueError, match=message):
                program.run()
        with pytest.raises(ValueError, match="None"):
            nothing.run_batch([{}, {}])


def test_the_lines_of_a_program_are_its_own() -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "a" + sgl.gen("x", max_tokens=2)

    with MockBackend(["b"]):
        record = program.run().record
    assert {node.line.partition(":")[0].rpartition("/")[2] for node in record.graph.nodes} == {"test_sglang.py"}
