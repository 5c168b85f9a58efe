"""Runs one Select node: asks the engine for the log-probabilities of its choices, and takes one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from ramet.errors import InvalidProgram, InvalidRequest
from ramet.lang.graph import ir
from ramet.runtime.programs import choice_scores
from ramet.runtime.programs.engine import usage_of
from ramet.runtime.programs.path import Path, Piece
from ramet.runtime.types import RequestOutput, SamplingParams

if TYPE_CHECKING:
    from ramet.runtime.programs.executor import NodeRun, ProgramExecutor


class Selection:
    """Scores the choices of one Select node: one request a choice, all at once, each tokenised with what precedes."""

    def __init__(self, executor: ProgramExecutor, run: NodeRun, node: ir.Select) -> None:
        self._executor, self._run, self._node = executor, run, node
        self._texts = [executor.render(choice) for choice in node.choices]
        duplicates = {text for text in self._texts if self._texts.count(text) > 1 or not text}
        if duplicates:
            raise InvalidProgram(f"the choices of a select must differ and not be empty: {self._texts!r}")
        self._before = executor.path_before(run)
        is_start = self._before.length == 0
        self._tokens = [
            executor.encoder.encode((*self._before.pending, Piece(text)), is_start=is_start) for text in self._texts
        ]
        shared = min(len(tokens) for tokens in self._tokens)
        self._shared = next((i for i in range(shared) if len({tokens[i] for tokens in self._tokens}) > 1), shared)
        self._usage = ir.Usage()
        self._left = 0
        self._lock = threading.Lock()

    def start(self) -> None:
        base = self._before.token_ids()
        score_from = len(base) + self._shared
        if score_from == 0:
            raise InvalidRequest("select needs some text before its choices; this model has no begin-of-text token")
        tails = [tokens[self._shared :] for tokens in self._tokens]
        jobs = [(i, base + tokens, score_from) for i, tokens in enumerate(self._tokens) if tails[i]]
        if self._node.scorer == "unconditional":
            start = self._executor.tokenizer.bos_id
            opening = [start if start is not None else min(self._executor.tokenizer.eos_ids)]
            jobs += [(i + len(tails), opening + tail, 1) for i, tail in enumerate(tails) if tail]
        self._rows: list[list[float]] = [[] for _ in range(2 * len(tails))]
        if len(tails) == 1:
            self._finish()
            return
        self._left = len(jobs)
        for row, prompt, begin in jobs:
            self._executor.submit(
                self._run, prompt, SamplingParams(max_tokens=1), self._collector(row), score_from=begin
            )

    def _collector(self, row: int) -> Callable[[RequestOutput], None]:
        def on_output(output: RequestOutput) -> None:
            if output.prompt_logprobs is not None:
                self._rows[row].extend(float(value) for value in output.prompt_logprobs)
            if output.finish_reason is None or self._run.is_over:
                return
            error = self._executor.request_error(output)
            with self._lock:
                self._left -= 1
                self._usage = self._usage + usage_of(output)
                is_last = self._left == 0
            if error is not None:
                self._executor.failed(self._run, error)
            elif is_last:
                self._finish()

        return on_output

    def _finish(self) -> None:
        node, count = self._node, len(self._texts)
        tails = [tokens[self._shared :] for tokens in self._tokens]
        values = choice_scores.scores(node.scorer, tails, self._rows[:count], self._rows[count:])
        index = choice_scores.choose(values, node.temperature, node.seed)
        text = self._texts[index]
        path = Path(self._before, tuple(self._tokens[index]), self._before.length + len(self._tokens[index]))
        self._executor.done(
            self._run,
            text=text,
            path=path,
            value=text,
            usage=self._usage,
            meta={
                "index": index,
                "choices": self._texts,
                "scores": values,
                "probs": choice_scores.probabilities(values),
            },
        )
