"""Limits on what a model's chat template may do: steps, time, and the size of what it makes.

Jinja's sandbox keeps a template from Python's objects, but not from loops in loops, from macros that call themselves
twice, or from a text of a billion letters. Every iteration, call, operator and filter of a bounded template counts as a
step, and is looked at before it makes something large.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import pass_context

MAX_STEPS = 1_000_000
MAX_SECONDS = 5.0
MAX_SIZE = 64 << 20  # characters of a text
MAX_ITEMS = 4 << 20  # of a list
MAX_BITS = 8192  # of a number
MAX_WIDTH = 10_000  # of numbers that filters and methods pad a text to, or that a format names
MAX_SOURCE = 1 << 18  # characters of a template
_BUDGET = "_ramet_budget"  # no name of a template begins with an underscore in practice; one that did would lose it
_STEP, _SIZED, _FORMAT = "_ramet_step", "_ramet_sized", "_ramet_format"
_FIELD = re.compile(r"%[-+ #0]*[\d*]*\.?[\d*]*|\{[^{}:]*:[^}]*")
_NUMBER = re.compile(r"\d{1,18}")
_LONG_CHECK = 256  # steps between two looks at the clock


class TemplateTooCostly(jinja2.TemplateError):
    """A template passed one of the limits."""


class Budget:
    """The steps and the time of one rendering. Used by one thread."""

    __slots__ = ("_end_s", "_num_left")

    def __init__(self) -> None:
        self._num_left = MAX_STEPS
        self._end_s = time.monotonic() + MAX_SECONDS

    def step(self) -> None:
        """Count a step. Raises TemplateTooCostly."""
        self._num_left -= 1
        if self._num_left < 0:
            raise TemplateTooCostly(f"it takes more than {MAX_STEPS:,} steps")
        if not self._num_left % _LONG_CHECK and time.monotonic() > self._end_s:
            raise TemplateTooCostly(f"it takes more than {MAX_SECONDS:.0f} s")


def render_bounded(template: jinja2.Template, values: Mapping[str, Any]) -> str:  # Any: what a template gets
    """Return the text of a template of a `BoundedEnvironment`. Raises TemplateTooCostly, and what the template does."""
    pieces, size = [], 0
    for piece in template.generate({**values, _BUDGET: Budget()}):
        size += len(piece)
        if size > MAX_SIZE:
            raise TemplateTooCostly(f"its text is longer than {MAX_SIZE:,} characters")
        pieces.append(piece)
    return "".join(pieces)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with limits. Its templates are rendered by `render_bounded`."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self, **options: Any) -> None:  # Any: Jinja's own options
        super().__init__(**options, optimized=False)  # what is constant would be computed at once, without a limit
        self.filters[_STEP] = _counted
        self.filters[_SIZED] = _sized
        self.filters[_FORMAT] = _plain_format

    def from_string(self, source: Any, *args: Any, **kwargs: Any) -> jinja2.Template:  # Any: as in Jinja
        """As Jinja's. Raises jinja2.TemplateError for whatever keeps a template from being compiled."""
        if isinstance(source, str) and len(source) > MAX_SOURCE:
            raise jinja2.TemplateError(f"it has {len(source):,} characters; the limit is {MAX_SOURCE:,}")
        try:
            return super().from_string(source, *args, **kwargs)
        except (SyntaxError, RecursionError, MemoryError, ValueError, OverflowError, AssertionError) as error:
            raise jinja2.TemplateError(f"it cannot be compiled: {error or type(error).__name__}") from error

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _bounded(super()._parse(source, name, filename), self)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:  # Any: a template's values
        context[_BUDGET].step()
        if operator == "*":
            _check_product(left, right)
        elif operator == "**":
            _check_power(left, right)
        elif operator == "%":
            _check_format(left)
        return _checked(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:  # Any: an attribute of a template's value
        """As Jinja's, for formats without huge widths."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(value.__self__)
        return wrapped

    def call(self, context: Context, target: Any, /, *args: Any, **kwargs: Any) -> Any:  # Any: a template's values
        context[_BUDGET].step()
        _check_arguments(getattr(target, "__self__", None), args, kwargs)
        return _checked(super().call(context, target, *args, **kwargs))


def _bounded(tree: nodes.Template, environment: jinja2.Environment) -> nodes.Template:
    """Make every loop count its iterations, and every filter and every joining of texts look at its size."""
    for loop in tree.find_all(nodes.For):
        loop.iter = _filtered(loop.iter, _STEP)
    _wrap(tree)
    tree.set_environment(environment)  # of the new nodes, too
    return tree


def _wrap(parent: nodes.Node) -> None:
    for name in parent.fields:
        value = getattr(parent, name)
        if isinstance(value, list):
            setattr(parent, name, [_wrapped(item) for item in value])
        else:
            setattr(parent, name, _wrapped(value))


def _wrapped(node: Any) -> Any:  # Any: a node, or a field's plain value
    if not isinstance(node, nodes.Node):
        return node
    _wrap(node)
    if isinstance(node, nodes.Filter) and node.node is not None and node.name not in (_STEP, _SIZED, _FORMAT):
        if node.name == "format":
            node.node = _filtered(node.node, _FORMAT)
        arguments = nodes.List([*node.args, *(pair.value for pair in node.kwargs)], lineno=node.lineno)
        node.node = _filtered(node.node, _SIZED, arguments)
    if isinstance(node, nodes.Concat):
        return _filtered(node, _SIZED)
    return node


def _filtered(node: nodes.Node, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


@pass_context
def _counted(context: Context, items: Iterable[Any]) -> Iterable[Any]:  # Any: a template's values
    budget = context[_BUDGET]
    if isinstance(items, list | tuple | dict | str | range):
        for _ in range(min(len(items), MAX_STEPS + 1)):
            budget.step()
        return items  # `loop.length` and the like need a sized one
    return _counting(items, budget.step)


def _counting(items: Iterable[Any], step: Callable[[], None]) -> Iterator[Any]:
    for item in items:
        step()
        yield item


@pass_context
def _sized(context: Context, value: Any, arguments: Iterable[Any] = ()) -> Any:  # Any: a template's values
    """Look at a joined text, or at what a filter gets, before it is applied."""
    context[_BUDGET].step()
    _check_arguments(value, tuple(arguments), {})
    return _checked(value)


def _plain_format(text: Any) -> Any:  # Any: a template's value
    """Look at a text before it is a format."""
    _check_format(text)
    return text


def _check_arguments(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse widths, and texts that would replace or join others, from which something huge is made."""
    given = (*args, *kwargs.values())
    if isinstance(target, str):
        if any(isinstance(value, int) and abs(value) > MAX_WIDTH for value in given):
            raise TemplateTooCostly(f"a text is padded or cut with a number beyond {MAX_WIDTH:,}")
        longest = max((len(value) for value in given if isinstance(value, str | list | tuple)), default=0)
        if (len(target) + 1) * longest > MAX_SIZE:
            raise TemplateTooCostly(f"a text may grow beyond {MAX_SIZE:,} characters")
    elif isinstance(target, list | tuple | dict | jinja2.Undefined):
        if any(isinstance(value, int) and abs(value) > MAX_WIDTH for value in given):
            raise TemplateTooCostly(f"a list is filled or indented with a number beyond {MAX_WIDTH:,}")
        longest = max((len(value) for value in given if isinstance(value, str)), default=0)
        if not isinstance(target, jinja2.Undefined) and len(target) * longest > MAX_SIZE:
            raise TemplateTooCostly(f"a text may grow beyond {MAX_SIZE:,} characters")


def _check_product(left: Any, right: Any) -> None:
    for made, count in ((left, right), (right, left)):
        if isinstance(made, str | list | tuple) and isinstance(count, int) and len(made) * count > _most(made):
            raise TemplateTooCostly(f"something is repeated to more than {_most(made):,} characters or items")
        if isinstance(made, int) and made.bit_length() > MAX_BITS:
            raise TemplateTooCostly(f"a number has more than {MAX_BITS:,} bits")


def _check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int) and abs(left) > 1 and right * left.bit_length() > MAX_BITS:
        raise TemplateTooCostly(f"a power has more than {MAX_BITS:,} bits")


def _check_format(text: Any) -> None:
    """Refuse a format such as `%999999999d` or `{:>999999999}`, and one whose width is an argument."""
    if not isinstance(text, str):
        return
    for found in _FIELD.finditer(text):
        if "*" in found[0] or "{" in found[0][1:] or any(int(width) > MAX_WIDTH for width in _NUMBER.findall(found[0])):
            raise TemplateTooCostly(f"a format has a width beyond {MAX_WIDTH:,}, or one that is an argument")


def _checked(value: Any) -> Any:  # Any: a template's value
    if isinstance(value, str | list | tuple | dict) and len(value) > _most(value):
        raise TemplateTooCostly(f"something has more than {_most(value):,} characters or items")
    return value


def _most(value: str | list[Any] | tuple[Any, ...] | dict[Any, Any]) -> int:
    return MAX_SIZE if isinstance(value, str) else MAX_ITEMS
