"""Where programs get their grammars: the grammar engine's compile service, for one tokenizer."""

from __future__ import annotations

import json
import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

from ramet.lang.graph.ir import Constraint
from ramet.runtime.text.chat_template import ChatTemplate

if TYPE_CHECKING:
    from ramet.grammar import CompiledGrammar, Vocabulary
    from ramet.grammar.service.compile_service import CompileService
    from ramet.runtime.constraints.device_grammars import DeviceGrammars
    from ramet.runtime.text.tool_style import ToolStyle


class VocabularySource(Protocol):
    @property
    def token_bytes(self) -> list[bytes]: ...

    @property
    def eos_ids(self) -> frozenset[int]: ...

    @property
    def special_ids(self) -> frozenset[int]: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def special_tokens(self) -> dict[str, int]: ...

    @property
    def chat_template(self) -> ChatTemplate: ...


class GrammarCache:
    """Compiled constraints of one tokenizer's vocabulary. Thread-safe.

    The grammar engine is loaded, and its compile service started, at the first constraint. The service keeps what it
    compiled, and limits time and memory. With `device`, grammars are closed, if they can be, before their futures are
    done; JSON schemas are then written in declared order, because any order has too many states.
    """

    def __init__(self, tokenizer: VocabularySource, device: DeviceGrammars | None = None) -> None:
        self._tokenizer = tokenizer
        self._device = device
        self._closing: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._service: CompileService | None = None
        self._vocabulary: Vocabulary | None = None
        self._marked: Vocabulary | None = None
        self._style: ToolStyle | None = None

    def get(self, constraint: Constraint) -> Future[CompiledGrammar]:
        """Return the grammar's future at once. It raises GrammarError and its subclasses."""
        with self._lock:
            if self._service is None or self._vocabulary is None:
                from ramet.grammar import Vocabulary
                from ramet.grammar.service.compile_service import CompileService

                source = self._tokenizer
                self._vocabulary = Vocabulary(source.token_bytes, source.eos_ids, source.special_ids, source.vocab_size)
                self._service = CompileService()
                weakref.finalize(self, self._service.abandon).atexit = False
            if constraint.kind == "tools":
                return self._service.submit("tools", self._tool_set(constraint.source), self._vocabulary_with_marks())
            options = {"mode": "declared_order"} if constraint.in_order else {}
            if self._device is None:
                return self._service.submit(constraint.kind, constraint.source, self._vocabulary, **options)
            return self._on_device(self._service, self._vocabulary, constraint, options)

    def _on_device(
        self, service: CompileService, vocabulary: Vocabulary, constraint: Constraint, options: dict[str, str]
    ) -> Future[CompiledGrammar]:
        """Compile and close; what cannot be closed in declared order is compiled as it was asked for."""
        device, kind, source = self._device, constraint.kind, constraint.source
        assert device is not None
        if self._closing is None:
            self._closing = ThreadPoolExecutor(1, "ramet-close")
        closing = self._closing
        ordered = {"mode": "declared_order"} if kind == "json_schema" else options
        compiled = service.submit(kind, source, vocabulary, **ordered)
        answer: Future[CompiledGrammar] = Future()

        def settle(found: Future[CompiledGrammar]) -> None:
            if found.cancelled() or not answer.set_running_or_notify_cancel():
                return
            error = found.exception()
            if error is None:
                answer.set_result(found.result())
            else:
                answer.set_exception(error)

        def close(found: Future[CompiledGrammar]) -> None:
            if answer.cancelled():
                return
            if found.exception() is None and not device.close(found.result()) and ordered != options:
                service.submit(kind, source, vocabulary, **options).add_done_callback(settle)
            else:
                settle(found)

        def close_later(found: Future[CompiledGrammar]) -> None:
            if found.cancelled():
                return
            try:
                closing.submit(close, found)
            except RuntimeError:  # the cache was closed
                settle(found)

        answer.add_done_callback(lambda done: compiled.cancel() if done.cancelled() else None)
        compiled.add_done_callback(close_later)
        return answer

    def _tool_set(self, source: str) -> str:
        """The tool set in the format of the model's chat template, where it names none."""
        found = json.loads(source)
        if not isinstance(found, dict) or "format" in found:
            return source
        style = self._tool_style()
        parallel = found.get("parallel", True) if style.max_calls is None else style.max_calls
        return json.dumps({**found, "format": style.format_source, "parallel": parallel}, ensure_ascii=False)

    def _vocabulary_with_marks(self) -> Vocabulary:
        """The vocabulary in which special tokens that write parts of calls can be written."""
        from ramet.grammar.tools.tool_set import with_marker_tokens
        from ramet.runtime.text.tool_style import shown_specials

        assert self._vocabulary is not None
        if self._marked is None:
            shown = shown_specials(self._tool_style(), self._tokenizer.special_tokens)
            self._marked = with_marker_tokens(self._vocabulary, shown) if shown else self._vocabulary
        return self._marked

    def _tool_style(self) -> ToolStyle:
        if self._style is None:
            from ramet.runtime.text.tool_style import tool_style

            self._style = tool_style(self._tokenizer.chat_template)
        return self._style

    def close(self) -> None:
        """Give up what is being compiled, and end the service's threads."""
        with self._lock:
            if self._closing is not None:
                self._closing.shutdown(wait=False, cancel_futures=True)
            if self._service is not None:
                self._service.close()
