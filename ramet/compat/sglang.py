"""SGLang's frontend language on Ramet: write `from ramet.compat import sglang as sgl` for `import sglang as sgl`.

A program keeps SGLang's meaning: a value that is read (`s["x"]`) is text and is waited for, `join` makes lists of the
new variables, `copy` joins back, `choices` compares mean log-probabilities, `dtype` gives text. What Ramet does in
another way raises NotSupported, which names that way. A program written for `ramet` itself waits less: there a value
that is only put into text is no wait (docs/language.md).

Source: the interface is that of SGLang's `sglang.lang.api`; nothing here is taken from its code.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, overload

import ramet
from ramet.errors import ConfigError, InvalidRequest, NotSupported
from ramet.lang.backends.default import choose_backend
from ramet.lang.backends.in_process import EngineBackend
from ramet.lang.graph import ir
from ramet.lang.program.stream import Stream
from ramet.lang.recording.recorder import Appendable, Expr, Recorder
from ramet.lang.recording.state import Branches, State
from ramet.lang.running.values import plain

set_default_backend = ramet.set_default_backend

# Choice methods; each is the name of a scorer of `ramet.select`.
token_length_normalized = "token_normalized"
greedy_token_selection = "greedy"
unconditional_likelihood_normalized = "unconditional"
_METHODS = (token_length_normalized, greedy_token_selection, unconditional_likelihood_normalized)

_PATTERNS = {"int": r"[-+]?[0-9]+", "float": r"[-+]?[0-9]*\.?[0-9]+", "bool": "True|False", "str": r'"[\w\d\s]*"'}
_JOINS = {"gather_variable": "gather", "concate_and_append": "append"}
_SAMPLING = {
    "max_tokens": "max_tokens",
    "max_new_tokens": "max_tokens",
    "min_tokens": "min_tokens",
    "min_new_tokens": "min_tokens",
    **{name: name for name in ("stop", "stop_token_ids", "stop_regex", "temperature", "top_p", "top_k", "min_p")},
    **{name: name for name in ("frequency_penalty", "presence_penalty", "ignore_eos")},
}
_LOGPROBS = ("return_logprob", "logprob_start_len", "top_logprobs_num", "return_text_in_logprobs")
_OTHER_WAYS = {
    "image": "Ramet's models read text only",
    "video": "Ramet's models read text only",
    "Engine": "use ramet.Engine(model), whose generate(prompts, sampling) takes many prompts at once",
    "Anthropic": "use ramet.OpenAI(base_url, api_key, model) with an endpoint that has OpenAI's API",
    "LiteLLM": "use ramet.OpenAI(base_url, api_key, model) with LiteLLM's proxy",
    "Shortfin": "use ramet.OpenAI(base_url, api_key, model), if the server has OpenAI's API",
    "VertexAI": "use ramet.OpenAI(base_url, api_key, model) with Google's endpoint for OpenAI's API",
}


def __getattr__(name: str) -> Any:  # Any: it only raises
    if name in _OTHER_WAYS:
        raise NotSupported(f"sgl.{name} is not there: {_OTHER_WAYS[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Descriptions.


@dataclass(frozen=True, slots=True)
class Step(Expr):
    """A place of a program where something is done that `ramet` has no description for."""

    do: Callable[[Recorder], object]

    def record(self, recorder: Recorder) -> object:
        """Do it on this branch."""
        return self.do(recorder)


def gen(
    name: str | None = None,
    max_tokens: int | None = None,
    min_tokens: int | None = None,
    n: int | None = None,
    stop: str | Sequence[str] | None = None,
    stop_token_ids: Sequence[int] | None = None,
    stop_regex: str | Sequence[str] | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    frequency_penalty: float | None = None,
    presence_penalty: float | None = None,
    ignore_eos: bool | None = None,
    return_logprob: bool | None = None,
    logprob_start_len: int | None = None,
    top_logprobs_num: int | None = None,
    return_text_in_logprobs: bool | None = None,
    dtype: type | str | None = None,
    choices: Sequence[str] | None = None,
    choices_method: str | None = None,
    regex: str | None = None,
    json_schema: str | Mapping[str, Any] | None = None,
) -> Expr:
    """Generate text as variable `name`; with `choices`, select one of them.

    The value is text, also with `dtype` and `json_schema`. `n` above 1 writes several texts: the variable is their
    list, and the program goes on after the first. `max_tokens=0` with `return_logprob` adds no text:
    `get_meta_info(name)` has the likeliest next tokens.
    """
    if choices:
        return select(name, choices, temperature or 0.0, choices_method or token_length_normalized)
    given = {
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "stop": stop,
        "stop_token_ids": stop_token_ids,
        "stop_regex": stop_regex,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "frequency_penalty": frequency_penalty,
        "presence_penalty": presence_penalty,
        "ignore_eos": ignore_eos,
        "return_logprob": return_logprob,
        "logprob_start_len": logprob_start_len,
        "top_logprobs_num": top_logprobs_num,
        "return_text_in_logprobs": return_text_in_logprobs,
    }
    sampling = _sampling(given)
    if dtype is not None:
        kind = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", "")
        if kind not in _PATTERNS or regex is not None or json_schema is not None:
            raise InvalidRequest(
                f"dtype is {dtype!r}; it must be int, float, bool or str, and stand without regex and json_schema; "
                "ramet.gen(name, type) takes any type",
                param="dtype",
            )
        regex = _PATTERNS[kind]
    if max_tokens == 0:
        if not return_logprob or name is None:
            raise NotSupported("gen(max_tokens=0) writes nothing; it needs a name, and return_logprob=True")
        sampling["max_tokens"] = 1
    # Of type str, because SGLang's values are text; the constraint holds all the same.
    written = ramet.gen(name, str, regex=regex, json_schema=json_schema, **sampling)
    if max_tokens == 0:
        return Step(lambda recorder: _look(recorder, name or "", written))
    if n is None or n == 1:
        return written
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InvalidRequest(f"n is {n!r}, but must be an integer from 1", param="n")
    return Step(lambda recorder: _several(recorder, name, n, written))


def _look(recorder: Recorder, name: str, written: Expr) -> None:
    """Ask for the next token on a branch beside this one."""
    (aside,) = recorder.fork(1)
    written.record(aside)
    recorder.variables[name], recorder.variables[_next_token(name)] = "", aside.variables[name]


def _next_token(name: str) -> str:
    return f"{name} (next token)"


def _several(recorder: Recorder, name: str | None, n: int, written: Expr) -> None:
    branches = recorder.fork(n)
    for branch in branches:
        written.record(branch)
    recorder.adopt(branches[0])
    if name is not None:
        recorder.variables[name] = [branch.variables[name] for branch in branches]


def gen_int(name: str | None = None, max_tokens: int | None = None, n: int | None = None, **options: Any) -> Expr:
    """Generate the text of an integer."""
    return gen(name, max_tokens, None, n, dtype=int, **options)


def gen_string(name: str | None = None, max_tokens: int | None = None, n: int | None = None, **options: Any) -> Expr:
    """Generate a text in quotation marks."""
    return gen(name, max_tokens, None, n, dtype=str, **options)


def select(
    name: str | None = None,
    choices: Sequence[str] | None = None,
    temperature: float = 0.0,
    choices_method: str = token_length_normalized,
) -> Expr:
    """Select one of `choices`."""
    if choices_method not in _METHODS:
        raise NotSupported(
            f"choices_method is {choices_method!r}, but must be one of sgl.token_length_normalized, "
            "sgl.greedy_token_selection and sgl.unconditional_likelihood_normalized; a method of one's own can compare "
            's.get_meta_info(name)["input_token_logprobs"]'
        )
    return ramet.select(name, choices or (), scorer=choices_method, temperature=temperature)


def system(expr: Appendable | None = None) -> Expr:
    """Return a system message."""
    return ramet.system("" if expr is None else expr)


def user(expr: Appendable | None = None) -> Expr:
    """Return a user message."""
    return ramet.user("" if expr is None else expr)


def assistant(expr: Appendable | None = None) -> Expr:
    """Return an assistant message."""
    return ramet.assistant("" if expr is None else expr)


def system_begin() -> Expr:
    """Return the beginning of a system message."""
    return Step(lambda recorder: recorder.open_message("system"))


def system_end() -> Expr:
    """Return the end of a system message."""
    return Step(lambda recorder: _close(recorder, "system"))


def user_begin() -> Expr:
    """Return the beginning of a user message."""
    return Step(lambda recorder: recorder.open_message("user"))


def user_end() -> Expr:
    """Return the end of a user message."""
    return Step(lambda recorder: _close(recorder, "user"))


def assistant_begin() -> Expr:
    """Return the beginning of an assistant message."""
    return Step(lambda recorder: recorder.open_message("assistant"))


def assistant_end() -> Expr:
    """Return the end of an assistant message."""
    return Step(lambda recorder: _close(recorder, "assistant"))


def _close(recorder: Recorder, role: str) -> None:
    if recorder.role != role:
        raise InvalidRequest(f"{role}_end() stands where no {role} message is open; begin it with {role}_begin()")
    recorder.close_message()


def separate_reasoning(expr: Expr | None = None, model_type: str | None = None) -> Expr:
    """Append generations whose text begins with thinking, which ends with `</think>`.

    The variable `name` is then the text after it, and `name_reasoning_content` the thinking. Only the text after it
    stays in the program's text. With `ramet` itself, gen(..., thinking=True) does this without a wait, for models whose
    chat template has marks for thinking.
    """
    if expr is None:
        raise InvalidRequest("separate_reasoning needs a generation: separate_reasoning(sgl.gen(name))", param="expr")
    return Step(lambda recorder: _separate(recorder, expr))


def _separate(recorder: Recorder, expr: Expr) -> None:
    tip, before, variables = recorder.tip, dict(recorder.variables), recorder.variables
    expr.record(recorder)
    whole = recorder.run.text_of(recorder.tip, tip)
    for name in [name for name, value in variables.items() if before.get(name) is not value]:
        text = str(variables[name])
        thinking, mark, answer = text.partition("</think>")
        variables[name] = answer.lstrip() if mark else text
        variables[f"{name}_reasoning_content"] = thinking.strip().removeprefix("<think>").strip() if mark else ""
        whole = whole.replace(text, variables[name], 1)
    recorder.go_back(tip)
    recorder.append(whole)


def _sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return SGLang's sampling values under Ramet's names, without those that say nothing."""
    found = {_SAMPLING[name]: value for name, value in given.items() if name in _SAMPLING and value is not None}
    for name in ("stop", "stop_token_ids", "stop_regex"):
        if name in found and not found[name]:
            del found[name]
    if found.get("top_k") == -1:
        del found["top_k"]
    start = given.get("logprob_start_len")
    if start is not None and start != -1:
        raise NotSupported(
            f"logprob_start_len is {start!r}: a program has the log-probabilities of generated tokens alone; POST "
            "/generate of `ramet serve` has those of a prompt"
        )
    if given.get("return_logprob"):
        found["logprobs"] = given.get("top_logprobs_num") or 0
    return found


# Programs.


class ProgramState(State):
    """The state of a program: the user's interface to one branch. `events`: those of a streamed run."""

    __slots__ = ("_events",)

    def __init__(self, recorder: Recorder, events: _Events | None = None) -> None:
        super().__init__(recorder)
        self._events = events

    def __iadd__(self, other: Appendable) -> ProgramState:
        if other is None:
            raise ValueError("None was appended to a program's state")
        self.recorder.append(other)
        return self

    # Values are waited for.

    def __getitem__(self, name: str) -> Any:
        if self._events is not None and name not in self:
            self._events.wait()
        return plain(super().__getitem__(name), self.recorder.run)

    def get_var(self, name: str) -> Any:
        """Return the value of a variable. Waits for it."""
        return self[name]

    @property
    def ret_value(self) -> Any:
        """The result of the program's function."""
        if self._events is not None:
            self._events.wait()
        return self.result

    def sync(self) -> None:
        """Wait until everything appended so far is there."""
        if self._events is not None:
            self._events.wait()
        self.wait()

    def get_meta_info(self, name: str) -> dict[str, Any]:
        """Return the details of a variable in SGLang's form: token counts, finish reason, log-probabilities. Waits."""
        self[name]
        if _next_token(name) in self:
            name = _next_token(name)
        meta = self.meta(name)
        meta = meta["branches"][0] if "branches" in meta else meta
        usage = meta["usage"] or ir.Usage()
        found: dict[str, Any] = {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
            "finish_reason": {"type": meta["finish_reason"]},
        }
        if "scores" in meta:
            found["normalized_prompt_logprobs"] = meta["scores"]
            found["input_token_logprobs"] = [
                list(zip(*row, strict=True))
                for row in zip(meta["logprobs"], meta["token_ids"], meta["tokens"], strict=True)
            ]
        elif "logprobs" in meta:
            columns = (meta["logprobs"], meta["token_ids"], meta["tokens"])
            found["output_token_logprobs"] = list(zip(*columns, strict=True))
            found["output_top_logprobs"] = [
                [(one["logprob"], one["id"], one["token"]) for one in top] for top in meta.get("top_logprobs", ())
            ]
        return found

    # Branches.

    def fork(self, n: int = 1, position_ids_offset: Sequence[int] | None = None) -> ProgramStateGroup:
        """Split into `n` branches. `position_ids_offset` has no effect, as in SGLang: positions follow the text."""
        return ProgramStateGroup(self, [ProgramState(branch) for branch in self.recorder.fork(n)])

    @contextmanager
    def copy(self, position_ids_offset: Sequence[int] | None = None) -> Iterator[ProgramState]:  # type: ignore[override]
        """Split off one branch for a block, and join it at the block's end, so that its variables are lists here."""
        group = self.fork(1, position_ids_offset)
        try:
            yield group.states[0]
        finally:
            group.join()

    # Streams.

    def text_iter(self, var_name: str | None = None) -> Iterator[str]:
        """Yield the text of a variable, or all text of the program, as it is written."""
        if self._events is None:
            yield self.text() if var_name is None else str(self[var_name])
            return
        run = self.recorder.run
        aside: dict[int | None, bool] = {None: False}  # node -> whether it is on another branch
        for event in self._events:
            node = run.nodes[event.node]
            if event.kind != ("text" if isinstance(node, ir.Generate) else "done"):
                continue
            if var_name is not None:
                if event.name is not None and ir.variable(event.name) == var_name:
                    yield event.text or str(event.value)
                continue
            for one in run.path(node.id) if node.parent not in aside else [node]:
                aside[one.id] = isinstance(one, ir.Fork) or aside[one.parent]
            if event.text and not aside[node.id]:
                yield event.text
        error = self.error()
        if error is not None:
            raise error

    async def text_async_iter(self, var_name: str | None = None, return_meta_data: bool = False) -> AsyncIterator[str]:
        """`text_iter` for an event loop."""
        if return_meta_data:
            raise NotSupported("text_async_iter gives no details with each piece; astream() of a ramet.function does")
        pieces = self.text_iter(var_name)
        while True:
            piece = await asyncio.to_thread(next, pieces, None)
            if piece is None:
                return
            yield piece

    def __repr__(self) -> str:
        return f"ProgramState({self.text()})"


class ProgramStateGroup(Branches):
    """The branches of a fork."""

    __slots__ = ("_source", "states")

    def __init__(self, source: ProgramState, states: list[ProgramState]) -> None:
        super().__init__(source, list(states))
        self._source, self.states = source, states

    def join(self, mode: str = "gather_variable") -> None:
        """Make the branches' new variables lists in the state that was forked, or append their texts to it.

        `mode`: "gather_variable" or "concate_and_append".
        """
        if mode not in _JOINS:
            raise ValueError(f"join mode is {mode!r}, but must be one of {', '.join(_JOINS)}")
        variables = self._source.recorder.variables
        before = dict(variables)
        self._source.join(self.states, mode=_JOINS[mode])
        if mode == "concate_and_append":
            variables.clear()
        variables.update(before)  # SGLang gathers new variables only


class _Events:
    """The events of a streamed run, which several iterations may follow, one after the other or at once."""

    def __init__(self, stream: Stream) -> None:
        self._stream = iter(stream)
        self._seen: list[ir.NodeEvent] = []
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[ir.NodeEvent]:
        index = 0
        while self._has(index):
            yield self._seen[index]
            index += 1

    def _has(self, index: int) -> bool:
        with self._lock:
            if index == len(self._seen):
                self._seen.extend(event for event in [next(self._stream, None)] if event is not None)
            return index < len(self._seen)

    def wait(self) -> None:
        """Wait for the end of the program."""
        for _ in self:
            pass


class SglFunction:
    """A program."""

    def __init__(self, body: Callable[..., Any], bound: Mapping[str, Any] | None = None) -> None:
        functools.update_wrapper(self, body)
        self._body, self._bound = body, dict(bound or {})

        @functools.wraps(body)
        def ours(state: State, *args: Any, **kwargs: Any) -> Any:
            return body(ProgramState(state.recorder), *args, **kwargs)

        self._program = ramet.Function(ours, bound=self._bound)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program; given a state, run it as a part of that state's program."""
        return self._program(*args, **kwargs) if args and isinstance(args[0], State) else self.run(*args, **kwargs)

    def bind(self, **arguments: Any) -> SglFunction:
        """Return the same program with some arguments given."""
        self._program.bind(**arguments)  # raises for unknown ones
        return SglFunction(self._body, {**self._bound, **arguments})

    def run(self, *args: Any, stream: bool = False, backend: object | None = None, **kwargs: Any) -> ProgramState:
        """Run the program. `kwargs`: its arguments, and SGLang's sampling values, such as `max_new_tokens`.

        `stream`: return at once; `text_iter` of the state follows the text.
        """
        options = _options(kwargs, backend)
        if all(parameter.name != "failures" for parameter in self._program.parameters):
            options["failures"] = "keep"  # SGLang's programs leave them in the state
        if not stream:
            return ProgramState(self._program.run(*args, **options).recorder)
        found = self._program.stream(*args, **options)
        return ProgramState(found.state.recorder, _Events(found))

    def run_batch(
        self,
        batch_kwargs: Sequence[Mapping[str, Any] | Sequence[Any]],
        *,
        backend: object | None = None,
        num_threads: str | int = "auto",
        progress_bar: bool = False,
        generator_style: bool = False,
        **sampling: Any,
    ) -> Any:
        """Run the program for every row: a dict of arguments, or a list of them in order."""
        rows = [row if isinstance(row, Mapping) else tuple(row) for row in batch_kwargs]
        threads = None if num_threads == "auto" else num_threads
        states: Iterable[State] = self._program.run_batch(
            rows,
            num_threads=threads,
            progress_bar=progress_bar,
            generator_style=generator_style or None,
            **_options(sampling, backend),
        )
        found = (_without_error(state) for state in states)
        return found if generator_style else list(found)

    def cache(self, backend: object | None = None) -> None:
        """Compute the text that all runs of the program begin with, so that it is in the cache."""
        nodes = self._program.trace(**({} if backend is None else {"backend": backend})).graph.nodes

        @ramet.function
        def prefix(s: State) -> None:
            for node in nodes:
                if isinstance(node, ir.Role):
                    s.recorder.open_message(node.role) if node.is_open else s.recorder.close_message()
                elif isinstance(node, ir.Text):
                    for part in node.parts:
                        if not isinstance(part, str):
                            break
                        s += part
                    if not all(isinstance(part, str) for part in node.parts):
                        break
                elif not isinstance(node, ir.Argument):
                    break
            if s.recorder.tip is not None:
                s += ramet.gen(max_tokens=1, temperature=0.0)

        prefix.run(backend=backend)

    pin = cache  # the cache keeps what is used, and drops what will not be used first; nothing is pinned in it

    def trace(self, **kwargs: Any) -> Any:
        raise NotSupported("ramet.function(body).trace() returns the graph of a program, and explain() its costs")

    def compile(self, **kwargs: Any) -> Any:
        raise NotSupported("ramet.function(body).compile() returns a program that runs without its function")

    def __repr__(self) -> str:
        return repr(self._program)


def _options(given: Mapping[str, Any], backend: object | None) -> dict[str, Any]:
    """Return a run's arguments, with its options in Ramet's form."""
    own = {name: value for name, value in given.items() if name not in _SAMPLING and name not in _LOGPROBS}
    found = {**own, **_sampling({name: value for name, value in given.items() if name not in own})}
    return found if backend is None else {**found, "backend": backend}


def _without_error(state: State) -> ProgramState:
    """Return the state of a row. An exception of the program's function is raised, as in SGLang."""
    state.recorder.run.check_function()
    return ProgramState(state.recorder)


@overload
def function(func: Callable[..., Any]) -> SglFunction: ...
@overload
def function(
    func: None = None, num_api_spec_tokens: int | None = None
) -> Callable[[Callable[..., Any]], SglFunction]: ...
def function(
    func: Callable[..., Any] | None = None, num_api_spec_tokens: int | None = None
) -> SglFunction | Callable[[Callable[..., Any]], SglFunction]:
    """Make a function a program. `num_api_spec_tokens` is not needed: text that comes back is not asked for again."""
    return SglFunction if func is None else SglFunction(func)


# Backends.


class RuntimeEndpoint(ramet.Remote):
    """A Ramet server (`ramet serve`)."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        verify: bool | None = None,
        chat_template_name: str | None = None,
    ) -> None:
        if chat_template_name is not None:
            raise NotSupported(
                f"chat_template_name is {chat_template_name!r}: a server uses the chat template of the model's files; "
                "serve a folder with another one"
            )
        if verify is not None and not isinstance(verify, bool):
            raise NotSupported(f"verify is {verify!r}, but must be True or False")
        super().__init__(base_url, api_key=api_key, verify=verify is not False)
        self.base_url = base_url

    def get_model_name(self) -> str:
        """Return the name or path of the server's model."""
        return str(self.http.wait(self.http.request("GET", "/get_model_info"))["model_path"])

    def get_server_info(self) -> Any:  # Any: JSON
        """Return the server's configuration and counters."""
        return self.http.wait(self.http.request("GET", "/get_server_info"))

    def flush_cache(self, empty_cache: bool = True) -> None:
        """Drop cached prefixes that are not in use."""
        self.http.wait(self.http.request("POST", "/flush_cache", {}))


class Runtime(EngineBackend):
    """An engine in this process. `options`: fields of ramet.EngineConfig; `tp_size` is `tp`."""

    engine: ramet.Engine

    def __init__(self, model_path: str | None = None, log_level: str = "error", **options: Any) -> None:
        if "tp_size" in options:
            options["tp"] = options.pop("tp_size")
        super().__init__(ramet.Engine(model_path, **options))

    @property
    def endpoint(self) -> Runtime:
        """The backend of programs: this engine."""
        return self

    def flush_cache(self, empty_cache: bool = True) -> None:
        """Drop cached prefixes that are not in use."""
        self.engine.flush_cache()

    def shutdown(self) -> None:
        """Stop the engine, and free its memory."""
        self.engine.shutdown()


def OpenAI(model_name: str, is_chat_model: bool | None = None, **options: Any) -> ramet.OpenAI:
    """Return the backend of an endpoint with OpenAI's API. Programs with messages use its chat API."""
    return ramet.OpenAI(model=model_name, **options)


def flush_cache(backend: object | None = None, empty_cache: bool = True) -> None:
    """Drop the prefixes that a backend has cached and does not use."""
    found = choose_backend(backend)
    if not isinstance(found, RuntimeEndpoint | Runtime):
        raise ConfigError(f"{found!r} is no RuntimeEndpoint or Runtime; ramet.Engine has flush_cache()")
    found.flush_cache(empty_cache)


def get_server_info(backend: object | None = None) -> Any:  # Any: JSON
    """Return a server's configuration and counters."""
    found = choose_backend(backend)
    if not isinstance(found, RuntimeEndpoint):
        raise ConfigError(f"{found!r} is no RuntimeEndpoint; ramet.Engine has stats()")
    return found.get_server_info()
