"""Loops over arrays, written once in the subset of Python that numba compiles.

Where numba is installed, a loop is compiled at its first call, and the compiled code is kept beside its file. Without
it the same source runs as it is, about a hundred times slower: enough for the tests of programs with a scripted model.
"""

from __future__ import annotations

import hashlib
import io
import logging
import pickletools
import sys
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np

try:
    import numba
except ImportError:  # an installation without an engine
    numba = None

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


def loop(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function whose loops should be compiled. It may not use the interpreter's lock."""
    if numba is not None:
        compiled: Callable[P, R] = numba.njit(cache=True, nogil=True)(function)
        drop_damaged(folder_of(compiled))
        return compiled

    @wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> R:
        with np.errstate(over="ignore"):  # sums that pass 64 bits wrap, as they do when compiled
            return function(*args, **kwargs)

    return plain


@cache
def compiler() -> str:
    """What compiles the loops, with its version and this computer's CPU; empty if they run as they are."""
    if numba is None:
        return ""
    from llvmlite.binding import get_host_cpu_name  # a part of numba

    return f"{numba.__version__} {get_host_cpu_name()}"


def folder_of(compiled: Any) -> Path:  # Any: numba's function
    """Return the folder in which a compiled loop is kept."""
    return Path(compiled.stats.cache_path)


def are_compiled(loop: Any) -> bool:  # Any: as above
    """Tell whether the loops of a loop's folder (`grammar`) were compiled on this computer, or run as they are."""
    return not compiler() or mark_of(loop).exists()


@cache
def mark_of(loop: Any) -> Path:  # Any: as above
    """Return the path of the file that says that the loops of a loop's folder are compiled. It stands beside the code.

    Its name changes with all that the compiled code depends on.
    """
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.joinpath(loop.__module__.split(".")[1]).rglob("*.py")):
        digest.update(source.read_bytes())
    for version in (compiler(), str(sys.implementation.cache_tag)):
        digest.update(version.encode())
    return folder_of(loop) / f"ramet-compiled-{digest.hexdigest()[:16]}"


@cache
def drop_damaged(folder: Path) -> None:
    """Remove compiled code that a full disk or a lost machine left cut off: it is compiled again. Once a process.

    numba would end the process when it reads such a file. A millisecond for five files.
    """
    damaged = [path for path in folder.glob("*.nb[ic]") if not _is_whole(path)]
    if damaged:
        logger.warning("%d damaged files of compiled code in %s: compiled again", len(damaged), folder)
    for path in damaged:
        path.unlink(missing_ok=True)


def _is_whole(path: Path) -> bool:
    """Return whether a file consists of pickles from its first to its last byte; an index (.nbi) has two. Runs none."""
    try:
        content = io.BytesIO(path.read_bytes())
        for _ in range(2 if path.suffix == ".nbi" else 1):
            for _ in pickletools.genops(content):
                pass
    except FileNotFoundError:
        return True  # another process has replaced it
    except Exception:  # reading arbitrary bytes as a pickle may raise anything
        return False
    return not content.read(1)
