"""The last line of a benchmark: its result as one line of JSON, printed, and appended to a file where one is named."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def commit() -> str:
    """The commit that runs; COMMIT says it where the working tree came without its history."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def print_record(record: Mapping[str, Any], out: Path | str | None = None) -> None:  # Any: JSON
    """Print the record, and append it to the file `out`."""
    line = json.dumps(record)
    print(line)
    if out is not None:
        path = Path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
