"""A JSON schema to its place on a machine."""

from __future__ import annotations

from ramet.errors import GrammarError, GrammarTooLarge, InvalidSchema
from ramet.grammar import ir
from ramet.grammar.json_schema.algebra.values import Const, Values
from ramet.grammar.json_schema.frames.frames import Context, Json
from ramet.grammar.json_schema.frames.objects import prepare
from ramet.grammar.json_schema.keywords.keywords import Interpreter
from ramet.grammar.json_schema.keywords.schema_errors import survey
from ramet.grammar.json_schema.keywords.strict import check_strict
from ramet.grammar.json_schema.schema.document import Registry
from ramet.grammar.machine.automaton import Machine, target

WARM_NODES = 64  # schemas read at once; larger schemas are read further as they are visited


class RootContext:
    """The value is the whole text."""

    number = 0
    remembers = False
    is_anonymous = False
    is_for_masks = False

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def resume(self, mask: int, value: Const | None) -> int:
        return target(self.machine.done)

    def rest(self, tag: int) -> int:
        return 0

    def mask_twin(self) -> Context:
        return self


def place_schema(source: ir.JsonSchema, machine: Machine, max_states: int, context: Context | None = None) -> int:
    """Return the target at the start of the schema's values.

    Raises: InvalidSchema, UnsupportedSchema, GrammarTooLarge; GrammarError where no value satisfies the schema.
    """
    if not isinstance(source.schema, dict | bool):
        raise InvalidSchema("a schema must be an object or a boolean", "")
    options = source.options
    registry = Registry(source.schema, options.registry)
    lenient = options.on_unsupported == "validate"
    interpreter = Interpreter(registry, max_states, only_named=options.mode != "exact", lenient=lenient)
    try:
        return _place(source, machine, interpreter, context)
    except RecursionError as error:
        raise GrammarTooLarge("schemas are nested too deeply to be combined") from error


def _place(source: ir.JsonSchema, machine: Machine, interpreter: Interpreter, context: Context | None) -> int:
    options, registry = source.options, interpreter.registry
    machine.unenforced.extend(survey(interpreter))
    if options.mode == "strict":
        check_strict(registry.root)
    expressions = interpreter.expressions
    root = expressions.of_schema(registry.root)
    if expressions.is_empty(root):
        raise GrammarError("the schema is contradictory: no JSON value satisfies it")
    json = Json(machine, expressions, spaced=options.whitespace == "bounded", ordered=options.mode != "exact")
    for node in registry.nodes[:WARM_NODES]:
        objects = expressions.values(expressions.of_schema(node)).objects
        if len(objects) == 1 and not expressions.values_are_empty(Values(objects=objects)):
            prepare(json, objects[0])
    return json.value((root,), context or RootContext(machine), 2)
