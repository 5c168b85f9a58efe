"""The runtime's target for the language's passes (lang/passes/target.py), which needs only a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ramet.lang.graph.ir import AnyNode, Constraint, Marked
from ramet.lang.graph.json_form import AS_CONFIGURED, JsonForm
from ramet.runtime.programs.grammars import ProgramGrammars
from ramet.runtime.text.role_marks import RoleMarks
from ramet.runtime.text.tokenizer import Tokenizer
from ramet.runtime.types import SamplingParams


class TokenizerTarget:
    """A tokenizer with its chat template, and limits: no weights, no engine."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        name: str = "",
        context_length: int = 1 << 20,
        page_size: int = 1,
        form: JsonForm = AS_CONFIGURED,
    ) -> None:
        self.name = name or type(tokenizer).__name__
        self.context_length = context_length
        self.page_size = page_size
        self.default_max_tokens = SamplingParams().max_tokens or context_length
        self.token_bytes: Sequence[bytes] = tokenizer.token_bytes
        self.max_token_bytes = max(len(token) for token in self.token_bytes)
        self.special_tokens: Mapping[str, int] = tokenizer.special_tokens
        self._tokenizer = tokenizer
        self._marks = RoleMarks(tokenizer.chat_template)
        self.stop_strings = self._marks.stop_strings
        self._grammars = ProgramGrammars(tokenizer, self._marks, form=form)

    def encode(self, text: str, *, add_special: bool, continues: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special=add_special, continues=continues)

    def mark(self, before: Sequence[AnyNode], node: Marked) -> str:
        return self._marks.text(before, node)

    def goes_on(self, constraint: Constraint | None, before: bytes) -> bool:
        return constraint is None or self._grammars.get(constraint).result().goes_on(before)

    def forced_tokens(self, constraint: Constraint) -> list[int] | None:
        return self._grammars.get(constraint).result().forced_tokens(0)
