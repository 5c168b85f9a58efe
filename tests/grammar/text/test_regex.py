from __future__ import annotations

import random
import re
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ramet.errors import GrammarTooLarge, InvalidRegex
from ramet.grammar import ir
from ramet.grammar.deadline import time_limit
from ramet.grammar.json_schema.schema.pattern import search
from ramet.grammar.regular import char_classes
from ramet.grammar.regular import languages as regular
from ramet.grammar.regular.utf8 import compile_text, text_dfa
from ramet.grammar.text.regex import parse_regex


def automaton(pattern: str, flags: int = 0) -> ir.Table:
    return compile_text(parse_regex(pattern, flags))


def all_texts(alphabet: str, longest: int) -> list[str]:
    return ["".join(t) for n in range(longest + 1) for t in product(alphabet, repeat=n)]


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "a|b|",
        "(a|b)*a(a|b){2}",
        "(?:ab){1,2}",
        "a{2,}?b??",
        "[^a]b",
        ".",
        "(?s:.)",
        "(?i:aB)",
        "^a$",
        "^$|a",
        "a$|b$",
        "(^a|b)c",
        "a^b",
        "a$b",
        "a$\n",
        "(?m)a$\nb",
        "(?m)^a$(\n^b)?",
        r"\Aa\Z",
        r"\ba\b",
        r"a\b b",
        r"a\Bb",
        r"(a|b)\B",
        r"a\B\B.",
        "a(?<=a)b",
        "[ab]*(?<!a)b",
        "[ab]*(?<=a)b",
        "(a|bc)(?<!c)(?:x|)",
        "(?:a|b)?(?<=b)",
        "(?<!a)b",
        "(?<=a)b",
        "(?:a{2}|b{0,2}){1,2}(?<!a)c?",
        "(?=a|b).?(?<!a)c*",
        r"\b",
        "(?=a)[ab]+",
        "(?!ab)[abc]{2,3}",
        "(?=.*a)(?=.*b)[abc]*",
        "((?=a).|b)*",
        "(?!.*aa)[ab]*",
        "(?!)|a",
        "(?!a$)[ab]+",
        "(?=(a|b)$)a",
        "(?x) a b # comment",
        r"[\]\-a]",
        "(?P<name>a)b",
        "a{,2}",
        "a{x}",
        "(a*)*b",
        "(|a)+",
    ],
)
def test_language_is_that_of_fullmatch_on_all_short_texts(pattern: str) -> None:
    found = automaton(pattern)
    for text in all_texts("abcAB \n]-{x}", 3):
        assert found.accepts(text.encode()) == bool(re.fullmatch(pattern, text)), text


@st.composite
def patterns(draw: st.DrawFn) -> str:
    atom = st.sampled_from(
        ["a", "b", "é", "€", ".", "[ab]", "[^a]", r"\w", r"\W", r"\s", r"\d", "[b-é]", "[^é\\d]", "^", "$"]
    )
    return draw(
        st.recursive(
            atom,
            lambda inner: st.one_of(
                st.tuples(inner, inner).map("".join),
                st.tuples(inner, inner).map(lambda p: f"(?:{p[0]}|{p[1]})"),
                st.tuples(inner, st.sampled_from(["*", "+", "?", "{1,2}", "{2}"])).map(lambda p: f"(?:{p[0]}){p[1]}"),
                inner.map(lambda p: f"(?={p})"),
                inner.map(lambda p: f"(?!{p})"),
                st.tuples(inner, st.sampled_from(["a", "[^a]", r"\w", "."])).map(lambda p: f"{p[0]}(?<!{p[1]})"),
                st.tuples(inner, st.sampled_from(["é", "[^b]", r"\s"])).map(lambda p: f"{p[0]}(?<={p[1]})"),
            ),
            max_leaves=6,
        )
    )


@settings(max_examples=200, deadline=None)
@given(patterns(), st.lists(st.text("abé€\n 1_", max_size=5), min_size=5, max_size=20))
def test_random_patterns_agree_with_fullmatch(pattern: str, texts: list[str]) -> None:
    try:
        found = automaton(pattern)
    except InvalidRegex as error:
        if not re.search("more than one way|may be empty|too complex", str(error)):
            raise
        return
    for text in texts:
        assert found.accepts(text.encode()) == bool(re.fullmatch(pattern, text)), text


@pytest.mark.parametrize("flags", [0, re.ASCII])
@pytest.mark.parametrize("letter", "dwsDWS")
def test_categories_are_those_of_re(letter: str, flags: int) -> None:
    ranges = char_classes.category(letter, bool(flags))
    pattern = re.compile(rf"\{letter}", flags)
    found = {c for low, high in ranges for c in range(low, high + 1)}
    assert found == {c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF and pattern.match(chr(c))}


@pytest.mark.parametrize("char", ["a", "K", "ß", "s", "ſ", "İ", "i", "I", "µ", "Ⓐ", "ﬅ", "σ", "1", "ͅ"])
@pytest.mark.parametrize("flags", [0, re.ASCII])
def test_ignored_case_is_that_of_re(char: str, flags: int) -> None:
    ranges = char_classes.ignore_case(((ord(char), ord(char)),), bool(flags))
    found = {c for low, high in ranges for c in range(low, high + 1)}
    pattern = re.compile(re.escape(char), re.IGNORECASE | flags)
    assert found == {c for c in range(0x110000) if pattern.fullmatch(chr(c))}


@pytest.mark.parametrize("pattern", ["[a-z]", "[^a-z]", "[à-þ_]", r"[\Wk]"])
def test_ignored_case_of_classes_is_that_of_re(pattern: str) -> None:
    found = automaton(pattern, re.IGNORECASE)
    compiled = re.compile(pattern, re.IGNORECASE)
    for c in (*range(0xD800), *range(0xE000, 0x10400, 7)):
        assert found.accepts(chr(c).encode()) == bool(compiled.fullmatch(chr(c))), chr(c)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(a+)\\1", r"a back reference to the group 1, which has more than 256 texts, or one .* \(position 4\)"),
        ("(?P<x>a)?(?P=x)", r"a back reference to the group 1, which is not read exactly once \(position 9\)"),
        (r"(a\b)\1", r"a back reference to the group 1, in which anchors or assertions stand"),
        (r"(a{5000})\1", r"to the group 1, which has more than 256 texts, or one of more than 4,096 characters"),
        (r"(.)\1", r"which has more than 256 texts.*; write the texts of the group out, as"),
        ("ab(?<=ab)c", r"a lookbehind of more than one character \(position 2\).*look at one character, or let"),
        ("(a)?(?(1)b|c)", r"a conditional group \(position 4\)"),
        ("(?>a+)b", r"an atomic group \(position 0\)"),
        ("a++b", r"a possessive repeat \(position 1\)"),
        ("a(b", "does not parse: missing \\), unterminated subpattern at position 1"),
        ("a**", "does not parse: multiple repeat at position 2"),
    ],
)
def test_what_is_refused_is_named_with_its_position(pattern: str, message: str) -> None:
    with pytest.raises(InvalidRegex, match=message):
        parse_regex(pattern)


REFERRING = [
    *(
        r"(a|b)x\1",
        r"(?P<q>['x])[ab]+(?P=q)",
        r"(a|b|ab)\1{2}",
        r"(a?)b\1",
        r"()\1a",
        r"(?:(a|b))\1",
        r"x(a{1,3})x\1(b)\2?",
    ),
    *(
        r"((a|b)x)\1\2",
        r"((a)|b)\1",
        r"([ab])(\1x)\2",
        r"(a|b)([x'])(?:\2\1|\1)",
        r"(a|b)(?!\1)[abx]",
        r"(?=(a|b)\1).*",
    ),
    *(r"(a|b)\1|x", r"(?:(a|b)\1)*x", r"(a|b)(?:(x|')\2)+\1", r"(?:(a|b)x\1){2}", "(é|\U0001f600)x\\1"),
]


@pytest.mark.parametrize("pattern", REFERRING)
def test_back_references_to_groups_with_few_texts_are_those_of_re(pattern: str) -> None:
    found, searched = automaton(pattern), regular.compile_chars(search(pattern))
    for text in [*all_texts("abx'", 6), "éxé", "éx\U0001f600", "\U0001f600x\U0001f600"]:
        assert found.accepts(text.encode()) == bool(re.fullmatch(pattern, text)), text
        assert searched.accepts(map(ord, text)) == bool(re.search(pattern, text)), text


@pytest.mark.parametrize(
    "pattern", [r"(?i)(ab|b)\1", r"(?i:(a|x))b\1", r"(a|B)(?i:\1)", r"(?ia)(k|s|é)\1", r"(?i)(K|s|é|İ|ß)\1"]
)
def test_a_back_reference_that_ignores_case_is_that_of_re(pattern: str) -> None:
    found = automaton(pattern)
    letters = "abABxXkKsSéÉ\u212aſİiIßẞ"
    for text in [a + b for a in letters for b in letters] + all_texts("aAbB", 4):
        assert found.accepts(text.encode()) == bool(re.fullmatch(pattern, text)), text


def test_a_back_reference_to_a_long_text_is_written_out() -> None:
    found = automaton(r"(a{300})b\1")
    assert found.accepts(b"a" * 300 + b"b" + b"a" * 300)
    assert not found.accepts(b"a" * 300 + b"b" + b"a" * 299)


@pytest.mark.parametrize("pattern", ["a(?=b)", "^a", "a$", r"a\Z", r"\Aa", "(?<!b)a"])
def test_a_lexeme_may_not_look_beyond_itself(pattern: str) -> None:
    with pytest.raises(InvalidRegex, match=r"looks beyond the terminal|may be empty"):
        parse_regex(pattern, is_lexeme=True)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r'".*?(?<!\\)(\\\\)*?"', '"a" b"'),
        (r'".*?(?<!\\)(\\\\)*?"', r'"a\"b" c"'),
        (r'".*?(?<!\\)(\\\\)*?"', r'"a\\" c"'),
        (r"/\*(.|\n)*?\*/", "/* a * b / */ */"),
        (r"\/(?!\/)[^\n]*?\/[imslux]*", "/a/im/"),
        (r"x?(\"\"\".*?\"\"\"|'.*?')", "x'a'b'"),
        ("a*?b+c?", "aabbc"),
        (r"if\b", "if"),
    ],
)
def test_a_lexeme_with_a_lazy_repeat_is_what_a_lexer_finds(pattern: str, text: str) -> None:
    found = compile_text(parse_regex(pattern, is_lexeme=True))
    lexed = re.match(pattern, text)
    assert lexed is not None
    whole = [text[:i] for i in range(len(text) + 1) if found.accepts(text[:i].encode())]
    if pattern == "a*?b+c?":  # what is greedy behind the lazy part may still be any length
        assert lexed.group() == "aabbc"
        assert whole == ["aab"]
    else:
        assert lexed.group() in whole
        assert all(len(w) <= len(lexed.group()) for w in whole)


@pytest.mark.parametrize(
    "pattern", ["a{200000}", "(){4294967294}", "(a{1000}){1000}", "(a|b)*a(a|b){40}", "(" * 5000 + ")" * 5000]
)
def test_patterns_that_explode_raise_within_the_limit(pattern: str) -> None:
    with pytest.raises(GrammarTooLarge):
        compile_text(parse_regex(pattern), max_states=5000)


@pytest.mark.parametrize(
    "pattern", [r"\w+é", "[^a]", ".", "(?i)ß|ÿ", "[߿-ࠀ\uffff-\U00010001]", "[\ud7ff-\ue000]", "\U0010ffff"]
)
def test_no_state_is_out_of_reach(pattern: str) -> None:
    table = compile_text(parse_regex(pattern))
    reached, queue = {0}, [0]
    for state in queue:
        for following in set(table.transitions[state].tolist()) - reached - {-1}:
            reached.add(following)
            queue.append(following)
    assert reached == set(range(len(table.accepting)))


@pytest.mark.parametrize(
    "pattern", [r"\w+é", "[^a]", ".", "(?i)ß|ÿ", "[߿-ࠀ\uffff-\U00010001]", "[\ud7ff-\ue000]", "\U0010ffff"]
)
def test_bytes_are_those_of_the_general_builder(pattern: str) -> None:
    node = parse_regex(pattern)
    direct = regular.compile_bytes(node)
    by_way_of_classes = regular.compile_bytes(compile_text(node))
    assert direct.key() == by_way_of_classes.key()


def random_pattern(rng: random.Random, depth: int, anchors: list[str]) -> str:
    kind = rng.random()
    if depth == 0 or kind < 0.35:
        return rng.choice(["a", "b", " ", "[ab]", ".", "[^a]", r"\w", "\n", ""])
    if kind < 0.55:
        return rng.choice(anchors)
    inner = [random_pattern(rng, depth - 1, anchors) for _ in range(2)]
    if kind < 0.7:
        return "".join(inner)
    return f"(?:{'|'.join(inner)})" if kind < 0.85 else f"(?:{inner[0]}){rng.choice(['*', '+', '?', '{2}', '{0,2}'])}"


ANCHORS = ["^", "$", r"\b", r"\B", "(?<=a)", "(?<!a)", "(?<![b ])", "(?=a)", r"(?=\bb)", "(?!a$)"]


@pytest.mark.parametrize("seed", range(8))
def test_anchors_boundaries_and_lookbehinds_may_stand_anywhere(seed: int) -> None:
    rng = random.Random(seed)
    texts = all_texts("ab \n", 4)
    for number in range(40):
        is_search = number % 2 == 1  # as JSON schemas read a pattern
        anchors = ANCHORS if is_search else [*ANCHORS, r"\A", r"\Z"]
        pattern = "".join(random_pattern(rng, 3, anchors) for _ in range(rng.randrange(1, 4)))
        flags = re.MULTILINE if not is_search and number % 3 == 0 else 0
        automaton = text_dfa(search(pattern) if is_search else parse_regex(pattern, flags).item)
        known = re.compile(pattern, flags)
        for text in texts:
            if (is_search and "\n" in text) or (r"\B" in pattern and not text):
                continue  # there, ECMA's rules and those of Python before 3.14 are others
            expected = known.search(text) if is_search else known.fullmatch(text)
            assert automaton.accepts(map(ord, text)) == bool(expected), (pattern, flags, text)


@pytest.mark.parametrize("depth", [12, 40])
def test_nested_repeats_of_anchors_end_in_a_typed_error(depth: int) -> None:
    pattern = r"\bx"
    for level in range(depth):
        pattern = rf"(?:{pattern}|\ba)*" if level % 2 else f"(?:{pattern}b)+"
    for read in (parse_regex, search):
        with pytest.raises(GrammarTooLarge), time_limit(3.0):
            read(pattern)
