"""Find the programs of a Python file and read their arguments: for `ramet run`, `explain` and `mcp`."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import re
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ramet.errors import InvalidRequest, RametError

if TYPE_CHECKING:
    from ramet.lang.program.function import Function


def add_program(parser: argparse.ArgumentParser) -> None:
    """Declare the file, the program and its arguments."""
    parser.add_argument(
        "file", metavar="FILE[:PROGRAM]", help="a Python file, and which of its programs, where it has several"
    )
    parser.add_argument(
        "values",
        nargs="*",
        metavar="NAME=VALUE",
        help="arguments: texts, or JSON where the parameter is no text; default: the file's EXAMPLE, if any",
    )
    parser.add_argument("--arguments", help="all arguments as a JSON object")
    parser.set_defaults(further="values")


def load_program(arguments: argparse.Namespace) -> tuple[dict[str, Any], Function]:  # Any: whatever the file defines
    """Return the names of the file and the program that is meant. Raises InvalidRequest."""
    path, wanted = split_name(arguments.file)
    names = load_file(Path(path))
    return names, choose_program(names, wanted, path)


def split_name(file: str) -> tuple[str, str]:
    """Return the path and the program's name of `FILE[:PROGRAM]`."""
    path, _, wanted = file.rpartition(":")
    if not path or not wanted.isidentifier():  # the colon of a drive's letter, or none
        return file, ""
    return path, wanted


def load_file(file: Path) -> dict[str, Any]:  # Any: whatever the file defines
    """Execute a file as a module and return its names. Raises InvalidRequest saying which of its lines failed."""
    if not file.is_file():
        raise InvalidRequest(f"{file} is no file", param="file")
    spec = importlib.util.spec_from_file_location(f"ramet_file_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise InvalidRequest(f"{file} is no Python file", param="file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the names in annotations
    sys.path.insert(0, str(file.resolve().parent))  # as `python FILE` does
    try:
        spec.loader.exec_module(module)
    except RametError:
        raise
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = f"{file}:{line}" if line else str(file)
        raise InvalidRequest(f"{where} can't be loaded: {type(error).__name__}: {error}", param="file") from error
    return vars(module)


def choose_program(names: dict[str, Any], wanted: str, file: str) -> Function:
    """Return the program `wanted`; if that is empty, the file's only one, or the one whose parameters match EXAMPLE."""
    from ramet.lang.program.function import Function

    found = {name: value for name, value in names.items() if isinstance(value, Function)}
    if wanted:
        if wanted not in found:
            raise InvalidRequest(
                f"{file} has no program {wanted!r}; it has {', '.join(found) or 'none'}", param="program"
            )
        return found[wanted]
    if isinstance(names.get("EXAMPLE"), dict):
        fitting = [f for f in found.values() if {p.name for p in f.parameters} == set(names["EXAMPLE"])]
        if len(fitting) == 1:
            return fitting[0]
    if len(found) != 1:
        have = f"{len(found)} programs ({', '.join(found)}); choose one: {file}:{next(iter(found), '')}"
        raise InvalidRequest(
            f"{file} has {have if found else 'no program; mark a function with @function'}", param="program"
        )
    return next(iter(found.values()))


def given_arguments(
    names: dict[str, Any], program: Function, arguments: argparse.Namespace
) -> dict[str, Any]:  # Any: arguments of the program
    """Return the arguments of the command line; if there are none, the file's EXAMPLE where it fits the program."""
    if not arguments.arguments and not arguments.values:
        return _example(names, program)
    found = from_json(arguments.arguments, "--arguments") if arguments.arguments else {}
    if not isinstance(found, dict):
        raise InvalidRequest(f"--arguments is {arguments.arguments}, but must be a JSON object", param="arguments")
    parameters = {p.name: p for p in program.parameters}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in program.parameters)
    for text in arguments.values:
        name, is_pair, value = text.partition("=")
        if not is_pair:
            raise InvalidRequest(f"{text!r} is no NAME=VALUE", param="arg")
        found[name] = _read(value, parameters.get(name))
    for name in found:
        if name not in parameters and not takes_any:
            have = ", ".join(parameters) or "none"
            raise InvalidRequest(f"{program.name} has no parameter {name!r}; it has {have}", param="arg")
    types = inspect.signature(program.body, eval_str=True).parameters
    return {name: _checked(name, value, types.get(name)) for name, value in found.items()}


def check_complete(program: Function, given: dict[str, Any]) -> None:
    """Raise InvalidRequest that names the missing arguments."""
    missing = [
        p.name
        for p in program.parameters
        if p.name not in given and p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    if missing:
        way = " ".join(f"{name}=..." for name in missing)
        raise InvalidRequest(f"{program.name} needs {', '.join(missing)}: {way}", param="arg")


def from_json(text: str, flag: str) -> Any:  # Any: JSON
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; NAME=VALUE stands alone, without a flag" if re.match(r"\w+=", text) else ""
        raise InvalidRequest(f"{flag} is {text!r}, which is not JSON: {error}{hint}", param=flag.lstrip("-")) from error


def _read(text: str, parameter: inspect.Parameter | None) -> Any:  # Any: JSON, or the text
    if parameter is not None and parameter.annotation in (str, "str"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _checked(name: str, value: Any, parameter: inspect.Parameter | None) -> Any:  # Any: JSON, and any type
    """Return the value as its parameter's type, if pydantic knows that type. Raises InvalidRequest."""
    from pydantic import PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError

    if parameter is None or parameter.annotation is parameter.empty:
        return value
    try:
        return TypeAdapter(parameter.annotation).validate_python(value)
    except (PydanticSchemaGenerationError, PydanticUserError):
        return value
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = "".join(f"[{part!r}]" for part in problem["loc"])
        raise InvalidRequest(f"{name}{where} is {problem['input']!r:.200}: {problem['msg']}", param="arg") from error


def _example(names: dict[str, Any], program: Function) -> dict[str, Any]:
    example = names.get("EXAMPLE")
    fits = isinstance(example, dict) and {p.name for p in program.parameters} >= set(example)
    return dict(example) if fits and isinstance(example, dict) else {}
