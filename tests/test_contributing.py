"""CONTRIBUTING.md names files and functions that exist, and every room of the house."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PLACE = re.compile(
    r"`((?:lang|grammar|kernels|runtime|ramet|tests|benchmarks|docs|tools|examples)/[\w/.*-]*)(?::([\w.]+))?`"
)
PLACES = sorted({(match[1], match[2] or "") for match in PLACE.finditer(TEXT)})


def names_in(path: Path) -> set[str]:
    """Functions, classes, `Class.method` and assigned names of a file."""
    found: set[str] = set()

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(prefix + child.name)
                if isinstance(child, ast.ClassDef):
                    visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.Assign | ast.AnnAssign):
                targets = child.targets if isinstance(child, ast.Assign) else [child.target]
                found.update(prefix + t.id for t in targets if isinstance(t, ast.Name))

    visit(ast.parse(path.read_text(encoding="utf-8")), "")
    return found


@pytest.mark.parametrize(("path", "name"), PLACES)
def test_every_place_that_is_named_exists(path: str, name: str) -> None:
    assert (ROOT / path).exists(), path
    if name:
        assert name in names_in(ROOT / path), f"{path} has no {name}"


def test_many_places_are_named() -> None:
    assert len(PLACES) > 60


def test_the_map_names_every_room() -> None:
    rooms = {
        p.parent for folder in ("lang", "grammar", "kernels", "runtime") for p in (ROOT / folder).rglob("__init__.py")
    }
    missing = [str(room.relative_to(ROOT)) for room in rooms if f"`{room.relative_to(ROOT)}/`" not in TEXT]
    assert not missing, missing
