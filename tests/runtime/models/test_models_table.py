"""The table of docs/models.md: a cell says what a test does for a family. `python THIS_FILE` writes it anew."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import transformers

from ramet.runtime.models.families import FAMILIES, family_of_hf

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- families: made by tests/runtime/models/test_models_table.py -->\n", "<!-- end of families -->\n"
TESTS = {  # where each column is tested, for the models of its table
    "logits": "test_decoder.py",
    "bf16": "test_decoder.py",
    "FP8": "test_decoder.py",
    "FP8 KV": "test_decoder.py",
    "W4A16": "test_decoder.py",
    "GGUF": "test_loaders.py",
    "LoRA": "test_decoder.py",
    "tp": "../parallel/test_sharded.py",
}


def families_in(file: str) -> set[str]:
    """The families that a test file has in its table of models."""
    rows: dict[str, Any] = runpy.run_path(str(HERE / file))["MODELS"]
    kinds = [getattr(transformers, row[0]) if isinstance(row[0], str) else row[0] for row in rows.values()]
    return {family_of_hf({"model_type": kind.model_type}).name for kind in kinds}


def table() -> str:
    columns = {name: set() if file is None else families_in(file) for name, file in TESTS.items()}
    columns["GGUF"] |= {*runpy.run_path(str(HERE / "test_families.py"))["GGUF"]}
    lines = [f"| family | classes | {' | '.join(TESTS)} |", f"|---|---|{'---|' * len(TESTS)}"]
    for family in FAMILIES:
        cells = {name: family.name in families for name, families in columns.items()}
        cells["W4A16"] &= not family.fused
        marks = " | ".join("yes" if cell else "–" for cell in cells.values())
        lines.append(f"| {family.name} | {', '.join(family.hf_classes)} | {marks} |")
    return "\n".join(lines) + "\n"


def written(document: str) -> str:
    before, _, rest = document.partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


def test_the_table_of_the_documents_says_what_the_tests_do() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    assert BEGIN in document
    assert written(document) == document, f"run: python {__file__}"


def test_every_family_has_its_logits_compared() -> None:
    assert families_in("test_decoder.py") == {family.name for family in FAMILIES}


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
