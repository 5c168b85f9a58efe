"""Read a JSON object from a model folder, with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ramet.errors import BrokenModelFile

MAX_JSON_BYTES = 64 << 20
MAX_JSON_PARTS = 1_000_000  # lists and objects; as values of Python an empty one takes 64 bytes


def read_json(
    path: Path, *, max_bytes: int = MAX_JSON_BYTES, max_parts: int = MAX_JSON_PARTS
) -> dict[str, Any]:  # JSON values
    """Parse a JSON object. Raises: BrokenModelFile naming the file, and for one that is too large."""
    try:
        num_bytes = path.stat().st_size
        if num_bytes > max_bytes:
            raise BrokenModelFile(f"{path} has {num_bytes:,} bytes; the limit is {max_bytes:,}")
        data = path.read_bytes()
        num_parts = data.count(b"[") + data.count(b"{")
        if num_parts > max_parts:
            raise BrokenModelFile(f"{path} has {num_parts:,} lists and objects; the limit is {max_parts:,}")
        parsed = json.loads(data.decode("utf-8"))
    except FileNotFoundError as error:
        raise BrokenModelFile(f"{path.parent} lacks {path.name}") from error
    except BrokenModelFile:
        raise
    except RecursionError as error:
        raise BrokenModelFile(f"{path} is nested too deep to be read") from error
    except (OSError, ValueError) as error:  # bad UTF-8 and bad JSON are both ValueError
        raise BrokenModelFile(f"{path} is not readable JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise BrokenModelFile(f"{path} holds a {type(parsed).__name__} but must hold a JSON object")
    return parsed
