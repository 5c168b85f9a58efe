"""What the keywords of one schema object mean: a `Values`. Also the survey that finds everything wrong with a schema.

Keywords of all drafts are read wherever they stand; the draft decides where one word has had two meanings (`items` as a
list, `exclusiveMinimum` as a boolean, what stands beside `$ref`).
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from ramet.errors import InvalidSchema
from ramet.grammar.json_schema.algebra import costs, distinct, specs
from ramet.grammar.json_schema.algebra import values as v
from ramet.grammar.json_schema.algebra.expressions import Expressions, Operations
from ramet.grammar.json_schema.algebra.languages import Languages
from ramet.grammar.json_schema.algebra.values import FALSE, TRUE, Arrays, Contains, Expr, Objects, Rule, Strings, Values
from ramet.grammar.json_schema.schema import formats, pattern
from ramet.grammar.json_schema.schema.document import DRAFT4, DRAFT7, DRAFT2019, SchemaNode, Subschemas, escape
from ramet.grammar.json_schema.schema.pattern import UnsupportedPattern
from ramet.grammar.regular import dfas
from ramet.grammar.regular import numbers as numeric
from ramet.grammar.regular.numbers import Numbers, fraction

TYPES = ("null", "boolean", "number", "integer", "string", "object", "array")
_ANY_OBJECTS, _ANY_ARRAYS, _ANY_STRINGS = (v.ANY_OBJECTS,), (v.ANY_ARRAYS,), (v.ANY_STRINGS,)
_NUMBER_KEYS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "divisibleBy")
_STRING_KEYS = ("minLength", "maxLength", "pattern", "format")
_OBJECT_KEYS = ("properties", "patternProperties", "additionalProperties", "required", "propertyNames", "minProperties",
                "maxProperties", "dependentRequired", "dependencies")  # fmt: skip
_ARRAY_KEYS = ("items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems", "contains")
_COMBINING = ("allOf", "anyOf", "oneOf", "not", "if", "dependentSchemas", "dependencies", "extends", "disallow")


# keywords whose value is a schema, a list of schemas, or a map of schemas
_DIRECT = ("additionalProperties", "additionalItems", "propertyNames", "contains", "not", "if", "then", "else", "items",
           "unevaluatedProperties", "unevaluatedItems", "contentSchema", "allOf", "anyOf", "oneOf",
           "prefixItems")  # fmt: skip
_MAPS = ("properties", "patternProperties", "definitions", "$defs", "dependentSchemas", "dependencies")
SUBSCHEMAS = {**dict.fromkeys(_DIRECT, Subschemas.DIRECT), **dict.fromkeys(_MAPS, Subschemas.NAMED)}
# keywords that can leave a schema without any value, alone or together
_MAY_EMPTY = {
    "enum", "const", "required", "allOf", "anyOf", "oneOf", "not", "if", "$ref", "$dynamicRef", "$recursiveRef",
    "extends", "disallow", "dependentSchemas", "dependencies", "pattern", "minLength", "maximum", "exclusiveMaximum",
    "multipleOf", "divisibleBy", "minItems", "contains", "minProperties", "unevaluatedProperties", "unevaluatedItems",
}  # fmt: skip
_NESTING = {
    "$ref", "allOf", "anyOf", "oneOf", "not", "if", "$dynamicRef", "$recursiveRef", "properties", "items", "required",
    "additionalProperties", "patternProperties", "dependencies", "dependentSchemas", "contains", "prefixItems",
}  # fmt: skip
_OPERATIONS = Operations(
    specs.both_objects, specs.both_arrays, specs.not_objects, specs.not_arrays, costs.of_values, distinct.all_of
)


class Interpreter:
    """Reads schema nodes as values.

    only_named: see values.Objects.named_only. lenient: what cannot be enforced is left out instead of refused.
    """

    def __init__(self, max_states: int, *, only_named: bool = False, lenient: bool = False) -> None:
        self.only_named = only_named
        self.lenient = lenient
        self.languages = Languages(max_states)
        self.expressions = Expressions(self.languages, self, _OPERATIONS, lenient=lenient)

    def is_scalar(self, node: SchemaNode) -> bool:
        schema = node.schema
        if not isinstance(schema, dict) or _NESTING & schema.keys():
            return False
        if "const" in schema:
            return not isinstance(schema["const"], dict | list)
        if isinstance(schema.get("enum"), list):
            return not any(isinstance(x, dict | list) for x in schema["enum"])
        return isinstance(schema.get("type"), str) and schema["type"] not in ("object", "array")

    def surely_has_values(self, node: SchemaNode) -> bool:
        return isinstance(node.schema, dict) and not _MAY_EMPTY & node.schema.keys()

    def child(self, node: SchemaNode, schema: Any, suffix: str) -> SchemaNode:
        return node.registry.child(node, schema, suffix)

    def expr(self, node: SchemaNode, schema: Any, suffix: str) -> Expr:
        if schema is True or schema is False:
            return TRUE if schema else FALSE
        found = node.children.get(id(schema))
        return self.expressions.of_schema(self.child(node, schema, suffix) if found is None else found)

    def values(self, node: SchemaNode, schema: Any, suffix: str) -> Values:
        return self.expressions.values(self.expr(node, schema, suffix))

    def interpret(self, node: SchemaNode) -> Values:
        schema = node.schema
        assert isinstance(schema, dict)
        if "$ref" in schema and node.draft <= DRAFT7:
            return self.referred(node, "$ref")
        if is_tracking(node):
            return v.unite(a for a, _ in tracked(self, node))
        found = self.own(node)
        for key in ("$ref", "$dynamicRef", "$recursiveRef"):
            if key in schema and (key == "$ref" or node.draft >= DRAFT2019):
                found = self.expressions.intersect(found, self.referred(node, key))
        if any(key in schema for key in _COMBINING):
            found = self.combined(node, found)
        return found

    def referred(self, node: SchemaNode, key: str) -> Values:
        return self.expressions.values(self.expressions.of_schema(self.target(node, key)))

    def target(self, node: SchemaNode, key: str) -> SchemaNode:
        """The node that a reference leads to."""
        if key == "$ref":
            return node.registry.resolve(node, node.schema[key], key)
        return node.registry.resolve_dynamic(node, "#" if key == "$recursiveRef" else node.schema[key], key)

    # --- the keywords that look at one value by its type

    def own(self, node: SchemaNode) -> Values:
        schema = node.schema
        types = schema.get("type")
        if types is None:
            found = Values(
                True, 3, self.numbers(node, None), self.strings(node), self.objects(node), self.arrays(node)
            )  # fmt: skip
        else:
            parts = [self.of_type(node, t) for t in ([types] if isinstance(types, str | dict) else types)]
            found = parts[0] if len(parts) == 1 else v.unite(parts)
        if "enum" in schema:
            found = self.expressions.intersect(found, self.listed(schema["enum"]))
        if "const" in schema:
            found = self.expressions.intersect(found, self.listed([schema["const"]]))
        return found

    def of_type(self, node: SchemaNode, name: Any) -> Values:
        match name:
            case "string":
                return Values(strings=self.strings(node))
            case "object":
                return Values(objects=self.objects(node))
            case "array":
                return Values(arrays=self.arrays(node))
            case "number":
                return Values(numbers=self.numbers(node, None))
            case "integer":
                return Values(numbers=self.numbers(node, True))
            case "boolean":
                return Values(booleans=3)
            case "null":
                return Values(null=True)
            case "any":  # draft 3
                return Values(
                    True, 3, self.numbers(node, None), self.strings(node), self.objects(node), self.arrays(node)
                )
            case dict() if node.draft == DRAFT4:  # draft 3
                return self.values(node, name, "/type")
            case _:
                raise InvalidSchema(f"{node.pointer or '/'}/type: {name!r} is not a JSON type", node.pointer + "/type")

    def listed(self, values: Iterable[Any]) -> Values:
        """Exactly these values."""
        return v.unite(self.constant(x) for x in values)

    def constant(self, value: Any) -> Values:
        if value is None:
            return Values(null=True)
        if isinstance(value, bool):
            return Values(booleans=2 if value else 1)
        if isinstance(value, int | float):
            return Values(numbers=(Numbers(finite=frozenset((fraction(value),))),))
        if isinstance(value, str):
            return Values(strings=(Strings(finite=frozenset((value,))),))
        if isinstance(value, list):
            items = tuple(self.expressions.of_values(self.constant(x)) for x in value)
            return Values(arrays=(Arrays(items, FALSE, len(items), len(items)),))
        properties = tuple((k, self.expressions.of_values(self.constant(x))) for k, x in value.items())
        return Values(objects=(Objects(properties, FALSE, required=frozenset(value)),))

    def numbers(self, node: SchemaNode, integer: bool | None) -> tuple[Numbers, ...]:
        schema = node.schema
        plain = True if integer and node.draft == DRAFT4 else None
        if not any(key in schema for key in _NUMBER_KEYS):
            return (numeric.ANY,) if integer is None else (_INTEGERS[plain],)
        low, high = _fraction(schema, "minimum"), _fraction(schema, "maximum")
        low_open = high_open = False
        for key, is_low in (("exclusiveMinimum", True), ("exclusiveMaximum", False)):
            bound = schema.get(key)
            if bound is True:
                low_open, high_open = (True, high_open) if is_low else (low_open, True)
            elif bound is not None and bound is not False:
                edge = fraction(bound)
                if is_low and (low is None or edge >= low):
                    low, low_open = edge, True
                elif not is_low and (high is None or edge <= high):
                    high, high_open = edge, True
        multiples = frozenset(
            (fraction(schema[key]), True) for key in ("multipleOf", "divisibleBy") if schema.get(key) not in (None, 0)
        )
        if low is None and high is None and not multiples:
            return (numeric.ANY,) if integer is None else (_INTEGERS[plain],)
        low_open, high_open = low_open and low is not None, high_open and high is not None
        found = numeric.simplify(Numbers(low, low_open, high, high_open, integer, multiples, plain=plain))
        return () if found is None else (found,)

    def strings(self, node: SchemaNode) -> tuple[Strings, ...]:
        schema = node.schema
        if not any(key in schema for key in _STRING_KEYS):
            return _ANY_STRINGS
        languages, counts = [], list[tuple[int, int | None]]()
        if isinstance(schema.get("pattern"), str) and self.is_enforced(schema["pattern"]):
            source, *count = pattern.without_count(schema["pattern"])
            languages.append((self.languages.add("pattern", source), True))
            counts.extend(count)
        name = schema.get("format")
        if isinstance(name, str) and name in formats.KNOWN:
            languages.append((self.languages.add("format", name), True))
        counts.append((int(schema.get("minLength", 0)), _count(schema, "maxLength")))
        high = min((high for _, high in counts if high is not None), default=None)
        spec = Strings(max(low for low, _ in counts), high, frozenset(languages))
        if spec == v.ANY_STRINGS:
            return _ANY_STRINGS
        return () if self.languages.is_empty(spec) else (spec,)

    def is_enforced(self, source: str) -> bool:
        """False for a pattern that lenient reading leaves out.

        Raises: UnsupportedPattern for such a pattern otherwise.
        """
        try:
            self.languages.add("pattern", source)
        except UnsupportedPattern:
            if not self.lenient:
                raise
            return False
        return True

    def objects(self, node: SchemaNode) -> tuple[Objects, ...]:
        schema = node.schema
        if not any(key in schema for key in _OBJECT_KEYS):
            return _ANY_OBJECTS
        patterns = tuple(
            (self.languages.add("pattern", p), self.expr(node, s, f"/patternProperties/{escape(p)}"))
            for p, s in mapping(schema, "patternProperties").items()
            if self.is_enforced(p)
        )
        properties = []
        for key, s in mapping(schema, "properties").items():
            known = node.children.get(id(s))
            e = self.expr(node, s, f"/properties/{escape(key)}") if known is None else self.expressions.of_schema(known)
            for number, other in patterns:
                if self.languages.accepts(number, key):
                    e = self.expressions.both(e, other)
            properties.append((key, e))
        rest = self.expr(node, schema.get("additionalProperties", True), "/additionalProperties")
        if len(patterns) < len(mapping(schema, "patternProperties")):
            rest = TRUE  # a key that matches a pattern left out might be any
        required = schema.get("required", ())
        required = frozenset(required) if isinstance(required, list) else frozenset()
        # draft 3: `required` stands in the property
        required |= {
            k for k, s in mapping(schema, "properties").items() if isinstance(s, dict) and s.get("required") is True
        }
        dependent = self.dependent_keys(schema)
        rules: tuple[Rule, ...] = (Rule(patterns, rest),) if patterns else ()
        spec = Objects(
            tuple(properties),
            TRUE if patterns else rest,
            rules,
            required,
            int(schema.get("minProperties", 0)),
            None if schema.get("maxProperties") is None else int(schema["maxProperties"]),
            dependent,
            named_only=self.only_named and "additionalProperties" not in schema and bool(properties),
        )
        found = specs.tidy_objects(self.expressions, spec)
        if found is not None and "propertyNames" in schema:
            found = specs.both_objects(self.expressions, found, self.names(node))
        return () if found is None else (found,)

    def names(self, node: SchemaNode) -> Objects:
        """The objects whose keys are in `propertyNames`."""
        strings = self.values(node, node.schema["propertyNames"], "/propertyNames").strings
        if strings == _ANY_STRINGS:
            return v.ANY_OBJECTS
        if all(s.finite is not None for s in strings):
            return Objects(tuple((k, TRUE) for s in strings for k in sorted(s.finite or ())), FALSE)
        dfa = dfas.union([self.languages.whole(s) for s in strings])
        number = self.languages.add_automaton("propertyNames", dfa)
        return Objects(rules=(Rule(((number, TRUE),), FALSE),))

    @staticmethod
    def dependent_keys(schema: dict[str, Any]) -> tuple[tuple[str, frozenset[str]], ...]:
        found: dict[str, frozenset[str]] = {}
        for key in ("dependentRequired", "dependencies"):
            for name, needs in mapping(schema, key).items():
                if isinstance(needs, str):  # draft 3
                    needs = [needs]
                if isinstance(needs, list) and needs:
                    found[name] = found.get(name, frozenset()) | frozenset(needs)
        return tuple(sorted(found.items()))

    def arrays(self, node: SchemaNode) -> tuple[Arrays, ...]:
        schema = node.schema
        if not any(key in schema for key in _ARRAY_KEYS):
            return _ANY_ARRAYS
        prefix: tuple[Expr, ...] = ()
        rest: Any = True
        rest_key = "/items"
        items = schema.get("items", True)
        if "prefixItems" in schema:
            prefix = tuple(self.expr(node, s, f"/prefixItems/{i}") for i, s in enumerate(schema["prefixItems"]))
            rest = items if not isinstance(items, list) else True
        elif isinstance(items, list):
            prefix = tuple(self.expr(node, s, f"/items/{i}") for i, s in enumerate(items))
            rest, rest_key = schema.get("additionalItems", True), "/additionalItems"
        else:
            rest = items
        contains: tuple[Contains, ...] = ()
        if "contains" in schema:
            low = int(schema.get("minContains", 1)) if node.draft >= DRAFT2019 else 1
            high = schema.get("maxContains") if node.draft >= DRAFT2019 else None
            contains = (
                Contains(0, self.expr(node, schema["contains"], "/contains"), low, None if high is None else int(high)),
            )
        high = schema.get("maxItems")
        spec = Arrays(
            prefix,
            self.expr(node, rest, rest_key),
            int(schema.get("minItems", 0)),
            None if high is None else int(high),
            contains,
            bool(schema.get("uniqueItems", False)) and high not in (0, 1),
        )
        found = specs.tidy_arrays(self.expressions, spec)
        return () if found is None else (found,)

    # --- the keywords that combine schemas

    def combined(self, node: SchemaNode, found: Values) -> Values:
        schema, both = node.schema, self.expressions.intersect
        for i, s in enumerate(schema.get("allOf", ())):
            found = both(found, self.values(node, s, f"/allOf/{i}"))
        if "extends" in schema and node.draft == DRAFT4:
            parts = schema["extends"] if isinstance(schema["extends"], list) else [schema["extends"]]
            for i, s in enumerate(parts):
                found = both(found, self.values(node, s, f"/extends/{i}"))
        if "anyOf" in schema:
            found = both(found, v.unite(self.values(node, s, f"/anyOf/{i}") for i, s in enumerate(schema["anyOf"])))
        if "oneOf" in schema:
            found = self.exactly_one(found, self.branches(node, "oneOf"))
        if "not" in schema:
            found = both(found, self.refused(self.expr(node, schema["not"], "/not")))
        if "disallow" in schema and node.draft == DRAFT4:
            names = schema["disallow"] if isinstance(schema["disallow"], list) else [schema["disallow"]]
            for i, name in enumerate(names):
                other = {"type": name} if isinstance(name, str) else name
                found = both(found, self.refused(self.expr(node, other, f"/disallow/{i}")))
        if "if" in schema and ("then" in schema or "else" in schema):
            condition = self.expr(node, schema["if"], "/if")
            yes, no = both(found, self.expressions.values(condition)), both(found, self.refused(condition))
            if "then" in schema:
                yes = both(yes, self.values(node, schema["then"], "/then"))
            if "else" in schema:
                no = both(no, self.values(node, schema["else"], "/else"))
            found = v.unite((yes, no))
        for key in ("dependentSchemas", "dependencies"):
            for name, s in mapping(schema, key).items():
                if isinstance(s, dict | bool):
                    found = self.depending(node, found, name, self.values(node, s, f"/{key}/{escape(name)}"))
        return found

    def depending(self, node: SchemaNode, found: Values, name: str, then: Values) -> Values:
        """Where an object has the key, all of `then` holds."""
        without = v.ANY._replace(objects=(Objects(((name, FALSE),)),))
        within = Values(objects=(Objects(((name, TRUE),), required=frozenset((name,))),))
        both = self.expressions.intersect
        return v.unite((both(found, without), both(both(found, within), then)))

    def branches(self, node: SchemaNode, key: str) -> list[Expr]:
        return [self.expr(node, s, f"/{key}/{i}") for i, s in enumerate(node.schema[key])]

    def refused(self, expr: Expr) -> Values:
        """All values that are not in `expr`."""
        return self.expressions.values(self.expressions.negate(expr))

    def exactly_one(self, found: Values, branches: list[Expr]) -> Values:
        """Values in one branch and in no other. Branches that cannot meet need no complement."""
        both, out = self.expressions.intersect, []
        parts = [both(found, self.expressions.values(e)) for e in branches]
        overlaps = {(i, j): self.may_meet(a, parts[j]) for i, a in enumerate(parts) for j in range(i)}
        for i, a in enumerate(parts):
            rest = a
            for j, e in enumerate(branches):
                if i != j and overlaps[max(i, j), min(i, j)]:
                    rest = both(rest, self.refused(e))
            out.append(rest)
        return v.unite(out)

    def interpret_not(self, node: SchemaNode) -> Values:
        """All values that the schema refuses: those that some keyword refuses."""
        schema, parts = node.schema, []
        if "$ref" in schema and node.draft <= DRAFT7:
            return self.refused(self.expressions.of_schema(self.target(node, "$ref")))
        if is_tracking(node):
            return self.expressions.complement(self.expressions.values(self.expressions.of_schema(node)))
        own = self.own(node)
        if own != v.ANY:
            parts.append(self.expressions.complement(own))
        for key in ("$ref", "$dynamicRef", "$recursiveRef"):
            if key in schema and (key == "$ref" or node.draft >= DRAFT2019):
                parts.append(self.refused(self.expressions.of_schema(self.target(node, key))))
        parts.extend(self._not_combined(node))
        return v.unite(parts)

    def _not_combined(self, node: SchemaNode) -> Iterable[Values]:
        schema, both = node.schema, self.expressions.intersect
        if "allOf" in schema:
            yield from map(self.refused, self.branches(node, "allOf"))
        if "anyOf" in schema:
            yield self._none_of(self.branches(node, "anyOf"))
        if "oneOf" in schema:
            branches = self.branches(node, "oneOf")
            yield self._none_of(branches)
            values = [self.expressions.values(e) for e in branches]
            for i, a in enumerate(values):
                for j in range(i):
                    common = both(a, values[j])
                    if not self.expressions.values_are_empty(common):
                        yield common
        if "not" in schema:
            yield self.values(node, schema["not"], "/not")
        if "if" in schema and ("then" in schema or "else" in schema):
            condition = self.expr(node, schema["if"], "/if")
            if "then" in schema:
                yield both(self.expressions.values(condition), self.refused(self.expr(node, schema["then"], "/then")))
            if "else" in schema:
                yield both(self.refused(condition), self.refused(self.expr(node, schema["else"], "/else")))
        for key in ("dependentSchemas", "dependencies"):
            for name, s in mapping(schema, key).items():
                if isinstance(s, dict | bool):
                    within = Values(objects=(Objects(((name, TRUE),), required=frozenset((name,))),))
                    yield both(within, self.refused(self.expr(node, s, f"/{key}/{escape(name)}")))
        if node.draft == DRAFT4 and ("extends" in schema or "disallow" in schema):
            yield self.expressions.complement(self.combined(node, v.ANY))

    def _none_of(self, branches: list[Expr]) -> Values:
        found = v.ANY
        for e in branches:
            found = self.expressions.intersect(found, self.refused(e))
        return found

    def may_meet(self, a: Values, b: Values) -> bool:
        common = self.expressions.intersect(a, b)
        if common.null or common.booleans or common.numbers or common.strings:
            return True
        return not self.expressions.values_are_empty(common)


# imported last: it works on an Interpreter
from ramet.grammar.json_schema.keywords.unevaluated import is_tracking, tracked  # noqa: E402

_INTEGERS = {plain: Numbers(integer=True, plain=plain) for plain in (None, True)}


def _fraction(schema: dict[str, Any], key: str) -> Fraction | None:
    return None if schema.get(key) is None else fraction(schema[key])


def _count(schema: dict[str, Any], key: str) -> int | None:
    return None if schema.get(key) is None else int(schema[key])


def mapping(schema: dict[str, Any], key: str) -> dict[str, Any]:
    found = schema.get(key)
    return found if isinstance(found, dict) else {}
