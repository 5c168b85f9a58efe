"""A language model of DSPy on any of Ramet's backends: `dspy.configure(lm=as_dspy_lm(Engine("smollm2-135m")))`.

DSPy (3.4 or newer) keeps its own cache, retries and history. Each of its requests is one program here: the system's
text, the messages, and the assistant's answer, which a schema of DSPy's JSONAdapter constrains. What has no place in
such a program is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ramet.errors import ContextOverflow, InvalidRequest, NotSupported, Overloaded
from ramet.lang.backends.default import choose_backend
from ramet.lang.program.function import function
from ramet.lang.recording.primitives import gen
from ramet.lang.recording.state import State

if TYPE_CHECKING:
    import dspy

_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "stop", "seed", "frequency_penalty", "presence_penalty")
_ROLES = {"developer": "system", "user": "user", "assistant": "assistant"}
Request = Any  # of DSPy, which need not be installed
Response = Any


def as_dspy_lm(backend: object | None = None, *, model: str = "ramet", **options: Any) -> dspy.LM:
    """Return a language model for `dspy.configure`, or for one module.

    `backend`: an engine, a backend, or a server's address; None: the default one. `model`: its name in DSPy's history
    and cache: two models need two names. `options`: those of `dspy.LM`, such as `temperature` and `cache`. Needs
    `pip install dspy`.

    Raises:
        ConfigError: `backend` is none of these. A call raises DSPy's own errors: UnsupportedFeatureError for tools,
        images and settings that programs lack, ContextLengthError, RateLimitError, InvalidRequestError.
    """
    import dspy

    found = choose_backend(backend)

    def complete(request: Request) -> Response:
        with _errors_of_dspy():
            return _response(_answer.run(*_turns_and_values(request), backend=found, failures="keep"), model)

    async def acomplete(request: Request) -> Response:
        with _errors_of_dspy():
            return _response(await _answer.arun(*_turns_and_values(request), backend=found, failures="keep"), model)

    params = {*_SAMPLING, "response_format"}  # DSPy knows those of its own engines alone
    members = {"supported_params": params, "supports_response_schema": True}
    kind = type("RametLM", (dspy.LM,), members)
    engine, async_engine = SimpleNamespace(complete=complete), SimpleNamespace(complete=acomplete)
    return kind(model, engine=engine, async_engine=async_engine, **options)


@function
def _answer(s: State, turns: Sequence[tuple[str, str]], values: dict[str, Any]) -> None:
    for role, text in turns:
        getattr(s, role)(text)
    s.assistant(gen("answer", **values))


def _turns_and_values(request: Request) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Return the messages of a request as (role, text), and the arguments of `gen`. Raises NotSupported."""
    from dspy.lm15 import Config

    config, unset = request.config, Config()
    turns = [] if request.system is None else [("system", _text(request.system))]
    for message in request.messages:
        if message.role not in _ROLES:
            raise NotSupported(f"a message of DSPy's role {message.role!r} has no place in a program")
        turns.append((_ROLES[message.role], _text(message.parts)))
    if request.tools:
        raise NotSupported("tools of DSPy have no place in a program; let DSPy's adapters write them into the prompt")
    values = {name: getattr(config, name) for name in _SAMPLING if getattr(config, name) != getattr(unset, name)}
    if config.response_format is not None:
        values["json_schema"] = config.response_format.get("schema", {"type": "object"})
    left = (*_SAMPLING, "response_format", "cache", "user_id")  # the last two change no answer
    more = [name for name in Config.__dataclass_fields__ if name not in left]
    for name in more:
        if getattr(config, name) != getattr(unset, name):
            raise NotSupported(f"DSPy's setting {name} is {getattr(config, name)!r}, but programs have no such setting")
    return turns, values


def _text(parts: Any) -> str:  # Any: a text, or DSPy's parts
    if isinstance(parts, str):
        return parts
    other = next((part.type for part in parts if part.type != "text"), None)
    if other is not None:
        raise NotSupported(f"a part of kind {other!r} has no place in a program; only text has")
    return "".join(part.text for part in parts)


def _response(state: State, model: str) -> Response:
    from dspy.lm15 import Message, Response, Usage

    error = state.error()
    if error is not None:
        raise error.__cause__ or error
    meta = state.meta("answer")
    used = meta["usage"]
    usage = Usage(used.prompt_tokens, used.completion_tokens, cache_read_tokens=used.cached_tokens)
    reason = "length" if meta["finish_reason"] == "length" else "stop"
    return Response(None, model, Message.assistant(meta["text"]), reason, usage)


@contextmanager
def _errors_of_dspy() -> Iterator[None]:
    """Raise DSPy's errors, which its retries and adapters know, in place of Ramet's."""
    from dspy.lm15 import ContextLengthError, InvalidRequestError, RateLimitError, UnsupportedFeatureError

    try:
        yield
    except NotSupported as error:
        raise UnsupportedFeatureError(str(error)) from error
    except ContextOverflow as error:
        raise ContextLengthError(str(error)) from error
    except Overloaded as error:
        raise RateLimitError(str(error), retry_after=error.retry_after_s) from error
    except InvalidRequest as error:
        raise InvalidRequestError(str(error)) from error
