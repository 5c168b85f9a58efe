"""No Triton kernel without its specification and its checks: here, for sm_90, and on a card."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def text_of(*paths: str) -> str:
    return "".join((ROOT / path).read_text(encoding="utf-8") for path in paths)


KERNELS = text_of(*(str(path.relative_to(ROOT)) for path in sorted((ROOT / "kernels").rglob("*.py"))))
LAUNCHERS = sorted(set(re.findall(r"^def ([a-z][a-z_0-9]+)_triton\b", KERNELS, re.MULTILINE)))
# Other ways to compute what a reference computes.
SPECIFIED_BY = {"attention_tree": "attention_decode", "gated_product": "gemv_silu_and_mul"}
PLACES = {
    "a test": text_of(*(str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests/kernels").rglob("test_*.py")))),
    "the kernels that are compiled for sm_90": text_of("benchmarks/launch_cases.py"),
    "the checks on a card": text_of(
        "benchmarks/kernel_checks.py", "benchmarks/race_checks.py", "benchmarks/attention_cases.py"
    ),
}


def test_there_are_launchers() -> None:
    assert len(LAUNCHERS) > 20


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_kernel_has_a_reference_a_test_a_compiled_case_and_a_check_on_a_card(launcher: str) -> None:
    assert f"def {SPECIFIED_BY.get(launcher, launcher)}_reference(" in KERNELS
    name = re.compile(rf"\b{launcher}(_triton\b|_\{{kind\}}|\b)")
    assert [place for place, text in PLACES.items() if not name.search(text)] == []
