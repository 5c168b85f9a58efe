"""Schemas that are wrong, contradictory or explosive: a typed error within the limits, and nothing is lost by it."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from ramet.errors import GrammarError, GrammarTooLarge, InvalidSchema, RametError
from ramet.grammar import Limits, Vocabulary, compile_grammar
from ramet.grammar.ir import JsonOptions, JsonSchema
from ramet.grammar.json_schema.keywords.table import KEYWORDS
from ramet.grammar.service.compile_service import CompileService, ServiceConfig
from ramet.grammar.service.sources import compile_constraint

# an interrupt may be thrown inside another library's callback, where it is lost with a warning; it is then sent again
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True, scope="module")
def _no_callbacks_of_the_collector() -> Iterator[None]:
    """Hypothesis has one, and pytest fails where a second interrupt comes while it reports the first."""
    callbacks = gc.callbacks.copy()
    gc.callbacks.clear()
    yield
    gc.callbacks[:] = callbacks


BYTES = Vocabulary([*(bytes((i,)) for i in range(256)), b""], [256])
QUICK = Limits(max_time_s=0.5)


def nested(keyword: str, depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        if keyword in ("allOf", "anyOf", "oneOf"):
            schema = {keyword: [schema]}
        elif keyword in ("properties", "patternProperties", "$defs"):
            schema = {keyword: {"a": schema}}
        else:
            schema = {keyword: schema}
    return schema


def lists(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def use(schema: Any, limits: Limits | None = None) -> None:
    """Compile, and go a few steps."""
    grammar = compile_grammar(JsonSchema(schema), BYTES, limits=limits)
    grammar.mask(0)
    grammar.completion_bound(0)
    for begin in (b"{", b'"', b"["):
        state = grammar.advance_bytes(0, begin)
        if state is not None:
            grammar.mask(state)


def failure(schema: Any) -> GrammarError | None:
    """Use it within a short time; what was raised."""
    try:
        use(schema, QUICK)
    except GrammarError as error:
        return error
    return None


NESTING = ["items", "properties", "not", "allOf", "anyOf", "oneOf", "if", "additionalProperties", "contains", "$defs",
           "propertyNames", "patternProperties"]  # fmt: skip


@pytest.mark.parametrize("keyword", NESTING)
@pytest.mark.parametrize("depth", [100, 400, 10_000])
def test_deep_nesting_compiles_or_ends_in_a_typed_error(keyword: str, depth: int) -> None:
    try:
        use(nested(keyword, depth))
    except GrammarError:
        assert depth > 100
    else:
        assert depth < 10_000


@pytest.mark.parametrize("keyword", ["enum", "const", "default", "x-unknown"])
def test_deep_values_compile_or_end_in_a_typed_error(keyword: str) -> None:
    deep = lists(10_000)
    schema = {"type": "array", keyword: [deep] if keyword == "enum" else deep}
    if keyword in ("enum", "const"):
        with pytest.raises(GrammarTooLarge, match=f"/{keyword}: values are nested deeper"):
            use(schema)
    else:
        use(schema)
    use({"const": lists(90)})


def choices(count: int, letter: str = "k") -> list[Any]:
    return [{"properties": {f"{letter}{i}": {"type": "null"}}} for i in range(count)]


def conditions(count: int) -> list[Any]:
    return [{"if": {"properties": {f"k{i}": {"const": 1}}}, "then": {"required": [f"z{i}"]}} for i in range(count)]


LOOKAHEADS = "(?!.*aaa)(?!.*bbb)(?!.*[ab]{5}c).{5,500}"
WIDE = [{"properties": {f"{i}{j}": {"type": "null"} for j in range(12)}} for i in range(9)]
DEEP = [{"anyOf": [{"required": [f"{i}{j}"]} for j in range(6)]} for i in range(12)]
PATTERNED = [{"anyOf": [{"pattern": f"a{i}.*b{j}"} for j in range(5)]} for i in range(8)]
EXPLOSIVE: dict[str, tuple[Any, str]] = {
    "oneOf of objects": ({"oneOf": WIDE}, "/"),
    "nested": ({"properties": {"a": {"allOf": DEEP}}}, "/properties/a"),
    "many constants": ({"items": {"oneOf": [{"const": f"x{i}"} for i in range(100_000)]}}, "/items"),
    "many numbers": ({"enum": list(range(100_000))}, ""),
    "patterns": ({"type": "string", "allOf": PATTERNED}, ""),
    "lookaheads": (
        {"properties": {"p": {"pattern": LOOKAHEADS, "type": "string"}}, "required": ["p"]},
        "/properties/p",
    ),
    "contains": ({"type": "array", "allOf": [{"contains": {"const": i}, "maxContains": 50} for i in range(20)]}, ""),
    "unevaluated": ({"unevaluatedProperties": False, "anyOf": choices(20)}, "/"),
    "conditions": ({"allOf": conditions(40)}, "/"),
}


@pytest.mark.parametrize("name", EXPLOSIVE)
def test_explosions_are_stopped_in_time_and_name_the_place(name: str) -> None:
    schema, pointer = EXPLOSIVE[name]
    begin = time.thread_time()
    with pytest.raises(GrammarTooLarge) as caught:
        use(schema, QUICK)
    assert time.thread_time() - begin < 10
    assert pointer in str(caught.value)
    assert str(caught.value).startswith(("/", "compiling")), caught.value


PATTERNS = [
    *("(a+)+$", "(a|a)*b", "(.*a){30}", "^(a|b)*a(a|b){40}$", "(x+x+)+y", "((a{0,100}){0,100}){0,100}", "a{900000}"),
    *("(a{1000}){1000}", "^(?=.*a{20})(?=.*b{20})(?=.*c{20})(?=.*d{20}).*$", "(?:a?){500}a{500}"),
    *("ab" * 3_000_000, "(" * 5000 + ")" * 5000, "|".join(f"^word{i}$" for i in range(50_000))),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=[p[:30] for p in PATTERNS])
def test_catastrophic_patterns_compile_or_end_in_a_typed_error(pattern: str) -> None:
    begin = time.thread_time()
    error = failure({"type": "string", "pattern": pattern})
    assert error is None or ("pattern" in str(error) and len(str(error)) < 1000)
    assert time.thread_time() - begin < 10


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "minLength": 10**9, "maxLength": 10**18},
        {"type": "string", "minLength": 10**7, "pattern": "^(ab)+$"},
        {"type": "array", "minItems": 10**9, "items": {"type": "integer"}, "uniqueItems": True},
        {"type": "array", "minContains": 10**9, "contains": {"const": 1}},
        {"type": "object", "minProperties": 10**9},
        {"type": "object", "required": [f"p{i}" for i in range(50_000)]},
    ],
)
def test_texts_that_are_too_long_to_finish_end_in_a_typed_error(schema: Any) -> None:
    begin = time.thread_time()
    with pytest.raises(GrammarTooLarge):
        use(schema, QUICK)
    assert time.thread_time() - begin < 10


def test_large_limits_alone_cost_nothing() -> None:
    use({"type": "string", "maxLength": 10**18, "pattern": "^a+b"}, QUICK)
    use({"type": "string", "pattern": "^[\\s\\S]{0,131072}$"}, QUICK)
    use({"type": "array", "maxItems": 10**18, "items": {"type": "string", "maxLength": 10**9}}, QUICK)


WRONG: list[Any] = [
    None,
    1,
    -1,
    1.5,
    float("nan"),
    float("inf"),
    "x",
    True,
    [],
    [1],
    ["x", 1],
    {},
    {"a": 1},
    [[]],
    [None],
    10**400,
]


DRAFT_4, DRAFT_2020 = "http://json-schema.org/draft-04/schema#", "https://json-schema.org/draft/2020-12/schema"


@pytest.mark.parametrize("keyword", sorted(KEYWORDS.rows))
@pytest.mark.parametrize("dialect", [DRAFT_4, DRAFT_2020])
def test_keywords_of_a_wrong_type_end_in_a_typed_error_or_mean_nothing(keyword: str, dialect: str) -> None:
    for value in WRONG:
        for name in ("object", "array", "string", "number", None):
            schema = {"$schema": dialect, **({} if name is None else {"type": name}), keyword: value}
            for whole in (schema, {"properties": {"p": schema}}):
                error = failure(whole)
                assert not isinstance(error, InvalidSchema) or isinstance(error.pointer, str)


@pytest.mark.parametrize(
    "garbage", [None, 1, 1.5, "x", [], [{}], b"{}", object(), float("nan"), {1: 2}, {"type": object()}]
)
def test_what_is_no_schema_is_refused_by_type(garbage: Any) -> None:
    try:
        use(garbage, QUICK)
    except RametError:
        return
    assert garbage == {1: 2}  # an unknown keyword


TEXTS = [
    "",
    "{",
    "[1",
    "nul",
    '{"minimum": 1e999}',
    '{"minimum": NaN}',
    '{"minimum": ' + "9" * 5000 + "}",
    "[" * 100_000,
]


@pytest.mark.parametrize("text", [*TEXTS, '{"a":' * 100_000, "\x00"], ids=lambda t: repr(t[:20]))
def test_texts_that_are_no_schema_are_refused_by_type(text: str) -> None:
    with pytest.raises(GrammarError):
        compile_constraint("json_schema", text, BYTES)


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {"allOf": [{"$ref": "#"}]},
        {"not": {"$ref": "#"}},
        {"not": {"$ref": "#/$defs/a"}, "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {"$ref": "http://[::1"},
        {"$ref": "#/%zz"},
        {"$ref": "#/title", "title": "x"},
        {"$ref": "#/$defs/" + "a/" * 10_000},
        {"$dynamicRef": "#nowhere"},
    ],
)
def test_broken_and_circular_references_are_named(schema: Any) -> None:
    with pytest.raises(InvalidSchema):
        use(schema)


def test_long_chains_of_references_end_in_a_typed_error() -> None:
    chain: Any = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(20_000)}
    with pytest.raises(GrammarTooLarge, match="150 levels"):
        use({"$ref": "#/$defs/d0", "$defs": {**chain, "d20000": {}}})


def test_texts_with_single_surrogates_are_never_asked_for() -> None:
    for schema in (
        {"const": "\ud800"},
        {"type": "string", "pattern": "[\ud800-\udfff]"},
        {"type": "string", "not": {"pattern": "^[^\ud800-\udfff]*$"}},
    ):
        error = failure(schema)
        assert error is None or "contradictory" in str(error)


def test_large_schemas_compile_or_end_in_a_typed_error_in_time() -> None:
    large: list[Any] = [
        {"properties": {f"property_{i}": {"type": "string", "maxLength": i % 50 + 1} for i in range(60_000)}},
        {"enum": [f"value number {i} of many" for i in range(150_000)]},
        {"anyOf": [{"properties": {"k": {"const": i}}, "required": ["k"]} for i in range(50_000)]},
        {"type": "string", "description": "x" * 10_000_000},
    ]
    with CompileService(ServiceConfig(cache_dir=None, max_time_s=1)) as service:
        for schema in large:
            begin = time.thread_time()
            error = service.submit("json_schema", json.dumps(schema), BYTES).exception(timeout=120)
            assert error is None or (isinstance(error, GrammarTooLarge) and len(str(error)) < 2000)
            assert time.thread_time() - begin < 10


def test_no_worker_is_lost_to_explosive_schemas(caplog: pytest.LogCaptureFixture) -> None:
    with CompileService(ServiceConfig(cache_dir=None, max_time_s=0.3)) as service:
        futures = [service.submit("json_schema", json.dumps(s), BYTES) for s, _ in EXPLOSIVE.values()]
        for future in futures:
            assert isinstance(future.exception(timeout=120), GrammarTooLarge)
        grammar = service.submit("json_schema", '{"const": 7}', BYTES).result(timeout=60)
        state = grammar.advance_bytes(0, b"7")
        assert state is not None
        assert grammar.is_accepting(state)
        end = time.monotonic() + 60
        while not all(w.thread.is_alive() and w.is_idle for w in service._workers):  # the last answers may come first
            assert time.monotonic() < end
            time.sleep(0.01)
    assert "is replaced" not in caplog.text


def test_an_error_of_time_is_not_kept() -> None:
    schema = {"enum": list(range(20_000))}
    with CompileService(ServiceConfig(cache_dir=None, max_time_s=0.05)) as service:
        with pytest.raises(GrammarTooLarge, match=r"took longer than 0\.05 s"):
            service.compile("json_schema", schema, BYTES)
        assert not service._cache


@pytest.mark.parametrize("broken", [{"$defs": []}, {"definitions": "x"}, {"required": True}])
def test_strict_mode_reads_past_what_is_malformed_and_not_its_concern(broken: dict[str, Any]) -> None:
    schema = {"type": "object", "additionalProperties": False, "properties": {}, **broken}
    grammar = compile_grammar(JsonSchema(schema, JsonOptions(strict=True)), BYTES)
    assert grammar.advance_bytes(0, b"{}") is not None
