"""Where there is no GPU, Triton kernels run in Triton's interpreter; it is chosen before any kernel is defined."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from ramet.runtime.models.load import LoadedModel

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The SmolLM2-135M-Instruct file; fetched on first use. Tests that take it are marked `model`."""
    from ramet.runtime.models.catalog import resolve_model

    return resolve_model("smollm2-135m")


@pytest.fixture(scope="session")
def tiny_model() -> LoadedModel:
    """Two layers of random weights over bytes, context 512: a real engine in milliseconds."""
    from ramet.runtime.models.dummy import tiny_model

    return tiny_model()
