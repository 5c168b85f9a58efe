"""Read a JSON object from a model folder, with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ramet.errors import BrokenModelFile


def read_json(path: Path) -> dict[str, Any]:  # JSON values
    """Parse a JSON object. Raises: BrokenModelFile naming the file."""
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BrokenModelFile(f"{path.parent} lacks {path.name}") from error
    except (OSError, ValueError) as error:  # bad UTF-8 and bad JSON are both ValueError
        raise BrokenModelFile(f"{path} is not readable JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise BrokenModelFile(f"{path} holds a {type(parsed).__name__} but must hold a JSON object")
    return parsed
