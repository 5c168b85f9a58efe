"""Check and time the attention kernels over tile sizes and splits, for the choices in kernels/attention/plan.py.

    PYTHONPATH=. python3 benchmarks/bench_attention.py --out attention.json   (at the repository's root)

Every configuration is first compared with an fp32 reference on the same inputs (output poisoned with NaN), then timed
as replays of a CUDA graph that walks over enough separate caches to defeat the L2 cache. Floor: bytes / 3.04 TB/s for
what must be read once, or operations / 798 TFLOP/s (a large bf16 matrix product of an H100), whichever is longer.
Compilation runs in worker processes first, through Triton's disk cache. `--dry-run` walks the same code on a CPU in
Triton's interpreter with toy shapes: its times mean nothing and are not printed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import rehearsal  # noqa: F401 (before the imports below)

# isort: split
import torch
from attention_cases import Case, Options, all_cases
from kernel_cases import difference
from torch import Tensor

MIN_CACHE_BYTES = 256 << 20  # all caches of a case together: five times the L2 cache
LAUNCHES = 16  # at least, in one graph
TOLERANCE = 1.5e-2  # relative error in the 2-norm, bf16 inputs


def compile_case(case: Case, share: int) -> None:
    """Launch every run once, so that Triton's disk cache holds it; each worker begins elsewhere in the list."""
    first = share * 5 % len(case.runs)
    for _, run in case.runs[first:] + case.runs[:first]:
        try:
            run(0)
        except Exception as error:  # a tile that does not fit this card is reported by the timing pass
            print(f"compile: {error}", file=sys.stderr)
    torch.cuda.synchronize()


def time_run(run: Callable[[int], Tensor], num_caches: int) -> tuple[float, float, float]:
    """Return the 20th, 50th and 80th percentile, in seconds, of one launch inside a graph of many."""
    launches = -(-LAUNCHES // num_caches) * num_caches
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        run(0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(launches):
                run(i % num_caches)
        times = []
        graph.replay()
        for _ in range(7):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e-3 / launches)
    times.sort()
    return times[1], times[3], times[5]


def measure(case: Case, args: Options) -> list[dict[str, object]]:
    """Check and time every run of a case; a run that cannot be launched or is wrong is reported, not hidden."""
    expected = case.reference().float() if case.reference else None
    records: list[dict[str, object]] = []
    for name, run in case.runs:
        record: dict[str, object] = {"case": case.name, "run": name, "floor_us": case.floor_s * 1e6, **case.facts}
        records.append(record)
        try:
            out = run(0)
            out.fill_(torch.nan)
            out = run(0).float()
            if expected is not None:
                record["error"] = float((out - expected).norm() / expected.norm())
                if not is_right(record):
                    record["where"] = difference(out, expected)
            if not args.dry_run:
                p20, p50, p80 = time_run(run, case.num_caches)
                record |= {"us": p50 * 1e6, "us_p20": p20 * 1e6, "us_p80": p80 * 1e6}
                record |= {"tflops": case.flops / p50 * 1e-12, "tbytes": case.floor_bytes / p50 * 1e-12}
        except Exception as error:
            record["failed"] = f"{type(error).__name__}: {error}"[:200]
    return records


def is_right(record: dict[str, object]) -> bool:
    error = record.get("error", 0.0)
    return "failed" not in record and isinstance(error, float) and error < TOLERANCE  # NaN is not


def show(records: list[dict[str, object]], top: int) -> None:
    """Print the floor, the best runs, the default (*), and everything that failed or is wrong."""
    if not records:
        return
    print(f"\n{records[0]['case']}: floor {records[0]['floor_us']:.1f} us")
    timed = sorted((r for r in records if "us" in r and is_right(r)), key=lambda r: float(str(r["us"])))
    shown = timed[:top] + [r for r in timed[top:] if str(r["run"]).endswith("*")]
    for r in shown:
        speed = f"{r['tflops']:6.1f} TFLOP/s  {r['tbytes']:5.2f} TB/s"
        print(f"  {r['us']:8.1f} us  {speed}  err {r['error']:.1e}  {r['run']}")
    for r in records:
        if not is_right(r):
            print(f"  WRONG {r['run']}: {r.get('failed') or r['error']} {r.get('where', '')}")
    if not timed:
        print(f"  {sum(map(is_right, records))} of {len(records)} right")


def compile_in_workers(arguments: argparse.Namespace, num_cases: int) -> None:
    """Let worker processes launch every variant once; each fills Triton's disk cache with its share of the cases."""
    count = min(arguments.workers, num_cases)
    command = [sys.executable, __file__, "--sections", arguments.sections, "--page", str(arguments.page)]
    workers = [
        subprocess.Popen([*command, "--compile-share", f"{i}/{count}"], stdout=subprocess.DEVNULL) for i in range(count)
    ]
    for worker in workers:
        worker.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write every record as JSON here")
    parser.add_argument("--sections", default="extend,decode,tree", help="which kernels")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile first; 0 compiles in line")
    parser.add_argument("--page", type=int, default=16, help="positions of a KV page; of 64, a tile of 64 keys is one")
    parser.add_argument("--top", type=int, default=4, help="runs shown of each case")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no case after this time")
    parser.add_argument("--dry-run", action="store_true", help="toy shapes in Triton's interpreter, no times")
    parser.add_argument("--compile-share", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    begin = time.perf_counter()
    if arguments.dry_run:
        options = Options(
            "cpu", True, 4, 0, torch.float32, arguments.page
        )  # the interpreter multiplies bf16 as integers
    else:
        num_sms = torch.cuda.get_device_properties(0).multi_processor_count if arguments.compile_share else 132
        options = Options(
            "cuda", False, num_sms, 0 if arguments.compile_share else MIN_CACHE_BYTES, torch.bfloat16, arguments.page
        )
    cases = all_cases(arguments.dry_run, set(arguments.sections.split(",")))
    if arguments.compile_share:
        share, count = map(int, arguments.compile_share.split("/"))
        for _, build in cases[share::count]:
            case = build(options)
            compile_case(case, share)
            case.free()
        return
    if arguments.workers and not arguments.dry_run:
        compile_in_workers(arguments, len(cases))
        print(f"compiled after {time.perf_counter() - begin:.0f} s on {torch.cuda.get_device_name(0)}")
    if not arguments.dry_run:
        options.num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    records: list[dict[str, object]] = []
    device = "cpu" if arguments.dry_run else torch.cuda.get_device_name(0)
    broken: list[str] = []
    for name, build in cases:
        if time.perf_counter() - begin > arguments.seconds:
            print("no time left")
            break
        try:
            case = build(options)
            found = measure(case, options)
        except Exception as error:  # the other cases still tell something
            traceback.print_exc()
            print(f"FAILED {name}: {type(error).__name__}: {error}")
            broken.append(name)
            continue
        case.free()
        show(found, arguments.top)
        records += found
        if arguments.out:  # after every case: an early end leaves what there is
            result = {"device": device, "versions": {"torch": torch.__version__}, "records": records}
            arguments.out.write_text(json.dumps(result))
    print(f"\n{sum(map(is_right, records))} of {len(records)} runs right, {time.perf_counter() - begin:.0f} s")
    sys.exit(0 if all(map(is_right, records)) and not broken else 1)


if __name__ == "__main__":
    main()
