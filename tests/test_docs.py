"""The documents: their examples run as they stand and print what they show, and their links lead somewhere."""

from __future__ import annotations

import linecache
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import ramet
from ramet import set_default_backend

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


@pytest.fixture(autouse=True)
def default_backend_is_put_back() -> Iterator[None]:
    yield
    set_default_backend(None)


HOW_TO = {"batches": 2, "extract": 2, "migrate": 1, "rag": 2, "sessions": 2, "testing": 2, "tools": 2}


@pytest.mark.parametrize(
    ("name", "num_blocks"),
    [("language.md", 20), ("tutorial.md", 8), *((f"how-to/{name}.md", count) for name, count in HOW_TO.items())],
)
def test_every_example_runs_and_prints_what_is_shown_under_it(
    name: str,
    num_blocks: int,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # where an example writes a file
    module = ModuleType(name.partition(".")[0])  # dataclasses look for their module
    sys.modules[module.__name__] = module
    text = (ROOT / "docs" / name).read_text()
    blocks = re.findall(r"^```python\n(.*?)^```(?:\n\n```text\n(.*?)^```)?", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= num_blocks
    for i, (block, shown) in enumerate(blocks):
        place = f"{name}[{i}]"
        linecache.cache[place] = (len(block), None, block.splitlines(True), place)
        exec(compile(block, place, "exec"), module.__dict__)
        printed = capsys.readouterr().out
        assert shown in ("", printed), f"{place} prints:\n{printed}"


def anchors(text: str) -> set[str]:
    """The names by which a document's headings are linked, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_to_a_heading(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (document.parent / name) if name else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), target


def test_every_test_that_the_readme_names_is_there() -> None:
    cells = re.findall(r"^\|[^|]+\| (`tests/.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(cells) >= 5
    for cell in cells:
        file = ""
        for name in re.findall(r"`([^`]+)`", cell):
            path, _, test = name.partition("::")
            file = path or file
            assert f"def {test}(" in (ROOT / file).read_text(), name


def test_the_reference_has_every_public_name() -> None:
    named = re.findall(r"^::: ramet\.(\w+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(dir(ramet))


def test_the_pages_are_built_without_a_link_or_a_name_that_leads_nowhere(tmp_path: Path) -> None:
    settings = (ROOT / "mkdocs.yml").read_text().replace("site_dir: build/site", f"site_dir: {tmp_path / 'site'}")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "ramet").symlink_to(ROOT / "ramet")
    (tmp_path / "mkdocs.yml").write_text(settings)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "reference" / "index.html").read_text()
    assert 'id="ramet.gen"' in page
    assert not re.findall(r'(?:src|href)="https?://(?!zensical)', page), "pages must not need a network"
