"""A new user's path: the built wheel in an empty environment, and every command of the README and the tutorial.

Prints how long each installation takes and how large it is. Slow: it installs torch.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/index.md", "docs/tutorial.md")
OWN = ("make ",)  # they make an environment of their own, which CI does
Command = Callable[..., str]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def commands(page: str) -> list[str]:
    """The shell lines of a page, without their comments."""
    shown = re.findall(r"^    ((?:pip|ramet|make) .*)$", (ROOT / page).read_text(), re.MULTILINE)
    return [line.partition("#")[0].strip() for line in shown]


def script(page: str) -> str:
    """The Python blocks of a page, one after the other."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL))


def printed(page: str) -> str:
    """What a page shows under its blocks."""
    return "".join(re.findall(r"^```text\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, built = tmp_path_factory.mktemp("source") / "ramet", tmp_path_factory.mktemp("built")
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", built, source], check=True)
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("empty") / "venv"
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    return place / "bin"


@pytest.fixture(scope="module")
def run(bin_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    folder = tmp_path_factory.mktemp("work")
    mine = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*command: str | Path, **options: str) -> str:
        environment = {**mine, "PATH": f"{bin_folder}:{os.environ['PATH']}", **options}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


@pytest.fixture(scope="module")
def install(wheel: Path, bin_folder: Path, run: Command) -> Callable[[str], tuple[float, float]]:
    """A function that installs the wheel with extras. Returns seconds, and the environment's megabytes."""

    def install(extras: str) -> tuple[float, float]:
        start_s = time.monotonic()
        run(bin_folder / "pip", "install", "-q", f"{wheel}{extras}")
        seconds = time.monotonic() - start_s
        (packages,) = bin_folder.parent.glob("lib/python*/site-packages")
        size = sum(file.stat().st_size for file in packages.rglob("*") if not file.is_symlink() and file.is_file())
        return seconds, size / 1e6

    return install


def test_every_command_of_the_first_pages_works_in_an_empty_environment(
    install: Callable[[str], tuple[float, float]],
    run: Command,
    bin_folder: Path,
    smollm2_path: Path,  # it is in the cache, which a new user fills by the same commands
    capsys: pytest.CaptureFixture[str],
) -> None:
    seconds, megabytes = install("")
    found = [f"ramet: {seconds:.0f} s, {megabytes:.0f} MB"]
    assert not list(bin_folder.parent.glob("lib/python*/site-packages/torch")), "the light installation has torch"
    done = {"pip install ramet"}
    assert run("python", "-c", script("docs/tutorial.md")) == printed("docs/tutorial.md")
    assert "pip install 'ramet[cpu]'" in _failed(bin_folder, "import ramet; ramet.Engine()")

    for page in PAGES:
        for command in commands(page):
            if command.startswith("pip install"):  # of the wheel; no machine of CI has a GPU
                extras = "".join(re.findall(r"\[.*\]", command)).replace("gpu", "cpu")
                command = f"pip install ramet{extras}"
            if command in done or command.startswith(OWN):
                continue
            done.add(command)
            if command.startswith("pip install"):
                seconds, megabytes = install(extras)
                found.append(f"ramet{extras}: {seconds:.0f} s, {megabytes:.0f} MB in all")
            elif command.startswith("ramet serve"):
                _serve(bin_folder, command)
            else:
                run("sh", "-c", command)
    assert len(done) >= 5, done
    assert "Lisbon" in run("python", "-c", script("README.md"))
    start_s = time.monotonic()
    run("python", "-c", "import ramet\nnext(iter(ramet.Engine('smollm2-135m').submit('The capital of France is')))")
    found.append(f"first token of a warm process, and its end: {time.monotonic() - start_s:.1f} s")
    with capsys.disabled():
        print("", *found, sep="\n")


def _failed(bin_folder: Path, code: str) -> str:
    done = subprocess.run([bin_folder / "python", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    return done.stderr


def _serve(bin_folder: Path, command: str) -> None:
    """Start a server as the page says, on a free port, and look at what the page names."""
    words = re.sub(r"--port \d+", "--port 0", command).split()
    with subprocess.Popen([bin_folder / words[0], *words[1:]], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, "")
            address = next(found[0] for line in lines if (found := re.search(r"http://[\d.]+:\d+", line)))
            for path in ("/ui", "/docs", "/health", "/metrics"):
                assert httpx.get(address + path).status_code == 200, path
        finally:
            process.terminate()
