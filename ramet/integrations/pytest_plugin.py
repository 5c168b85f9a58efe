"""A pytest plugin for programs: a scripted backend as a fixture, and snapshots of graphs and tokens.

pytest loads it wherever Ramet is installed; `-p no:ramet` leaves it out. Ramet itself is imported by the fixtures
alone, so tests that do not use them start as fast as before.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ramet.lang.backends.in_process import MockBackend
    from ramet.lang.recording.state import State

FOLDER = "__ramet__"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ramet")
    group.addoption("--ramet-update", action="store_true", help="write the snapshots of Ramet's programs anew")


@pytest.fixture
def scripted() -> Iterator[Callable[..., MockBackend]]:
    """A function that makes a strict MockBackend of a script, and lets all programs of this test run on it.

    Its arguments are those of MockBackend; `strict` is true unless it is given. The last one made is the default.
    """
    from ramet.lang.backends.default import use_backend
    from ramet.lang.backends.in_process import MockBackend

    with ExitStack() as stack:

        def make(script: Any = None, *, strict: bool = True, **options: Any) -> MockBackend:  # Any: MockBackend's own
            backend = stack.enter_context(MockBackend(script, strict=strict, **options))
            stack.enter_context(use_backend(backend))
            return backend

        yield make


@pytest.fixture
def program_snapshot(request: pytest.FixtureRequest) -> Callable[[State], None]:
    """A function that compares a run with the one that was kept: its graph, its texts, and tokens by node.

    The file stands beside the test, in `__ramet__/`. `--ramet-update` writes it. A test may compare several runs.
    """
    path, number = Path(request.node.path), 0

    def compare(state: State) -> None:
        nonlocal number
        number += 1
        name = "".join(c if c.isalnum() or c in "-_." else "-" for c in request.node.name)
        file = path.parent / FOLDER / f"{path.stem}.{name}{f'.{number}' if number > 1 else ''}.json"
        found = json.dumps(described(state), indent=1, ensure_ascii=False) + "\n"
        if request.config.getoption("--ramet-update"):
            file.parent.mkdir(exist_ok=True)
            file.write_text(found, encoding="utf-8")
        elif not file.is_file():
            pytest.fail(f"{file} does not exist; look at what the program does, and write it by --ramet-update")
        elif (kept := file.read_text(encoding="utf-8")) != found:
            lines = difflib.unified_diff(kept.splitlines(), found.splitlines(), str(file), "this run", lineterm="")
            pytest.fail("\n".join(["the program does something else now; --ramet-update keeps it", *lines]))

    return compare


def described(state: State) -> Mapping[str, Any]:  # Any: JSON
    """Return what a snapshot keeps of a run: its nodes with texts and tokens; no times and no lines of the source."""
    record = state.record
    nodes = []
    for node in record.graph.nodes:
        event = record.events.get(node.id)
        one: dict[str, Any] = {"kind": node.kind_name, "after": node.parent}  # Any: JSON
        if node.label is not None:
            one["name"] = node.label
        if event is not None:
            one["text"] = event.text
            if event.error is not None:
                one["error"] = event.error.type
            if event.usage is not None:
                usage = event.usage
                one["tokens"] = {"prompt": usage.prompt_tokens, "cached": usage.cached_tokens}
                one["tokens"]["written"] = usage.completion_tokens
        nodes.append(one)
    return {"program": record.program, "nodes": nodes}
