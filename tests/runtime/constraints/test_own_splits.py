"""What a tokenizer writes for a whole text is allowed token by token, for tokenizers of every supported kind."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from ramet.grammar import Bordered, Vocabulary, compile_constraint
from ramet.grammar.ir import AS_MODELS_WRITE
from ramet.grammar.machine import bitmask
from ramet.kernels.grammar.arena import GrammarArena
from ramet.kernels.grammar.mask import TokenTable
from ramet.runtime.constraints.device_grammars import DeviceGrammars
from ramet.runtime.text.tokenizer import SubwordTokenizer

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
SMALL = {"max_states": 4096, "max_transitions": 1 << 18, "max_mask_rows": 512, "max_grammars": 4}
JOBS = ["engineer", "engineering", "it's", "'s", "naïve", "naive"]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "job": {"enum": JOBS},
        "age": {"type": "integer"},
        "member": {"type": "boolean"},
        "tags": {"type": "array", "items": {"enum": ["name", "na", "x-ray", "{name}"]}},
        "parts": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"id": {"type": "string"}, "size": {"type": "number"}, "none": {"type": "null"}},
                "required": ["id"],
                "additionalProperties": False,
            },
        },
        "joined": {"type": "string", "pattern": "^20[0-9]{2}-[01][0-9]-[0-3][0-9]$"},
    },
    "required": ["name", "joined"],
    "additionalProperties": False,
}


RECORD = 'name: ("[a-z]{0,9}"|[0-9]{1,3}), (member|engineer|none|joined): (true|false)'


def record(rng: random.Random) -> Any:
    words = ["name", "it's", "", "a b", "123", "-", "naïve", "x\ny", "{", 'quo"te', "  two"]
    made = {
        "name": " ".join(rng.choices(words, k=rng.randrange(4))),
        "job": rng.choice(JOBS),
        "age": rng.choice([0, 7, 1234, -56]),
        "member": rng.random() < 0.5,
        "tags": rng.choices(["name", "na", "x-ray", "{name}"], k=rng.randrange(3)),
        "parts": [
            {"id": rng.choice(words), "size": rng.choice([1.5, -20, 1e-3])}
            | ({"none": None} if rng.random() < 0.3 else {})
            for _ in range(rng.randrange(3))
        ],
        "joined": f"20{rng.randrange(10, 99)}-{rng.randrange(10, 13)}-{rng.randrange(10, 29)}",
    }
    return {key: value for key, value in made.items() if key in ("name", "joined") or rng.random() < 0.6}


def texts(seed: int, number: int, compact: bool) -> list[str]:
    rng = random.Random(seed)
    separators = (",", ":") if compact else (", ", ": ")
    return [json.dumps(record(rng), separators=separators, ensure_ascii=False) for _ in range(number)]


@cache
def tokenizer(kind: str) -> SubwordTokenizer:
    """A small tokenizer of this kind, trained on records like those of the tests."""
    known = texts(1, 200, True) + texts(2, 200, False)
    if kind == "sentencepiece":
        backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet = [f"<0x{value:02X}>" for value in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", "<end>", *alphabet], show_progress=False)
        backend.train_from_iterator(known, trainer)
        spec = json.loads(backend.to_str())
        spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in ("<unk>", "<end>")]
        backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    else:
        backend = tokenizers.Tokenizer(models.BPE())
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt-2")
        before: dict[str, list[Any]] = {
            "gpt-2": [pre_tokenizers.Digits(individual_digits=True)],
            "llama-3": [pre_tokenizers.Split(Regex(LLAMA_3), "isolated")],
        }
        backend.pre_tokenizer = pre_tokenizers.Sequence([*before.get(kind, ()), byte_level])
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=["<end>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(known, trainer)
    end = backend.token_to_id("<end>")
    assert end is not None
    return SubwordTokenizer(backend, eos_ids=[end])


def vocabulary(made: SubwordTokenizer) -> Vocabulary:
    return Vocabulary(made.token_bytes, made.eos_ids, made.special_ids, made.vocab_size, made)


KINDS = ["gpt-2", "llama-3", "no pieces", "sentencepiece"]


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_own_split_of_a_whole_record_is_allowed_token_by_token(kind: str, compact: bool) -> None:
    made = tokenizer(kind)
    whitespace = "compact" if compact else "model"
    grammar = compile_constraint("json_schema", SCHEMA, vocabulary(made), whitespace=whitespace)
    for text in texts(3, 60, compact):
        state: int | None = 0
        for token in made.encode(text, continues=True):
            assert state is not None
            assert bitmask.is_allowed(grammar.mask(state), token), (text, made.token_bytes[token])
            state = grammar.advance(state, token)
        assert state is not None
        assert grammar.is_accepting(state)


@pytest.mark.parametrize("kind", KINDS)
def test_forced_keys_come_in_the_tokenizers_own_tokens(kind: str) -> None:
    made = tokenizer(kind)
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"member": {"type": "boolean"}, "parts": {"const": "name"}},
    }
    schema |= {"required": ["member", "parts"], "additionalProperties": False}
    grammar = compile_constraint("json_schema", schema, vocabulary(made), **AS_MODELS_WRITE)
    text = '{"member": false, "parts": "name"}'
    state = 0
    written: list[int] = []
    while not grammar.is_accepting(state):
        run = grammar.forced_tokens(state)
        if not run:  # the choice of the boolean
            run = [
                t
                for t in grammar.allowed_tokens(state).tolist()
                if text.encode().startswith(b"".join(made.token_bytes[x] for x in [*written, t]))
            ][-1:]
        for token in run:
            after = grammar.advance(state, token)
            assert after is not None
            state = after
        written += run
    assert b"".join(made.token_bytes[t] for t in written).decode() == text
    assert len(written) <= len(made.encode(text, continues=True)) + 1


@pytest.mark.parametrize(("before", "rest"), [(b"}", 1), (b" ", 1), (b"a", 0), (b"\n", 0)])
def test_the_character_before_a_text_decides_where_its_first_piece_ends(before: bytes, rest: int) -> None:
    assert tokenizer("llama-3").rest_of_piece(before, b'"name": 1') == rest  # `}"` is one piece, `name` the next
    assert tokenizer("no pieces").rest_of_piece(before, b'"name": 1') == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_is_that_of_a_text_that_continues(kind: str) -> None:
    made = tokenizer(kind)
    for text in ("name", '"name": 1', "'s", " name", '":', "é", ""):
        assert made.split(text.encode()) == made.encode(text, continues=True)
        for before in (b"a", b" ", "é".encode()):
            made.split(text.encode()[: made.rest_of_piece(before, text.encode())])  # whole characters


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", [RECORD, "name(: name)?"])
@pytest.mark.parametrize("has_ends", [False, True])
def test_the_device_and_the_host_mask_alike(kind: str, source: str, has_ends: bool) -> None:
    made = tokenizer(kind)
    grammar = compile_constraint("regex", source, vocabulary(made))
    assert grammar.close()
    tokens = TokenTable.create(made.token_bytes, made.eos_ids, made.special_ids, made.vocab_size)
    device = DeviceGrammars(GrammarArena(tokens, 2, **SMALL), made.token_bytes, made.eos_ids, made.special_ids)
    tables = device.prepare(grammar)
    assert tables is not None
    base = device.acquire(grammar, tables, has_ends=has_ends)
    assert base is not None
    for state in range(tables.num_states):
        row = device.arena.mask_rows[device.arena.mask_index[base + state].long()]
        ends = grammar.ends(state) if has_ends and not grammar.is_complete(state) else None
        if not has_ends or not grammar.is_complete(state):  # in a complete text, every token stands for the end
            assert (row.numpy() == (grammar.mask(state) if ends is None else grammar.mask(state) | ends)).all()
    assert tables.refused is not None
    assert len(tables.refused) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "border", [{"after": b", name: "}, {"before": b" ", "after": b"\n"}, {"lead": b" ", "after": b"."}]
)
def test_the_device_and_the_host_mask_a_bordered_value_alike(kind: str, border: dict[str, bytes]) -> None:
    made = tokenizer(kind)
    grammar = compile_constraint("regex", RECORD, vocabulary(made))
    assert grammar.close()
    bordered = Bordered(grammar, grammar.vocabulary, **border)
    tokens = TokenTable.create(made.token_bytes, made.eos_ids, made.special_ids, made.vocab_size)
    device = DeviceGrammars(GrammarArena(tokens, 2, **SMALL), made.token_bytes, made.eos_ids, made.special_ids)
    tables = device.prepare(bordered)
    assert tables is not None
    base = device.acquire(bordered, tables, has_ends=True)
    assert base is not None
    rng, num_refused = random.Random(4), 0
    for _ in range(12):
        state, local = 0, 0
        while not bordered.is_complete(state):
            row = device.arena.mask_rows[device.arena.mask_index[base + local].long()].numpy()
            ends = bordered.ends(state)
            expected = bordered.mask(state) if ends is None else bordered.mask(state) | ends
            odd = set(bitmask.unpack(row).tolist()) ^ set(bitmask.unpack(expected).tolist())
            assert all(over_the_border(bordered, state, made.token_bytes[token]) for token in odd), (state, odd)
            assert tables.refused is not None
            num_refused += int((tables.refused[:, 0] == local).sum())
            choices = [t for t in bitmask.unpack(bordered.mask(state)).tolist() if t not in made.eos_ids]
            token = rng.choice(choices)
            reached, after_it = bordered.advance(state, token), device.state_after(tables, [token], local)
            assert reached is not None
            assert after_it is not None
            state, local = reached, after_it
    assert num_refused > 20


def over_the_border(bordered: Bordered, state: int, text: bytes) -> bool:
    """Whether a token holds so much of the value that the host does not look for it."""
    place = bordered._places[state]
    assert place is not None
    reached = bordered._after_text(place, text)
    return reached is not None and bool(reached[1]) and len(text) - reached[1][0] > 4
