"""What programs know of a model without its weights: tokenizer, chat template, limits, compiled constraints.

Nodes run with it (executor.py), and it is the language's target for passes, which predict a run
(lang/passes/target.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ramet.lang.graph.ir import Constraint, Marked
from ramet.lang.graph.json_form import AS_CONFIGURED, JsonForm
from ramet.lang.graph.prompt_tokens import Piece, healing, special_border, tokenised
from ramet.runtime.programs.grammars import ProgramGrammars
from ramet.runtime.text.bounded_tokenizer import BoundedTokenizer
from ramet.runtime.text.role_marks import RoleMarks
from ramet.runtime.text.tokenizer import Tokenizer
from ramet.runtime.types import SamplingParams

if TYPE_CHECKING:
    from ramet.runtime.constraints.device_grammars import DeviceGrammars  # loads torch


class ProgramModel:
    """A model as programs see it. Thread-safe.

    `tokenizer`: refuses a text that cannot fit the context; `encode`, for plans, counts the tokens of any text.
    `marks`: the text that the chat template writes around messages. `given_back`: which last token of a prompt the
    model writes again.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        name: str = "",
        context_length: int = 1 << 20,
        page_size: int = 1,
        form: JsonForm = AS_CONFIGURED,
        device: DeviceGrammars | None = None,
    ) -> None:
        """`form`: of JSON, where a constraint does not say. `device`: for automata that run on the engine's device."""
        self.name = name or type(tokenizer).__name__
        self.context_length = context_length
        self.page_size = page_size
        self.default_max_tokens = SamplingParams().max_tokens or context_length
        self.token_bytes: Sequence[bytes] = tokenizer.token_bytes
        self.max_token_bytes = max(len(token) for token in self.token_bytes)
        self.max_text_bytes = max(len(token.decode("utf-8", "replace").encode()) for token in self.token_bytes)
        self.special_tokens: Mapping[str, int] = tokenizer.special_tokens
        self.tokenizer: Tokenizer = BoundedTokenizer(tokenizer, context_length)
        self.marks = RoleMarks(tokenizer.chat_template)
        self.stop_strings = self.marks.stop_strings
        self.grammars = ProgramGrammars(self.tokenizer, self.marks, device, form)
        self.given_back = healing(self.token_bytes)
        self.encode = tokenizer.encode
        self._border = special_border(self.special_tokens)

    def encode_pieces(self, pieces: Sequence[Piece[str]], is_start: bool) -> list[int]:
        """Return the tokens of adjoining pieces of a branch's text. `is_start`: nothing stands before them."""

        def encoded(texts: list[str], add_special: bool, continues: bool) -> list[int]:
            return self.tokenizer.encode("".join(texts), add_special=add_special, continues=continues)

        return tokenised(pieces, encoded, self._border, self.special_tokens, is_start=is_start)

    def mark(self, talk: object, opening: str, node: Marked) -> tuple[object, str]:
        return self.marks.mark(talk, opening, node)

    def goes_on(self, constraint: Constraint | None, before: bytes) -> bool:
        return constraint is None or self.grammars.get(constraint).result().goes_on(before)

    def masks_on_host(self, constraint: Constraint, after: bytes) -> bool | None:
        return self.grammars.masks_on_host(constraint, after)

    def forced_tokens(self, constraint: Constraint) -> list[int] | None:
        return self.grammars.get(constraint).result().forced_tokens(0)
