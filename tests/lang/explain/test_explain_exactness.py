"""What explain() says before a run is what the run measures: for every example, and for random programs.

Exact where a prompt's text is known, within its limits elsewhere; the KV bound is never exceeded. On the scripted
engine with bytes as tokens, and with SmolLM2's own tokenizer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ramet import Engine, Function, State, contains, function, gen, select
from ramet.lang.backends.in_process import EngineBackend
from ramet.lang.explain.explanation import Explanation
from ramet.lang.graph import ir
from ramet.runtime.cache.page_pool import PagePool
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.testing.scripted_model import ScriptedEngine

PROGRAMS = sorted((Path(__file__).resolve().parents[3] / "examples" / "programs").glob("*.py"))
Load = Callable[[Path], Any]  # Any: the Example of conftest.py


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2_path: Path) -> Any:
    from ramet.runtime.models.description import describe_model

    return describe_model(smollm2_path).tokenizer


class DistinctWords(ScriptedEngine):
    """Writes words that no two requests have in common, and no text of a program."""

    def _seed(self, job: Any) -> int:
        """One that no request names, for those that name none."""
        return super()._seed(job) + (1 << 32) * (job.sampling.seed is None and not job.sampling.is_greedy)

    def _words(self, job: Any) -> list[int]:
        digest = hashlib.blake2b(repr((job.prompt, self._seed(job))).encode(), digest_size=24).digest()
        letters = [chr(0x4E00 + int.from_bytes(digest[i : i + 2], "big") % 20000) for i in range(0, 24, 2)]
        return self.tokenizer.encode(" ".join("".join(letters[i : i + 4]) for i in range(0, 12, 4)) + ".")


def engine_with(tokenizer: Any = None) -> ScriptedEngine:
    return DistinctWords(tokenizer=tokenizer)


def compare(plan: Explanation, state: State) -> Iterator[tuple[str, int]]:
    """Every node of the plan with what was measured; yields where they differ."""
    events = state.record.events
    for cost in plan.nodes:
        usage = events[cost.node].usage
        assert usage is not None
        where = f"{cost.kind} {cost.name} of node {cost.node} ({cost.line})"
        if not cost.prompt.at_least <= usage.prompt_tokens <= cost.prompt.at_most:
            yield f"{where}: prompt {cost.prompt}", usage.prompt_tokens
        if not cost.prompt.is_exact and usage.computed_tokens == 0:
            continue  # at run time its prompt turned out to be another one's
        if not cost.new.at_least <= usage.computed_tokens <= cost.new.at_most:
            yield f"{where}: new {cost.new}", usage.computed_tokens
        if not cost.shared.at_least <= usage.cached_tokens <= cost.shared.at_most:
            yield f"{where}: shared {cost.shared}", usage.cached_tokens
        if usage.completion_tokens > cost.written.at_most:
            yield f"{where}: written {cost.written}", usage.completion_tokens
        if state.record.attempts.get(cost.node):
            continue  # its usage is that of all its tries
        if cost.kind == "generate" and usage.prompt_tokens + usage.completion_tokens > plan.kv.longest:
            yield f"{where}: longest branch {plan.kv.longest}", usage.prompt_tokens + usage.completion_tokens


def differences(program: Function, arguments: dict[str, Any], tokenizer: Any = None) -> tuple[list[Any], Explanation]:
    with engine_with(tokenizer) as engine:
        backend = EngineBackend(engine)
        plan = program.explain(**arguments, backend=backend)
        state = program.run(**arguments, backend=backend)
        error = state.error()
        if error is not None:
            raise error
        found = list(compare(plan, state))
        if plan.is_complete and len(engine._trie) > plan.kv.tokens:
            found.append((f"kv bound {plan.kv.tokens}", len(engine._trie)))
        return found, plan


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_the_plan_of_an_example_is_what_a_run_measures(path: Path, load_example: Load) -> None:
    example = load_example(path)
    if path.stem == "fastest_answer":
        pytest.skip("which branch is cancelled depends on time")
    found, plan = differences(example.program, {**example.arguments, "seed": 11})
    assert found == []
    assert plan.nodes
    assert plan.nodes[0].prompt.is_exact
    assert plan.nodes[0].new.is_exact


@pytest.mark.model
@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_the_plan_is_exact_with_the_tokens_of_a_real_model(
    path: Path, load_example: Load, smollm2_tokenizer: Any
) -> None:
    example = load_example(path)
    if path.stem == "fastest_answer":
        pytest.skip("which branch is cancelled depends on time")
    found, plan = differences(example.program, {**example.arguments, "seed": 11}, smollm2_tokenizer)
    assert found == []
    assert plan.nodes[0].prompt.is_exact


@pytest.fixture(scope="module")
def tiny_engine(tiny_model: LoadedModel) -> Iterator[Engine]:
    with Engine(tiny_model, num_kv_tokens=1 << 15, max_running_requests=32) as engine:
        yield engine


class PeakOfPages:
    """The most pages of a pool that were in use at any moment, those that only the cache holds among them."""

    def __init__(self, pool: PagePool, monkeypatch: pytest.MonkeyPatch) -> None:
        self._pool, self._allocate = pool, pool.allocate
        self.most = self.used
        monkeypatch.setattr(pool, "allocate", self._take)

    @property
    def used(self) -> int:
        return self._pool.num_usable - self._pool.num_free

    def _take(self, count: int) -> list[int] | None:
        taken = self._allocate(count)
        self.most = max(self.most, self.used)
        return taken


@pytest.fixture
def peak_of_pages(tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[PeakOfPages]:
    """Of the tiny engine, whose cache is empty at first."""
    tiny_engine.flush_cache()
    yield PeakOfPages(tiny_engine._core.scheduler.pool, monkeypatch)
    tiny_engine.check_integrity()


# Not a race, whose losers are cancelled at any time, and not two programs whose checks only a model that speaks pass:
# the plans of these two are compared with scripted runs above.
ON_RANDOM_WEIGHTS = [p for p in PROGRAMS if p.stem not in ("fastest_answer", "research_team", "quiz")]


@pytest.mark.parametrize("path", ON_RANDOM_WEIGHTS, ids=lambda path: path.stem)
def test_the_plan_holds_on_an_engine_with_pages_where_branches_run_together(
    path: Path, load_example: Load, tiny_engine: Engine, peak_of_pages: PeakOfPages
) -> None:
    example = load_example(path)
    options = {**example.arguments, "seed": 11, "max_tokens": 24, "backend": tiny_engine}
    plan = example.program.explain(**options)
    state = example.program.run(**options)
    assert state.error() is None
    assert list(compare(plan, state)) == []
    assert plan.kv.pages is not None
    assert peak_of_pages.most > 0
    if plan.is_complete:
        assert peak_of_pages.most <= plan.kv.pages


def test_branches_that_leave_a_prefix_within_a_page_have_each_their_own_copy_of_it(
    tiny_engine: Engine, peak_of_pages: PeakOfPages
) -> None:
    @function(max_tokens=4, ignore_eos=True)
    def program(s: State) -> None:
        s += "x" * 40
        branches = s.fork(5)
        branches += lambda i: f"{i}:"
        branches += gen("x")
        branches.join()

    plan = program.explain(backend=tiny_engine)
    assert plan.kv.known == 40 + 5 * 2
    assert plan.kv.pages == peak_of_pages.most + 3 + 4  # two whole pages, and each branch's own
    program.run(backend=tiny_engine)
    assert peak_of_pages.most == plan.kv.pages
    assert "(7 pages)" in str(plan)
    assert plan.to_dict()["kv_bound"]["pages"] == 7


def test_rows_that_begin_alike_need_no_more_pages_than_their_bound(
    tiny_engine: Engine, peak_of_pages: PeakOfPages
) -> None:
    @function(max_tokens=4, ignore_eos=True)
    def program(s: State, topic: str) -> None:
        s += "Some words about the same thing: " + topic + gen("x")

    rows = ["a", "bb", "ccc", "d" * 20]
    plan = program.explain(rows=rows, backend=tiny_engine)
    assert plan.kv.pages is not None
    program.run_batch(rows, backend=tiny_engine)
    assert 6 <= peak_of_pages.most <= plan.kv.pages <= 8


@pytest.mark.parametrize(("prefix", "is_shared"), [("short", False), ("x" * 40, True)])
def test_a_prefix_of_less_than_a_page_is_not_said_to_be_shared_by_branches(
    prefix: str, is_shared: bool, tiny_engine: Engine
) -> None:
    @function(max_tokens=4)
    def program(s: State) -> None:
        s += prefix
        branches = s.fork(3)
        branches += ["a", "b", "c"]
        branches += gen("x")
        branches.join()

    plan = program.explain(backend=tiny_engine)
    assert plan.shared.is_exact == is_shared
    tiny_engine.flush_cache()
    state = program.run(backend=tiny_engine)
    assert state.error() is None
    assert list(compare(plan, state)) == []
    later = program.explain(backend=EngineBackend(engine_with()))
    assert later.shared.is_exact


def test_choices_of_branches_that_wait_for_one_page_share_no_part_of_the_next(tiny_engine: Engine) -> None:
    @function
    def program(s: State) -> None:
        s += "x" * 20
        branches = s.fork(3)
        branches += lambda i: f"{i}: abc "
        branches += select("grade", ["good", "fair", "poor"])
        branches.join()

    plan = program.explain(backend=tiny_engine)
    tiny_engine.flush_cache()
    state = program.run(backend=tiny_engine)
    assert state.error() is None
    assert list(compare(plan, state)) == []


# Random programs. No text begins as generated text does, or as another text that only a run knows: what two branches
# have in common by chance is shared as well, and no plan can say so.

Step = tuple[str, Any]
SOME = [chr(code) for code in range(0x4E00, 0x4E00 + 20000, 17)]
leaves = st.one_of(
    st.tuples(st.just("text"), st.sampled_from(["A ", "Bé\n", "C.", "  "])),
    st.tuples(
        st.just("gen"),
        st.sampled_from([{"temperature": 0}, {"temperature": 1}, {"max_tokens": 7}, {"stop": " "}, {"seed": 3}]),
    ),
    st.tuples(
        st.just("select"), st.tuples(st.sampled_from([["X", "XY"], ["Yes", "No", "Nope"]]), st.sampled_from(ir.SCORERS))
    ),
    st.tuples(st.just("use"), st.integers(0, 5)),
    st.tuples(st.just("choose among values"), st.integers(0, 5)),
    st.tuples(st.just("scope"), st.none()),
    st.tuples(st.just("late"), st.sampled_from(["L ", "Lé\n"])),
    st.tuples(st.just("checked"), st.sampled_from([None, 3])),
    st.tuples(st.just("map"), st.lists(st.sampled_from(["P", "Q"]), max_size=3)),
)
steps = st.recursive(
    st.lists(leaves, max_size=4),
    lambda inner: st.lists(
        leaves
        | st.tuples(st.just("fork"), st.lists(inner, min_size=1, max_size=3))
        | st.tuples(st.just("twins"), inner)
        | st.tuples(st.just("message"), inner),
        max_size=4,
    ),
    max_leaves=12,
)


def execute(s: State, program: Sequence[Step], known: list[Any], words: Sequence[str] = SOME) -> None:
    for kind, what in program:
        if kind == "text":
            s += what
        elif kind == "gen":
            s += "> " + gen("g", **what)
            known.append(s["g"])
        elif kind == "select":
            s += "?" + select("s", what[0], scorer=what[1])
            known.append(s["s"])
        elif kind == "use" and known:
            s += f"[{known[what % len(known)]}]"
        elif kind == "choose among values" and known:
            s += select("c", [f"1{known[what % len(known)]}", "2other"])
        elif kind == "late":
            s.append(what if not known else f"{what}{known[-1]}", prefix="late")
        elif kind == "scope":
            with s.var_scope("scope"):
                s += "In " + gen("g", max_tokens=7)
            known.append(s["scope"])
        elif kind == "checked":  # about every second text fits
            s += "> " + gen("g", where=contains(*words), retries=60, max_tokens=60, seed=what)
            known.append(s["g"])
        elif kind == "map":
            s.map(what, lambda branch, item: branch.append(f"{item}: " + gen("g", max_tokens=4))).join()
        elif kind == "fork":
            branches = s.fork(len(what))
            for i, (branch, inner) in enumerate(zip(branches, what, strict=True)):
                branch += f"{i}:"
                execute(branch, inner, list(known), words)
            branches.join()
        elif kind == "twins":
            branches = s.fork(3)
            for branch in branches:
                execute(branch, what, list(known), words)
            branches.join()
        elif kind == "message" and s.recorder.role is None:
            with s.user():
                execute(s, what, known, words)


@function(max_tokens=12)
def random_program(s: State, program: Any, words: Sequence[str] = SOME) -> None:
    s += "Begin. "
    execute(s, program, [], words)
    s += "End. " + gen("end")


@given(steps)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_plan_of_a_random_program_is_what_a_run_measures(program: list[Step]) -> None:
    found, _ = differences(random_program, {"program": program})
    assert found == []


@given(program=steps)
@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_no_random_program_needs_more_pages_than_its_bound(
    tiny_engine: Engine, peak_of_pages: PeakOfPages, program: list[Step]
) -> None:
    tiny_engine.flush_cache()
    peak_of_pages.most = peak_of_pages.used
    # Random weights write no words, but letters.
    options: dict[str, Any] = {"program": program, "words": list("abcdefghijklmnop"), "seed": 5, "backend": tiny_engine}
    plan = random_program.explain(**options)
    state = random_program.run(**options)
    assert state.error() is None
    assert plan.kv.pages is not None
    assert peak_of_pages.most <= plan.kv.pages


@pytest.mark.model
@given(program=steps)
@settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_the_plan_of_a_random_program_is_exact_with_a_real_tokenizer(
    smollm2_tokenizer: Any, program: list[Step]
) -> None:
    found, _ = differences(random_program, {"program": program}, smollm2_tokenizer)
    assert found == []
