"""Places JSON schemas on a machine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from ramet.errors import GrammarError, GrammarTooLarge
from ramet.grammar import ir
from ramet.grammar.json_schema.algebra.values import Expr, Values
from ramet.grammar.json_schema.frames.arrays import open_array
from ramet.grammar.json_schema.frames.compilation import Compilation, Opener, TextContext
from ramet.grammar.json_schema.frames.layout import layout_of
from ramet.grammar.json_schema.frames.objects import open_object, prepare
from ramet.grammar.json_schema.frames.scalars import open_literal, open_number, open_string, prepare_scalars
from ramet.grammar.json_schema.frames.tables import ARRAY, AT_VALUE, LITERALS, NUMBER, OBJECT, STRING
from ramet.grammar.json_schema.keywords.interpreter import Interpreter
from ramet.grammar.json_schema.keywords.schema_errors import survey
from ramet.grammar.json_schema.keywords.strict import check_strict
from ramet.grammar.json_schema.keywords.table import KEYWORDS
from ramet.grammar.json_schema.schema.document import SchemaNode
from ramet.grammar.machine.automaton import Machine
from ramet.grammar.machine.compiled_grammar import Problem
from ramet.grammar.machine.frame import target

WARM_S = 0.001  # for patterns and ranges ahead; the others are read when a text reaches them
WARM_NODES = 64  # nodes prepared at once; the rest of a larger schema is prepared when a text reaches it

OPENERS: Mapping[int, Opener] = {
    OBJECT: open_object,
    ARRAY: open_array,
    STRING: open_string,
    NUMBER: open_number,
    **{kind: partial(open_literal, kind) for kind in LITERALS},
}


class Schemas:
    """JSON schemas with the same options, read into one set of expressions.

    unenforced: the problems that masks will not prevent.
    """

    def __init__(self, options: ir.JsonOptions, max_states: int) -> None:
        self.options = options
        self.unenforced: list[Problem] = []
        closes, lenient = options.additional_properties == "closed", options.on_unsupported == "validate"
        self._interpreter = Interpreter(KEYWORDS, max_states, closes_objects=closes, lenient=lenient)
        self.expressions = self._interpreter.expressions

    def read(self, schema: Any) -> tuple[Expr, list[SchemaNode]]:  # Any: JSON
        """Return the expression of a schema, and those of its nodes that should be prepared first.

        Raises: InvalidSchema, UnsupportedSchema, GrammarTooLarge.
        """
        root = self._interpreter.open(schema, self.options.registry)
        self.unenforced += survey(self._interpreter, root)
        if self.options.strict:
            check_strict(root)
        return self.expressions.of_schema(root), root.registry.nodes[:WARM_NODES]

    def compilation(self, machine: Machine) -> Compilation:
        """Return the compilation that places these schemas on a machine."""
        options = self.options
        return Compilation(
            machine,
            self.expressions,
            OPENERS,
            layout=layout_of(options.whitespace),
            ordered=options.order == "declared",
            plain_integers=options.integers == "plain",
        )


def place_schema(source: ir.JsonSchema, machine: Machine) -> tuple[int, list[Problem]]:
    """Return the target at the start of the schema's values, and the problems that masks will not prevent.

    Raises: InvalidSchema, UnsupportedSchema, GrammarTooLarge; GrammarError if no value satisfies the schema.
    """
    try:
        schemas = Schemas(source.options, machine.limits.max_regular_states)
        root, nodes = schemas.read(source.schema)
        expressions = schemas.expressions
        if expressions.is_empty(root):
            raise GrammarError("the schema is contradictory: no JSON value satisfies it")
        compilation = schemas.compilation(machine)
        for node in nodes:
            objects = expressions.values(expressions.of_schema(node)).objects
            if len(objects) == 1 and not expressions.values_are_empty(Values(objects=objects)):
                prepare(compilation, objects[0])
        end = time.thread_time() + WARM_S
        for node in nodes:
            if time.thread_time() >= end:
                break
            with suppress(GrammarTooLarge):  # a text that gets there raises it
                prepare_scalars(compilation, expressions.values(expressions.of_schema(node)))
        return compilation.value((root,), TextContext(target(machine.done), 0), AT_VALUE), schemas.unenforced
    except RecursionError as error:
        raise GrammarTooLarge("schemas are nested too deeply to be combined") from error
