"""Token paths: one tokenisation of a run of text, special tokens in markup alone, stop strings inside tokens."""

from __future__ import annotations

from pathlib import Path as FilePath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet.lang.graph.prompt_tokens import Piece
from ramet.runtime.programs.model import ProgramModel
from ramet.runtime.programs.path import Path, keep_text
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer
from ramet.runtime.text.tokenizer import Tokenizer


def test_a_path_is_append_only_and_shared_by_its_branches() -> None:
    encode = ProgramModel(ByteTokenizer()).encode_pieces
    root = Path().append("ab").flush(encode)
    left, right = root.append("c").flush(encode), root.extend([1, 2], rest="z")
    assert bytes(root.token_ids()) == b"ab"
    assert bytes(left.token_ids()) == b"abc"
    assert right.token_ids() == [97, 98, 1, 2]
    assert right.append("y").flush(encode).token_ids() == [97, 98, 1, 2, 122, 121]
    assert (left.length, right.length) == (3, 4)


def test_special_tokens_are_parsed_in_markup_and_not_in_text() -> None:
    tokenizer = ByteTokenizer()
    tokens = ProgramModel(tokenizer).encode_pieces([Piece("<|im_start|>u\n", True), Piece("<|im_end|>")], True)
    assert tokens[0] == tokenizer.special_tokens["<|im_start|>"]
    assert bytes(tokens[1:]) == b"u\n<|im_end|>"


def test_an_opening_token_is_added_before_text_but_not_before_markup() -> None:
    tokenizer = ByteTokenizer(add_bos=True)
    assert ProgramModel(tokenizer).encode_pieces([Piece("a")], True) == [tokenizer.bos_id, 97]
    assert ProgramModel(tokenizer).encode_pieces([Piece("a")], False) == [97]
    assert ProgramModel(tokenizer).encode_pieces([Piece("a", True)], True) == [97]


@given(
    st.lists(
        st.sampled_from([b"a", b"bc", "é".encode()[:1], "é".encode()[1:], b" ", b"\xff", b"b\xf0\x9f"]), max_size=8
    ),
    st.integers(0, 12),
)
def test_keeping_text_splits_tokens_where_the_text_ends(pieces: list[bytes], cut: int) -> None:
    whole = b"".join(pieces).decode(errors="replace")
    text = whole[:cut]
    kept, rest = keep_text(pieces, list(range(len(pieces))), text)
    assert b"".join(pieces[i] for i in kept).decode(errors="replace") + rest == text
    assert kept == list(range(len(kept)))
    if b"\xef\xbf\xbd" not in text.encode() and text == whole:
        assert rest == ""


@pytest.mark.model
def test_pieces_of_a_chat_are_tokenised_as_the_whole_rendered_chat(smollm2_path: FilePath) -> None:
    from ramet.runtime.models.description import describe_model

    tokenizer: Tokenizer = describe_model(smollm2_path).tokenizer
    template = tokenizer.chat_template
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "\n\n  Where is it?  "},
        {"role": "assistant", "content": "There.\n"},
        {"role": "user", "content": "1234 + 5678 = ?"},
    ]
    pieces: list[Piece[str]] = []
    for i, message in enumerate(messages):
        role = template.role_text(messages[:i], message["role"])
        pieces.append(Piece(role.before, True))
        half = len(message["content"]) // 2
        pieces += [Piece(message["content"][:half]), Piece(message["content"][half:])]
        pieces.append(Piece(role.after, True))
    pieces.append(Piece(template.role_text(messages, "assistant").before, True))
    whole = template.render(messages, add_generation_prompt=True)
    assert ProgramModel(tokenizer).encode_pieces(pieces, True) == tokenizer.encode(whole, parse_special=True)


def test_a_point_holds_its_own_piece_of_the_text_that_waits() -> None:
    point = Path().extend([1, 2], "a").append("b").append("c", is_markup=True)
    assert point.pending == [Piece("a"), Piece("b"), Piece("c", True)]
    assert point.piece == Piece("c", True)
    assert point.token_ids() == [1, 2]
    flushed = point.flush(lambda pieces, is_start: [len(pieces), int(is_start)])
    assert (flushed.token_ids(), flushed.pending) == ([1, 2, 3, 0], [])
    assert flushed.append("d").pending == [Piece("d")]
