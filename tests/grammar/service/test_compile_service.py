from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError, Future, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ramet.errors import EngineStopped, GrammarTooLarge, InvalidRegex, InvalidSchema, Overloaded
from ramet.grammar import CompiledGrammar, Limits, Vocabulary, deadline
from ramet.grammar.service import compile_service as service_module
from ramet.grammar.service import sources
from ramet.grammar.service.compile_service import CompileService, ServiceConfig, source_key
from ramet.grammar.service.disk_cache import DiskCache
from ramet.grammar.text.choices import choices

# an interrupt may be thrown inside another library's callback, where it is lost with a warning; it is then sent again
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

BYTES = Vocabulary([*(bytes((i,)) for i in range(256)), b"<eos>"], [256], [256])
OTHER = Vocabulary([*(bytes((i,)) for i in range(256)), b"ab", b"<eos>"], [257], [257])
# half a million states if let run: far longer than any limit below
SLOW = "(a|b)*a(a|b){18}"
PATIENT = Limits(max_regular_states=10_000_000)


def config(**fields: Any) -> ServiceConfig:
    return ServiceConfig(**{"cache_dir": None, "max_memory_bytes": None, "min_disk_time_s": 0.0, **fields})


def accepts(grammar: CompiledGrammar, text: str) -> bool:
    state = grammar.advance_bytes(0, text.encode())
    return state is not None and grammar.is_accepting(state)


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Held:
    """Sources whose parsing goes on until it is let go: it looks at its time limit, so it can be paused and given up.

    Names that begin with "deaf" do not look. `order`: what began, ended, or was given up.
    """

    def __init__(self) -> None:
        self.order: list[str] = []
        self._go: dict[str, threading.Event] = {}
        self._begun: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    def wait(self, source: str) -> None:
        """Wait until a source is being parsed."""
        assert self._event(self._begun, source).wait(30), f"{source} did not begin: {self.order}"

    def let_go(self, source: str) -> None:
        self._event(self._go, source).set()

    def parse(self, kind: str, source: Any, **options: Any) -> Any:
        if not str(source).startswith(("held", "deaf")):
            self.order.append(source)
            return sources.parse_source(kind, source, **options)
        self.order.append(f"{source} begins")
        self._event(self._begun, source).set()
        go = self._event(self._go, source)
        try:
            while not go.wait(0 if source.startswith("held") else 60):
                if source.startswith("held"):
                    deadline.check(source)
        except BaseException as error:
            self.order.append(f"{source}: {type(error).__name__}")
            raise
        self.order.append(f"{source} ends")
        return sources.parse_source("regex", "x", **options)

    def _event(self, events: dict[str, threading.Event], source: str) -> threading.Event:
        with self._lock:
            return events.setdefault(source, threading.Event())


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    held = Held()
    monkeypatch.setattr(service_module, "parse_source", held.parse)
    return held


def test_equal_constraints_are_compiled_once_and_kept() -> None:
    with CompileService(config()) as service:
        first = service.compile("regex", "a+", BYTES)
        assert accepts(first, "aaa")
        assert service.compile("regex", "a+", BYTES) is first
        assert service.compile("regex", "a+", OTHER) is not first
        assert service.compile("regex", "a+", BYTES, flags=2) is not first


def test_white_space_of_json_sources_does_not_count() -> None:
    assert source_key("json_schema", '{"a": [1]}', {}) == source_key("json_schema", {"a": [1]}, {})
    assert source_key("json_schema", '{"a": 1, "b": 2}', {}) != source_key("json_schema", '{"b": 2, "a": 1}', {})
    assert source_key("regex", "a", {}) != source_key("substring", "a", {})


def test_errors_reach_the_future_and_are_kept() -> None:
    with CompileService(config()) as service:
        for _ in range(2):
            with pytest.raises(InvalidRegex, match="does not parse"):
                service.compile("regex", "(", BYTES)
        with pytest.raises(InvalidSchema, match="not JSON"):
            service.compile("json_schema", "{", BYTES)
        assert accepts(service.compile("choice", '["x"]', BYTES), "x")


def test_a_job_past_its_time_ends_with_a_typed_error_and_the_worker_goes_on() -> None:
    with CompileService(config(max_time_s=0.3, limits=PATIENT)) as service:
        with pytest.raises(GrammarTooLarge, match=r"took longer than 0.3 s, at the pattern '\(a\|b\)"):
            service.compile("regex", SLOW, BYTES)
        first = service._workers[0]
        wait_until(lambda: first.is_idle)
        assert accepts(service.compile("regex", "b", BYTES), "b")
        assert service._workers == [first]


def test_a_job_past_its_memory_ends_with_a_typed_error() -> None:
    with CompileService(config(max_time_s=60, max_memory_bytes=8 << 20, limits=PATIENT)) as service:
        with pytest.raises(GrammarTooLarge, match="took more than 8,388,608 bytes of memory"):
            service.compile("regex", SLOW, BYTES)
        assert accepts(service.compile("regex", "b", BYTES), "b")


def test_a_worker_that_does_not_listen_is_replaced(monkeypatch: pytest.MonkeyPatch, held: Held) -> None:
    monkeypatch.setattr(service_module, "_GRACE_S", 0.2)
    monkeypatch.setattr(service_module, "_MOST_WALL", 0.5)
    with CompileService(config(max_time_s=1)) as service:
        with pytest.raises(GrammarTooLarge):
            service.compile("regex", "deaf", BYTES)
        (deaf,) = service._workers
        wait_until(lambda: deaf not in service._workers)
        assert accepts(service.compile("regex", "b", BYTES), "b")  # by another worker: the first is still deaf
        held.let_go("deaf")


def test_a_small_source_does_not_wait_for_large_ones(held: Held) -> None:
    with CompileService(config(max_time_s=60)) as service:
        large = [service.submit("regex", f"held {i}", BYTES, client=("", str(i))) for i in range(4)]
        held.wait("held 0")
        assert accepts(service.compile("regex", "b", BYTES, client=("", "b")), "b")
        assert not any(future.done() for future in large)
        for i in range(4):
            held.let_go(f"held {i}")
        assert all(accepts(future.result(60), "x") for future in large)


def test_a_source_of_unknown_cost_makes_way_for_others_of_its_client(held: Held) -> None:
    with CompileService(config(max_time_s=60)) as service:
        large = service.submit("regex", "held", BYTES)
        held.wait("held")
        assert accepts(service.compile("regex", "a", BYTES), "a")
        held.let_go("held")
        assert accepts(large.result(60), "x")
        assert held.order == ["held begins", "a", "held ends"]  # nothing was begun anew


def test_a_source_that_does_not_look_at_its_time_is_not_waited_for(held: Held) -> None:
    with CompileService(config(max_time_s=60)) as service:
        large = service.submit("regex", "deaf", BYTES)
        held.wait("deaf")
        assert accepts(service.compile("json_schema", '{"type": "integer"}', BYTES), "7")
        held.let_go("deaf")
        assert accepts(large.result(60), "x")


def test_a_job_that_is_given_up_while_it_is_held_ends(held: Held) -> None:
    with CompileService(config(max_time_s=60)) as service:
        first = service.submit("regex", "held 0", BYTES, client=("", "a"))
        held.wait("held 0")
        second = service.submit("regex", "held 1", BYTES, client=("", "b"))
        held.wait("held 1")  # only one of the two has the turn
        assert first.cancel()
        wait_until(lambda: "held 0: _Interrupted" in held.order)
        assert second.cancel()
        wait_until(lambda: "held 1: _Interrupted" in held.order)
        wait_until(lambda: all(worker.is_idle for worker in service._workers))
        assert all(worker.num_interrupts == 0 for worker in service._workers)


def test_more_jobs_than_may_wait_are_refused_and_the_others_go_on(held: Held) -> None:
    with CompileService(config(max_time_s=60, max_waiting=8)) as service:
        running = service.submit("regex", "held", BYTES)
        held.wait("held")
        greedy = [service.submit("regex", f"held {i}{{{i}}}", BYTES, client=("", "greedy")) for i in range(8)]
        refused = [future for future in greedy if future.done()]
        assert len(refused) == 4
        with pytest.raises(
            Overloaded, match=r"4 constraints wait to be compiled, and the limit is 8 for all"
        ) as raised:
            refused[0].result()
        assert raised.value.retry_after_s >= 1
        again = service.submit("regex", "held 0{0}", BYTES, client=("", "greedy"))  # one that waits already
        assert not again.done()
        assert accepts(service.compile("regex", "b", BYTES, client=("", "modest")), "b")
        held.let_go("held")
        assert accepts(running.result(60), "x")


def test_an_error_that_is_no_exception_reaches_those_who_wait_and_ends_no_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Panic(BaseException):
        """As compiled extensions raise."""

    def parse(kind: str, source: Any, **options: Any) -> Any:
        if source == "panic":
            raise Panic("no way")
        return sources.parse_source(kind, source, **options)

    monkeypatch.setattr(service_module, "parse_source", parse)
    with CompileService(config()) as service:
        with pytest.raises(Panic, match="no way"):
            service.submit("regex", "panic", BYTES).result(60)
        (worker,) = service._workers
        assert accepts(service.compile("regex", "b", BYTES), "b")
        assert service._workers == [worker]


def test_a_warm_up_that_fails_ends_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise SystemExit(3)

    monkeypatch.setattr(service_module, "load_loops", fail)
    with CompileService(config()) as service:
        assert accepts(service.submit("regex", "a", BYTES).result(60), "a")
        assert len(service._workers) == 1


def test_a_warm_up_that_does_not_end_fails_those_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(service_module, "load_loops", lambda: go_on.wait(60))
    monkeypatch.setattr(service_module, "_START_S", 0.1)
    with CompileService(config()) as service:
        with pytest.raises(EngineStopped, match="could not be loaded within"):
            service.submit("regex", "a", BYTES).result(60)
        with pytest.raises(EngineStopped, match="could not be loaded within"):
            service.submit("regex", "b", BYTES).result(60)
        assert len(service._workers) == 1
        go_on.set()
        wait_until(lambda: service._workers[0].is_warm)
        assert accepts(service.submit("regex", "c", BYTES).result(60), "c")


def test_closing_stops_a_job_that_goes_on(held: Held) -> None:
    service = CompileService(config(max_time_s=60))
    service.submit("regex", "held", BYTES)
    held.wait("held")
    threads = [service._supervisor, *(worker.thread for worker in service._workers)]
    service.close()
    assert not any(thread is None or thread.is_alive() for thread in threads)
    assert held.order == ["held begins", "held: _Interrupted"]


def test_cancelling_gives_a_job_up_once_nobody_waits() -> None:
    with CompileService(config(max_time_s=60, limits=PATIENT)) as service:
        first = service.submit("regex", SLOW, BYTES)
        second = service.submit("regex", SLOW, BYTES)
        queued = service.submit("regex", "never", BYTES)
        assert queued.cancel()
        assert first.cancel()
        assert len(service._jobs) == 1
        assert second.cancel()
        assert accepts(service.submit("regex", "b", BYTES).result(timeout=30), "b")
        with pytest.raises(CancelledError):
            second.result()
        assert not service._jobs


def test_a_worker_is_left_alone_until_it_has_loaded_the_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    may_load, loads = threading.Event(), sources.parse_source
    order: list[str] = []

    def load() -> None:
        order.append("loads")
        assert may_load.wait(30)

    def parse(kind: str, source: Any, **options: Any) -> Any:
        order.append("parses")
        return loads(kind, source, **options)

    monkeypatch.setattr(service_module, "load_loops", load)
    monkeypatch.setattr(service_module, "parse_source", parse)
    with CompileService(config(max_time_s=1)) as service:
        given_up = service.submit("regex", "a", BYTES)
        wanted = service.submit("regex", "b", BYTES)
        wait_until(lambda: service._workers)
        (worker,) = service._workers
        assert given_up.cancel()
        worker.interrupt()
        time.sleep(1.5)  # a job's time does not begin before
        assert order == ["loads"]
        may_load.set()
        assert accepts(wanted.result(30), "b")
        assert order == ["loads", "parses"]
        assert service._workers == [worker]


def test_jobs_that_are_given_up_leave_the_queue(held: Held) -> None:
    with CompileService(config(max_time_s=60)) as service:
        service.submit("regex", "held", BYTES)
        held.wait("held")
        queued = [service.submit("regex", f"a{i}", BYTES) for i in range(7)]
        assert len(service._queue) == 7
        assert all(future.cancel() for future in queued)
        assert not len(service._queue)


def test_a_cancelled_future_is_waited_for_no_longer() -> None:
    with CompileService(config(max_time_s=60, limits=PATIENT)) as service:
        future = service.submit("regex", SLOW, BYTES)
        assert future.cancel()
        assert wait([future], timeout=10).done == {future}


def test_many_threads_asking_at_once_get_the_same_grammar() -> None:
    with CompileService(config()) as service:
        futures: list[Future[CompiledGrammar]] = []

        def ask() -> None:
            for i in range(20):
                futures.append(service.submit("regex", f"a{{{i}}}", BYTES))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({id(f.result()) for f in futures}) == 20


def test_interrupts_at_any_moment_lose_no_job() -> None:
    with CompileService(config()) as service:
        stop = threading.Event()

        def disturb() -> None:
            while not stop.is_set():
                for worker in list(service._workers):
                    worker.interrupt()
                time.sleep(0.05)

        disturber = threading.Thread(target=disturb)
        disturber.start()
        try:
            for i in range(150):
                assert accepts(service.submit("regex", f"a{{{i % 7}}}{i}", BYTES).result(30), "a" * (i % 7) + str(i))
        finally:
            stop.set()
            disturber.join()


def test_the_oldest_grammars_make_room() -> None:
    with CompileService(config(max_grammars=3)) as service:
        first = service.compile("regex", "x0", BYTES)
        for i in range(1, 5):
            service.compile("regex", f"x{i}", BYTES)
        wait_until(lambda: len(service._cache) == 3)
        assert service.compile("regex", "x0", BYTES) is not first


def test_grammars_that_are_asked_for_once_do_not_push_out_one_that_is_used_again() -> None:
    with CompileService(config(max_grammars=3)) as service:
        used = service.compile("regex", "used", BYTES)
        assert service.compile("regex", "used", BYTES) is used
        for i in range(5):
            service.compile("regex", f"x{i}", BYTES)
        wait_until(lambda: len(service._cache) == 3)
        assert service.compile("regex", "used", BYTES) is used


def test_grammars_that_are_asked_for_once_take_a_small_part_of_the_cache() -> None:
    with CompileService(config()) as probe:
        size = probe.compile("regex", "x{50}0", BYTES).num_bytes
    with CompileService(config(max_cache_bytes=20 * size)) as service:  # an eighth: two of them
        for i in range(9):
            service.compile("regex", f"x{{50}}{i}", BYTES)
        wait_until(lambda: len(service._cache) == 2)
        for i in range(9):
            for _ in range(2):
                service.compile("regex", f"y{{50}}{i}", BYTES)
        wait_until(lambda: len(service._cache) >= 9)


def test_a_parsed_regex_is_not_kept_beside_its_grammar() -> None:
    with CompileService(config()) as service:
        service.compile("regex", "(?:(?!foo|bar).){0,20}", BYTES)
        assert not service._parsed


def test_closing_answers_those_who_wait() -> None:
    service = CompileService(config(max_time_s=60, limits=PATIENT))
    future = service.submit("regex", SLOW, BYTES)
    service.close()
    with pytest.raises(EngineStopped):
        future.result(60)
    with pytest.raises(EngineStopped):
        service.submit("regex", "a", BYTES)


def test_a_finalizer_ends_a_service_whose_lock_is_held_where_it_interrupts() -> None:
    service = CompileService(ServiceConfig(cache_dir=None))
    service.compile("choice", ["a", "b"], BYTES)
    threads = [service._supervisor, *(worker.thread for worker in service._workers)]
    with service._lock:  # as in the supervisor, when the garbage collector runs there
        service.abandon()
    for thread in threads:
        assert thread is not None
        thread.join(10)
        assert not thread.is_alive()
    with pytest.raises(EngineStopped):
        service.submit("choice", ["a"], BYTES)


def test_regular_sources_are_read_back_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, source in [("regex", "(ab)+"), ("choice", ["abab"]), ("substring", "xabab"), ("cfg", 'start: "ab"+')]:
        with CompileService(config(cache_dir=tmp_path)) as service:
            assert accepts(service.compile(kind, source, BYTES), "abab")

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("parsed again")

    monkeypatch.setattr(service_module, "parse_source", fail)
    with CompileService(config(cache_dir=tmp_path)) as service:
        for kind, source in [("regex", "(ab)+"), ("choice", ["abab"]), ("substring", "xabab"), ("cfg", 'start: "ab"+')]:
            assert accepts(service.compile(kind, source, OTHER), "abab")


def test_what_is_quickly_made_is_not_put_on_disk(tmp_path: Path) -> None:
    with CompileService(config(cache_dir=tmp_path, min_disk_time_s=5.0)) as service:
        assert accepts(service.compile("regex", "(ab)+", BYTES), "abab")
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_dropped(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    cache.put("k", choices(["ab"]))
    (path,) = tmp_path.iterdir()
    for content in (b"", b"PK\x03\x04 not a zip", path.read_bytes()[:-30]):
        path.write_bytes(content)
        assert cache.get("k") is None
        assert not path.exists()
        cache.put("k", choices(["ab"]))
        found = cache.get("k")
        assert found is not None
        assert found.accepts(b"ab")


@pytest.mark.parametrize(
    "arrays",
    [
        {"rows": np.full((1, 1), 5, np.int32)},
        {"rows": np.full((1, 1), -1, np.int64)},
        {"byte_class": np.full(256, 3, np.uint8)},
        {"accepting": np.ones(2, np.bool_)},
        {"accepting": np.array([object()])},
    ],
)
def test_a_file_that_is_no_automaton_is_dropped(tmp_path: Path, arrays: dict[str, Any]) -> None:
    cache = DiskCache(tmp_path)
    good = {"rows": np.full((1, 1), -1, np.int32), "byte_class": np.zeros(256, np.uint8), "accepting": np.ones(1, bool)}
    np.savez(cache._path("k"), **{**good, **arrays})
    assert cache.get("k") is None


def test_the_folder_stays_within_its_limit(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, max_bytes=4000)
    for i in range(20):
        cache.put(str(i), choices([f"some text {i}"]))
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= 4000
    assert cache.get("19") is not None


def test_a_folder_that_cannot_be_written_is_a_miss(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = DiskCache(tmp_path / "file")
    cache.put("k", choices(["ab"]))
    assert cache.get("k") is None


def test_masks_of_the_start_and_of_a_marker_are_made_ahead() -> None:
    with CompileService(config()) as service:
        grammar = service.compile("tools", {"tools": [{"name": "now"}]}, BYTES)
        assert grammar.rows.of_state[0] is not None
        wait_until(lambda: grammar.num_states > 11 and all(row is not None for row in grammar.rows.of_state[:11]))


def test_tools_seen_before_are_parsed_once_for_all_vocabularies(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}}
    tools = {"tools": [{"name": f"tool_{i}", "parameters": parameters} for i in range(128)]}
    parse, parsed = sources.parse_source, []

    def count(kind: str, source: Any, **options: Any) -> Any:
        parsed.append(kind)
        return parse(kind, source, **options)

    monkeypatch.setattr(service_module, "parse_source", count)
    with CompileService(config()) as service:
        first = service.compile("tools", tools, BYTES)
        assert service.compile("tools", tools, OTHER) is not first
        assert service.compile("tools", tools, BYTES) is first
    assert parsed == ["tools"]
