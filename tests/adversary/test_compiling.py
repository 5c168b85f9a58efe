"""Sources that take seconds to compile, from one client, while another has a small one."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from ramet.errors import GrammarTooLarge, Overloaded
from ramet.grammar import CompiledGrammar, Vocabulary
from ramet.grammar.deadline import check
from ramet.grammar.machine.automaton import Limits
from ramet.grammar.service.compile_service import CompileService, ServiceConfig

# an interrupt may be thrown inside another library's callback, where it is lost with a warning; it is then sent again
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

BYTES = Vocabulary([*(bytes((i,)) for i in range(256)), b"<eos>"], [256], [256])
ENDLESS = "(?:(?!foo%s|bar|baz).){0,2000}"


@pytest.fixture
def service() -> Iterator[CompileService]:
    with CompileService(ServiceConfig(cache_dir=None, max_time_s=600, max_waiting=64)) as service:
        yield service


def nasty(i: int) -> tuple[str, str]:
    """A source that takes far longer than a test may last: alone, or in a schema."""
    pattern = ENDLESS % i
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": f"^{pattern}$"}}, "required": ["a"]}
    return ("json_schema", json.dumps(schema)) if i % 2 else ("regex", pattern)


def test_small_schemas_are_compiled_while_endless_ones_are(service: CompileService) -> None:
    futures = [service.submit(*nasty(i), BYTES, client=("", f"nasty {i}")) for i in range(8)]
    for i in range(10):
        small = json.dumps({"type": "integer", "minimum": i})
        assert service.submit("json_schema", small, BYTES, client=("", "nice")).result(60).num_states
    assert not any(future.done() for future in futures)


def test_a_flood_of_one_client_leaves_places_for_others(service: CompileService) -> None:
    flood = [service.submit(*nasty(i), BYTES, client=("", "nasty")) for i in range(200)]
    refused = [future for future in flood if future.done()]
    assert len(refused) >= 200 - 64
    assert all(isinstance(future.exception(), Overloaded) for future in refused)
    for i in range(5):
        assert service.submit("regex", f"a{i}", BYTES, client=("", "nice")).result(60).num_states
    for future in flood:
        future.cancel()
    assert service.submit("regex", "b", BYTES, client=("", "nasty")).result(60).num_states


def test_endless_sources_end_with_their_own_error() -> None:
    with CompileService(ServiceConfig(cache_dir=None, max_time_s=0.2)) as service:
        futures = [service.submit(*nasty(i), BYTES, client=("", str(i))) for i in range(3)]
        assert all(isinstance(future.exception(120), GrammarTooLarge) for future in futures)


def finish(grammar: CompiledGrammar) -> None:
    """Endless work with the grammars whose text begins with an x."""
    while grammar.advance_bytes(0, b"x") is not None:
        check()


def test_what_follows_compiling_takes_turns_with_other_jobs() -> None:
    config = ServiceConfig(limits=Limits(max_time_s=600), cache_dir=None, max_time_s=600)
    with CompileService(config, finish) as service:
        futures = [service.submit("regex", f"x{i}", BYTES, client=("", f"nasty {i}")) for i in range(4)]
        for i in range(5):
            assert service.submit("regex", f"a{i}", BYTES, client=("", "nice")).result(60).num_states
        assert not any(future.done() for future in futures)


def test_a_grammar_whose_time_is_over_before_it_is_finished_is_given_out_as_it_is() -> None:
    with CompileService(ServiceConfig(limits=Limits(max_time_s=0.5), cache_dir=None), finish) as service:
        futures = [service.submit("regex", f"x{i}", BYTES, client=("", f"{i}")) for i in range(2)]
        assert all(future.result(120).num_states for future in futures)
