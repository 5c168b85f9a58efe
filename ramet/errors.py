"""Every error that Ramet raises on purpose.

    RametError
    ├── InvalidRequest (ValueError)        a request's own fields are wrong
    │   └── ContextOverflow                prompt + output do not fit the context
    ├── GrammarError (ValueError)          a constraint cannot be compiled
    │   ├── InvalidSchema                  not a valid JSON schema; has `.pointer`
    │   ├── UnsupportedSchema              valid, but a keyword cannot be enforced; has `.problems`
    │   ├── InvalidRegex                   a pattern that does not parse or is not regular
    │   ├── InvalidGrammar                 a Lark grammar that does not parse
    │   └── GrammarTooLarge                a limit on time, states or memory was passed
    ├── ModelError                         model files or weights
    │   ├── ModelNotFound (LookupError)    no such model, directory or hub id
    │   ├── DownloadFailed (OSError)       offline, broken, or wrong checksum
    │   ├── BrokenModelFile (ValueError)   GGUF, safetensors or config that cannot be read
    │   └── UnsupportedArchitecture (ValueError)
    ├── ConfigError (ValueError)           a configuration value or an unknown key
    ├── ProgramError                       a program's run failed; has `.node`, `.source_line`, `.prompt_tail`
    │   ├── UndefinedVariable (KeyError)   reading a name that no node produces
    │   ├── InvalidProgram (ValueError)    a graph that cannot be run (cycle, fork(0), ...)
    │   ├── CheckFailed                    a generated value failed its `where` checks too often; has `.attempts`
    │   ├── ProgramCancelled
    │   └── DeadlineExceeded (TimeoutError)
    ├── NotSupported (NotImplementedError) what this backend can't do; the message says what can
    ├── RemoteError (ConnectionError)      a server that can't be reached or whose answer can't be used; has `.status`
    ├── Overloaded                         the queue is full; has `.retry_after_s`
    ├── RequestCancelled                   aborted by its owner
    ├── EngineStopped                      the engine was shut down or crashed; what was in flight gets this
    ├── OutOfMemory (MemoryError)          weights or KV pool do not fit; names the knob and a value
    └── CacheIntegrityError (AssertionError)   page accounting broken: a bug in Ramet

A message names the thing, its value, the limit, and the way out.
"""

from __future__ import annotations

# What an installation without an engine lacks: module names by the extra that brings them.
EXTRAS = {
    "cpu": ("gguf", "numba", "safetensors", "torch"),
    "server": ("httptools", "prometheus_client", "starlette", "uvicorn", "uvloop", "zmq", "zstandard"),
    "gpu": ("triton",),
    "mcp": ("mcp",),
}


class RametError(Exception):
    """Base of every error raised on purpose by Ramet."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else self.__class__.__name__


class InvalidRequest(RametError, ValueError):
    """A request's own fields are wrong, or what it brings (KV pages of another model); `param` names the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextOverflow(InvalidRequest):
    """Prompt and output together do not fit the context."""


class GrammarError(RametError, ValueError):
    """A constraint cannot be compiled."""


class InvalidSchema(GrammarError):
    """Not a valid JSON schema; `pointer` is the JSON pointer of the offending part."""

    def __init__(self, message: str, pointer: str = "") -> None:
        super().__init__(message)
        self.pointer = pointer


class UnsupportedSchema(GrammarError):
    """A valid schema that cannot be enforced; `problems` lists every (pointer, keyword, reason)."""

    def __init__(self, problems: list[tuple[str, str, str]]) -> None:
        lines = "; ".join(f"{pointer or '/'}: {keyword}: {reason}" for pointer, keyword, reason in problems)
        super().__init__(f"the schema cannot be enforced exactly: {lines}")
        self.problems = problems


class InvalidRegex(GrammarError):
    """A pattern that does not parse or does not describe a regular language."""


class InvalidGrammar(GrammarError):
    """A Lark grammar that does not parse."""


class GrammarTooLarge(GrammarError):
    """A limit on compile time, states or memory was passed; the message names the part that exploded.

    `pointer`, where it is known, is the JSON pointer of the schema that did.
    """

    pointer: str | None = None


class ModelError(RametError):
    """Model files or weights."""


class ModelNotFound(ModelError, LookupError):
    """No such model name, directory or hub id."""


class DownloadFailed(ModelError, OSError):
    """A download was refused, broken, or does not match its checksum."""


class BrokenModelFile(ModelError, ValueError):
    """A model file that cannot be read."""


class UnsupportedArchitecture(ModelError, ValueError):
    """An architecture that the decoder does not implement; the message lists those it does."""


class ConfigError(RametError, ValueError):
    """A configuration value is out of range, or a key is unknown."""


class ProgramError(RametError):
    """A program's run failed.

    `program`, `node` and `source_line` say where; `prompt_tail` is the end of the text that the node continued; the
    cause is chained.
    """

    def __init__(
        self,
        message: str,
        *,
        program: str | None = None,
        node: int | None = None,
        source_line: str | None = None,
        prompt_tail: str | None = None,
    ) -> None:
        super().__init__(message)
        self.program = program
        self.node = node
        self.source_line = source_line
        self.prompt_tail = prompt_tail


class UndefinedVariable(ProgramError, KeyError):
    """A name was read that no node produces."""


class InvalidProgram(ProgramError, ValueError):
    """A graph that cannot be run."""


class CheckFailed(ProgramError):
    """A generated value failed its `where` checks as often as it was tried.

    `attempts`: one for each try, a dict of its `text` and the `problem` with it.
    """

    attempts: tuple[dict[str, str], ...] = ()


class ProgramCancelled(ProgramError):
    """The program, or the branch that was waited for, was cancelled."""


class DeadlineExceeded(ProgramError, TimeoutError):
    """The program's deadline passed."""


class NotSupported(RametError, NotImplementedError):
    """A backend can't do this; the message says what can."""


class RemoteError(RametError, ConnectionError):
    """A server can't be reached, or its answer can't be used; `status` is HTTP's, where there was an answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Overloaded(RametError):
    """The queue is full."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RequestCancelled(RametError):
    """The request was aborted by its owner."""


class EngineStopped(RametError):
    """The engine was shut down or crashed while this was in flight."""


class OutOfMemory(RametError, MemoryError):
    """Weights, KV pool or workspace do not fit; the message names the knob and a value that would fit."""


class CacheIntegrityError(RametError, AssertionError):
    """Page accounting is broken: a bug in Ramet, reported instead of hidden."""


def explained(error: ModuleNotFoundError) -> ModuleNotFoundError:
    """Return the error of an import with the command that installs what is missing, if one of our extras brings it."""
    missing = (error.name or "").partition(".")[0]
    for extra, packages in EXTRAS.items():
        if missing in packages:
            return ModuleNotFoundError(
                f"{missing} is not installed, which this needs: pip install 'ramet[{extra}]'", name=missing
            )
    return error


def from_name(name: str, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> RametError:
    """An error that came from elsewhere by the name of its class; RametError itself where the class isn't ours."""
    kind = globals().get(name)
    if not (isinstance(kind, type) and issubclass(kind, RametError)):
        return RametError(f"{name}: {message}")
    if issubclass(kind, Overloaded):
        return kind(message, retry_after_s or 1.0)
    if issubclass(kind, InvalidRequest):
        return kind(message, param)
    if issubclass(kind, UnsupportedSchema):
        found = kind([])
        found.args = (message,)
        return found
    return kind(message)
