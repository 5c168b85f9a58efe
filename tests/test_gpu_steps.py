"""The steps of a run on a card: what fails costs itself alone; what was found is set beside the targets."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[1] / "benchmarks"
PARTS = ("ladder", "engine", "kernels")
HOWS = ("crash", "exit", "hang")
# Stands for Python: ends at once, and writes what the scripts write that later steps read.
FAKE = """
import json, os, sys
words = sys.argv[1:]
if words[0] == "-c":
    os.execv(sys.executable, [sys.executable, "-S", *words])
options = {a: b for a, b in zip(words, words[1:]) if a.startswith("--")}
name = words[0].rsplit("/", 1)[-1]
if name == "bench_gpu.py":
    with open(options["--out"], "a") as file:
        for row in options["--rows"].split(","):
            if row == os.environ.get("BREAKS_AT") and not any("tree_attention" in word for word in words):
                os.abort()
            figures = {"row": row, "tok_s": 9e9, "ratio": 1.0, "itl_p50_ms": 1.0, "ttft_p50_ms": 1.0}
            config = dict(word.split("=") for word in words if "=" in word)
            line = {"benchmark": "gpu", "label": options["--label"], "config": config, "row": figures}
            print(json.dumps(line), file=file, flush=True)
if name == "compile_kernels.py":
    open(os.environ["TRITON_CACHE_DIR"] + "/a.cubin", "w")
if name in ("fit_table.py", "ladder.py"):
    out = options["--out"] if name == "fit_table.py" else options["--out"] + "/flags.txt"
    open(out, "w").write("{}" if name == "fit_table.py" else "overlap=false\\n--no-fold\\n")
"""


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setenv("COMMIT", "abc")
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    before = set(sys.modules)
    module = import_module("gpu_steps")
    monkeypatch.setattr(module, "PLANTED_S", 0.4)
    yield module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(SCRIPTS)):
            del sys.modules[name]


def make_run(steps: ModuleType, part: str, folder: Path, plants: dict[str, str], seconds: float = 300.0) -> Any:  # Run
    python = folder / "python"
    (folder / "fake.py").write_text(FAKE)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S {shlex.quote(str(folder / "fake.py"))} "$@"\n')
    python.chmod(0o755)
    for name in ("out", "keep"):
        (folder / name).mkdir(exist_ok=True)
    run = steps.Run(part, folder / "out", folder / "keep", True, time.monotonic() + seconds)
    run.plants, run.python = plants, str(python)
    return run


def statuses(steps: ModuleType, folder: Path) -> dict[str, int]:
    lines = steps.read([folder / "out"])
    return {line["step"]: line["status"] for line in lines if line["benchmark"] == "gpu-steps"}


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("part", PARTS)
def test_a_step_that_fails_costs_itself_alone(steps: ModuleType, part: str, how: str, tmp_path: Path) -> None:
    """Every second step fails, the others in the next way: each fails at least once, and each passes."""
    names = [step.name for step in make_run(steps, part, tmp_path, {}).steps() if step.name != "launch"]
    planted = names[HOWS.index(how) % 2 :: 2]
    make_run(steps, part, tmp_path, dict.fromkeys(planted, how)).go()
    found = statuses(steps, tmp_path)
    failed = [name for name, status in found.items() if status != 0]
    assert ("check, CUDA_LAUNCH_BLOCKING" in found) == ("check" in planted and how == "crash")
    assert failed == [name for name in planted if name in found], found
    assert set(names) - set(found) <= {"rows-again"}, "no row was measured before, or all were, and no target is missed"
    done = {line["row"]["row"] for line in steps.read([tmp_path / "out"]) if "row" in line}
    wanted = {"ladder": ["decode1@1", "unique@10"], "engine": [*steps.FEW, *steps.SHARED, *steps.MANY], "kernels": []}
    assert done >= set(wanted[part]), "rows of a process that fails are measured by the next"
    log = (tmp_path / "out" / "log.txt").read_text()
    if how != "exit":
        assert log.count("Aborted") >= len(failed), "each says where it was"
    if part == "kernels" and "fit" not in planted:
        assert "kernel_table" in log, "what comes later uses what was fitted"
    if part == "ladder" and "ladder" not in planted:
        assert "--set overlap=false" in log, "what failed is left out of what comes later"


def test_where_nothing_can_be_launched_nothing_else_is_tried(steps: ModuleType, tmp_path: Path) -> None:
    run = make_run(steps, "ladder", tmp_path, {"launch": "crash"})
    run.dry = False
    run.go()
    assert statuses(steps, tmp_path) == {"launch": -6}


def test_only_rows_that_were_not_measured_run_again_and_ratios_have_both_rows(
    steps: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BREAKS_AT", "json@32")
    run = make_run(steps, "engine", tmp_path, {})
    step = next(step for step in run.steps() if step.name == "rows-few")
    assert step.run(step) == 0
    rows = [(line["row"]["row"], line["label"]) for line in steps.read([tmp_path / "out"]) if "row" in line]
    first = [(row, "rows") for row in steps.FEW[:-1]]
    assert rows == [*first, ("json@32", 'tree_attention="off"'), ("jsonoff@32", 'tree_attention="off"')]
    assert list(statuses(steps, tmp_path)) == ["rows-few", 'rows-few, tree_attention="off"']


def test_no_step_begins_when_time_is_over_and_the_last_one_is_cut_short(steps: ModuleType, tmp_path: Path) -> None:
    run = make_run(steps, "kernels", tmp_path, {}, seconds=steps.LEAST_S + 0.2)
    assert run.run("long", 100.0, [sys.executable, "-c", "import time; time.sleep(0.3)"]) == 0
    assert run.run("late", 100.0, [run.python, "fit_table.py"]) == 125
    assert run.run("missing", 100.0, ["/no/such/program"]) == 125
    run.end_s += 60
    assert run.run("missing", 100.0, ["/no/such/program"]) == 126
    noisy = "print('begin'); print('x' * (4 << 20)); print('ValueError: at its end'); raise SystemExit(2)"
    assert run.run("noisy", 100.0, [sys.executable, "-c", noisy]) == 2
    assert (tmp_path / "out" / "log.txt").stat().st_size < 1.1 * steps.LOG_BYTES
    assert steps.read([tmp_path / "out"])[-1]["last"] == "ValueError: at its end"


@pytest.mark.parametrize("part", PARTS)
def test_the_steps_of_a_part_are_expected_to_begin_in_time(steps: ModuleType, part: str, tmp_path: Path) -> None:
    run = make_run(steps, part, tmp_path, {})
    begins_s = 25.0
    for step in run.steps():
        assert step.expected_s < step.limit_s
        assert begins_s < steps.ALL_S[part], step.name
        begins_s += step.expected_s


def test_the_table_says_what_is_met(steps: ModuleType) -> None:
    report = import_module("gpu_report")

    def row(
        name: str, label: str = "rows", config: dict[str, object] | None = None, **figures: float
    ) -> dict[str, object]:
        return {"benchmark": "gpu", "label": label, "config": config or {}, "row": {"row": name, **figures}}

    lines = [
        row("decode1@1", itl_p50_ms=5.7, tok_s=170.0),
        row("unique@50", tok_s=2700.0),
        row("unique@50", "again", {"kernel_table": "/x/table.json", "mem_fraction_static": 0.85}, tok_s=2790.0),
        row("unique@50", "profile", tok_s=9999.0, idle_percent=3.25),
        row("fork@64", 'tree_attention="off"', {"tree_attention": "off"}, tok_s=3000.0),
        row("rag@50", tok_s=5000.0),
        {"benchmark": "start", "times": {"first token": {"new_s": 41.0}}},
        {"benchmark": "start", "times": {"first token": {"new_s": 41.0, "warm_s": 7.5}}},
        {"benchmark": "gpu-checks", "section": "soak", "ok": True, "finished": 9},
        row("rag@50", "no-tree", {"tree_attention": "off"}, tok_s=4000.0),
        {"benchmark": "gpu", "label": "no-tree", "rows": [], "failed": []},
        {"benchmark": "gpu-card", "device": "a card", "facts": {"copy_tb_s": 3.0}},
        {"benchmark": "gpu-steps", "step": "fit", "status": -6, "why": "SIGABRT", "last": "KeyError: 'us'"},
    ]
    shown = {line[:14].strip(): line for line in report.table(lines).splitlines()}
    assert " met " in shown["decode1@1"]
    assert "2790" in shown["unique@50"]
    assert "2700; 2790 (kernel_table=fitted)" in shown["unique@50"]
    assert "BEHIND" in shown["fork@64"], "slower than the others"
    assert "MISSED" in shown["rag@50"]
    assert "MISSED" in shown["start, cold"]
    assert " met " in shown["start, warm"]
    assert "not measured" in shown["json@32"]
    assert {"fork@64", "rag@50", "json@32", "start, cold"} <= set(report.missed(lines))
    assert not {"decode1@1", "unique@50", "start, warm"} & set(report.missed(lines))
    said = "\n".join(report.facts(lines))
    assert "idle share, %: unique@50 3.25" in said
    assert "step fit: SIGABRT: KeyError: 'us'" in said
    assert "soak: ok, finished 9" in said
    assert "deterministic: not measured" in said
    assert "no-tree: rag@50 4000 tok/s" in said


@pytest.mark.slow
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("part", PARTS)
def test_a_rehearsal_survives_the_failure_of_every_second_step(part: str, how: str, half: int, tmp_path: Path) -> None:
    """The commands themselves, on a CPU: what is planted fails, and nothing else does."""
    command = [sys.executable, str(SCRIPTS / "gpu_steps.py"), part, str(tmp_path / "out"), "--keep", str(tmp_path)]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONFAULTHANDLER": "1"}
    environment |= {"PYTHONPATH": str(SCRIPTS.parent), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    (tmp_path / "triton").mkdir()
    shown = subprocess.run([*command, "--plan"], env=environment, capture_output=True, text=True, check=True).stdout
    table = shown[shown.index("step ") :].splitlines()[1:-1]
    names = [line.split()[0] for line in table if not line.startswith("launch ")]
    planted = ",".join(f"{name}={how}" for name in names[half::2])
    subprocess.run([*command, "--dry-run", "--plant", planted], env=environment, capture_output=True, check=False)
    lines = [json.loads(line) for line in (tmp_path / "out" / "gpu.jsonl").read_text().splitlines()]
    failed = [line["step"] for line in lines if line["benchmark"] == "gpu-steps" and line["status"] != 0]
    assert failed == names[half::2]
    assert len(list((tmp_path / "out").iterdir())) <= 8
