"""The work of a Select node: gets the log-probabilities of its choices, and selects one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ramet.errors import InvalidProgram, InvalidRequest
from ramet.lang.graph import choice_scores, ir
from ramet.lang.graph.prompt_tokens import Piece
from ramet.runtime.programs.engine import EngineRequest
from ramet.runtime.programs.model import ProgramModel
from ramet.runtime.programs.path import Path
from ramet.runtime.types import RequestOutput, SamplingParams


class Selection:
    """The scoring of all choices, with one request for each, tokenised together with the branch. Methods as Generation.

    A choice's tail is its tokens after the prefix shared by all choices. Only tails are scored.
    """

    def __init__(self, node: ir.Select, texts: Sequence[str], model: ProgramModel, before: Path) -> None:
        """`texts`: the rendered choices. Raises InvalidProgram, InvalidRequest."""
        if len(set(texts)) < len(texts) or "" in texts:
            raise InvalidProgram(f"the choices of a select must differ and not be empty: {texts!r}")
        self._node, self._texts, self._before = node, texts, before
        is_start = before.length == 0
        pending = before.pending
        self._tokens = [model.encode_pieces((*pending, Piece(text)), is_start) for text in texts]
        shared = choice_scores.num_shared(self._tokens)
        self._tails = [tokens[shared:] for tokens in self._tokens]
        self._token_bytes = model.token_bytes
        self._rows: list[list[float]] = [[] for _ in range(2 * len(texts))]  # log-probabilities of tails: see _requests
        self._usages: list[ir.Usage] = []
        self._chosen = 0
        rows = self._requests(before.token_ids(), shared, model)
        self._row_of = list(rows)
        self.requests = list(rows.values())

    def _requests(self, base: list[int], shared: int, model: ProgramModel) -> dict[int, EngineRequest]:
        """Return requests by row: first the choices after the branch, then the same after the scorer's neutral text."""
        score_from = len(base) + shared
        if score_from == 0:
            raise InvalidRequest("select needs some text before its choices; this model has no begin-of-text token")
        if len(self._texts) == 1:
            return {}
        sampling = SamplingParams(max_tokens=1)
        found = {
            row: EngineRequest(base + self._tokens[row], sampling, score_from)
            for row, tail in enumerate(self._tails)
            if tail
        }
        neutral = choice_scores.NEUTRAL_TEXT.get(self._node.scorer)
        if neutral is not None:
            start = model.tokenizer.bos_id
            opening = model.tokenizer.encode(neutral, add_special=True) if neutral else []
            opening = opening or [start if start is not None else min(model.tokenizer.eos_ids)]
            for row, tail in enumerate(self._tails, len(self._tails)):
                if tail:  # scored from the second token, so the requests of a run share nothing: costs are known
                    found[row] = EngineRequest(opening + tail, sampling, 1)
        return found

    def take(self, index: int, output: RequestOutput) -> None:
        if output.prompt_logprobs is not None:
            self._rows[self._row_of[index]].extend(float(value) for value in output.prompt_logprobs)
        if output.finish_reason is not None:
            self._usages.append(output.usage)

    def result(self) -> ir.NodeResult:
        node, count = self._node, len(self._texts)
        if all(-math.inf in row for row in self._rows[:count]):
            raise InvalidRequest(
                f"every choice of {self._texts!r} has the probability 0; a strict script gives it to those that are "
                "not its answer"
            )
        neutral = [row[len(row) - len(tail) :] for row, tail in zip(self._rows[count:], self._tails, strict=True)]
        values = choice_scores.scores(node.scorer, self._tails, self._rows[:count], neutral)
        self._chosen = choice_scores.choose(values, node.temperature, node.seed)
        text = self._texts[self._chosen]
        meta = {
            "index": self._chosen,
            "choices": self._texts,
            "scores": values,
            "probs": choice_scores.probabilities(values),
            "logprobs": self._rows[:count],
            "token_ids": self._tails,
            "tokens": [[self._token_bytes[token].decode("utf-8", "replace") for token in tail] for tail in self._tails],
        }
        return ir.NodeResult(text, value=text, usage=sum(self._usages, ir.Usage()), meta=meta)

    def path(self) -> Path:
        tokens = self._tokens[self._chosen]
        return Path(self._before, tuple(tokens), self._before.length + len(tokens))

    def read(self, text: str) -> ir.JsonValue:
        return text
