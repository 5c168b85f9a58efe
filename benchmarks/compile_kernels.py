"""Compile every Triton kernel for an H100 on a machine without one, and report what the assembler gave it.

    python benchmarks/compile_kernels.py                    kernels with the configurations that are in use
    python benchmarks/compile_kernels.py --candidates       also the tile sizes that the timing scripts try
    python benchmarks/compile_kernels.py --only decode,tree --json
    python benchmarks/compile_kernels.py --adopt FOLDER     make a cache of Triton's usable that was brought to FOLDER

Launchers run on `meta` tensors with a driver that only knows the target (sm_90), so what is compiled is exactly what a
launch with these shapes would compile. Registers, spilled bytes and shared memory are read from the binary; the exit
status is 1 where a configuration in use spills more than `--max-spill` bytes or needs more than 227 KiB of shared
memory. Needs no GPU; Triton's wheel brings ptxas. Not here: whether a kernel is right, or fast.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is defined

import torch
import triton
from launch_cases import Launch, all_launches, of_table
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from ramet.kernels.card_table import load_card_table

SHARED_LIMIT = 227 << 10  # bytes a block may have on an H100
REGISTERS, SHARED, WARPS, BLOCKS = 65_536, 228 << 10, 64, 32  # of a processor; each block takes 1 KiB more than its own


@dataclass(slots=True)
class Compiled:
    """One kernel variant. Bytes but for registers, which are per thread."""

    case: str
    kernel: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    warps: int
    narrow: int  # loads and stores of global memory of one or two bytes a thread: what could not be made wider
    in_use: bool
    blocks: int = 0  # that a processor holds at once
    error: str = ""
    instructions: dict[str, int] = field(default_factory=dict)  # how many there are of those that speed and order need
    before_wait: int | None = None  # accesses of global memory before it waits for the kernel before it, if it does

    def is_bad(self, max_spill: int) -> bool:
        return bool(self.error) or self.spill_bytes > max_spill or self.shared_bytes > SHARED_LIMIT


class OfflineDriver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of local memory: what was spilled, or an array that is indexed at run time."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(cubin)
        command = [str(tool), "--dump-resource-usage", str(binary)]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.findall(r"REG:(\d+)", found), re.findall(r"(?:STACK|LOCAL):(\d+)", found)
    assert registers, found
    return max(map(int, registers)), max(map(int, stack))


def blocks_at_once(registers: int, shared_bytes: int, warps: int) -> int:
    """Blocks that a processor of an H100 holds at once. Registers are given out by 8 a thread."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    return min(by_registers, SHARED // (shared_bytes + 1024), WARPS // warps, BLOCKS)


def narrow_accesses(ptx: str) -> int:
    """Loads and stores of global memory that move one or two bytes a thread."""
    return len(re.findall(r"\b(?:ld|st)\.global(?:\.\w+)*\.b(?:8|16) ", ptx))


def instructions(ptx: str) -> dict[str, int]:
    """Counts of matrix products, copies to shared memory, loads of global memory, atomic operations, and conversions of
    which a processor does few at a time. Copies narrower than 16 bytes have their width behind them.
    """
    names = r"wgmma\.mma_async|mma\.sync|cp\.async\.cg|ld\.global\.(?:nc|cg)|atom\.global\.gpu\.acq_rel|cvt\.bf16\.f16"
    narrow = re.findall(r"\bcp\.async\.ca\.shared\.global [^;]*?\], (?:0x)?([48]),", ptx)
    return dict(Counter([*re.findall(rf"\b(?:{names})\b", ptx), *(f"cp.async {width}" for width in narrow)]))


def accesses_before_wait(ptx: str) -> int | None:
    """Accesses of global memory before the wait of a kernel that is launched early; None if it does not wait."""
    before, wait, _ = ptx.partition("griddepcontrol.wait")
    return len(re.findall(r"\b(?:ld|st|atom|red)\.global|\bcp\.async", before)) if wait else None


def adopt(cache: Path) -> None:
    """Let Triton find what it cached in another folder: it notes each kernel's files, and where they were written.

    Files that are not there any more are left out; a launch needs the binary alone.
    """
    for group in cache.glob("*/__grp__*.json"):
        files = [group.parent / name for name in json.loads(group.read_text())["child_paths"]]
        found = {file.name: str(file) for file in files if file.is_file()}
        group.write_text(json.dumps({"child_paths": found}))


def compile_launches(launches: list[Launch], capability: int, show: Callable[[Compiled], None]) -> list[Compiled]:
    """Run every launcher with a driver that never launches; each variant is compiled once."""
    driver.set_active(OfflineDriver(capability))
    found: list[Compiled] = []
    seen: set[str] = set()
    current: list[Launch] = []
    launch_for_real = jit.JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:  # Any: as Triton declares it
        options.pop("warmup", None)
        kernel = launch_for_real(self, *args, grid=grid, warmup=True, **options)
        if hasattr(kernel, "result"):
            kernel = kernel.result()
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            registers, spills = resources(kernel.asm["cubin"])
            metadata = kernel.metadata
            case = current[0]
            record = Compiled(
                case.name,
                self.fn.__name__,
                registers,
                spills,
                metadata.shared,
                metadata.num_warps,
                narrow_accesses(kernel.asm["ptx"]),
                case.in_use,
                blocks_at_once(registers, metadata.shared, metadata.num_warps),
                instructions=instructions(kernel.asm["ptx"]),
                before_wait=accesses_before_wait(kernel.asm["ptx"]),
            )
            found.append(record)
            show(record)
        return kernel

    jit.JITFunction.run = run
    try:
        for launch in launches:
            current[:] = [launch]
            try:
                launch.run()
            except Exception as error:  # the report is of all kernels, also of those that do not compile
                text = f"{type(error).__name__}: {error}".strip().splitlines()
                record = Compiled(launch.name, "", 0, 0, 0, 0, 0, launch.in_use, error=" ".join(text)[:300])
                found.append(record)
                show(record)
    finally:
        jit.JITFunction.run = launch_for_real
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", action="store_true", help="also what the timing scripts try")
    parser.add_argument("--only", default="", help="parts of launch names, comma-separated")
    parser.add_argument("--kernel-table", type=Path, help="also what a card's table chooses")
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--max-spill", type=int, default=64, help="bytes that a configuration in use may spill")
    parser.add_argument("--adopt", type=Path, help="compile nothing: make the cache in this folder usable there")
    parser.add_argument("--share", default="0/1", help="i/n: every n-th launch from the i-th on")
    parser.add_argument("--json", action="store_true", help="one JSON line last")
    args = parser.parse_args()
    if args.adopt is not None:
        adopt(args.adopt)
        return
    parts = [part for part in args.only.split(",") if part]
    chosen = [] if args.kernel_table is None else of_table(load_card_table("", args.kernel_table))
    launches = [
        launch
        for launch in all_launches() + chosen
        if (args.candidates or launch.in_use) and (not parts or any(part in launch.name for part in parts))
    ]
    index, count = map(int, args.share.split("/"))
    columns = "kernel, registers, spilled bytes, shared KiB, warps, blocks a processor, narrow accesses"
    print(f"Triton {triton.__version__}, sm_{args.capability}: {columns}")

    def show(record: Compiled) -> None:
        mark = "BAD " if record.is_bad(args.max_spill) else ""
        numbers = f"{record.registers:4d} {record.spill_bytes:6d} {record.shared_bytes / 1024:7.1f} {record.warps:3d}"
        numbers += f" {record.blocks:3d} {record.narrow:4d}"
        print(f"{mark}{record.case:60s} {record.kernel:16s} {record.error or numbers}", flush=True)

    found = compile_launches(launches[index::count], args.capability, show)
    bad = [record for record in found if record.in_use and record.is_bad(args.max_spill)]
    print(f"{len(found)} variants, {len(bad)} bad ones in use")
    if args.json:
        print(json.dumps({"triton": triton.__version__, "variants": [asdict(record) for record in found]}))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
