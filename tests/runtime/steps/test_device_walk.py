"""The GPU path at a real model's shapes, on a device of fake tensors: nothing is refused, awaited, or compiled late."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ramet.kernels.card_table import CardTable, Product
from ramet.kernels.layers.gemv import GemvConfig

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "walk_device.py"
# The fake device takes CUDA's place in a torch that has none. Where torch has it, a card can be asked: check_gpu.py.
pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA itself")


@pytest.mark.parametrize(
    "options",
    [
        "--models llama-8b --set kernel_table=early --set page_size=64",
        "--models gemma3-4b --set deterministic=true",
        '--models llama-8b-blocks --set speculative_draft="smollm2"',
        '--models smollm2 --set grammar_on_device=false --set kv_cache_dtype="fp8_e4m3" --set max_loras=2 '
        '--set quantization="fp8"',
        pytest.param(
            '--models smollm2 --set kv_cache_dtype="fp8_e4m3" --set speculative_draft="mtp"', marks=pytest.mark.slow
        ),
        pytest.param("--models qwen3-8b --set tp=2 --set num_kv_tokens=65536", marks=pytest.mark.slow),
    ],
)
def test_an_engine_starts_and_serves_every_kind_of_request(options: str, tmp_path: Path) -> None:
    table = tmp_path / "early.json"
    tiles = {Product(rows, 14336, 4096, True): GemvConfig("tile", 64, 64, 4, 4, block_m=64) for rows in (32, 384)}
    table.write_text(CardTable("any", early_launch=True, gated=tiles).to_json())
    options = options.replace("kernel_table=early", f'kernel_table="{table}"')
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    small = "--set max_running_requests=24 --set cuda_graph_max_extend=64"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), *options.split(), *small.split()],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "nothing found"
