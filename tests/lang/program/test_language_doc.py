"""The examples of docs/language.md run as they stand."""

from __future__ import annotations

import linecache
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from ramet import set_default_backend

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "language.md"


@pytest.fixture(autouse=True)
def default_backend_is_put_back() -> Iterator[None]:
    yield
    set_default_backend(None)


def test_every_example_of_the_language_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where an example writes a file
    module = ModuleType("language_guide")  # dataclasses look for their module
    sys.modules[module.__name__] = module
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 12
    for i, block in enumerate(blocks):
        name = f"language.md[{i}]"
        linecache.cache[name] = (len(block), None, block.splitlines(True), name)
        exec(compile(block, name, "exec"), module.__dict__)
