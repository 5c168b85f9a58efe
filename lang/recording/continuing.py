"""States in files: a branch's text with its token path, so that the cache of the same model has its prefix again."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from ramet.errors import InvalidProgram
from ramet.lang.backends.protocol import Backend
from ramet.lang.graph import ir
from ramet.lang.graph.options import ProgramOptions
from ramet.lang.recording.recorder import Recorder
from ramet.lang.running.run import Run
from ramet.lang.running.tools import to_json
from ramet.lang.running.values import plain


class SavedState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A branch in a file. `graph`: its text, and its token path. `values`: its variables, as JSON.

    The others are fields of Recorder and Run.
    """

    program: str
    graph: ir.Graph
    values: dict[str, Any]
    counts: dict[str, int]
    place: tuple[int, ...]
    num_generated: int
    role: str | None
    seed: int | None
    sampling: ir.Sampling
    cache_salt: str
    adapter: str = ""
    format: Literal["ramet state 1"] = "ramet state 1"


def saved(recorder: Recorder) -> bytes:
    """Return a branch as JSON. Waits for it.

    Raises its error, and InvalidRequest for a variable without a JSON form.
    """
    recorder.record_late()
    run = recorder.run
    if run.is_recording:
        run.note_path(recorder.tip)
    state = SavedState(
        run.options.program,
        run.transcript(recorder.tip),
        {name: to_json(plain(value, run), name) for name, value in recorder.variables.items()},
        recorder.counts,
        recorder.place,
        recorder.num_generated,
        recorder.role,
        run.seed,
        recorder.sampling,
        run.options.cache_salt,
        run.options.adapter,
    )
    return msgspec.json.encode(state)


def loaded(data: bytes, backend: Backend) -> Recorder:
    """Return the branch of a file's contents, in a run of its own. Raises InvalidProgram for other contents."""
    try:
        found = msgspec.json.decode(data, type=SavedState)
    except msgspec.MsgspecError as error:
        raise InvalidProgram(f"this is no saved state: {error}") from error
    ir.GraphIndex().add(found.graph)
    options = ProgramOptions(found.program, cache_salt=found.cache_salt, adapter=found.adapter)
    return Recorder(
        Run(backend, options, seed=found.seed, graph=found.graph, is_continued=True),
        len(found.graph.nodes) - 1 if found.graph.nodes else None,
        place=found.place,
        variables=found.values,
        counts=found.counts,
        role=found.role,
        sampling=found.sampling,
        num_generated=found.num_generated,
    )
