"""What has to be chosen before torch is loaded or any kernel defined.

Where there is no GPU, Triton kernels run in Triton's interpreter.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

import ramet  # noqa: F401 (before torch: it limits how long waiting threads spin)

# isort: split
import torch

# No test fails because the machine is busy: an example may take long, and may be drawn slowly.
hypothesis.settings.register_profile("ramet", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("ramet")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell started the suite in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

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
    from ramet.runtime.testing.dummy import tiny_model

    return tiny_model()
