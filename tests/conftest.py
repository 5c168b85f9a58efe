"""Where there is no GPU, Triton kernels run in Triton's interpreter; it is chosen before any kernel is defined."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
