from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lark import Lark
from lark.exceptions import LarkError

from ramet.errors import GrammarError, GrammarTooLarge, InvalidGrammar
from ramet.grammar import CompiledGrammar, Vocabulary, compile_constraint

BYTES = Vocabulary([*(bytes((i,)) for i in range(256)), b"1+", b"(((", b')"', b"<eos>"], [259], [259])

CALCULATOR = r"""
    ?start: sum
    ?sum: product | sum "+" product -> add | sum "-" product -> sub
    ?product: atom | product "*" atom
    ?atom: NUMBER | "-" atom | "(" sum ")"
    NUMBER: /[0-9]+/
    %ignore " "
"""
JSON = r"""
    ?start: value
    ?value: object | array | string | SIGNED_NUMBER -> number | "true" | "false" | "null"
    array: "[" _list{value} "]"
    object: "{" [pair ("," pair)*] "}"
    pair: string ":" value
    string: ESCAPED_STRING
    _list{x}: [x ("," x)*]
    %import common.ESCAPED_STRING
    %import common.SIGNED_NUMBER
    %import common.WS
    %ignore WS
"""


def accepts(grammar: CompiledGrammar, text: str) -> bool:
    state = grammar.advance_bytes(0, text.encode())
    return state is not None and grammar.is_accepting(state)


def agrees(grammar: CompiledGrammar, parser: Lark, text: str) -> None:
    try:
        parser.parse(text)
        expected = True
    except LarkError:
        expected = False
    assert accepts(grammar, text) == expected, text


@pytest.mark.parametrize(
    ("source", "alphabet"),
    [
        (CALCULATOR, "1+-*() "),
        (JSON, '[]{}":,1e\\ a'),
        ('start: "a" start "b" | ', "ab"),
        ('start: start start | "a"', "ab"),
        ('start: "a"~2..3 ("b" | "c")* ["d"]', "abcd"),
        ('start: x\nx: x "a" | y\ny: y "b" | x "c" | "d"', "abcd"),
        ('start: A "x"i\nA.2: "a".."c" B~2\nB: /[^x]/ | "é"', "abcxXé"),
        ("start: (NAME _SEP)+\nNAME: /[a-z]+/\n_SEP: /[;\\n]/\n%ignore /[ ]/", "ab; \n"),
        ('start: pair{"a", pair{"b", x}}\npair{l, r}: "(" l r ")"\nx: "c"', "(abc)"),
        ('!start: a\n?a.2: "a" -> b | (("c"))', "abc"),
        ("start: S\n%import common.ESCAPED_STRING -> S", '"a\\b'),
        ('start: C "x"\n%import common.C_COMMENT -> C', "/*a x"),
    ],
)
def test_language_is_that_of_larks_own_parser_on_random_texts(source: str, alphabet: str) -> None:
    grammar = compile_constraint("cfg", source, BYTES)
    parser = Lark(source, parser="earley", lexer="dynamic_complete")

    @settings(max_examples=150, deadline=None)
    @given(st.text(alphabet, max_size=9))
    def check(text: str) -> None:
        agrees(grammar, parser, text)

    check()


@pytest.mark.parametrize(
    "text",
    [
        '{"a": [1, -2.5e3, "x\\"y"], "b": {}}',
        "[]",
        '{"a":1,}',
        '{"a" 1}',
        '"a"b"',
        "[1 2]",
        "nul",
        '{"a": [[[[true]]]]}',
    ],
)
def test_json_of_larks_tutorial(text: str) -> None:
    agrees(compile_constraint("cfg", JSON, BYTES), Lark(JSON, parser="earley", lexer="dynamic_complete"), text)


def test_masks_equal_brute_force_along_a_text() -> None:
    grammar = compile_constraint("cfg", CALCULATOR, BYTES)
    state: int | None = 0
    for byte in b"(1+ 2)*-3":
        assert state is not None
        row = np.unpackbits(grammar.mask(state).view(np.uint8), bitorder="little")
        for token in range(259):
            assert row[token] == (grammar.advance(state, token) is not None), (state, token)
        assert row[259] == grammar.is_accepting(state)
        state = grammar.advance(state, byte)


def test_a_grammar_without_recursion_is_closed() -> None:
    grammar = compile_constraint("cfg", 'start: "a" x ["c"]\nx: "b"+', BYTES)
    assert grammar.close()


def test_what_is_ignored_can_be_bounded() -> None:
    source = 'start: "a" "b"\n%ignore /[ ]+/\n%ignore /#x*/'
    free, bounded = (compile_constraint("cfg", source, BYTES, max_ignored=n) for n in (None, 2))
    for text, expected in [
        ("a b", (True, True)),
        (" a  b#x", (True, True)),
        ("a   b", (True, False)),
        ("ab #x", (True, False)),
    ]:
        assert (accepts(free, text), accepts(bounded, text)) == expected
    with pytest.raises(InvalidGrammar, match="max_ignored is -1"):
        compile_constraint("cfg", source, BYTES, max_ignored=-1)


def test_deep_recursion_has_a_completion() -> None:
    grammar = compile_constraint("cfg", CALCULATOR, BYTES)
    state = grammar.advance_bytes(0, b"(" * 50 + b"1")
    assert state is not None
    assert bytes(grammar.shortest_completion(state)) == b")" * 50


def test_recursion_deeper_than_pythons_has_a_completion() -> None:
    grammar = compile_constraint("cfg", 'start: "(" start ")" | "[" start "]" "." | "a"', BYTES)
    state = grammar.advance_bytes(0, b"([" * 3000)
    assert state is not None
    assert grammar.completion_bound(state) == 1 + 3 * 3000
    assert bytes(grammar.shortest_completion(state)[:4]) == b"a].)"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("start: a\n b", r"line 2 of the grammar: .*Unexpected"),
        ('x: "a"\n\nstart: x missing\n', r"line 3 of the grammar: .*'missing' used but not defined"),
        ("a: /x/", r"there is no rule 'start' to start from; rules are a"),
        ('start: "a"\nx: /b(/\nA: /c[/\nstart2: A', r""),
        ("start: A\nA: /b(/\n", r"line 2 of the grammar: terminal A: .*missing \).*\n    A: /b\(/"),
        ("start: x\nx: /(.)\\1/\n", r"line 2 of the grammar: .*a back reference to the group 1, which has more"),
        ('start: "a"\nA: A "x"\n', r"line 2 of the grammar: Recursion in terminal 'A'"),
        ('start{a}: a "b"', "line 1 of the grammar: the template 'start' takes 1 arguments, and here it has 0"),
        ('start: foo{x}\nx: "a"\nfoo{a, b}: a b', r"line 1 of the grammar: Wrong number of template arguments"),
        ("start: %\n", r"line 1 of the grammar: .*\n    start: %\n           \^"),
        ('start: x\nx: "a"\nx: "b"', r"line \d of the grammar: Rule 'x' defined more than once"),
        ("%import common.FOO\nstart: FOO", r"line [12] of the grammar: .*'FOO' used but not defined"),
        ("%import .secrets.x\nstart: x", r"only Lark's own grammars"),
        ("%import foo.bar\nstart: bar", r"only Lark's own grammars"),
        ("start: A\nA: /x*/", r"line 2 of the grammar: terminal A matches the empty text"),
        ('start: ""', r"Empty terminals are not allowed"),
        ('start: "a"~5..2', r"line 1 of the grammar: ~5..2 asks for at least 5 and at most 2"),
        ("%declare X\nstart: X", r"line 1 of the grammar: terminal X is declared but has no definition"),
        ('%override a: "x"\nstart: a', r"line 1 of the grammar: Cannot override a nonexisting rule a"),
        ("start: A\nA: /a(?=b)/", r"looks beyond the terminal"),
    ],
)
def test_errors_point_at_the_users_line(source: str, message: str) -> None:
    if not message:
        compile_constraint("cfg", source, BYTES)  # what the start does not reach is not compiled
        return
    with pytest.raises(InvalidGrammar) as caught:
        compile_constraint("cfg", source, BYTES)
    assert re.search(message, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        'start: "a"~20000',
        "start: a{x}\na{y}: a{b{y}}\nb{z}: z\nx: /q/",
        "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(40)) + '\nr40: "a"',
        "start: A\nA: /(a|b)*a(a|b){30}/",
    ],
)
def test_grammars_that_explode_raise_within_the_limit(source: str) -> None:
    with pytest.raises(GrammarTooLarge):
        compile_constraint("cfg", source, BYTES)


@pytest.mark.parametrize("source", ["start: start", 'start: "a" start', "start: x\nx: y\ny: x"])
def test_a_grammar_without_any_text_is_refused(source: str) -> None:
    with pytest.raises(GrammarError, match="no text matches"):
        compile_constraint("cfg", source, BYTES)


def test_a_terminal_may_refer_back_to_a_group_with_few_texts() -> None:
    grammar = compile_constraint("cfg", 'start: STRING ("," STRING)*\nSTRING: /(["\']).*?\\1/\n', BYTES)
    for text in ["'a'", '"a"', "'a\"b'", "'a',\"b'c\""]:
        assert accepts(grammar, text), text
    for text in ["'a\"", "'a'b'", '"a",', "a"]:
        assert not accepts(grammar, text), text
