"""Runs the features of one client's tour against a server, and prints one line of JSON for each.

A tour is a script whose features are the functions of its own that take the server's URL. It runs in an environment of
its own, because the clients' requirements exclude each other: `python litellm_tour.py URL`.

The user's message carries the answers of the scripted engine: ⟦first‖second⟧. What begins with `call` is a tool call.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType

SCHEMA = {
    "type": "object",
    "properties": {"path": {"type": "string"}},
    "required": ["path"],
    "additionalProperties": False,
}


def says(*answers: str) -> str:
    """A user's message to which the engine gives these answers, one a turn."""
    return "Go on: ⟦" + "‖".join(answers) + "⟧"


def call(name: str, /, **arguments: object) -> str:
    return f"call {name} {json.dumps(arguments)}"


def agent(script: str, arguments: list[str], folder: str, **variables: str) -> str:
    """Run an agent of npm in a folder, and return what it wrote. `script`: the tour, whose head names the package."""
    package = re.search(r'^# npm = "(.*)"$', Path(script).read_text(encoding="utf-8"), re.MULTILINE)[1]
    command = ["npx", "--yes", package, *arguments]
    home = {"HOME": folder, "PATH": os.environ["PATH"], "npm_config_cache": os.path.expanduser("~/.npm")}
    done = subprocess.run(
        command, cwd=folder, env=home | variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def features(module: ModuleType) -> list[str]:
    """The features of a tour, in its order."""
    own = {name: value for name, value in vars(module).items() if inspect.isfunction(value)}
    own = {name: value for name, value in own.items() if value.__module__ == module.__name__}
    return [name for name, value in own.items() if list(inspect.signature(value).parameters) == ["url"]]


def run() -> None:
    module, url = sys.modules["__main__"], sys.argv[1]
    for name in features(module):
        error, start_s = None, time.monotonic()
        try:
            vars(module)[name](url)
        except Exception:  # whatever a client raises is what went wrong there
            error = traceback.format_exc(limit=-6)
        print(json.dumps({"name": name, "error": error, "seconds": round(time.monotonic() - start_s, 2)}), flush=True)
