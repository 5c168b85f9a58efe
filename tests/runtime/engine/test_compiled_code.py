"""What is compiled on a CPU is compiled before the first request."""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import ramet.kernels.cpu
from ramet import loops
from ramet.grammar.service import warm_up
from ramet.kernels.cpu.functions import functions, load_functions
from ramet.kernels.cpu.threads import MODULES, Kernel
from ramet.runtime.engine.loading import STAGE, prepare_compiled_code


def test_every_module_with_compiled_functions_is_listed() -> None:
    folder = Path(ramet.kernels.cpu.__path__[0])
    users = {m.name for m in pkgutil.iter_modules([str(folder)]) if _imports_kernels(folder / f"{m.name}.py")}
    assert users - {"functions"} <= set(MODULES)
    assert len(users) > 5


def _imports_kernels(path: Path) -> bool:
    return "ramet.kernels.cpu.threads import" in path.read_text()


def test_every_function_is_compiled_for_one_set_of_types() -> None:
    load_functions(lambda number, of: None)
    found = list(functions())
    assert all(f.was_on_disk or f.address for f in found if isinstance(f, Kernel))
    wrong = {f.__name__: f.signatures for f in found if not isinstance(f, Kernel) and len(f.signatures) > 1}
    assert len(found) > 10
    assert not wrong
    again: list[tuple[int, int]] = []
    load_functions(lambda *progress: again.append(progress))
    assert not again, "what this process has compiled is not compiled again, nor said to be"


def test_loops_are_compiled_once_per_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "mark"
    monkeypatch.setattr(loops, "mark_of", lambda loop: mark)
    monkeypatch.setattr(warm_up, "mark_of", lambda loop: mark)
    monkeypatch.setattr(warm_up, "_are_loaded", threading.Event())
    told: list[str] = []
    prepare_compiled_code(torch.device("cuda"), told.append)  # a GPU needs the loops alone
    assert told == [STAGE]
    assert mark.exists()
    prepare_compiled_code(torch.device("cuda"), told.append)
    assert told == [STAGE]


def test_a_folder_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loops, "mark_of", lambda loop: tmp_path / "missing" / "mark")
    monkeypatch.setattr(warm_up, "mark_of", loops.mark_of)
    monkeypatch.setattr(warm_up, "SAMPLES", ())
    monkeypatch.setattr(warm_up, "_are_loaded", threading.Event())
    with caplog.at_level("INFO"):
        prepare_compiled_code(torch.device("cuda"), None)
    assert STAGE in caplog.text
    assert "will look again" in caplog.text


FIRST_START = """
import json
from numba.core import event
from ramet import Engine, SamplingParams
from ramet.lang.graph.ir import Constraint
from ramet.runtime.programs.grammars import ProgramGrammars
from ramet.runtime.text.role_marks import RoleMarks

stages, passes = [], []

class Listener(event.Listener):
    def on_start(self, event): passes.append(event.data["name"])
    def on_end(self, event): pass

schema = {"type": "object", "properties": {"name": {"type": "string", "pattern": "^[A-Z][a-z]{2,8}$"},
          "kind": {"enum": ["a", "bc"]}, "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}}},
          "required": ["name", "kind"]}
with Engine(on_stage=stages.append, num_kv_tokens=4096, num_threads=1) as engine:
    event.register("numba:run_pass", Listener())
    grammars = ProgramGrammars(engine.tokenizer, RoleMarks(engine.chat_template))
    sampling = SamplingParams(max_tokens=12, temperature=0.0)
    engine.generate("word " * 300, sampling)
    for handle in [engine.submit(f"{i} is", sampling) for i in range(9)]:
        handle.result()
    for kind, source in (("regex", "[1-9][0-9]{1,2}"), ("json_schema", json.dumps(schema)),
                         ("choice", json.dumps(["morning", "evening"])), ("cfg", 'start: "[" start* "]"')):
        engine.generate("Answer: ", sampling, grammar=grammars.get(Constraint(kind, source)).result())
    grammars.close()
print(json.dumps([stages, passes]))
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.model
def test_a_first_start_compiles_before_the_first_request(smollm2_path: Path, tmp_path: Path) -> None:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    num_all = len(list(functions()))
    progress = [*(f": {number} of {num_all}" for number in range(1, num_all + 1)), ""]
    for is_new in (True, False):  # a new machine; a machine that has all on disk
        command = [sys.executable, "-c", FIRST_START]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=True)
        stages, passes = json.loads(done.stdout.strip().splitlines()[-1])
        assert [stage.removeprefix(STAGE) for stage in stages] == (progress if is_new else [])
        assert not passes, "a request compiled something"
