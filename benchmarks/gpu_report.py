"""What runs on a card found, as one table: each row beside the best of other engines and the target, met or missed.

    python benchmarks/gpu_report.py OUT1 OUT2 ...                    folders of run_on_gpu.sh, of one machine or several
    python benchmarks/gpu_report.py OUT1 --append benchmarks/results/gpu.jsonl    keep their lines, for the docs to cite

Reads gpu.jsonl of each folder (or a file of such lines). A row that was measured several times shows its best figure,
and all of them with what was special about each run. The others are SGLang 0.5.17 and vLLM 0.26.0, the better of both,
on an H100 SXM 80 GB, the same workloads and shapes, measured on 2026-11-23 (torch 2.11, CUDA 13.0): compare only with
the same card.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Line = dict[str, Any]  # JSON
LINES = "gpu.jsonl"  # in a run's folder


@dataclass(frozen=True, slots=True)
class Target:
    """A row's figure (its name in the row's record), the best of the others, what is wanted, and what is possible."""

    figure: str
    others: float
    target: float
    floor: float | None = None

    @property
    def is_time(self) -> bool:
        return self.figure.endswith("_ms") or self.figure == "s"

    def is_met(self, value: float) -> bool:
        return value <= self.target if self.is_time else value >= self.target

    def best(self, values: Iterable[float]) -> float:
        return min(values) if self.is_time else max(values)


TARGETS: dict[str, Target] = {
    "decode1@1": Target("itl_p50_ms", 6.37, 5.8, 5.63),
    "unique@10": Target("ttft_p50_ms", 198, 160),
    "unique@50": Target("tok_s", 2676, 2780, 2940),
    "unique@256": Target("tok_s", 3726, 3800, 3950),
    "rag@50": Target("tok_s", 4360, 6000, 6670),
    "rag@256": Target("tok_s", 8684, 14_000, 16_700),
    "multiturn@50": Target("tok_s", 5069, 5700, 6140),
    "multiturn@256": Target("tok_s", 11_397, 12_300, 13_200),
    "agentic@50": Target("tok_s", 3710, 4400, 4730),
    "agentic@256": Target("tok_s", 6400, 7700, 8200),
    "fork@64": Target("tok_s", 3593, 8500, 9790),
    "json@1": Target("ratio", 1.00, 0.98),
    "json@32": Target("ratio", 0.76, 0.98),
    "json@128": Target("ratio", 0.58, 0.98),
    "start, cold": Target("s", 139, 30),
    "start, warm": Target("s", 31, 8),
}


def figures(lines: Iterable[Line]) -> dict[str, list[tuple[float, str]]]:
    """The measured figures of each row of TARGETS, and what was special about the run, in the order of the lines."""
    found: dict[str, list[tuple[float, str]]] = {name: [] for name in TARGETS}
    for line in lines:
        if line.get("benchmark") == "start":
            for name, seconds in line["times"].get("first token", {}).items():
                found["start, cold" if name == "new_s" else "start, warm"].append((seconds, ""))
        row = line.get("row", {})
        target = TARGETS.get(row.get("row", ""))
        if target is not None and target.figure in row and line.get("label") in WITH_FIGURES:
            found[row["row"]].append((row[target.figure], special(line)))
    return {
        name: list(dict.fromkeys(runs)) for name, runs in found.items()
    }  # a start is told twice: when it is half done


WITH_FIGURES = ("rows", "again", 'tree_attention="off"', "cuda_graph=false")  # not those beside a profiler


def special(line: Line) -> str:
    """A run's configuration, without what all runs have."""
    config = {key: value for key, value in line.get("config", {}).items() if key != "mem_fraction_static"}
    if "kernel_table" in config:
        config["kernel_table"] = "fitted"
    return ", ".join(f"{key}={value}" for key, value in config.items())


def missed(lines: Iterable[Line]) -> list[str]:
    """The rows whose target no run has met, or that no run has measured."""
    found = figures(lines)
    return [name for name, target in TARGETS.items() if not any(target.is_met(value) for value, _ in found[name])]


def table(lines: list[Line]) -> str:
    found = figures(lines)
    shown = [f"{'row':14} {'figure':12} {'Ramet':>8} {'others':>8} {'target':>8} {'floor':>8}  verdict       runs"]
    for name, target in TARGETS.items():
        runs = found[name]
        value = target.best(value for value, _ in runs) if runs else None
        verdict = "not measured" if value is None else "met" if target.is_met(value) else "MISSED"
        if value is not None and not target.is_met(value) and target.best((value, target.others)) != value:
            verdict = "BEHIND"
        each = "; ".join(f"{value:g}" + (f" ({what})" if what else "") for value, what in runs)
        shown.append(
            f"{name:14} {target.figure:12} {'-' if value is None else f'{value:g}':>8} {target.others:8g} "
            f"{target.target:8g} {target.floor or '-':>8}  {verdict:12}  {each}"
        )
    shown.append("MISSED: not the target; BEHIND: nor the best of the others. Times in ms or s, tok_s in tokens/s.")
    return "\n".join(shown)


def facts(lines: list[Line]) -> list[str]:
    """Everything else that was asked of a card, a line each."""
    shown = [f"card: {line['device']}, {line['facts']}" for line in lines if line.get("benchmark") == "gpu-card"]
    for name in ("reference", "same", "deterministic", "grammar", "soak"):
        mine = [line for line in lines if line.get("benchmark") == "gpu-checks" and line["section"] == name]
        shown += [f"{name}: {'ok' if line['ok'] else 'FAILED'}, {short(line)}" for line in mine]
        shown += [] if mine else [f"{name}: not measured"]
    idle = {line["row"]["row"]: line["row"]["idle_percent"] for line in lines if "idle_percent" in line.get("row", {})}
    shown.append("idle share, %: " + (", ".join(f"{row} {value:g}" for row, value in idle.items()) or "not measured"))
    for label in ("no-tree", "deterministic"):
        rows = [line["row"] for line in lines if line.get("label") == label and "row" in line]
        shown += [f"{label}: {row['row']} {row['tok_s']:g} tok/s" for row in rows]
    steps = {line["step"]: line for line in lines if line.get("benchmark") == "gpu-steps"}
    for name, line in steps.items():
        if line["status"] != 0:
            shown.append(f"step {name}: {line['why']}: {line['last']}")
    shown += [f"{name}: ok" for name in ("sanitizer", "kernel-tests", "check", "attention") if passed(steps, name)]
    return shown


def passed(steps: dict[str, Line], name: str) -> bool:
    return name in steps and steps[name]["status"] == 0


def short(line: Line) -> str:
    hidden = ("benchmark", "section", "ok", "commit", "device", "rows")
    return ", ".join(f"{key} {value}" for key, value in line.items() if key not in hidden)[:300]


def read(paths: Iterable[Path]) -> list[Line]:
    """All lines of these folders or files; those that a kill cut off are named and left out."""
    found: list[Line] = []
    for path in paths:
        file = path / LINES if path.is_dir() else path
        for number, text in enumerate(file.read_text().splitlines() if file.is_file() else (), 1):
            try:
                found.append(json.loads(text))
            except ValueError:
                print(f"{file}:{number} is no JSON: {text[:80]}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--append", type=Path, help="append all lines to this file")
    args = parser.parse_args()
    lines = read(args.folders)
    for fact in facts(lines):
        print(fact)
    print(table(lines))
    if args.append is not None:
        with args.append.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    main()
