"""`@tool`: a Python function that a model may call.

Its signature gives the schema of the arguments. Its docstring gives the description for the model.

Not here: the loop in which a model calls tools (tool_loop.py), threads and time limits (tool_runner.py).
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from ramet.errors import InvalidRequest, InvalidSchema
from ramet.grammar.service.python_types import map_schemas, schema_of

_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
_SECTION = re.compile(r"^(args|arguments|parameters)\s*:\s*$", re.IGNORECASE)
_NEXT_SECTION = re.compile(r"^\w[\w ]*:\s*$")
_ARGUMENT = re.compile(r"^\s*(?::param\s+)?\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)$")


@dataclass(frozen=True, slots=True)
class Tool:
    """A function with its description for the model. It is called like the function itself.

    `parameters`: JSON schema of the arguments. `timeout_s`: the limit of one call; the program's deadline holds, too.
    `takes_json`: the function takes the arguments as they are, not as the types of its signature.
    """

    function: Callable[..., Any]
    name: str
    description: str
    parameters: Mapping[str, Any]
    timeout_s: float | None = None
    takes_json: bool = False

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InvalidRequest(
                f"a tool's name is {self.name!r}, but must match {_NAME.pattern}; give name=", param="name"
            )

    @property
    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(self.function)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def read(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Convert a call's JSON arguments to the types of the signature. Raises InvalidRequest."""
        if self.takes_json:
            return dict(arguments)
        from pydantic import TypeAdapter, ValidationError

        adapter: TypeAdapter[Any] = TypeAdapter(_arguments_type(self.function, self.name))
        try:
            found: dict[str, Any] = adapter.validate_json(json.dumps(arguments))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "its arguments"
            raise InvalidRequest(f"tool {self.name!r} was called with a bad {where}: {first['msg']}", where) from error
        return found

    def declaration(self) -> dict[str, Any]:
        """Return the tool in the form of OpenAI's API and of chat templates."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@overload
def tool(function: Callable[..., Any]) -> Tool: ...
@overload
def tool(
    function: None = None, *, name: str | None = None, description: str | None = None, timeout_s: float | None = None
) -> Callable[[Callable[..., Any]], Tool]: ...
def tool(
    function: Callable[..., Any] | None = None,
    *,
    name: str | None = None,
    description: str | None = None,
    timeout_s: float | None = None,
) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """Make a function a tool: `@tool`, or `@tool(timeout_s=5)`.

    Every parameter needs a type that `gen` accepts. The model may leave out parameters with a default. The first
    paragraph of the docstring describes the tool; lines `name: text` under `Args:` (or `:param name: text`) describe
    parameters. `async def` works. Raises InvalidRequest for a signature that has no schema.
    """
    if function is None:
        return lambda wrapped: _tool(wrapped, name, description, timeout_s)
    return _tool(function, name, description, timeout_s)


def as_tools(given: Sequence[Tool | Callable[..., Any]]) -> tuple[Tool, ...]:
    """Return the given tools, with functions made tools. Raises InvalidRequest for two with the same name."""
    found: dict[str, Tool] = {}
    for one in given:
        made = one if isinstance(one, Tool) else _tool(one, None, None, None)
        if made.name in found:
            raise InvalidRequest(f"two tools have the name {made.name!r}; give one of them another", param="tools")
        found[made.name] = made
    if not found:
        raise InvalidRequest("the list of tools is empty; give at least one", param="tools")
    return tuple(found.values())


def tools_by_name(
    given: Mapping[str, Callable[..., Any]] | Sequence[Tool | Callable[..., Any]] | None,
) -> dict[str, Callable[..., Any]]:
    """Return functions by the names in tool calls: a mapping, or a list's tools by name. Raises InvalidRequest."""
    if isinstance(given, Mapping) and all(callable(one) for one in given.values()):
        return dict(given)
    if isinstance(given, list | tuple) and all(callable(one) for one in given):
        return {one.name: one for one in as_tools(given)}
    if given is None:
        return {}
    raise InvalidRequest(f"tools is {given!r}, but must be a list of tools, or functions by name", param="tools")


def declared(tools: Sequence[Tool]) -> str:
    """Return the JSON of a Tools node."""
    return json.dumps([one.declaration() for one in tools], ensure_ascii=False, separators=(",", ":"))


def to_json(value: object, name: str) -> Any:  # Any: JSON
    """Return a value as JSON, as pydantic writes dataclasses, models, dates and so on.

    `name`: of the tool or the variable that has it. Raises InvalidRequest.
    """
    if value is None or isinstance(value, str | int | float | bool):
        return value
    from pydantic_core import PydanticSerializationError, to_jsonable_python

    try:
        return to_jsonable_python(value)
    except PydanticSerializationError as error:
        raise InvalidRequest(f"the value of {name!r} is {value!r}, which has no JSON form: {error}") from error


def _tool(function: Callable[..., Any], name: str | None, description: str | None, timeout_s: float | None) -> Tool:
    if not callable(function):
        raise InvalidRequest(f"a tool must be a function, not {function!r}", param="tools")
    name = name or str(getattr(function, "__name__", ""))
    if timeout_s is not None and not timeout_s > 0:
        raise InvalidRequest(f"timeout_s of tool {name!r} is {timeout_s!r}, but must be above 0", param="timeout_s")
    told = inspect.getdoc(function) or ""
    try:
        schema = schema_of(_arguments_type(function, name))
    except InvalidSchema as error:
        raise InvalidRequest(f"tool {name!r}: {error}", param="tools") from error
    schema = map_schemas(schema, _without_title)
    schema.pop("description", None)
    for argument, text in _argument_texts(told).items():
        if argument in schema.get("properties", {}):
            shown = schema["properties"][argument]
            # only newer JSON schema drafts read keywords beside a reference
            if isinstance(shown, dict) and "$ref" not in shown:
                schema["properties"][argument] = {**shown, "description": text}
    return Tool(function, name, description or _summary(told), schema, timeout_s)


@functools.lru_cache(maxsize=1024)
def _arguments_type(function: Callable[..., Any], name: str) -> Any:  # Any: a TypedDict
    import typing_extensions
    from pydantic import with_config

    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError) as error:
        raise InvalidRequest(f"the types of tool {name!r} can't be read: {error}", param="tools") from error
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise InvalidRequest(f"tool {name!r} takes {parameter}, which no model can give by name", param="tools")
        if parameter.name not in hints:
            raise InvalidRequest(f"parameter {parameter.name!r} of tool {name!r} needs a type", param="tools")
        kind = hints[parameter.name]
        marker = typing_extensions.Required if parameter.default is parameter.empty else typing_extensions.NotRequired
        fields[parameter.name] = marker[kind]
    arguments: Any = typing_extensions.TypedDict("Arguments", fields)  # type: ignore[misc]
    return with_config(extra="forbid")(arguments)


def _summary(told: str) -> str:
    """Return the docstring up to the description of its parameters, as one line."""
    kept: list[str] = []
    for line in told.splitlines():
        if _SECTION.match(line) or line.lstrip().startswith(":param"):
            break
        if _NEXT_SECTION.match(line):
            break
        kept.append(line.strip())
    return " ".join(" ".join(kept).split())


def _argument_texts(told: str) -> dict[str, str]:
    found: dict[str, str] = {}
    is_inside, current = False, ""
    for line in told.splitlines():
        is_param = line.lstrip().startswith(":param")
        if _SECTION.match(line):
            is_inside, current = True, ""
        elif is_inside and line and not line[0].isspace():
            is_inside = False
        match = _ARGUMENT.match(line) if is_inside or is_param else None
        if match is not None:
            current = match[1]
            found[current] = match[2].strip()
        elif is_inside and current and line.strip():
            found[current] = f"{found[current]} {line.strip()}"
    return found


def _without_title(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema without its title, which only repeats a property's name and costs tokens."""
    return {key: value for key, value in schema.items() if key != "title"}
