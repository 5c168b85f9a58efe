"""Compile the CPU's machine code before the first request. The result is cached on the machine's disk."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)

OnStage = Callable[[str], None]
STAGE = "compiling for this CPU, once per machine"


def prepare_compiled_code(device: torch.device, on_stage: OnStage | None) -> None:
    """Load the CPU kernels and the grammars' loops, and compile those that are not on this machine's disk yet.

    Compiling takes about 15 s. `on_stage` is called when it begins; without one, a log line is written.
    """
    from ramet.grammar.service import warm_up  # it brings numba and Lark: importing the engine's class does without

    start_s = time.monotonic()
    is_told = False

    def tell() -> None:
        nonlocal is_told
        if not is_told:
            is_told = True
            (on_stage or logger.warning)(STAGE)

    if device.type == "cpu":
        from ramet.kernels.cpu.functions import load_functions  # an engine on a GPU runs none of them

        load_functions(tell)
    if not warm_up.are_compiled():
        tell()
        warm_up.load_loops()
    if is_told:
        logger.info("compiled for this CPU in %.1f s", time.monotonic() - start_s)
