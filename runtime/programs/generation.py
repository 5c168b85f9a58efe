"""Runs one Generate node: from its branch's tokens to a request, from its outputs to a value and a longer branch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ramet.errors import CheckFailed
from ramet.lang.graph import ir
from ramet.runtime.programs.engine import usage_of
from ramet.runtime.programs.path import Path, keep_text
from ramet.runtime.types import FinishReason, RequestOutput

if TYPE_CHECKING:
    from ramet.runtime.programs.executor import NodeRun, ProgramExecutor


class Generation:
    """One generation on its way. Outputs come on the engine's thread, one after the other."""

    def __init__(self, executor: ProgramExecutor, run: NodeRun, node: ir.Generate) -> None:
        self._executor, self._run, self._node = executor, run, node
        self._texts: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        prompt = executor.path_before(run).flush(executor.encoder)
        if prompt.length == 0 and executor.tokenizer.bos_id is not None:
            prompt = prompt.extend([executor.tokenizer.bos_id])
        self._prompt = prompt

    def start(self) -> None:
        executor = self._executor
        sampling = ir.retry_sampling(self._node.sampling, len(self._run.attempts)).params()
        room = executor.context_length - self._prompt.length
        if self._node.sampling.max_tokens is None and 0 < room < (sampling.max_tokens or 0):
            # Nobody asked for that many: near the end of the context, what is left is enough.
            sampling = msgspec.structs.replace(sampling, max_tokens=room, min_tokens=min(sampling.min_tokens, room))
        if executor.marks.stop_strings and executor.is_in_role(self._node):
            sampling = msgspec.structs.replace(sampling, stop=(*sampling.stop, *executor.marks.stop_strings))
        allowed = executor.reserve(self._run, sampling)
        if allowed is not None:
            executor.submit(self._run, self._prompt.token_ids(), allowed, self._on_output, grammar=self._run.grammar)

    def _on_output(self, output: RequestOutput) -> None:
        self._texts.append(output.text)
        self._tokens.extend(output.token_ids)
        self._logprobs.extend(output.logprobs or ())
        if self._run.is_over:
            return
        if output.text and self._executor.limits.text_events and not self._node.checks:
            self._executor.emit(self._run, "text", text=output.text)
        if output.finish_reason is not None:
            self._finish(output, output.finish_reason)

    def _finish(self, output: RequestOutput, reason: FinishReason) -> None:
        executor, node, text = self._executor, self._node, "".join(self._texts)
        error = executor.request_error(output)
        if error is not None:
            executor.failed(self._run, error)
            return
        value, problem = None, None
        try:
            value = self._tool_calls() if node.type == "tools" else ir.parse_value(node.type, text)
        except ValueError as bad:
            cut = "it was cut by max_tokens" if reason is FinishReason.LENGTH else ""
            cut = f" because {output.incomplete or cut}" if output.incomplete or cut else ""
            problem = ir.NodeError("InvalidValue", f"not a value of type {node.type}{cut}: {text[:200]!r} ({bad})")
        if node.checks and not self._is_accepted(text, value, problem, output):
            return
        meta: dict[str, object] = {"logprobs": self._logprobs, "token_ids": self._tokens} if self._logprobs else {}
        if output.incomplete is not None:
            meta["incomplete"] = output.incomplete
        if node.checks:
            meta["attempts"] = self._run.attempts
            if text and executor.limits.text_events:  # held back until it was sure that it stays
                executor.emit(self._run, "text", text=text)
        executor.done(
            self._run,
            text=text,
            path=self._path_after(text, output),
            value=value,
            usage=self._run.spent + usage_of(output),
            finish_reason=reason.value,
            meta=meta or None,
            timings=self._timings(output),
            error=problem,
        )

    def _tool_calls(self) -> dict[str, object]:
        """What the model said and called. Special tokens that write parts of calls count with their spelling."""
        from ramet.runtime.text.tool_style import read_calls, shown_specials  # loads the grammar engine

        executor = self._executor
        style = executor.marks.style
        shown = shown_specials(style, executor.tokenizer.special_tokens)
        spelled = (shown[t].encode() if t in shown else executor.tokenizer.token_bytes[t] for t in self._tokens)
        return read_calls(style, b"".join(spelled))

    def _is_accepted(self, text: str, value: object, problem: ir.NodeError | None, output: RequestOutput) -> bool:
        """Check the value. False: the node starts anew, or it fails because its tries are used up."""
        node, run = self._node, self._run
        wrong = problem.message if problem is not None else None
        wrong = wrong or next((found for check in node.checks if (found := check.problem(value))), None)
        if wrong is None:
            return True
        run.attempts.append({"text": text, "problem": wrong})
        if len(run.attempts) <= node.retries:
            self._executor.again(run, usage_of(output))
            return False
        run.spent = run.spent + usage_of(output)
        times = "once" if not node.retries else f"{len(run.attempts)} times"
        error = CheckFailed(
            f"it failed its `where` checks {times}; the last text was {text[:200]!r}: {wrong}; loosen the checks, or "
            f"raise retries ({node.retries})"
        )
        error.attempts = tuple(run.attempts)
        self._executor.failed(run, error)
        return False

    def _path_after(self, text: str, output: RequestOutput) -> Path:
        """The branch with the generated tokens, cut where a stop string cut its text."""
        if isinstance(output.stop_match, str):
            return self._prompt.extend(*keep_text(self._executor.tokenizer.token_bytes, self._tokens, text))
        return self._prompt.extend(self._tokens)

    def _timings(self, output: RequestOutput) -> dict[str, float]:
        """Seconds since the program's start, but `queue_s`: how long the request waited."""
        timings = dict(output.timings or {})
        first = timings.get("first_token_s")
        found = {} if first is None else {"first_token_s": self._run.start_s - self._executor.start_s + float(first)}
        return found | ({"queue_s": float(timings["queue_s"])} if "queue_s" in timings else {})
