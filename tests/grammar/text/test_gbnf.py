"""GBNF means the same in Lark's syntax."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ramet.errors import GrammarError, InvalidGrammar
from ramet.grammar import Matcher, Vocabulary, compile_constraint
from ramet.grammar.text.gbnf import is_gbnf, lark_of_gbnf

BYTES = Vocabulary([bytes([value]) for value in range(256)] + [b""], frozenset({256}), frozenset({256}), 257)


def accepts(source: str, text: str) -> bool:
    matcher = Matcher(compile_constraint("cfg", lark_of_gbnf(source), BYTES))
    for byte in text.encode():
        if not int(matcher.mask()[byte // 32]) >> (byte % 32) & 1:
            return False
        matcher.advance(byte)
    return bool(int(matcher.mask()[256 // 32]) >> (256 % 32) & 1)


ARITHMETIC = r"""
# from the notation's own description: expressions
root  ::= (expr "=" ws term "\n")+
expr  ::= term ([-+*/] term)*
term  ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \t\n]*
"""


@pytest.mark.parametrize(
    ("source", "good", "bad"),
    [
        ('root ::= "yes" | "no"', ["yes", "no"], ["", "yesno", "y"]),
        ('root ::= "a"\n  | "b" "c"\n', ["a", "bc"], ["ac"]),
        ('root ::= my-item ("," my-item)*\nmy-item ::= [a-c]{2}', ["ab", "ab,cc"], ["a", "ab,", "abd"]),
        ('root ::= my_item my-item\nmy_item ::= "1"\nmy-item ::= "2"', ["12"], ["11", "21"]),
        ('root ::= "a"{2,3} "b"{2,} "c"{0,1} "d"{0}', ["aabb", "aaabbbbc"], ["abb", "aaaabb", "aab", "aabbd"]),
        ('root ::= ("x" | "y")+? "z"', ["z", "xyz"], ["zz"]),
        (r'root ::= "\"\\\n\t" [\]\[\-\^/]', ['"\\\n\t]', '"\\\n\t-', '"\\\n\t/'], ['"\\\n\ta']),
        (r"root ::= [^a-c\n] . [é-ü\x41\u4e2d\U0001F600]", ["d\né", "ééA", "zz中", "zz😀"], ["a.é", "\n.é", "z.B"]),
        (r"root ::= [a-] [-a]", ["--", "aa", "-a"], ["b-"]),
        ('root ::= "" "a" ""', ["a"], ["", "aa"]),
        ('root ::= "é😀/\'" # and more\n', ["é😀/'"], ["é"]),
        ('root ::= "(" root ")" | ""', ["", "()", "((()))"], ["(", "())"]),
        (ARITHMETIC, ["a=1\n", "(a +b_1)*2 = 7\nx=3\n"], ["a", "a=\n", "1+=2\n"]),
    ],
)
def test_a_grammar_accepts_its_texts(source: str, good: list[str], bad: list[str]) -> None:
    assert is_gbnf(source)
    assert [text for text in good if not accepts(source, text)] == []
    assert [text for text in bad if accepts(source, text)] == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ('list ::= "a"', "no rule `root`"),
        ("root ::= gone", "line 1 .* no rule 'gone'"),
        ('root ::= "a"\nroot ::= "b"', "line 2 .* twice"),
        ('root ::= ("a"\nb ::= "c"', "line 2 .* still open"),
        ('root ::= ("a"', "not closed"),
        ('root ::= "a")', "not opened"),
        ("root ::= *", "repeats nothing"),
        ('root ::= ("a" | +)', "repeats nothing"),
        (r'root ::= "\q"', r"escape \\q"),
        (r'root ::= "\ud800"', "no character"),
        ('root ::= "a"{3,2}', "counts from 3 to 2"),
        ('root ::= "a" (= "b")', '\'= "b"'),
        ("root ::= <think>", "<think>"),
        ('"a" root ::= "b"', "before the first rule"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(source: str, message: str) -> None:
    with pytest.raises(InvalidGrammar, match=message):
        lark_of_gbnf(source)


def test_a_grammar_in_larks_syntax_is_not_taken_for_gbnf() -> None:
    assert not is_gbnf('start: "x ::= y" | NAME\nNAME: /[a-z]+ ::=/')


@settings(max_examples=150, deadline=None)
@given(literal=st.text(min_size=1, max_size=6), others=st.text(max_size=6))
def test_every_text_can_be_a_literal_and_every_character_a_class(literal: str, others: str) -> None:
    def escape(text: str, special: str) -> str:
        return "".join(f"\\U{ord(c):08x}" if c in special or c < " " else c for c in text)

    quoted = escape(literal, '"\\')
    classes = " ".join(f"[{escape(c, '[]^-' + chr(92))}]" for c in literal)
    for source in (f'root ::= "{quoted}"', f"root ::= {classes}"):
        assert accepts(source, literal)
        assert accepts(source, others) == (others == literal)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet='root:=()[]|*+?{}0,1"\\a-^.# \n', max_size=30))
def test_any_text_is_a_grammar_or_an_error(text: str) -> None:
    try:
        written = lark_of_gbnf("root ::= " + text)
    except GrammarError:
        return
    with contextlib.suppress(GrammarError):  # such as a rule that has no text; any other error is a failure
        compile_constraint("cfg", written, BYTES)
