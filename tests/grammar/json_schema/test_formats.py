"""String formats: whatever their automata accept, an independent checker accepts, too."""

from __future__ import annotations

import collections
import json
import random
from collections.abc import Iterator

import jsonschema
import pytest

from ramet.grammar import Vocabulary, compile_grammar
from ramet.grammar.ir import MAX_CODE_POINT, JsonSchema
from ramet.grammar.json_schema.algebra.languages import automaton
from ramet.grammar.json_schema.schema import formats
from ramet.grammar.regular.dfas import Dfa

BYTES = Vocabulary([*(bytes((i,)) for i in range(256)), b""], [256])
CHECKER = jsonschema.Draft202012Validator.FORMAT_CHECKER
DRAFT_3_NAMES = {"ip-address": "ipv4", "host-name": "hostname"}


class Sampler:
    """Texts of an automaton: through each of its transitions, and random walks, each ended the shortest way."""

    def __init__(self, dfa: Dfa, seed: int) -> None:
        self.dfa = dfa
        self.rng = random.Random(seed)
        self.ranges: dict[int, list[tuple[int, int]]] = {}
        for i, start in enumerate(dfa.starts):
            end = dfa.starts[i + 1] - 1 if i + 1 < len(dfa.starts) else MAX_CODE_POINT
            self.ranges.setdefault(dfa.classes[i], []).append((start, end))
        back: dict[int, list[tuple[int, int]]] = collections.defaultdict(list)
        for state, row in enumerate(dfa.transitions):
            for c, to in enumerate(row):
                if to >= 0:
                    back[to].append((state, c))
        self.after: dict[int, tuple[int, ...]] = {s: () for s, a in enumerate(dfa.accepting) if a}
        for to in (queue := list(self.after)):
            for state, c in back[to]:
                if state not in self.after:
                    self.after[state] = (c, *self.after[to])
                    queue.append(state)
        self.before: dict[int, tuple[int, ...]] = {0: ()}
        for state in (queue := [0]):
            for c, to in enumerate(dfa.transitions[state]):
                if to >= 0 and to not in self.before:
                    self.before[to] = (*self.before[state], c)
                    queue.append(to)

    def spell(self, classes: tuple[int, ...]) -> str:
        out = []
        for c in classes:
            low, high = self.rng.choice(self.ranges[c])
            out.append(
                chr(
                    self.rng.choice(
                        [low, high, self.rng.randint(low, high), self.rng.randint(low, min(high, 126 + low))]
                    )
                )
            )
        return "".join(out).encode("utf-8", "ignore").decode()  # single surrogates cannot be written

    def through_each_transition(self) -> Iterator[str]:
        for state, row in enumerate(self.dfa.transitions):
            for c, to in enumerate(row):
                if to >= 0:
                    yield self.spell((*self.before[state], c, *self.after[to]))

    def random_walk(self) -> str:
        state, classes = 0, list[int]()
        for _ in range(self.rng.choice((1, 3, 10, 40, 300))):
            choices = [c for c, to in enumerate(self.dfa.transitions[state]) if to >= 0]
            if not choices:
                break
            classes.append(self.rng.choice(choices))
            state = self.dfa.transitions[state][classes[-1]]
        return self.spell((*classes, *self.after[state]))


@pytest.mark.parametrize("name", sorted(formats.KNOWN))
def test_what_is_written_passes_an_independent_checker(name: str) -> None:
    checked = DRAFT_3_NAMES.get(name, name)
    assert checked in CHECKER.checkers, (
        "the checker's optional packages are not installed: pip install jsonschema[format]"
    )
    sampler = Sampler(automaton("format", name, 20_000), 1)
    longest = formats.MAX_LENGTHS.get(name, 10_000)
    texts = [*sampler.through_each_transition(), *(sampler.random_walk() for _ in range(500))]
    refused = [t for t in texts if len(t) <= longest and not CHECKER.conforms(t, checked)]
    assert not refused, [ascii(t) for t in sorted(refused, key=len)[:5]]


GOOD = {
    "date": ["2024-02-29", "0001-01-01"],
    "time": ["08:30:06.283185Z", "08:30:06+00:20", "12:00:00z"],
    "date-time": ["1963-06-19t08:30:06.283185z", "1990-12-31T15:59:59.123-08:00"],
    "duration": ["P4DT12H30M5S", "P2W"],
    "hostname": ["a.b", "a" * 63 + ".com", "xn--4gbwdl.xn--wgbh1c", ".".join(["ab"] * 84)],
    "idn-hostname": ["실례.테스트", "ßς་〇", "l·l", "α͵β", "א׳ב", "・ぁ", "ب٠ب", "۰0",
                     "क्‍ष", "بي‌بي", "a。b", "münchen", "Host-1"],
    "uri": ["http://[v6.x]/a?b#c", "urn:isbn:0-486-27557-4"],
    "uri-template": ["http://example.com/{term:1}/{term}{?q,lang*}"],
    "relative-json-pointer": ["120/foo/bar", "0#"],
    "regex": ["^[a-zA-Z0-9_.-]+$", "([abc])+\\s+$", "^(?!x)\\d{3}-\\d{4}(?:\\.[0-5]{1,12})?$", "a|b\\/c"],
    "uuid": ["2EB8AA08-aa98-11ea-b4aa-73b441d16380"],
}  # fmt: skip
BAD = {
    "date": ["0000-01-01", "2023-02-29"],
    "time": ["23:59:60Z", "24:00:00Z", "12:00:00", "08:30:06+24:00"],
    "date-time": ["1998-12-31T23:59:60Z", "2024-01-01 00:00:00Z"],
    "hostname": ["", "-a", "a" * 64, ".".join(["ab"] * 85), "a_b"],
    "idn-hostname": ["xn--X", "\u302e실", "a·l", "α͵S", "A׳ב", "def・abc", "ب٠۰", "क‍ष", "-a", "é" * 17, "。"],
    "uri": ["/a", "http://[v6.x"],
    "uri-template": ["{=x}", "{term", "{%41}", "{a:1000}"],
    "relative-json-pointer": ["01#", "/a"],
    "regex": ["^(abc]", "[z-a]", "a**", "[[a]", "(?<x)", "\\"],
    "uuid": ["2eb8aa08aa9811eab4aa73b441d16380"],
}


@pytest.mark.parametrize("name", sorted(GOOD))
def test_texts_are_accepted_and_refused_as_the_formats_say(name: str) -> None:
    grammar = compile_grammar(JsonSchema({"type": "string", "format": name}), BYTES)

    def accepts(text: str) -> bool:
        escaped = text.replace("\\", "\\\\").replace('"', '\\"')
        state = grammar.advance_bytes(0, f'"{escaped}"'.encode())
        return state is not None and grammar.is_accepting(state)

    assert [t for t in GOOD[name] if not accepts(t)] == []
    assert [t for t in BAD.get(name, []) if accepts(t)] == []


@pytest.mark.parametrize("name", ["hostname", "idn-hostname"])
def test_random_tokens_and_closings_keep_the_limit_of_a_whole_name(name: str) -> None:
    schema = {"type": "string", "format": name, "minLength": 40}
    grammar = compile_grammar(JsonSchema(schema), BYTES)
    for seed in range(10):
        rng = random.Random(seed)
        state, text = 0, b""
        for _ in range(rng.choice((0, 60, 500))):
            allowed = [t for t in grammar.allowed_tokens(state).tolist() if t != 256]
            if not allowed:
                break
            text += bytes((rng.choice(allowed),))
            state = grammar.advance(state, text[-1])  # type: ignore[assignment]
        for token in grammar.shortest_completion(state):
            text += bytes((token,))
        value = json.loads(text)
        jsonschema.validate(value, schema, cls=jsonschema.Draft202012Validator, format_checker=CHECKER)
