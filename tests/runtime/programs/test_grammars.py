"""Grammars of programs: the form of their JSON. With a device they are closed while they compile, if possible."""

from __future__ import annotations

import gc
import json
import threading

import pytest

from ramet.errors import GrammarError
from ramet.kernels.grammar.arena import GrammarArena
from ramet.kernels.grammar.mask import TokenTable
from ramet.lang.graph.ir import Constraint
from ramet.lang.graph.json_form import JsonForm
from ramet.runtime.constraints.device_grammars import DeviceGrammars
from ramet.runtime.engine.config import EngineConfig
from ramet.runtime.engine.factory import make_device_grammars
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.programs.grammars import ProgramGrammars
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer
from ramet.runtime.text.role_marks import RoleMarks

OBJECT = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TREE = {"$ref": "#/$defs/t", "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}}


def grammars_of(model: LoadedModel, device: DeviceGrammars | None = None) -> ProgramGrammars:
    return ProgramGrammars(model.tokenizer, RoleMarks(model.tokenizer.chat_template), device)


@pytest.fixture
def device(tiny_model: LoadedModel) -> DeviceGrammars:
    tokenizer = tiny_model.tokenizer
    tokens = TokenTable.create(
        tokenizer.token_bytes, tokenizer.eos_ids, tokenizer.special_ids, tokenizer.vocab_size, "cpu"
    )
    return make_device_grammars(tiny_model, GrammarArena(tokens, 2, max_states=64, max_transitions=1 << 12))


@pytest.fixture
def cache(tiny_model: LoadedModel, device: DeviceGrammars) -> ProgramGrammars:
    return grammars_of(tiny_model, device)


def schema(value: object) -> Constraint:
    return Constraint("json_schema", json.dumps(value))


def accepts(grammar, text: str) -> bool:  # type: ignore[no-untyped-def]
    state = grammar.advance_bytes(0, text.encode())
    return state is not None and grammar.is_accepting(state)


def test_a_cache_may_be_collected_while_its_service_is_at_work(tiny_model: LoadedModel) -> None:
    cache = grammars_of(tiny_model)
    cache.get(Constraint("regex", "a")).result()
    service = cache._service
    assert service is not None
    done = threading.Event()

    def collect() -> None:
        nonlocal cache
        with service._lock:
            del cache
            gc.collect()
        done.set()

    threading.Thread(target=collect, daemon=True).start()
    assert done.wait(30), "the finalizer waits for a lock that its own thread holds"
    assert service._supervisor is not None
    service._supervisor.join(10)
    assert not service._supervisor.is_alive()


def test_a_schema_is_closed_for_the_device(cache: ProgramGrammars, device: DeviceGrammars) -> None:
    grammar = cache.get(schema(OBJECT)).result(timeout=60)
    assert grammar.is_closed
    assert accepts(grammar, '{"a": 1, "b": "x"}')
    assert not accepts(grammar, '{"b": "x", "a": 1}')
    tables = device.prepare(grammar)
    assert tables is not None
    assert tables.closing is not None
    assert tables.mask_classes is not None
    assert cache.get(schema(OBJECT)).result(timeout=60) is grammar
    assert device.prepare(grammar) is tables


FORMS: list[tuple[JsonForm, str, str]] = [
    (JsonForm(), '{"a": 1, "b": "x"}', '{"b": "x", "a": 1}'),
    (JsonForm(), '{"a": 1}', '{"a":1}'),
    (JsonForm(), '{"a": 1}', '{"a": 1.0}'),
    (JsonForm(), '{"a": 1}', '{"c": 1}'),
    (JsonForm(order="any"), '{"b": "x", "a": 1}', '{"a": 1, "c": 1}'),
    (JsonForm(additional_properties="schema"), '{"a": 1, "c": 1}', '{"c": 1, "a": 1}'),
    (JsonForm("compact"), '{"a":1,"b":"x"}', '{"a": 1}'),
    (JsonForm("indent=2"), '{\n  "a": 1,\n  "b": "x"\n}', '{"a": 1}'),
    (JsonForm("any"), '{ "a" :1,"b" : "x"}', '{"a":  1}'),
]


@pytest.mark.parametrize("on_device", [False, True])
def test_json_is_written_in_the_form_that_is_asked_for(
    tiny_model: LoadedModel, device: DeviceGrammars, on_device: bool
) -> None:
    open_object = {name: value for name, value in OBJECT.items() if name not in ("additionalProperties", "required")}
    constraint = schema(open_object)
    cache = grammars_of(tiny_model, device if on_device else None)
    for form, good, bad in FORMS:
        grammar = cache.get(Constraint(constraint.kind, constraint.source, form=form)).result(timeout=60)
        assert accepts(grammar, good), (form, good)
        assert not accepts(grammar, bad), (form, bad)
    cache.close()


def test_a_form_that_is_not_asked_for_is_the_one_of_the_configuration(tiny_model: LoadedModel) -> None:
    marks = RoleMarks(tiny_model.tokenizer.chat_template)
    form = EngineConfig(json_whitespace="", json_order="any").json_form
    cache = ProgramGrammars(tiny_model.tokenizer, marks, form=form)
    grammar = cache.get(schema(OBJECT)).result(timeout=60)
    assert accepts(grammar, '{"b":"x","a":1}')
    assert not accepts(grammar, '{"b": "x", "a": 1}')
    spaced = cache.get(Constraint("json_schema", json.dumps(OBJECT), form=JsonForm("model", "declared"))).result(
        timeout=60
    )
    assert accepts(spaced, '{"a": 1, "b": "x"}')
    assert not accepts(spaced, '{"b": "x", "a": 1}')
    tools = {"tools": [{"name": "f", "parameters": OBJECT}], "choice": "required"}
    calls = cache.get(Constraint("tools", json.dumps(tools), form=JsonForm(order="declared"))).result(timeout=60)
    layout = marks.style.format
    begin = layout.begin + layout.before_name + "f" + layout.before_arguments
    assert calls.advance_bytes(0, (begin + '{"a":1,').encode()) is not None
    for refused in ('{"b"', '{"a": '):
        assert calls.advance_bytes(0, (begin + refused).encode()) is None
    cache.close()


def test_what_cannot_be_closed_is_what_was_asked_for(cache: ProgramGrammars, device: DeviceGrammars) -> None:
    grammar = cache.get(schema(TREE)).result(timeout=60)
    assert not grammar.is_closed
    assert device.prepare(grammar) is None
    assert accepts(grammar, "[[], [[]]]")
    mixed = {"type": "object", "properties": {**OBJECT["properties"], "t": TREE["$defs"]["t"]}, "$defs": TREE["$defs"]}  # type: ignore[dict-item,index]
    grammar = cache.get(schema(mixed)).result(timeout=60)
    assert accepts(grammar, '{"a": 1, "t": [[]]}')


def test_closing_is_not_tried_again(
    cache: ProgramGrammars, device: DeviceGrammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cache.get(schema(TREE)).result(timeout=60)
    monkeypatch.setattr(type(first), "close", lambda *args: pytest.fail("closed again"))
    assert cache.get(schema(TREE)).result(timeout=60) is first


def test_patterns_are_closed_and_errors_are_those_of_compiling(cache: ProgramGrammars) -> None:
    assert cache.get(Constraint("regex", "[a-z]{2,5}")).result(timeout=60).is_closed
    with pytest.raises(GrammarError):
        cache.get(Constraint("regex", "(")).result(timeout=60)
    cache.close()


def test_a_grammar_that_fails_while_it_is_closed_fails_its_future(
    cache: ProgramGrammars, device: DeviceGrammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(grammar: object) -> bool:
        raise MemoryError("closing")

    monkeypatch.setattr(device, "close", fail)
    with pytest.raises(MemoryError, match="closing"):
        cache.get(Constraint("regex", "[a-z]{2,6}")).result(timeout=60)


@pytest.mark.parametrize("on_device", [False, True])
def test_forced_text_is_tokenised_as_the_constraint_says(on_device: bool) -> None:
    tokenizer = WordTokenizer()
    tokens = TokenTable.create(tokenizer.token_bytes, tokenizer.eos_ids, tokenizer.special_ids, tokenizer.vocab_size)
    arena = GrammarArena(tokens, 2, max_states=64, max_transitions=1 << 12)
    device = DeviceGrammars(arena, tokenizer.token_bytes, tokenizer.eos_ids, tokenizer.special_ids)
    cache = ProgramGrammars(tokenizer, RoleMarks(tokenizer.chat_template), device if on_device else None)
    masks = {}
    for constraint in (
        Constraint("regex", "the end"),
        Constraint("regex", "the end", tokenization="any"),
        Constraint("choice", '["the end"]', tokenization="any"),
        Constraint("choice", '["the end"]'),
    ):
        grammar = cache.get(constraint).result()
        assert grammar.is_closed == on_device
        masks[constraint.kind, constraint.tokenization] = grammar.allowed_tokens(0).tolist()
    for kind in ("regex", "choice"):
        assert masks[kind, "canonical"] == [WordTokenizer.THE]
        assert masks[kind, "any"] == [ord("t"), WordTokenizer.THE]
    cache.close()


class WordTokenizer(ByteTokenizer):
    """A tokenizer of bytes with one word more."""

    THE = 300

    def __init__(self) -> None:
        super().__init__(vocab_size=301)
        self.token_bytes[self.THE] = b"the "
        self.special_ids -= {self.THE}

    def split(self, text: bytes) -> list[int]:
        begin, the, rest = text.partition(b"the ")
        return [*begin, *([self.THE, *self.split(rest)] if the else ())]


def test_a_value_with_too_many_places_in_what_follows_is_masked_by_the_host(
    cache: ProgramGrammars, tiny_model: LoadedModel
) -> None:
    small = Constraint("regex", "[a-z]{2,5}")
    assert cache.masks_on_host(small, b" or") is False
    assert cache.masks_on_host(small, b"") is False
    assert cache.masks_on_host(Constraint("regex", "[ab]{0,3000}"), b"ab" * 32) is True
    assert cache.masks_on_host(schema({"type": "array"}), b".") is True, "it is not closed"
    assert grammars_of(tiny_model).masks_on_host(small, b"") is None
