"""The packages, the links and the rule of dependency between folders, compared with what is on disk."""

import ast
import tomllib
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("grammar", "kernels", "lang", "runtime")

# folder -> what it may import of ours ("ramet.errors" is free to all)
ALLOWED = {
    "grammar": {"grammar"},
    "kernels": {"kernels"},
    "runtime": {"runtime", "grammar", "kernels", "lang.graph"},
    "lang": {"lang"},
}
# the places where the language reaches its in-process runtime, and types become schemas: imports inside functions only
LAZY_BORDER = {"lang": ("runtime.", "grammar.service.python_types.")}


def packages_on_disk() -> set[str]:
    found = {"ramet", "ramet.cli"}
    for folder in FOLDERS:
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add("ramet." + ".".join(init.parent.relative_to(ROOT).parts))
    return found


def test_the_build_finds_every_folder_with_an_init_file() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    assert set(find_packages(str(ROOT), include=options["include"])) == packages_on_disk()


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_package_links_to_the_folder_at_the_root(folder: str) -> None:
    link = ROOT / "ramet" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..") / folder


def test_every_python_file_stands_in_a_package() -> None:
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), file


def ramet_imports(tree: ast.AST) -> list[tuple[str, bool]]:
    """(module below `ramet.`, whether the import stands inside a function or under TYPE_CHECKING)."""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((a.name.removeprefix("ramet."), lazy) for a in node.names if a.name.startswith("ramet."))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ramet"):
            # `from ramet.lang.graph import ir` may import a module or a name of one: "lang.graph.ir" serves for both
            found.extend((f"{node.module}.{a.name}".removeprefix("ramet."), lazy) for a in node.names)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        inside = inside or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(tree, False)
    return found


def test_folders_import_only_what_the_rule_of_dependency_allows() -> None:
    wrong = []
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            for module, lazy in ramet_imports(ast.parse(file.read_text())):
                if module.split(".")[0] == "errors":
                    continue
                top = module.split(".")[0]
                allowed = top in ALLOWED[folder] or any(
                    module == a or module.startswith(a + ".") for a in ALLOWED[folder] if "." in a
                )
                if not allowed and not (lazy and f"{module}.".startswith(LAZY_BORDER.get(folder, ()))):
                    wrong.append(f"{file.relative_to(ROOT)} imports ramet.{module}")
    assert not wrong, wrong


def test_nothing_is_called_todo_and_no_tests_are_skipped_without_a_reason() -> None:
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text()
            assert "TODO" not in text, file
            assert "FIXME" not in text, file
