"""Rehearsals of kernels on a CPU: with `--dry-run` they run in Triton's interpreter. Import this before any kernel."""

from __future__ import annotations

import os
import sys
from typing import Any

DRY = "--dry-run" in sys.argv


def interpret() -> None:
    """Let kernels that are defined from now on run in Triton's interpreter.

    That of Triton 3.6 asks numpy for the integer of an array of one element, which numpy 2.5 refuses: kernels that run
    on a card have neither.
    """
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: type, scope: Any) -> None:  # Any: Triton has no types
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor


if DRY:
    interpret()
