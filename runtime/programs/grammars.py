"""The constraints of programs, compiled for one tokenizer by the grammar engine's compile service."""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from ramet import grammar as grammar_engine
from ramet.errors import GrammarError, GrammarTooLarge
from ramet.grammar import ir
from ramet.lang.graph.ir import Constraint, Generate
from ramet.lang.graph.json_form import AS_CONFIGURED, JsonForm
from ramet.lang.graph.narrowing import Narrowing
from ramet.runtime.text.role_marks import RoleMarks
from ramet.runtime.text.tokenizer import Tokenizer
from ramet.runtime.types import Grammar

if TYPE_CHECKING:  # these load numba or torch
    from ramet.grammar import Bordered, CompiledGrammar, CompileService, Vocabulary
    from ramet.runtime.constraints.device_grammars import DeviceGrammars

_MAX_HEALED = 128  # tokens for which free text after them keeps its masks


_WITH_JSON = ("json_schema", "structural_tag", "grammar")  # kinds that take the options of JSON


class ProgramGrammars:
    """Compiles constraints for one tokenizer; the compile service keeps them and limits their cost. Thread-safe.

    The first constraint loads the grammar engine, which needs numba, and starts the service. With `device`, a grammar
    is closed, if possible, before its future is done.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        marks: RoleMarks,
        device: DeviceGrammars | None = None,
        form: JsonForm = AS_CONFIGURED,
    ) -> None:
        """`marks`: of the tokenizer's chat template; they know how the model writes tool calls. `form`: of JSON, where
        a constraint does not say.
        """
        self._tokenizer = tokenizer
        self._marks = marks
        self._device = device
        self._form = form
        self._lock = threading.Lock()
        self._healed: dict[bytes, Bordered] = {}  # by the token that is given back
        self._service: CompileService | None = None
        self._beside: ThreadPoolExecutor | None = None

    def get(self, constraint: Constraint, client: tuple[str, ...] = ()) -> Future[CompiledGrammar]:
        """Return the grammar's future at once. It raises GrammarError and its subclasses, and Overloaded.

        `client`: who asks, for fairness: (key, connection, request).
        """
        with self._lock:
            service = self._service or self._start_service()
            if constraint.kind == "tools":
                source, words = self._tool_set(constraint), _in_tokens(self._tool_vocabulary, constraint)
                return service.submit("tools", source, words, client=client)
            options = self._options(constraint) if constraint.kind in _WITH_JSON else {}
            words = _in_tokens(self._vocabulary, constraint)
            return service.submit(constraint.kind, constraint.source, words, client=client, **options)

    def get_narrowed(self, node: Generate, client: tuple[str, ...]) -> Future[CompiledGrammar | None]:
        """Do as `get` for the constraint of a node, narrowed by the checks that become masks.

        If the narrowed constraint is too large to compile, the result is the grammar of the constraint alone (None if
        there is no constraint): all checks are then retried.
        """
        narrowed = node.narrowed()
        answer: Future[CompiledGrammar | None] = Future()
        answer.set_running_or_notify_cancel()

        def settle(found: Future[CompiledGrammar]) -> None:
            error = found.exception()
            if error is None:
                answer.set_result(found.result())
            else:
                answer.set_exception(error)

        def settle_narrowed(found: Future[CompiledGrammar]) -> None:
            error = found.exception()
            if not isinstance(error, GrammarTooLarge):
                settle(found if type(error) is not GrammarError else _failed(error, narrowed))
            elif node.constraint is None:
                answer.set_result(None)
            else:
                self.get(node.constraint, client).add_done_callback(settle)

        assert narrowed.constraint is not None
        asked = self.get(narrowed.constraint, client)
        asked.add_done_callback(settle_narrowed if narrowed.masked else settle)
        return answer

    def between(
        self, grammar: CompiledGrammar | None, before: bytes, after: bytes, lead: bytes = b""
    ) -> Grammar | None:
        """Return the grammar between the prompt's end, given back, and the text that follows: see Bordered.

        Without a grammar, any text may come after `before`. Equal arguments give one object, if it was used lately.
        """
        if not (before or after or lead):
            return grammar
        if grammar is not None:
            made = partial(grammar_engine.Bordered, grammar, grammar.vocabulary, before=before, after=after, lead=lead)
            return grammar.derived((before, after, lead), made)
        with self._lock:
            found = self._healed.get(before)
            if found is None:
                if len(self._healed) >= _MAX_HEALED:
                    self._healed = {}
                found = self._healed[before] = grammar_engine.Bordered(None, self._vocabulary, before=before)
        return found

    def masks_on_host(self, constraint: Constraint, after: bytes) -> bool | None:
        """Return whether the host makes the masks of a value that ends where `after` begins; None without a device."""
        if self._device is None:
            return None
        grammar = self.between(self.get(constraint).result(), b"", after)
        return grammar is None or self._device.prepare(grammar) is None

    def close(self) -> None:
        """Abandon running compilations, and end the service's threads."""
        with self._lock:
            if self._beside is not None:
                self._beside.shutdown(wait=False, cancel_futures=True)
            if self._service is not None:
                self._service.close()

    def run_aside(self, work: Callable[[], None]) -> None:
        """Run work that takes long on a thread beside the service's. Raises RuntimeError after `close`."""
        with self._lock:
            self._thread().submit(work)

    def _thread(self) -> ThreadPoolExecutor:
        """Return the thread beside the service's, under the lock."""
        if self._beside is None:
            self._beside = ThreadPoolExecutor(1, "ramet-grammars")
        return self._beside

    def _start_service(self) -> CompileService:
        self._service = grammar_engine.CompileService(finish=None if self._device is None else self._device.close)
        weakref.finalize(self, self._service.abandon).atexit = False
        return self._service

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        tokenizer = self._tokenizer
        return grammar_engine.Vocabulary(
            tokenizer.token_bytes, tokenizer.eos_ids, tokenizer.special_ids, tokenizer.vocab_size, tokenizer
        )

    @cached_property
    def _tool_vocabulary(self) -> Vocabulary:
        """Return the vocabulary that includes the special tokens which write parts of tool calls."""
        from ramet.grammar.tools.tool_set import with_marker_tokens  # loads numba

        shown = self._marks.style.shown_specials(self._tokenizer.special_tokens)
        return with_marker_tokens(self._vocabulary, shown) if shown else self._vocabulary

    def _tool_set(self, constraint: Constraint) -> str:
        """Return a tool set with a format and options of JSON. What it leaves out is as the chat template writes it."""
        found = json.loads(constraint.source)
        if not isinstance(found, dict):
            return constraint.source
        style = self._marks.style
        if "format" not in found:
            parallel = found.get("parallel", True) if style.max_calls is None else style.max_calls
            found = {**found, "format": style.format_source, "parallel": parallel}
        given = found.get("json", {})
        if isinstance(given, dict):
            found = {**found, "json": {"whitespace": style.whitespace, **self._options(constraint), **given}}
        return json.dumps(found, ensure_ascii=False)

    def _options(self, constraint: Constraint) -> dict[str, Any]:  # Any: each option has its own type
        """Return the options of a constraint with JSON in it: what it says, then the runtime's, then the defaults."""
        return {**ir.AS_MODELS_WRITE, **constraint.form.filled(self._form).said()}


def _failed(error: GrammarError, narrowed: Narrowing) -> Future[CompiledGrammar]:
    """Return a future whose error also names the checks, because they may be the cause."""
    failed: Future[CompiledGrammar] = Future()
    wrong = GrammarError(f"no text passes the `where` checks ({'; '.join(map(str, narrowed.masked))}): {error}")
    wrong.__cause__ = error
    failed.set_exception(wrong)
    return failed


def _in_tokens(vocabulary: Vocabulary, constraint: Constraint) -> Vocabulary:
    return vocabulary if constraint.tokenization == "canonical" else vocabulary.without_splits
