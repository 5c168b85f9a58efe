"""Whatever value a field of the configuration gets: it is taken, or refused with its name, the value and the limit."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ramet.errors import ConfigError
from ramet.kernels.card_table import CardTable
from ramet.runtime.engine.config import EngineConfig
from ramet.runtime.engine.factory import page_size_of

ODD: list[Any] = [
    -1,
    0,
    True,
    1.5,
    math.nan,
    math.inf,
    "",
    "x",
    [],
    {},
    object(),
    10**30,
    b"a",
    None,
    np.float64(-1),
]
GOOD: dict[str, list[Any]] = {
    "device": ["", "x"],
    "quantization": [None],
    "context_length": [None],
    "lora": [[]],
    "max_loras": [0, None],
    "page_size": [None],
    "num_kv_tokens": [None],
    "chunked_prefill_size": [None],
    "max_step_ms": [0, None],
    "cuda_graph": [True],
    "cuda_graph_max_extend": [0],
    "overlap": [True],
    "deterministic": [True],
    "kernel_table": ["", "x", None],
    "speculative_draft": [None],
    "grammar_on_device": [True],
    "json_whitespace": ["", None],
    "reservation_ratio": [0],
    "radix_cache": [True],
    "num_threads": [None],
    "seed": [-1, 0],
}


@pytest.mark.parametrize("name", [field.name for field in fields(EngineConfig)])
def test_an_odd_value_is_refused_with_its_field_and_limit(name: str) -> None:
    good = GOOD.get(name, [])
    for value in ODD:
        if any(type(value) is type(right) and value == right for right in good):
            assert EngineConfig.from_mapping({name: value})
        else:
            with pytest.raises(ConfigError, match=rf"^{name} is .* but must be \S"):
                EngineConfig.from_mapping({name: value})


def test_a_limit_says_what_is_right() -> None:
    with pytest.raises(ConfigError, match=r"^max_running_requests is 0 but must be an integer from 1 to 65,536$"):
        EngineConfig(max_running_requests=0)
    with pytest.raises(ConfigError, match=r"^context_length is 1 but must be an integer from 2 to .*, or None$"):
        EngineConfig(context_length=1)
    with pytest.raises(ConfigError, match=r"^num_kv_tokens is 31 but must be at least two pages: 32$"):
        EngineConfig(num_kv_tokens=31)
    assert EngineConfig(max_running_requests=np.int64(8)).max_running_requests == 8  # type: ignore[arg-type]


def test_pages_have_the_size_that_is_asked_for_then_the_one_measured_on_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, card, cpu = tmp_path / "table.json", torch.device("cuda", 0), torch.device("cpu")
    table.write_text(CardTable("any", page_size=64).to_json())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card that nobody has")
    measured = EngineConfig(kernel_table=str(table))
    assert page_size_of(measured, card) == 64
    assert page_size_of(measured.changed({"page_size": 32}), card) == 32
    assert page_size_of(measured, cpu) == page_size_of(EngineConfig(), card) == 16
