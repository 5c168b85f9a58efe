"""The packages, the links and the order of the rooms, compared with what is on disk."""

import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from setuptools import find_packages

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("grammar", "kernels", "lang", "runtime")


def packages_on_disk() -> set[str]:
    found = {"ramet", "ramet.cli", "ramet.compat", "ramet.integrations"}
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


def test_nothing_that_makes_the_house_hard_to_read_came_back(capsys: pytest.CaptureFixture[str]) -> None:
    """Rooms import downwards, no circles, no name for two things, nothing unused: see tools/house.py."""
    spec = importlib.util.spec_from_file_location("house", ROOT / "tools" / "house.py")
    assert spec is not None
    assert spec.loader is not None
    house = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(house)
    assert house.main(["--check"]) == 0, capsys.readouterr().out


def test_nothing_is_called_todo_and_no_tests_are_skipped_without_a_reason() -> None:
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text()
            assert "TODO" not in text, file
            assert "FIXME" not in text, file


def test_the_images_install_pinned_versions_that_the_package_takes() -> None:
    pins = dict(line.split("==") for line in (ROOT / "deploy/constraints.txt").read_text().splitlines() if "==" in line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for wanted in map(Requirement, [*project["dependencies"], *extras["cpu"], *extras["gpu"], *extras["server"]]):
        if wanted.name != "ramet":
            assert wanted.specifier.contains(pins[wanted.name]), wanted
    installs = re.findall(r"pip install .*", (ROOT / "deploy/Dockerfile").read_text())
    assert len(installs) == 2
    assert all("-c deploy/constraints.txt" in install for install in installs)


def test_a_release_is_a_commit_with_a_changelog_section_and_a_tag(tmp_path: Path) -> None:
    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    for name in ("Makefile", "pyproject.toml", "CHANGELOG.md"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    for command in (("init", "-q"), ("config", "user.name", "n"), ("config", "user.email", "e"), ("add", "-A")):
        run("git", *command)
    run("git", "commit", "-qm", "first")
    assert "must be like 0.2.0" in run("make", "tag", "VERSION=two").stdout
    assert run("make", "tag", "VERSION=9.8.7").returncode == 0
    assert run("git", "describe").stdout == "v9.8.7\n"
    assert run("git", "status", "--porcelain").stdout == ""
    assert tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]["version"] == "9.8.7"
    head = re.findall(r"^## .*", (tmp_path / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert head[0] == "## [Unreleased]"
    assert re.fullmatch(r"## \[9\.8\.7\] - \d{4}-\d\d-\d\d", head[1])
    (tmp_path / "new").write_text("")
    assert "not committed" in run("make", "tag", "VERSION=9.8.8").stdout
