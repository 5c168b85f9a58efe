"""What runs compiled on the CPU is compiled here, before the first request; a machine keeps the result on disk."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)

OnStage = Callable[[str], None]
STAGE = "compiling for this CPU, once per machine"


def prepare_compiled_code(device: torch.device, on_stage: OnStage | None) -> None:
    """Load the CPU's kernels, and compile them and the grammars' loops where this machine has not yet.

    on_stage is told when something has to be compiled, which takes about 15 s; without it, the log is.
    """
    from ramet.grammar.service import warm_up

    start_s = time.monotonic()
    is_told = False

    def tell() -> None:
        nonlocal is_told
        if not is_told:
            is_told = True
            (on_stage or logger.warning)(STAGE)

    if device.type == "cpu":
        from ramet.kernels.cpu.functions import load_functions  # needs numba: not for a GPU

        load_functions(tell)
    if not warm_up.are_compiled():
        tell()
        warm_up.compile_loops()
    if is_told:
        logger.info("compiled for this CPU in %.1f s", time.monotonic() - start_s)
