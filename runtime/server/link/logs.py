"""The lines that a server's processes write to their log: as text, or each as one JSON object."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Literal

LogFormat = Literal["text", "json"]


class JsonLines(logging.Formatter):
    """Writes a record as a JSON object. A record's `fields`, if it has some, are the object's own."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
        }
        fields = record.__dict__.get("fields")
        if isinstance(fields, dict):
            line |= {"message": "request", **fields}
        else:
            line["message"] = record.getMessage()
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def set_up_logging(level: str, form: LogFormat, process: str) -> None:
    """Write this process's log to standard error. `process`: the name that its lines have."""
    handler = logging.StreamHandler()
    text = logging.Formatter(f"%(asctime)s %(levelname)s {process} %(name)s: %(message)s")
    handler.setFormatter(JsonLines(process) if form == "json" else text)
    logging.basicConfig(level=level, handlers=[handler])
