"""Make command-line flags of configuration dataclasses: one flag a field, with its metadata's `help` as help text.

The flag of `max_body_bytes` is `--max-body-bytes`. Where SGLang has another name for the same thing, that name works
too. Only flags that were given are returned, so that the defaults stand in the dataclass alone.
"""

from __future__ import annotations

import argparse
import types
from collections.abc import Mapping
from dataclasses import Field, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

# SGLang's names, where the meaning is the same and the field's own name differs.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "dp": ("--dp-size", "--data-parallel-size", "--decode-replicas"),
    "json_whitespace": ("--constrained-json-whitespace-pattern",),
    "num_kv_tokens": ("--max-total-tokens",),
    "seed": ("--random-seed",),
    "tp": ("--tp-size", "--tensor-parallel-size"),
}
OFF_ALIASES: Mapping[str, tuple[str, ...]] = {
    "cuda_graph": ("--disable-cuda-graph",),
    "overlap": ("--disable-overlap-schedule",),
    "radix_cache": ("--disable-radix-cache",),
}


def add_flags(parser: argparse.ArgumentParser, config: type, title: str) -> None:
    """Add a group with one flag for each field of a dataclass."""
    group = parser.add_argument_group(title)
    hints = get_type_hints(config)
    for field in fields(config):
        _add_flag(group, field, hints[field.name])


def given_values(arguments: argparse.Namespace, config: type) -> dict[str, Any]:  # Any: the fields' own types
    """Return the fields that the command line gave, and leave out the others."""
    found = {}
    for field in fields(config):
        value = getattr(arguments, field.name, None)
        if value is not None:
            found[field.name] = tuple(value) if isinstance(value, list) else value
    return found


def _add_flag(group: argparse._ArgumentGroup, field: Field[Any], hint: Any) -> None:  # Any: a type expression
    name = "--" + field.name.replace("_", "-")
    kind, is_repeatable, choices = _shape(hint)
    text = _help(field, is_repeatable)
    names = (name, *ALIASES.get(field.name, ()))
    if kind is bool:
        off = ("--no-" + name.removeprefix("--"), *OFF_ALIASES.get(field.name, ()))
        if field.default is True:
            group.add_argument(*off, dest=field.name, action="store_false", default=None, help=f"do not {text}")
            group.add_argument(*names, dest=field.name, action="store_true", default=None, help=argparse.SUPPRESS)
        else:
            group.add_argument(*names, dest=field.name, action="store_true", default=None, help=text)
    elif is_repeatable:
        metavar = field.name.rsplit("_", 1)[-1].upper()
        group.add_argument(*names, dest=field.name, type=kind, action="append", metavar=metavar, help=text)
    else:
        value = None if choices else _METAVARS.get(kind, field.name.rsplit("_", 1)[-1].upper())
        group.add_argument(*names, dest=field.name, type=kind, choices=choices, metavar=value, help=text)


_METAVARS = {int: "N", float: "X"}


def _shape(hint: Any) -> tuple[type, bool, tuple[str, ...] | None]:  # Any: a type expression
    """Return a field's element type, whether it is a tuple, and its choices."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        (hint,) = (part for part in get_args(hint) if part is not type(None))
        return _shape(hint)
    if origin is tuple:
        return get_args(hint)[0], True, None
    if origin is Literal:
        return str, False, get_args(hint)
    if hint not in (str, int, float, bool):
        raise TypeError(f"no flag can be made of a field of type {hint!r}")
    return hint, False, None


def _help(field: Field[Any], is_repeatable: bool) -> str:
    text = str(field.metadata["help"]).replace("%", "%%").replace("None: ", "default: ")
    if is_repeatable:
        text += "; may be repeated"
    elif field.default is not None and not isinstance(field.default, bool):
        text += f" [{field.default}]"
    return text
