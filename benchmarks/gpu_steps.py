"""The steps of a run on a card: in which order, for how long at most, and what a failure costs: that step alone.

    python benchmarks/gpu_steps.py engine OUT        run_on_gpu.sh calls this when it has made the machine ready
    python benchmarks/gpu_steps.py engine OUT --dry-run [--plant products=crash]    the same on a CPU with toy shapes
    python benchmarks/gpu_steps.py engine OUT --plan                                the steps, and nothing is run
    python benchmarks/gpu_steps.py engine OUT --only rows-few,profile               some of them

Each step is a process of its own. At its limit it gets SIGABRT, so that Python prints where every thread is, and then
SIGKILL; its children end with it. None begins when the run's seconds are nearly over; a step's own limit is cut to
what is left. OUT/log.txt gets what steps print (of one that prints very much its begin and its end), OUT/gpu.jsonl what
they found and a line for each step: its status, its seconds, and its last words. The table of gpu_report.py comes last.

Rows run in three processes. What a process leaves unmeasured starts again without tree attention, then without graphs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from gpu_report import LINES, facts, missed, read, table
from json_line import commit

HERE = Path(__file__).parent
WHEELS = HERE.parent / ".whl"  # what pack_for_gpu.sh gathered
ALL_S = {"ladder": 290.0, "engine": 580.0, "kernels": 580.0}  # of a part, what came before the first step included
NO_ENGINE = 3  # ladder.py's exit status where its rung 0 fails
LEAST_S = 15.0  # no step is begun with less
LOG_BYTES = 1 << 20  # of one step
STACKS_S = 5.0  # for what a step says when it is ended
FALLBACKS = ('tree_attention="off"', "cuda_graph=false")
FEW = ["decode1@1", "unique@50", "jsonoff@32", "json@32"]
SHARED = ["fork@64", "rag@50", "agentic@50", "multiturn@50", "unique@10", "mixed@64"]
MANY = ["rag@256", "multiturn@256", "agentic@256", "unique@256"]
MANY += ["jsonoff@128", "json@128", "jsonoff@1", "json@1"]
PLANTED_S = 5.0  # of a step that is to hang
PLANTS = {"crash": "import os; os.abort()", "hang": "import time; time.sleep(1e6)", "exit": "raise SystemExit(3)"}


@dataclass(frozen=True, slots=True)
class Step:
    """limit_s: at most. expected_s: a guess, made without a card. run: what it does; None where a command says it."""

    name: str
    limit_s: float
    expected_s: float
    run: Callable[[Step], int | None]


@dataclass
class Run:
    """One part of the measurements, and what steps need of the ones before them."""

    part: str
    out: Path
    keep: Path  # what later parts use, on the same machine
    dry: bool
    end_s: float  # of time.monotonic()
    slack: float = 1.0  # times every limit: on a slower machine than one with a card
    only: list[str] = field(default_factory=list)  # steps; all if empty
    model: Path | None = None  # a file of real weights
    plants: dict[str, str] = field(default_factory=dict)
    python: str = sys.executable
    last: str = ""  # words of the step before, if it failed
    has_kernels: bool = False  # a launch found its kernel among those that came here: others will, too

    def steps(self) -> Iterator[Step]:
        """In the order of their worth. Limits and guesses of a part add up to more, and less, than its time."""

        def command(name: str, limit_s: float, expected_s: float, words: Callable[[], list[str]]) -> Step:
            return Step(name, limit_s, expected_s, lambda step: self.run(step.name, step.limit_s, words()))

        def rows(name: str, limit_s: float, expected_s: float, wanted: list[str]) -> Step:
            return Step(name, limit_s, expected_s, lambda step: self.rows(step, wanted, "rows"))

        def profile(*more: str) -> list[str]:
            return self.bench_gpu("--rows", "decode1@1,fork@64,unique@50", "--most", "60", "--label", "profile", *more)

        if not self.dry:
            yield Step("launch", 60, 10, self.launch)
        yield command("compile-ahead", 60, 15, self.compile_ahead)
        # Both compile first what they launch, in processes of their own: of the first nearly all came along.
        workers = ["--workers", "0"] if self.has_kernels else []
        kernels = self.script("bench_kernels.py", *self.dry_run, *workers)
        attention = self.script("bench_attention.py", *self.dry_run)
        checks = self.script("check_gpu.py", *self.dry_device, "--out", self.lines)
        if self.part == "ladder":
            checked = [*kernels, "--sections", "check", *self.to("check.json")]
            yield Step("check", 70, 40, lambda step: self.run_or_block(step, checked))
            yield command("ladder", 180, 100, self.ladder)
            yield rows("rows-first", 70, 45, ["decode1@1", "unique@10"])
            yield command("attention", 50, 40, lambda: [
                *attention, "--sections", "tree,decode", "--seconds", "35", *self.to("attention.json"),
            ])  # fmt: skip
        if self.part == "engine":
            yield rows("rows-few", 100, 50, FEW)
            yield rows("rows-shared", 130, 65, SHARED)
            yield rows("rows-many", 160, 105, MANY)
            yield command("checks", 100, 60, lambda: [
                *checks, *self.flags(), *self.known("random"), "--sections", "reference,same",
            ])  # fmt: skip
            yield command("profile", 100, 70, lambda: profile("--profile", str(self.out / "trace.json.gz")))
            yield command("start", 150, 60, self.start)
            yield command("grammar-soak", 70, 45, lambda: [
                *checks, *self.flags(), "--sections", "grammar,soak", "--soak", "4" if self.dry else "25",
            ])  # fmt: skip
            yield command("deterministic", 60, 40, lambda: [*checks, *self.flags(), "--sections", "deterministic"])
            yield command("no-tree", 45, 35, lambda: self.bench_gpu(
                "--rows", "fork@64,rag@50", "--label", "no-tree", "--set", 'tree_attention="off"',
            ))  # fmt: skip
            yield command("deterministic-cost", 45, 35, lambda: self.bench_gpu(
                "--rows", "unique@50", "--label", "deterministic", "--set", "deterministic=true",
            ))  # fmt: skip
        if self.part == "kernels":
            yield command("tree-decode", 130, 100, lambda: [
                *attention, "--sections", "tree,decode", "--seconds", "110", *self.to("attention.json"),
            ])  # fmt: skip
            yield command("products", 110, 70, lambda: [
                *kernels, "--sections", "gemv,gate,stack", *self.to("products.json"),
            ])  # fmt: skip
            yield command("pages", 50, 35, lambda: [
                *attention, "--sections", "decode", "--page", "64", "--seconds", "40", *self.to("pages.json"),
            ])  # fmt: skip
            yield command("extend", 60, 50, lambda: [
                *attention, "--sections", "extend", "--seconds", "50", *self.to("extend.json"),
            ])  # fmt: skip
            yield command("fit", 20, 8, self.fit)
            yield Step("rows-again", 180, 110, self.rows_again)
            if self.model:
                yield command("real-model", 60, 35, lambda: [
                    *checks, *self.flags(), "--model", str(self.model), *self.known(self.model.stem), *REFERENCE,
                ])  # fmt: skip
            yield command("sanitizer", 60, 45, lambda: self.sanitizer("memcheck"))
            yield command("kernel-tests", 110, 70, lambda: [*self.pytest(), *self.tests()])
            yield command("others", 50, 35, lambda: [
                *kernels, "--sections", "sampling,masks,small", *self.to("others.json"),
            ])  # fmt: skip
            yield command("racecheck", 60, 45, lambda: self.sanitizer("racecheck"))

    # What commands are made of.

    @property
    def dry_run(self) -> list[str]:
        return ["--dry-run"] if self.dry else []

    @property
    def dry_device(self) -> list[str]:
        return ["--device", "cpu", "--tiny"] if self.dry else []

    @property
    def lines(self) -> str:
        return str(self.out / LINES)

    def script(self, name: str, *words: str) -> list[str]:
        return [self.python, str(HERE / name), *words]

    def to(self, name: str) -> list[str]:
        return ["--out", str(self.out / name)]

    def kept(self, name: str) -> Path | None:
        """A file that an earlier step or part made, or that came with the wheels."""
        return next((file for folder in (self.out, self.keep, WHEELS) if (file := folder / name).is_file()), None)

    def known(self, weights: str) -> list[str]:
        """What a CPU gave for these weights: compiling its kernels and computing it takes a minute."""
        file = WHEELS / f"{weights}.json"
        return ["--reference", str(file)] if file.is_file() and not self.dry else []

    def flags(self, *, fit: bool = False) -> list[str]:
        """What leaves out the features that failed: settings of an engine, or options of fit_table.py."""
        file = self.kept("flags.txt")
        found = file.read_text().split("\n") if file else []
        options = [line for line in found if line.startswith("--")]
        return options if fit else [word for line in found if line and line not in options for word in ("--set", line)]

    def bench_gpu(self, *words: str) -> list[str]:
        """A measurement with the fitted table and the features that work."""
        chosen = self.kept("table.json")
        sizes = ["--scale", "64", "--shrink", "64"] if self.dry else MEMORY
        table = ["--set", f"kernel_table={json.dumps(str(chosen.resolve()))}"] if chosen else []
        return self.script(
            "bench_gpu.py", *self.dry_device, *sizes, *table, *self.flags(), *words, "--out", self.lines
        )  # fmt: skip

    def ladder(self) -> list[str]:
        limits = ["--limit", str(40 * self.slack), "--seconds", str(170 * self.slack)]
        return self.script("ladder.py", *self.dry_device, *limits, *self.to(""))

    def start(self) -> list[str]:
        device = ["--device", "cpu"] if self.dry else ["--device", "cuda", *MEMORY]
        return self.script("bench_start.py", *device, "--rounds", "1", "--out", self.lines)

    def fit(self) -> list[str]:
        found = {"--kernels": "products.json", "--attention": "attention.json", "--pages": "pages.json"}
        words = [word for option, name in found.items() for word in (option, str(self.out / name))]
        words[4:4] = [str(self.out / "extend.json")]
        return self.script("fit_table.py", *self.flags(fit=True), *words, *self.to("table.json"))

    def compile_ahead(self) -> list[str]:
        """Fill Triton's cache on all cores at once; no kernel is launched."""
        workers = 1 if self.dry else 12
        only = "prepare_decode" if self.dry else AHEAD
        chosen = self.kept("table.json")
        words = self.script("compile_kernels.py", "--candidates", "--only", only)
        words += ["--kernel-table", str(chosen)] if chosen else []
        count = "$(find $TRITON_CACHE_DIR -name '*.cubin' | wc -l)"
        shell = f'for share in $(seq 0 {workers - 1}); do "$@" --share "$share/{workers}" & done; wait'
        shell = f"before={count}; ({shell}) 2>&1 | grep -E 'BAD|Error'; echo $before kernels were here, now {count}"
        return ["bash", "-c", f"{shell}; test {count} -gt 0", "compile", *words]

    def pytest(self) -> list[str]:
        return [self.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", "-m", "not slow"]

    def tests(self) -> list[str]:
        if self.dry:
            return ["tests/kernels/slots/test_tables.py"]
        # Not those of the CPU's kernels: compiling these takes a minute there.
        without = ["--ignore-glob=*cpu*", "--ignore-glob=*block_*", "--timeout", "100", "-n", "8"]
        return ["tests/kernels", "tests/runtime/steps/test_tree_planner.py", *without]

    def sanitizer(self, tool: str) -> list[str]:
        words = [*self.pytest(), "tests/kernels/slots/test_tables.py"]
        words += [] if self.dry else ["tests/kernels/attention/test_tree.py"]
        tools = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        return words if self.dry else [*tools, *words]

    # How they run.

    def launch(self, step: Step) -> int:
        before = num_kernels()
        status = self.run(step.name, step.limit_s, self.script("smallest_launch.py", self.lines))
        self.has_kernels = before > 0 and num_kernels() == before
        return status

    def rows(self, step: Step, wanted: list[str], label: str) -> int:
        """Measure rows in a process; once more, without a feature, those that it leaves unmeasured."""
        before = len(read([self.out]))
        for tried, fewer in enumerate(("", *FALLBACKS)):
            done = {line["row"]["row"] for line in read([self.out])[before:] if "row" in line}
            left = [row for row in wanted if row not in done]
            left += [row.replace("json@", "jsonoff@") for row in left if row.startswith("json@")]  # a ratio of both
            if not left:
                break
            extra = ["--label", fewer or label, *(["--set", fewer] if fewer else [])]
            name = f"{step.name}, {fewer}" if tried else step.name
            status = self.run(name, step.limit_s, self.bench_gpu("--rows", ",".join(dict.fromkeys(left)), *extra))
        return status

    def run_or_block(self, step: Step, command: list[str]) -> int:
        """Run a command; where the card refused something, once more so that the stack is that of the launch."""
        status = self.run(step.name, step.limit_s, command)
        if status < 0 or "CUDA" in self.last:
            self.run(f"{step.name}, CUDA_LAUNCH_BLOCKING", step.limit_s, ["env", "CUDA_LAUNCH_BLOCKING=1", *command])
        return status

    def rows_again(self, step: Step) -> int | None:
        """Rows whose target is not met, or that nobody measured yet: with the table that was just fitted."""
        todo = missed(read([self.keep, self.out]))
        wanted = [row for row in (*FEW, *SHARED, *MANY) if row in todo]
        return self.rows(step, wanted, "again") if wanted else None

    def run(self, name: str, limit_s: float, command: list[str]) -> int:
        """Run a command; returns its status: 0, an exit status, minus a signal's number, or 124 where it was ended."""
        left_s, begin_s = self.end_s - time.monotonic(), time.monotonic()
        limit_s = min(limit_s * self.slack, left_s)
        if left_s < LEAST_S:
            return self.note(name, 125, 0.0, "no time left", "")
        planted = self.plants.get(name)
        if planted is not None:
            command, limit_s = [self.python, "-c", PLANTS[planted]], min(limit_s, PLANTED_S)
        log = self.out / "log.txt"
        with log.open("ab") as file:
            file.write(f"== {name} ({limit_s:.0f} s at most): {' '.join(command)[:1000]}\n".encode())
            file.flush()
            offset = file.tell()
            try:
                process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
            except OSError as error:
                return self.note(name, 126, 0.0, f"cannot be started: {error}", "")
            try:
                status = process.wait(limit_s)
                why = "" if status == 0 else f"exit status {status}" if status > 0 else signal.Signals(-status).name
            except subprocess.TimeoutExpired:
                status, why = 124, f"no end within {limit_s:.0f} s"
                end(process, signal.SIGABRT)
            end(process, signal.SIGKILL)
        said = cut(log, offset)
        for line in said[-int(os.environ.get("LINES_SHOWN", "25")) :]:
            print(line[:240])
        return self.note(name, status, time.monotonic() - begin_s, why, telling(said) if status else "")

    def note(self, name: str, status: int, seconds: float, why: str, last: str) -> int:
        left_s = self.end_s - time.monotonic()
        self.last = last
        text = f"== {name}: {why or 'ok'} ({seconds:.0f} s, {left_s:.0f} s left) {last[:160]}"
        print(text, flush=True)
        with (self.out / "log.txt").open("a") as log:
            log.write(text + "\n")
        with (self.out / LINES).open("a") as file:
            facts = {"benchmark": "gpu-steps", "step": name, "status": status, "seconds": round(seconds, 1)}
            file.write(json.dumps({**facts, "why": why, "last": last[:300], "commit": commit()}) + "\n")
        return status

    def keep_for_later(self) -> None:
        """What the next part uses if it runs on this machine: of a rehearsal nothing."""
        for name in () if self.dry else ("flags.txt", "table.json"):
            if (self.out / name).is_file():
                shutil.copy(self.out / name, self.keep)

    def go(self) -> dict[str, int]:
        """Run all steps; returns the status of each that had something to do."""
        found: dict[str, int] = {}
        for step in self.steps():
            if self.only and step.name not in self.only:
                continue
            if step.name == "rows-first" and found.get("ladder") == NO_ENGINE:
                continue
            status = step.run(step)
            if status is not None:
                found[step.name] = status
            self.keep_for_later()
            if status and step.name == "launch":
                break  # nothing can run here
        if not self.dry:
            with (self.keep / LINES).open("a") as file:
                file.write((self.out / LINES).read_text())
        return found


MEMORY = ["--set", "mem_fraction_static=0.85"]  # the memory of graphs is extrapolated: nobody has seen yet how well
REFERENCE = ["--sections", "reference"]
AHEAD = "llama-8b,smollm2,try,prepare,commit,scatter,copy_pages,build_masks,advance,table"


def num_kernels() -> int:
    """In Triton's cache."""
    return sum(1 for _ in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin"))


def end(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Signal a step and all its children; one that waits for a broken card may outlast even SIGKILL."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STACKS_S)


def cut(log: Path, offset: int) -> list[str]:
    """The lines of the log from this byte on; the middle of very many is dropped from the file, too."""
    data = log.read_bytes()[offset:]
    if len(data) > LOG_BYTES:
        data = data[: LOG_BYTES // 2] + b"\n...\n" + data[-LOG_BYTES // 2 :]
        with log.open("r+b") as file:
            file.truncate(offset)
            file.seek(offset)
            file.write(data)
    return [line for line in data.decode(errors="replace").splitlines() if line.strip()]


def telling(said: list[str]) -> str:
    """The line that tells most of a failure: the first wrong result, or the last error, or the last line."""
    wrong = [line for line in said if "FAILED" in line or "WRONG" in line]
    errors = [line for line in said if "Error" in line] or [line for line in said if line.startswith("Fatal")]
    return (wrong[:1] or errors[-1:] or said[-1:] or [""])[0].strip()


def plan(steps: Iterable[Step], all_s: float) -> str:
    shown = [f"{'step':20} {'limit s':>8} {'guess s':>8} {'begins':>7}"]
    begins_s = 25.0  # wheels, imports
    for step in steps:
        shown.append(f"{step.name:20} {step.limit_s:8g} {step.expected_s:8g} {begins_s:7g}")
        begins_s += step.expected_s
    return "\n".join([*shown, f"{'end':20} {all_s:8g} {'':8} {begins_s:7g}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=ALL_S)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, help="of this run, those before it included")
    parser.add_argument("--elapsed", type=float, default=0.0, help="seconds that the run took before")
    parser.add_argument("--keep", type=Path, default=Path("/tmp/ramet-on-gpu"), help="folder of what later runs use")
    parser.add_argument("--model", type=Path, help="a model file")
    parser.add_argument("--dry-run", action="store_true", help="toy shapes on a CPU")
    parser.add_argument("--only", default="", help="these steps alone, as rows-few,profile")
    parser.add_argument("--slack", type=float, help="limits are so many times those on a card; 4 in a rehearsal")
    parser.add_argument("--plant", default="", help="failures to rehearse, as products=crash,fit=hang (or exit)")
    parser.add_argument("--plan", action="store_true", help="show the steps and run none")
    args = parser.parse_args()
    slack = args.slack or (4.0 if args.dry_run else 1.0)
    all_s = args.seconds or ALL_S[args.part] * slack
    args.out.mkdir(parents=True, exist_ok=True)
    args.keep.mkdir(parents=True, exist_ok=True)
    plants = dict(item.split("=") for item in args.plant.split(",") if item)
    run = Run(args.part, args.out.resolve(), args.keep.resolve(), args.dry_run, time.monotonic() + all_s - args.elapsed)
    run.only = [name for name in args.only.split(",") if name]
    if unknown := {*run.only, *plants} - {step.name for step in run.steps()}:
        parser.error(f"{args.part} has no step {', '.join(sorted(unknown))}; its steps: --plan")
    run.model, run.plants, run.slack = args.model, plants, slack
    if args.plan:
        print(plan(run.steps(), all_s))
        return
    found = run.go()
    lines = read([args.out] if args.dry_run else [args.keep])
    print(*facts(lines), table(lines), sep="\n")
    if args.dry_run:
        print("A rehearsal on a CPU with toy shapes: its figures mean nothing.")
    files = list(args.out.iterdir())
    print(f"{len(files)} files, {sum(file.stat().st_size for file in files) / 2**20:.1f} MiB")
    sys.exit(1 if any(found.values()) else 0)


if __name__ == "__main__":
    main()
