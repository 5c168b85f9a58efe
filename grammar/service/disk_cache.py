"""Byte automata on disk. The regular part of compiling depends only on the source, so it is done once per computer.

Only arrays are stored (NumPy's format, never pickles). Files are checked when they are read: a damaged or foreign file
is deleted and compiled again. Writes are atomic. If the folder passes its limit, the oldest files are deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
from pathlib import Path

import numpy as np
from platformdirs import user_cache_dir

from ramet.grammar import ir

logger = logging.getLogger(__name__)

FORMAT = 1  # increase it when the automaton of some source changes


def default_cache_dir() -> Path:
    """Return $RAMET_CACHE_DIR/grammars, or the user's cache folder."""
    base = os.environ.get("RAMET_CACHE_DIR")
    return (Path(base) if base else Path(user_cache_dir("ramet"))) / "grammars"


class DiskCache:
    """A folder of automata by key. Several processes may use it. If nothing can be written, every look-up is a miss."""

    def __init__(self, folder: Path, max_bytes: int = 1 << 28) -> None:
        self.folder = folder
        self.max_bytes = max_bytes

    def get(self, key: str) -> ir.Table | None:
        path = self._path(key)
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                automaton = ir.Table(stored["rows"], stored["byte_class"], stored["accepting"])
            _check(automaton)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:  # of damaged files, zipfile and NumPy raise many kinds, MemoryError, too
            logger.warning("dropping %s, which cannot be read: %s", path, error)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        return automaton

    def put(self, key: str, automaton: ir.Table) -> None:
        temporary: str | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".tmp", delete=False) as out:
                temporary = out.name
                np.savez_compressed(
                    out, rows=automaton.rows, byte_class=automaton.byte_class, accepting=automaton.accepting
                )
            os.replace(temporary, self._path(key))
            self._evict()
        except OSError as error:
            logger.warning("the grammar cache in %s cannot be written: %s", self.folder, error)
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(f'{FORMAT} {key}'.encode()).hexdigest()}.npz"

    def _evict(self) -> None:
        files = []
        for path in self.folder.glob("*.npz"):
            try:
                files.append((path.stat().st_mtime, path.stat().st_size, path))
            except FileNotFoundError:  # another process also evicts
                continue
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size


def _check(automaton: ir.Table) -> None:
    """Raise ValueError if the arrays are not an automaton."""
    rows, byte_class, accepting = automaton.rows, automaton.byte_class, automaton.accepting
    if rows.dtype != np.int32 or rows.ndim != 2 or len(rows) == 0:
        raise ValueError("rows are not int32 [num_states, num_classes]")
    if byte_class.dtype != np.uint8 or byte_class.shape != (256,) or int(byte_class.max()) >= rows.shape[1]:
        raise ValueError("byte_class is not uint8 [256], or has a class too many")
    if accepting.dtype != np.bool_ or accepting.shape != (len(rows),):
        raise ValueError("accepting is not bool [num_states]")
    if int(rows.min()) < -1 or int(rows.max()) >= len(rows):
        raise ValueError("a transition leads out of the automaton")
