"""The watch that all kernel tests run under finds what it should."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ramet.kernels.triton_support import jit, tl

# What is watched is the interpreter. On a card programs run at once: race_checks.py looks for what this finds here.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a card nothing is interpreted")

# The `launch_watch` fixture is tests/kernels/conftest.py's LaunchWatch: a conftest cannot be imported, hence Any.


@jit
def _write_kernel(out_ptr, SIZE: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.program_id(0) * STEP + tl.arange(0, SIZE)
    tl.store(out_ptr + offsets, offsets)


@jit
def _pass_on_kernel(out_ptr, counter_ptr, COUNTS: tl.constexpr, WAITS: tl.constexpr):  # type: ignore[no-untyped-def]
    program, last = tl.program_id(0), tl.num_programs(0) - 1
    tl.store(out_ptr + program, program + 1)
    if COUNTS:
        arrived = tl.atomic_add(counter_ptr, 1)
    else:
        arrived = program
    if WAITS:
        tl.debug_barrier()
    if arrived == last:
        total = tl.sum(tl.load(out_ptr + tl.arange(0, 4)))
        tl.store(counter_ptr, total)


def faults_of(watch: Any) -> set[str]:
    """What was found so far; the fixture then fails no test for it."""
    found = {fault.partition(": ")[2] for fault in watch.faults}
    watch.faults.clear()
    return found


def test_programs_that_keep_to_themselves_are_right(launch_watch: Any) -> None:
    _write_kernel[(4,)](torch.zeros(16, dtype=torch.int32), SIZE=4, STEP=4)
    assert not faults_of(launch_watch)


def test_programs_run_in_another_order() -> None:
    out, counter = torch.zeros(4, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    _pass_on_kernel[(4,)](out, counter, COUNTS=True, WAITS=True)
    assert out.tolist() == [1, 2, 3, 4]
    assert int(counter) == 10, "the last to arrive adds up, whichever it is"


def test_addresses_outside_of_the_arguments_are_found(launch_watch: Any) -> None:
    whole = torch.zeros(20, dtype=torch.int32)
    _write_kernel[(4,)](whole[:15], SIZE=4, STEP=4)
    assert faults_of(launch_watch) == {"an address outside of the arguments"}


def test_cells_that_two_programs_write_are_found(launch_watch: Any) -> None:
    _write_kernel[(4,)](torch.zeros(16, dtype=torch.int32), SIZE=4, STEP=3)
    assert faults_of(launch_watch) == {"two programs write one address"}


@pytest.mark.parametrize("waits", [False, True])
def test_reading_what_others_write_needs_an_atomic_operation_and_a_barrier(launch_watch: Any, waits: bool) -> None:
    out, counter = torch.zeros(4, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    _pass_on_kernel[(4,)](out, counter, COUNTS=True, WAITS=waits)
    assert faults_of(launch_watch) == (set() if waits else {"a program reads what it wrote without a barrier between"})
    _pass_on_kernel[(4,)](out, counter, COUNTS=False, WAITS=True)
    assert faults_of(launch_watch) == {"a program reads what another one writes"}
