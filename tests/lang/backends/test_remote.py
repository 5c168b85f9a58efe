"""Programs on a server: the same tokens as in process, each event once whatever the connection does, typed errors."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ramet import Engine, OpenAI, Remote, State, function, gen, select, use_backend
from ramet.errors import (
    DeadlineExceeded,
    EngineStopped,
    InvalidProgram,
    Overloaded,
    ProgramCancelled,
    ProgramError,
    RametError,
    RemoteError,
)
from ramet.lang.backends.http_loop import retry_pause
from ramet.lang.graph.ir import Graph, Text
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.server.keys import KeyEntry, KeyFile, digest_of_key, write_keys
from ramet.runtime.testing.scripted_model import ScriptedEngine

PROGRAMS = sorted((Path(__file__).resolve().parents[3] / "examples" / "programs").glob("*.py"))
Serve = Callable[..., AbstractContextManager[Any]]
Load = Callable[[Path], Any]  # Any: the Example of conftest.py
Record = Callable[[], Any]  # Any: the RecordingEngine of conftest.py


@pytest.fixture
def engine(recording_engine: Record) -> Iterator[Any]:
    with recording_engine() as engine:
        yield engine


@pytest.fixture
def served(engine: ScriptedEngine, serve: Serve) -> Iterator[Any]:
    with serve(engine) as served:
        yield served


@pytest.fixture
def remote(served: Any) -> Iterator[Remote]:
    with Remote(served.url) as remote:
        yield remote


def test_a_program_that_has_ended_leaves_no_task(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    real = remote.http.request

    async def slow(method: str, path: str, *args: Any, **more: Any) -> Any:
        found = await real(method, path, *args, **more)
        if path.endswith("/parts"):
            try:
                await asyncio.sleep(3600)
            finally:
                for _ in range(5):  # as the end of a connection takes
                    await asyncio.sleep(0)
        return found

    async def tasks() -> list[str]:
        found = asyncio.all_tasks() - {asyncio.current_task()}
        return [str(one.get_coro()) for one in found if "_Program" in str(one.get_coro())]

    @function(temperature=0)
    def staged(s: State) -> None:
        s += "One: " + gen("x", max_tokens=4)
        s += f"{len(str(s['x']))} letters"

    monkeypatch.setattr(remote.http, "request", slow)
    staged.run(backend=remote)
    left = ["_run"]
    while any("_run" in one for one in left):
        left = remote.http.wait(tasks())
    assert left == []


@function(temperature=0)
def chat(s: State, name: str, turns: int = 3) -> None:
    s += f"A talk with {name}.\n"
    for turn in range(turns):
        s += f"Turn {turn}: " + gen("x", max_tokens=12) + "\n"
    s += "In all: " + select("verdict", ["good", "bad"])


# The same as in process.


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_an_example_computes_the_same_tokens_in_process_and_on_a_server(
    path: Path, load_example: Load, recording_engine: Record, serve: Serve
) -> None:
    if path.stem == "fastest_answer":
        pytest.skip("which branch is cancelled depends on time")
    example = load_example(path)
    with recording_engine() as here, recording_engine() as there, serve(there) as served, Remote(served.url) as remote:
        first = example.program.run(**example.arguments, backend=here, seed=11)
        second = example.program.run(**example.arguments, backend=remote, seed=11)
        assert first.error() is None
        assert second.error() is None
        assert Counter(here.prompts) == Counter(there.prompts)
        assert first.text() == second.text()
        assert repr(first.variables) == repr(second.variables)
        assert first.usage.completion_tokens == second.usage.completion_tokens
        assert first.record.graph == second.record.graph


@pytest.mark.parametrize(
    "name", ["debate", "map_reduce_summary", "multi_turn_chat", "self_consistency", "tree_of_thoughts", "router"]
)
def test_a_real_engine_behind_a_server_gives_the_same_tokens(
    name: str, tiny_model: LoadedModel, load_example: Load, serve: Serve
) -> None:
    example = load_example(PROGRAMS[0].with_name(f"{name}.py"))
    with Engine(tiny_model, num_kv_tokens=1 << 14, max_running_requests=16) as engine:
        first = example.program.run(**example.arguments, backend=engine, seed=3)
        engine.flush_cache()
        with serve(engine) as served, Remote(served.url) as remote:
            second = example.program.run(**example.arguments, backend=remote, seed=3)
            assert first.text() == second.text()
            assert repr(first.variables) == repr(second.variables)
            assert first.usage.prompt_tokens == second.usage.prompt_tokens
            assert first.usage.completion_tokens == second.usage.completion_tokens
            if name == "multi_turn_chat":  # what one branch finds of another's prefix depends on time
                assert first.usage.cached_tokens == second.usage.cached_tokens
        engine.check_integrity()


def test_streams_batches_and_event_loops_work_as_in_process(engine: ScriptedEngine, remote: Remote) -> None:
    pieces = list(chat.stream("Ann", var="x", backend=remote))
    state = chat.run("Ann", backend=engine)
    texts = [event.text for event in state.record.events.values() if event.finish_reason is not None]
    assert "".join(pieces) == "".join(texts)

    rows = [{"name": f"guest {i}"} for i in range(20)]
    expected = [one.text() for one in chat.run_batch(rows, backend=engine)]
    assert [one.text() for one in chat.run_batch(rows, backend=remote)] == expected

    async def many() -> list[str]:
        states = await asyncio.gather(*(chat.arun(**row, backend=remote) for row in rows))
        return [one.text() for one in states]

    assert asyncio.run(many()) == expected

    async def follow() -> str:
        return "".join([piece async for piece in chat.astream("Ann", var="x", backend=remote)])

    assert asyncio.run(follow()) == "".join(texts)


TRIP = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "stops": {"type": "array", "items": {"type": "string"}}},
    "required": ["city", "stops"],
}
WRITTEN = {"city": "Lyon", "stops": ["the old town", "the river", "a long walk home"]}


def test_partial_values_come_over_a_connection_while_the_value_is_written(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine goes on only when what it has written is there, so nothing waits for the whole value."""

    @function(max_tokens=200)
    def plan(s: State) -> None:
        s += "A trip: " + gen("trip", TRIP)

    @function
    def stops(s: State) -> list[str]:
        plan(s)
        found = []
        for stop in s["trip"]["stops"]:
            found.append(str(stop))
            steps.release(100)
        return found

    with ScriptedEngine([WRITTEN, WRITTEN]) as engine, serve(engine) as served, Remote(served.url) as remote:
        real, steps = engine._step, threading.Semaphore(0)

        def step() -> None:
            assert steps.acquire(timeout=60)
            real()

        monkeypatch.setattr(engine, "_step", step)
        steps.release(8)  # not enough for the whole value
        assert stops.run(backend=remote).result == WRITTEN["stops"]
        while steps.acquire(blocking=False):
            pass
        steps.release(3)
        found = []
        for trip in plan.stream(var="trip", backend=remote):
            found.append(trip)
            steps.release(3)
    assert found[0] in ({}, {"city": "Lyon"}, {"city": "Lyon", "stops": []})  # of three steps of the engine
    assert found[-1] == WRITTEN
    assert len(found) > 3


def test_the_rows_of_a_compiled_batch_are_one_request(engine: ScriptedEngine, served: Any, remote: Remote) -> None:
    compiled = chat.compile(turns=2)
    rows = [{"name": f"guest {i}"} for i in range(30)]
    expected = [state.text() for state in compiled.run_batch(rows, backend=engine)]
    with Posts(remote) as posts:
        states = compiled.run_batch(rows, backend=remote, token_budget=1000)
        assert [state.text() for state in states] == expected
    assert [path for _, path in posts.sent] == ["/v1/programs"]
    with pytest.raises(InvalidProgram, match="has no argument 'colour'"):
        compiled.run_batch([{"name": "a", "colour": "red"}], backend=remote)


class Posts:
    """What a Remote asks of its server."""

    def __init__(self, remote: Remote) -> None:
        self.sent: list[tuple[str, str]] = []
        self._http = remote.http

    def __enter__(self) -> Posts:
        async def note(request: Any) -> None:
            self.sent.append((request.method, request.url.path))

        self._hooks = self._http._run().client.event_hooks
        self._http._run().client.event_hooks = {**self._hooks, "request": [note]}
        return self

    def __exit__(self, *exc: object) -> None:
        self._http._run().client.event_hooks = self._hooks


def test_a_whole_program_is_one_request_and_each_stage_one_more(remote: Remote) -> None:
    @function(temperature=0)
    def staged(s: State) -> int:
        s += "Count: " + gen("a", max_tokens=8)
        first = len(s["a"])
        s += f" has {first} letters: " + gen("b", max_tokens=8)
        return first + len(s["b"])

    with Posts(remote) as posts:
        chat.run("Ann", backend=remote)
    assert posts.sent == [("POST", "/v1/programs")]
    with Posts(remote) as posts:
        state = staged.run(backend=remote)
    assert state.result == len(state["a"]) + len(state["b"])
    kinds = [path.split("/")[-1] for _, path in posts.sent]
    # That no more will come may be said after the run has returned.
    assert kinds in (["programs", "parts"], ["programs", "parts", "parts"])


def test_text_comes_while_it_is_written(serve: Serve) -> None:
    answers = ["one two three four five six"]
    with ScriptedEngine(answers, latency_s=0.02) as engine, serve(engine) as served, Remote(served.url) as remote:
        pieces = list(chat.stream("Ann", var="x", backend=remote, turns=1, max_tokens=40))
    assert len(pieces) > 1


def test_checks_and_tools_are_functions_of_this_process(remote: Remote) -> None:
    seen: list[str] = []

    def is_long(text: str) -> bool:
        seen.append(text)
        return len(text) > 3

    @function(temperature=0)
    def program(s: State) -> None:
        s += "Say: " + gen("x", max_tokens=20, where=is_long)

    assert len(program.run(backend=remote)["x"]) > 3
    assert seen


# Connections that break.


class Breaking:
    """A proxy on the loopback address that closes each connection after some bytes of answer, and counts them."""

    def __init__(self, port: int, limits: Sequence[int | None]) -> None:
        self._port = port
        self._limits = list(limits)
        self.num_connections = 0

    def __enter__(self) -> Breaking:
        self._loop = asyncio.new_event_loop()
        is_up = threading.Event()

        async def start() -> None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
            is_up.set()

        def run() -> None:
            asyncio.set_event_loop(self._loop)
            self._loop.run_until_complete(start())
            self._loop.run_forever()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        assert is_up.wait(10)
        return self

    def __exit__(self, *exc: object) -> None:
        async def end() -> None:
            self._server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        left = self._limits.pop(0) if self._limits else None
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._port)

        async def up() -> None:
            while data := await reader.read(65536):
                server_writer.write(data)
            server_writer.close()

        task = asyncio.ensure_future(up())
        try:
            while data := await server_reader.read(65536):
                if left is not None:
                    data, left = data[:left], left - len(data)
                writer.write(data)
                await writer.drain()
                if left is not None and left <= 0:
                    break
        finally:
            task.cancel()
            writer.transport.abort()
            server_writer.close()


@pytest.mark.parametrize("limits", [[0], [150], [400], [700, 300, 900], [1, 500, 1, 2000], [3000]])
def test_a_broken_connection_costs_nothing_but_time(limits: list[int], engine: Any, served: Any) -> None:
    """Whatever the server had sent by then: nothing is run twice, and no event is missed or comes twice."""
    expected = chat.run("Ann", backend=engine, turns=6)
    engine.prompts.clear()
    with Breaking(int(served.url.rpartition(":")[2]), limits) as proxy, Remote(proxy.url, max_retries=6) as remote:
        stream = chat.stream("Ann", backend=remote, turns=6)
        events = list(stream)
        state = stream.state
        assert proxy.num_connections > len(limits)
    assert state.text() == expected.text()
    assert len(engine.prompts) == 6 + 2 * 2, "each generation and each choice was asked for once"
    done = Counter(event.node for event in events if event.kind == "done")
    assert set(done.values()) == {1}
    texts: dict[int, str] = {}
    for event in events:
        if event.kind == "text":
            texts[event.node] = texts.get(event.node, "") + event.text
    assert texts == {e.node: e.text for e in events if e.kind == "done" and e.finish_reason is not None}


def test_stages_go_on_over_connections_that_break(engine: ScriptedEngine, served: Any) -> None:
    @function(temperature=0)
    def program(s: State) -> None:
        for turn in range(4):
            s += f"Turn {turn}: " + gen("x", max_tokens=12)
            s.set_var("length", len(s["x"]))

    expected = program.run(backend=engine)
    port = int(served.url.rpartition(":")[2])
    with Breaking(port, [500, 0, 400, 120]) as proxy, Remote(proxy.url, max_retries=8) as remote:
        state = program.run(backend=remote)
        assert state.text() == expected.text()


@function(max_tokens=4)
def poem(s: State) -> None:
    s += "A poem:" + gen("line")


def test_no_server_is_an_error_that_says_so() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with Remote(f"http://127.0.0.1:{port}", max_retries=1) as remote:
        state = chat.run("Ann", backend=remote, failures="keep")
        with pytest.raises(ProgramError, match="is `ramet serve` running there") as raised:
            state["verdict"]
    assert isinstance(raised.value.__cause__, RemoteError)
    endpoint = OpenAI(f"http://127.0.0.1:{port}/v1", "key", model="m", max_retries=1)
    with endpoint, pytest.raises(ProgramError, match="is a server with OpenAI's API running there"):
        poem.run(backend=endpoint, failures="keep")["line"]


@pytest.mark.parametrize(
    ("status", "expected"),
    [(404, r"\(status 404 of http://127.*/v1/programs\)"), (200, "is `ramet serve` running there")],
)
def test_an_address_of_something_else_is_an_error_that_names_it(status: int, expected: str) -> None:
    class Page(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        remote = Remote(f"http://127.0.0.1:{server.server_port}", max_retries=0)
        with remote, pytest.raises(ProgramError, match=expected):
            poem.run(backend=remote)["line"]
        server.shutdown()
        thread.join()


def test_an_engine_that_crashes_fails_what_ran_on_it_and_nothing_else(serve: Serve) -> None:
    @function(max_tokens=400, ignore_eos=True)
    def long(s: State) -> None:
        s += "On and on: " + gen("x")

    with ScriptedEngine(latency_s=0.05) as engine, serve(engine) as served, Remote(served.url) as remote:
        stream = long.stream(backend=remote, failures="keep")
        iterator = iter(stream)
        while next(iterator).kind != "text":
            pass
        served.loop.call_soon_threadsafe(served.proxy.crash)
        errors = [event for event in iterator if event.kind == "error"]
        assert errors
        error = stream.state.error()
        assert error is not None
        assert "crashed" in str(error)
        assert isinstance(error.__cause__, EngineStopped)
        assert chat.run("Ann", backend=remote, failures="keep").error() is None


# Refusals.


def test_keys_are_asked_for_and_sent(engine: ScriptedEngine, serve: Serve) -> None:
    with serve(engine, api_key=("secret",)) as served:
        with Remote(served.url) as stranger, pytest.raises(ProgramError, match="pass api_key="):
            assert chat.run("Ann", backend=stranger)["verdict"]
        with Remote(served.url, api_key="secret") as known:
            assert chat.run("Ann", backend=known)["verdict"]


def test_the_prompts_of_programs_wait_within_the_limit_of_their_key(
    engine: ScriptedEngine, serve: Serve, tmp_path: Path
) -> None:
    path = tmp_path / "keys.json"
    write_keys(path, KeyFile((KeyEntry(name="a", sha256=(digest_of_key(b"secret"),), max_queued_tokens=1000),)))
    with serve(engine, api_keys_file=str(path)) as served, Remote(served.url, api_key="secret", max_retries=0) as known:
        for _ in range(20):  # what has waited is given back
            assert chat.run("Ann", backend=known, failures="keep").error() is None
        error = chat.run("Ann" * 2000, backend=known, failures="keep").error()
        assert error is not None
        assert isinstance(error.__cause__, Overloaded)
        assert "max_queued_tokens of the key 'a'" in str(error)
        assert chat.run("Ann", backend=known, failures="keep").error() is None


def test_a_busy_server_is_asked_again_when_it_says(
    engine: ScriptedEngine, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float | None] = []
    with serve(engine) as served:

        def pause(error: RametError, failures: int) -> float | None:
            """The server has refused; it has room when it is asked again."""
            served.tenants.in_flight.limit = 100
            pauses.append(retry_pause(error, failures))
            return pauses[-1]

        monkeypatch.setattr("ramet.lang.backends.remote.retry_pause", pause)
        served.tenants.in_flight.limit = 0
        with Remote(served.url, max_retries=0) as impatient:
            error = chat.run("Ann", backend=impatient, failures="keep").error()
            assert error is not None
            assert isinstance(error.__cause__, Overloaded)
        pauses.clear()
        served.tenants.in_flight.limit = 0
        with Remote(served.url) as patient:
            assert chat.run("Ann", backend=patient, failures="keep").error() is None
        assert pauses == [1.0], "Retry-After said one second"


def test_what_the_server_refuses_has_the_class_it_has_in_process(remote: Remote) -> None:
    error = chat.run("Ann", backend=remote, cache_salt="x" * 300, failures="keep").error()
    assert error is not None
    assert type(error.__cause__).__name__ == "InvalidRequest"
    assert "cache_salt" in str(error)


def test_only_its_owner_sees_a_program(engine: ScriptedEngine, serve: Serve) -> None:
    with serve(engine, api_key=("one", "two")) as served:
        graph = {"version": 1, "nodes": [{"kind": "text", "id": 0, "parts": ["a"]}]}
        mine, other = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
        program = served.client.post("/v1/programs", json={"graph": graph}, headers=mine).json()
        assert served.client.get(f"/v1/programs/{program['id']}", headers=mine).status_code == 200
        assert served.client.get(f"/v1/programs/{program['id']}", headers=other).status_code == 404


def test_a_key_stands_for_one_request(served: Any) -> None:
    graph = {"version": 1, "nodes": [{"kind": "text", "id": 0, "parts": ["a"]}]}
    key = {"idempotency-key": "once"}
    first = served.client.post("/v1/programs", json={"graph": graph}, headers=key)
    assert served.client.post("/v1/programs", json={"graph": graph}, headers=key).json()["id"] == first.json()["id"]
    other = served.client.post("/v1/programs", json={"graph": graph, "priority": 3}, headers=key)
    assert other.status_code == 422
    assert other.json()["error"]["code"] == "idempotency_key_reused"


# Ends.


@function(max_tokens=1900, ignore_eos=True)
def endless(s: State) -> None:
    branches = s.fork(4)
    branches += lambda i: f"{i} on and on: "
    branches += gen("x")
    branches.join()


def idle(engine: Any, limit_s: float = 5.0) -> bool:
    deadline_s = time.monotonic() + limit_s
    while time.monotonic() < deadline_s:
        stats = engine.stats()
        if not stats["num_running"] and not stats["num_waiting"]:
            return True
        time.sleep(0.01)
    return False


@pytest.fixture(scope="module")
def tiny(tiny_model: LoadedModel) -> Iterator[Engine]:
    with Engine(tiny_model, num_kv_tokens=1 << 14, max_running_requests=16) as engine:
        yield engine


def test_leaving_a_stream_frees_the_servers_pages(tiny: Engine, serve: Serve) -> None:
    with serve(tiny) as served, Remote(served.url) as remote:
        for event in endless.stream(backend=remote):
            if event.kind == "text":
                break
        assert idle(tiny)
    tiny.check_integrity()
    stats = tiny.stats()
    assert stats["num_free_pages"] + stats["num_evictable_pages"] == stats["num_pages"]


def test_a_cancelled_task_cancels_the_program_on_the_server(tiny: Engine, serve: Serve) -> None:
    async def program() -> None:
        task = asyncio.create_task(endless.arun(backend=remote))
        while not tiny.stats()["num_running"]:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with serve(tiny) as served, Remote(served.url) as remote:
        asyncio.run(program())
        assert idle(tiny)
    tiny.check_integrity()


def test_a_program_whose_client_is_gone_ends_after_its_grace(tiny: Engine, serve: Serve) -> None:
    with serve(tiny) as served:
        port = int(served.url.rpartition(":")[2])
        with Breaking(port, [900]) as proxy, Remote(proxy.url, grace_s=0.4, max_retries=0) as remote:
            state = endless.run(backend=remote, failures="keep")
            error = state.error()
            assert error is not None
            assert isinstance(error.__cause__, RemoteError)
            assert not idle(tiny, 0.1), "it may come back"
            assert idle(tiny)
    tiny.check_integrity()


def test_a_deadline_holds_on_the_server_and_here(tiny: Engine, serve: Serve) -> None:
    with serve(tiny) as served, Remote(served.url) as remote:
        assert isinstance(endless.run(backend=remote, timeout_s=0.3, failures="keep").error(), DeadlineExceeded)
        assert idle(tiny)


def test_a_branch_can_be_cancelled_alone(tiny: Engine, serve: Serve) -> None:
    @function(temperature=0)
    def program(s: State) -> None:
        s += "Two ways: "
        slow, fast = s.fork(2)
        slow += gen("slow", max_tokens=1800, ignore_eos=True)
        fast += gen("fast", max_tokens=4, ignore_eos=True)
        s.set_var("answer", str(fast["fast"]))
        slow.cancel()

    with serve(tiny) as served, Remote(served.url) as remote:
        state = program.run(backend=remote)
        assert len(state["answer"]) == 4
        assert state.error() is None, "a branch that the program cancelled itself is no failure"
        assert idle(tiny)


def test_a_budget_holds_on_the_server(tiny: Engine, serve: Serve) -> None:
    with serve(tiny) as served, Remote(served.url) as remote:
        state = endless.run(backend=remote, token_budget=50, failures="keep")
        assert state.usage.completion_tokens <= 50


def test_a_closed_backend_ends_its_programs_and_works_again(tiny: Engine, serve: Serve) -> None:
    with serve(tiny) as served:
        remote = Remote(served.url, grace_s=0.2)
        stream = endless.stream(backend=remote)
        next(iter(stream))
        remote.close()
        assert isinstance(
            stream.state.error() or stream.state.recorder.run.outcomes.failure, ProgramError | ProgramCancelled
        )
        short = chat.run("Ann", backend=remote, turns=1)
        assert short.error() is None
        remote.close()
        assert idle(tiny)


# Choosing it.


def test_an_address_is_a_backend(served: Any) -> None:
    with use_backend(served.url) as backend:
        assert isinstance(backend, Remote)
        assert chat.run("Ann", failures="keep").error() is None
    assert chat.run("Ann", backend=served.url, failures="keep").error() is None
    backend.close()


def test_the_server_explains_a_graph_as_the_engine_here_does(engine: ScriptedEngine, remote: Remote) -> None:
    compiled = chat.compile(name="Ann", turns=2)
    graph = Graph(compiled.graph.nodes, {"name": "Ann"})
    found = remote.explain(graph, "chat")
    expected = chat.explain("Ann", 2, backend=engine).to_dict()
    for name in ("prompt", "shared", "new", "written", "kv_bound", "is_complete"):
        assert found[name] == expected[name]
    assert found["program"] == "chat"
    symbolic = remote.explain(compiled.graph, "chat")
    assert isinstance(symbolic["prompt"], list), "without its argument there are limits"
    with pytest.raises(InvalidProgram, match="refers to node 7"):
        remote.explain(Graph((Text(id=0, parent=7, parts=("a",)),)))
