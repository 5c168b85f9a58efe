"""The scripts that run where minutes of a GPU count, rehearsed on a CPU: every row, every part of what they print."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from ramet.runtime.models.weights import expected_tensors
from ramet.runtime.testing.dummy import describe_tiny, dummy_decoder

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """A script as a module; scripts import each other by bare names."""
    monkeypatch.syspath_prepend(SCRIPTS)
    before = set(sys.modules)
    yield import_module(request.param)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(SCRIPTS)):
            del sys.modules[name]


@pytest.mark.parametrize("script", ["bench_gpu"], indirect=True)
def test_every_row_of_the_gpu_benchmark_runs_on_a_cpu(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    arguments = ["--device", "cpu", "--tiny", "--scale", "128", "--shrink", "128", "--out", str(out), "--seconds", "60"]
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        script.main()
    shown = capsys.readouterr().out
    assert ended.value.code == 0, shown
    *rows, last = map(json.loads, out.read_text().splitlines())
    assert [line["row"]["row"] for line in rows] == script.ORDER
    assert set(script.ORDER) == {f"{kind}@{concurrency}" for kind, concurrency, _ in script.ROWS}
    assert all(line["row"]["tok_s"] > 0 for line in rows)
    assert json.loads(shown.splitlines()[-1])["rows"] == last["rows"] == [line["row"] for line in rows]
    assert last["failed"] == []
    hits = {row["row"]: row["hit_rate"] for row in last["rows"]}
    assert hits["unique@50"] == 0.0
    assert hits["fork@64"] > 0.9
    assert hits["rag@256"] > 0.5


@pytest.mark.parametrize("script", ["bench_gpu"], indirect=True)
def test_a_trace_gives_each_kernel_its_time_and_the_device_its_idle_share(script: ModuleType, tmp_path: Path) -> None:
    """Kernels of 8 us every 10 us, two of them at once in the middle, and events of the host beside."""
    events = [{"cat": "kernel", "name": f"kernel {i % 2}", "ts": 10.0 * i, "dur": 8.0, "ph": "X"} for i in range(100)]
    events += [{"cat": "kernel", "name": "_commit_kernel", "ts": 502.0 + 100 * i, "dur": 1.0} for i in range(2)]
    events += [{"cat": "kernel", "name": "beside", "ts": 502.0, "dur": 4.0}, {"cat": "cpu_op", "ts": 0.0, "dur": 999.0}]
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps({"traceEvents": [*reversed(events), {"cat": "kernel", "name": "instant", "ts": 5.0}]}))
    spans = script.spans_of(str(trace), ("kernel",))
    assert len(spans) == 103
    idle, steps, _, *lines = script.kernel_table(spans).splitlines()
    assert idle.startswith(("device idle 19.", "device idle 20."))
    assert steps == "2 steps of 0.403 ms of kernels"
    totals = {line.split("  ")[-1]: line.split() for line in lines}
    assert totals["kernel 0"][0] == "0.40"
    assert totals["kernel 0"][2:5] == ["50", "8.00", "200.0"]


@pytest.mark.parametrize("script", ["bench_host"], indirect=True)
def test_the_host_s_part_of_a_step_is_measured(script: ModuleType) -> None:
    record = script.measure("decode@2", script.steady(2, 8), 2)
    assert record["decode"]["steps"] >= 7
    assert {"schedule", "launch", "tree plans", "collect", "rest"} < record["mean"].keys()


@pytest.mark.parametrize("script", ["kernel_cases"], indirect=True)
def test_a_wrong_result_of_a_kernel_says_where(script: ModuleType) -> None:
    expected = torch.ones(2, 3, 4)
    actual = expected * 1.01
    assert script.difference(actual, expected).startswith("shape [2, 3, 4]: 0 wrong, largest difference 0.01 at ")
    actual[0, 2, 1], actual[1, 0, 3] = 1.5, torch.nan
    assert script.difference(actual, expected) == (
        "shape [2, 3, 4]: 2 wrong, largest difference inf at [1, 0, 3], first wrong at [0, 2, 1]: 1.5 instead of 1"
    )
    tokens = torch.tensor([5, 6, 7], dtype=torch.int32)
    assert script.difference(tokens + tokens.eq(6), tokens) == (
        "shape [3]: 1 wrong, largest difference 1 at [1], first wrong at [1]: 7 instead of 6"
    )


@pytest.mark.parametrize("script", ["simulate_rows"], indirect=True)
def test_simulated_rows_keep_the_batch_full_and_read_shared_prefixes_once(script: ModuleType) -> None:
    row = script.simulate("rag", 32, 64, {})
    plain = script.simulate("rag", 32, 64, {}, uses_tree=False)
    decode = row["steps"]["decode"]
    assert row["hit_rate"] > 0.9
    assert row["preemptions"] == 0
    assert decode["rows"] > 0.9 * 32
    assert decode["trees"] > 0.9
    assert decode["attention"] < 0.5 * decode["plain attention"]
    assert row["tok_s"] > plain["tok_s"]


@pytest.mark.parametrize("script", ["simulate_rows"], indirect=True)
def test_a_long_row_among_short_ones_is_cut_into_parts(script: ModuleType) -> None:
    """Without, its program reads on alone while the others have nothing to do."""
    lens = np.array([500] * 63 + [16_000])
    assert script.longest_part(lens) <= 1.1 * lens.sum() / 49
    cut, whole = (script.simulate("mixed", 64, 64, {}, cuts=cuts) for cuts in (True, False))
    assert cut["steps"]["decode"]["attention"] < 0.6 * whole["steps"]["decode"]["attention"]


@pytest.mark.parametrize("script", ["fit_table"], indirect=True)
def test_a_tile_is_taken_where_it_loses_least_over_all_cases(script: ModuleType) -> None:
    def record(case: str, run: str, us: float | None) -> dict[str, object]:
        facts = {"case": case, "run": run, "segments": [[4, 100]], "suffix_tokens": 10}
        return facts | ({} if us is None else {"us": us})

    def tree(case: str, default: float, other: float, third: float | None = None) -> list[dict[str, object]]:
        return [
            record(case, "plain parts 1", 90.0),
            record(case, "tree 128x64 w8 s5 x1 parts 2 *", default),
            record(case, "tree 64x64 w4 s3 x2 parts 2", other),
            record(case, "tree 64x64 w4 s3 x1 parts 2", third),
            record(case, "tree 64x64 w4 s3 x2 parts 2 side stream", 0.1),
            record(case, "tree 128x64 w8 s5 x1 parts 1", 0.1),
        ]

    default, best = script.DEFAULT_TREE, script.TileConfig(64, 64, 4, 3)
    records = tree("tree a", 40.0, 30.0) + tree("tree b", 50.0, 40.0, 1.0)
    assert script.fit_tile(records, "tree") == (best, " x2")
    assert [round(case.tree_s * 1e6) for case in script.tree_cases(records, default, " x1")] == [40, 50]
    assert [round(case.tree_s * 1e6) for case in script.tree_cases(records, best, " x2")] == [30, 40]
    assert script.fit_tile(tree("tree a", 40.0, 39.8), "tree") is None, "too little to gain"
    assert script.fit_tile(tree("tree a", 40.0, 30.0), "decode") is None
    decode = [
        record("decode llama-8b 8x100", "16x64 w4 s5 parts 4 fused *", 9.0),
        record("decode llama-8b 8x100", "16x32 w2 s7 parts 4 fused", 8.0),
        record("decode llama-8b 8x100", "16x64 w4 s5 parts 8 fused", 1.0),
        record("decode llama-8b 8x100", "16x64 w4 s5 parts 4 merge", 1.0),
    ]
    assert script.fit_tile(decode, "decode llama-8b") == (script.TileConfig(16, 32, 2, 7), "")
    assert script.fit_parts(decode) == 2 * script.PROGRAMS_PER_SM
    assert script.fit_parts(decode[:2]) is None
    assert script.fit_parts([]) is None


@pytest.mark.parametrize("script", ["fit_table"], indirect=True)
def test_what_a_table_switches_on_was_measured_to_be_faster(script: ModuleType) -> None:
    def gate(rows: int, name: str, us: float | None) -> dict[str, object]:
        tile = {} if name == "cuBLAS" else {"config": ["tile", 64, 64, 4, 4, False, 128]}
        return {"section": "gate", "B": rows, "name": name, "us": us, "outputs": 14336, "depth": 4096, **tile}

    tile = script.GemvConfig("tile", 64, 64, 4, 4, block_m=128)
    faster = [gate(64, "cuBLAS", 90.0), gate(64, "a", 85.0), gate(64, "b", None), gate(64, "c", 99.0)]
    slower = [gate(128, "cuBLAS", 90.0), gate(128, "a", 89.0)]
    assert script.fit_gated(faster + slower) == {script.Product(64, 14336, 4096, True): tile}
    name = "with norm, silu, residual: cuBLAS + kernels"
    stack = [{"section": "stack", "B": 1, "name": name, "us": 100.0}]
    assert not script.fit_early(stack)
    assert script.fit_early([*stack, {**stack[0], "name": f"{name}, early launch", "us": 97.0}])
    assert not script.fit_early([*stack, {**stack[0], "name": f"{name}, early launch", "us": 100.0}])
    cases = [{"case": "decode", "run": run, "us": us} for run, us in (("tile *", 50.0), ("other", 10.0))]
    assert script.fit_page_size(cases, [{**cases[0], "us": 48.0}, {**cases[1], "us": 99.0}]) == 64
    assert script.fit_page_size(cases, [{**cases[0], "us": 50.0}, {**cases[1], "us": 1.0}]) is None
    assert script.fit_page_size(cases, []) is None


@pytest.mark.parametrize("script", ["fit_table"], indirect=True)
def test_the_tile_of_decode_is_the_one_for_the_pages_that_are_taken(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def write(name: str, default: float, narrow: float, wide: float) -> str:
        runs = {"16x64 w4 s5 parts 4 fused *": default, "16x32 w2 s5 parts 4 fused": narrow}
        runs["16x128 w4 s3 parts 4 fused"] = wide
        records = [{"case": "decode llama-8b 8x100", "run": run, "us": us} for run, us in runs.items()]
        (tmp_path / name).write_text(json.dumps({"device": "a card", "records": records}))
        return str(tmp_path / name)

    def fitted(pages: str) -> tuple[int | None, int]:
        out = str(tmp_path / "table.json")
        arguments = ["--attention", write("16.json", 50.0, 40.0, 60.0), "--pages", pages, "--out", out]
        monkeypatch.setattr(sys, "argv", ["fit_table.py", *arguments])
        script.main()
        table = json.loads(Path(out).read_text())
        return table["page_size"], table["tiles"]["decode"]["block_n"]

    assert fitted(write("64.json", 45.0, 44.0, 35.0)) == (64, 128)
    assert fitted(write("64.json", 50.0, 44.0, 35.0)) == (None, 32)


@pytest.mark.parametrize("script", ["sim_cluster"], indirect=True)
def test_the_simulated_cluster_serves_all_and_its_router_computes_least(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    arguments = ["--replicas", "8", "--requests", "6000", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["sim_cluster.py", *arguments])
    script.main()
    capsys.readouterr()
    rows = json.loads(out.read_text())["replicas_8"]
    assert set(rows) == set(script.RULES)
    assert {row["requests"] for row in rows.values()} == {6000}
    prefilled = {name: row["prefilled_tokens"] for name, row in rows.items()}
    assert min(prefilled, key=prefilled.__getitem__) == "ramet"
    assert prefilled["random"] > 2 * prefilled["ramet"]
    assert rows["ramet"]["over_floor"] >= 1.0


@pytest.mark.parametrize("script", ["sim_cluster"], indirect=True)
def test_simulated_caches_tell_the_router_the_truth(script: ModuleType) -> None:
    rule = script.Ramet(4)
    checked = 0

    class Checked(script.Counted):  # type: ignore[misc, name-defined]
        def told(self, replica: int, changes: object) -> None:
            nonlocal checked
            self.rule.told(replica, changes)
            known = held.setdefault(replica, set())
            known.difference_update(changes.removed)  # type: ignore[attr-defined]
            known.update(changes.added)  # type: ignore[attr-defined]
            index = rule.router.index
            assert index.num_keys == sum(map(len, held.values()))
            checked += all(index.holds(key, replica) for key in known)

    held: dict[int, set[int]] = {}
    script.simulate(Checked(rule), script.Work(4, 500, 30.0, 0))
    assert checked == 1000


RUNGS = ["eager", "decode graphs", "mixed graphs", "overlap", "tree", "device grammar", "drafts", "pages of 64"]
RUNGS += ["early launch", "gated products", "folded layers"]


@pytest.mark.parametrize(
    ("plants", "flags"),
    [
        ({"eager": "crash"}, []),
        (
            {"decode graphs": "crash", "overlap": "wrong", "device grammar": "crash", "pages of 64": "wrong"},
            ["cuda_graph=false", "overlap=false", "grammar_on_device=false", "page_size=16"],
        ),
        (
            {"mixed graphs": "wrong", "tree": "crash", "gated products": "crash", "folded layers": "wrong"},
            ["cuda_graph_max_extend=0", 'tree_attention="off"', "--no-gate", "--no-fold"],
        ),
    ],
)
def test_a_feature_that_fails_on_a_machine_costs_itself_alone(
    plants: dict[str, str], flags: list[str], tmp_path: Path
) -> None:
    """Every rung fails once, in a process that ends or by other tokens; all others pass and are on in those above."""
    planted = ",".join(f"{name}={how}" for name, how in plants.items())
    command = [sys.executable, "-W", "ignore", str(SCRIPTS / "ladder.py"), "--out", str(tmp_path), "--device", "cpu"]
    done = subprocess.run(
        [*command, "--tiny", "--limit", "300", "--plant", planted], capture_output=True, text=True, check=False
    )
    lines = [json.loads(line) for line in (tmp_path / "ladder.jsonl").read_text().splitlines()]
    verdicts = {line["rung"]: line["ok"] for line in lines if "ok" in line}
    log = (tmp_path / "ladder.log").read_text()
    assert "Fatal Python error: Aborted" in log, "a crash leaves its stack"
    if "eager" in plants:
        assert done.returncode == 3, done.stdout + done.stderr
        assert verdicts == {"eager": False}
        left_out = (tmp_path / "flags.txt").read_text().splitlines()
        assert {"cuda_graph=false", "page_size=16", "--no-fold"} <= set(left_out), "what did not run is left out, too"
        return
    assert done.returncode == 0, done.stdout + done.stderr + log
    assert verdicts == {name: name not in plants for name in RUNGS}
    assert (tmp_path / "flags.txt").read_text().splitlines() == flags
    on = next(line["on"] for line in reversed(lines) if "on" in line)
    assert on == [name for name in RUNGS if name not in plants or name == RUNGS[-1]]


@pytest.mark.parametrize("script", ["gptq"], indirect=True)
def test_a_calibration_makes_the_products_of_4_bit_weights_better(script: ModuleType) -> None:
    torch.manual_seed(0)
    x = torch.randn(2000, 96) @ torch.randn(96, 96) * torch.logspace(-1, 1, 96)
    weight = torch.randn(40, 96)
    plain, calibrated = script.in_4_bits(weight), script.in_4_bits_for(weight, x.T @ x)
    errors = [float(((rounded - weight) @ x.T).norm()) for rounded in (plain, calibrated)]
    assert errors[1] < 0.8 * errors[0], errors
    for rounded in (plain, calibrated):  # 16 values a group of columns
        assert all(len(group.unique()) <= 16 for row in rounded for group in row.split(script.group_of(96)))
    tiny = describe_tiny()
    decoder = dummy_decoder(tiny.config, "cpu", torch.float32)
    found = script.calibrate(decoder, [[i % 200 for i in range(start, start + 64)] for start in range(4)])
    shapes = expected_tensors(tiny.config)
    assert {name: tuple(matrix.shape) for name, matrix in found.items()} == {
        name: shape for name, shape in shapes.items() if ".layers." in name and len(shape) == 2
    }
