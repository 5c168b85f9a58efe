"""Schema documents: dialects, identifiers, references. Every schema object met becomes a numbered node.

References lead into the document, or into documents of a registry that the caller gives; nothing is ever fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

from ramet.errors import InvalidSchema
from ramet.grammar import deadline

DRAFT4, DRAFT6, DRAFT7, DRAFT2019, DRAFT2020 = 4, 6, 7, 2019, 2020

_DIALECTS = {
    "json-schema.org/draft-03/schema": DRAFT4,
    "json-schema.org/draft-04/schema": DRAFT4,
    "json-schema.org/draft-06/schema": DRAFT6,
    "json-schema.org/draft-07/schema": DRAFT7,
    "json-schema.org/draft/2019-09/schema": DRAFT2019,
    "json-schema.org/draft/2020-12/schema": DRAFT2020,
    "json-schema.org/schema": DRAFT2020,
}
# keywords whose value is a schema, a list of schemas, or a map of schemas
_ONE = ("additionalProperties", "additionalItems", "propertyNames", "contains", "not", "if", "then", "else", "items",
        "unevaluatedProperties", "unevaluatedItems", "contentSchema")  # fmt: skip
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS = ("properties", "patternProperties", "definitions", "$defs", "dependentSchemas", "dependencies")
_NESTING = frozenset((*_ONE, *_LISTS, *_MAPS))
MAX_DEPTH = 500


@dataclass(frozen=True, slots=True, eq=False)
class SchemaNode:
    """One schema object in its place, as met in one dynamic scope.

    base: the URI that references are resolved against (without fragment). scope: for each dynamic anchor, the outermost
    resource on the way here that has it.
    """

    number: int
    schema: Any  # a JSON schema: dict or bool
    base: str
    pointer: str
    draft: int
    document: Document
    scope: tuple[tuple[str, str], ...] = ()
    children: dict[int, SchemaNode] = field(default_factory=dict)  # by identity of the schema


class Document:
    """One resource tree: identifiers found by a walk over all places where schemas stand."""

    def __init__(self, root: Any, base: str, draft: int) -> None:
        self.root = root
        self.base = base
        self.draft = draft


class Registry:
    """All documents of one compilation, and the nodes made of them."""

    def __init__(self, root: Any, extra: Mapping[str, Any]) -> None:
        self.extra = {urldefrag(uri)[0]: schema for uri, schema in extra.items()}
        self.nodes: list[SchemaNode] = []
        self._by_place: dict[tuple[object, ...], SchemaNode] = {}
        # absolute URI (with anchor as fragment) -> (schema, base, pointer, draft, document)
        self._places: dict[str, tuple[Any, str, str, int, Document]] = {}
        # base -> dynamic anchor -> place; "" stands for $recursiveAnchor
        self._dynamic: dict[str, dict[str, tuple[Any, str, str, int, Document]]] = {}
        self._loaded: set[str] = set()
        self._bases: dict[int, tuple[str, int]] = {}
        self.root = self._load(root, "")

    def _load(self, schema: Any, base: str, default: int = DRAFT2020) -> SchemaNode:
        draft = dialect(schema, default)
        document = Document(schema, base, draft)
        self._loaded.add(base)
        self._scan(document)
        base, draft = self._context(schema, base, draft)
        return self.node(schema, base, draft, "", document, self._extend((), base))

    def has(self, node: SchemaNode) -> bool:
        """True for a node that this registry has made."""
        return node.number < len(self.nodes) and self.nodes[node.number] is node

    def _extend(self, scope: tuple[tuple[str, str], ...], base: str) -> tuple[tuple[str, str], ...]:
        """The dynamic scope inside a resource entered from `scope`."""
        here = self._dynamic.get(base)
        if not here:
            return scope
        known = dict(scope)
        return tuple(sorted({**dict.fromkeys(here, base), **known}.items()))

    def _context(self, schema: Any, base: str, draft: int) -> tuple[str, int]:
        found = self._bases.get(id(schema)) if isinstance(schema, dict) else None
        return found or (base, draft)

    def _scan(self, document: Document) -> None:
        """Walk all subschemas once: note bases, identifiers and anchors."""
        self._places.setdefault(document.base, (document.root, document.base, "", document.draft, document))
        stack: list[tuple[Any, str, str, int, int]] = [(document.root, document.base, "", document.draft, 0)]
        while stack:
            schema, base, pointer, draft, depth = stack.pop()
            deadline.check(pointer or "/")
            if not isinstance(schema, dict):
                continue
            if depth > MAX_DEPTH:
                raise InvalidSchema(f"schemas are nested deeper than {MAX_DEPTH} at {pointer[:200]}", pointer)
            base, draft = self._identify(schema, base, pointer, draft, document)
            for key in schema.keys() & _NESTING:
                value = schema[key]
                where = f"{pointer}/{key}"
                if isinstance(value, list):
                    stack.extend((v, base, f"{where}/{i}", draft, depth + 1) for i, v in enumerate(value))
                elif not isinstance(value, dict):
                    continue
                elif key in _MAPS:
                    stack.extend((v, base, f"{where}/{escape(k)}", draft, depth + 1) for k, v in value.items())
                else:
                    stack.append((value, base, where, draft, depth + 1))

    def _identify(
        self, schema: dict[str, Any], base: str, pointer: str, draft: int, document: Document
    ) -> tuple[str, int]:
        if "$schema" in schema:
            draft = dialect(schema, draft)
        name = schema.get("id" if draft == DRAFT4 else "$id")
        hides = "$ref" in schema and draft <= DRAFT7
        if isinstance(name, str) and not hides:
            uri, fragment = urldefrag(_join(base, name))
            if fragment and draft <= DRAFT7:
                self._places.setdefault(f"{uri}#{fragment}", (schema, base, pointer, draft, document))
            if uri != base:
                base = uri
                self._places.setdefault(uri, (schema, base, pointer, draft, document))
        self._bases[id(schema)] = (base, draft)
        if draft >= DRAFT2019:
            for key in ("$anchor", "$dynamicAnchor"):
                anchor = schema.get(key)
                if isinstance(anchor, str):
                    place = (schema, base, pointer, draft, document)
                    self._places.setdefault(f"{base}#{anchor}", place)
                    if key == "$dynamicAnchor":
                        self._dynamic.setdefault(base, {}).setdefault(anchor, place)
            if schema.get("$recursiveAnchor") is True:
                self._dynamic.setdefault(base, {}).setdefault("", (schema, base, pointer, draft, document))
        return base, draft

    def node(
        self,
        schema: Any,
        base: str,
        draft: int,
        pointer: str,
        document: Document,
        scope: tuple[tuple[str, str], ...] = (),
    ) -> SchemaNode:
        """The node of a schema in its place."""
        key = (id(schema if isinstance(schema, dict) else document), pointer, scope)
        found = self._by_place.get(key)
        if found is None:
            if not isinstance(schema, dict | bool):
                raise InvalidSchema(
                    f"{pointer or '/'}: a schema must be an object or a boolean, not {_kind(schema)}", pointer
                )
            found = SchemaNode(len(self.nodes), schema, base, pointer, draft, document, scope)
            self.nodes.append(found)
            self._by_place[key] = found
        return found

    def child(self, node: SchemaNode, schema: Any, suffix: str) -> SchemaNode:
        """The node of a subschema of `node`."""
        if not isinstance(schema, dict):  # true and false are one object wherever they stand
            return self.node(schema, node.base, node.draft, node.pointer + suffix, node.document, node.scope)
        found = node.children.get(id(schema))
        if found is None:
            base, draft = self._context(schema, node.base, node.draft)
            scope = node.scope if base == node.base else self._extend(node.scope, base)
            found = self.node(schema, base, draft, node.pointer + suffix, node.document, scope)
            node.children[id(schema)] = found
        return found

    # --- references

    def resolve(self, node: SchemaNode, reference: str, keyword: str = "$ref") -> SchemaNode:
        """Return the node that a reference leads to.

        Raises: InvalidSchema naming the pointer and the reference.
        """
        uri, fragment = urldefrag(_join(node.base, reference))
        place = self._find(uri, node.draft)
        if place is None:
            raise InvalidSchema(
                f"{node.pointer or '/'}: {keyword} {reference!r} leads nowhere: no document {uri!r} is known",
                node.pointer,
            )
        if not fragment:
            found_at: tuple[Any, str, str, int, Document] | None = place
        elif fragment.startswith("/"):
            tokens = [unquote(t).replace("~1", "/").replace("~0", "~") for t in fragment[1:].split("/")]
            found_at = self._descend(place, tokens)
            document = place[4]
            if found_at is None and document.root is not place[0]:
                # an `id` that was meant as a name, not as a new base: pointers are then meant for the whole document
                found_at = self._descend((document.root, document.base, "", document.draft, document), tokens)
        else:
            found_at = self._places.get(f"{uri}#{fragment}") or self._places.get(f"{place[1]}#{fragment}")
        if found_at is None:
            raise InvalidSchema(f"{node.pointer or '/'}: {keyword} {reference!r} leads nowhere", node.pointer)
        return self._enter(node, found_at)

    def _enter(self, node: SchemaNode, place: tuple[Any, str, str, int, Document]) -> SchemaNode:
        schema, base, pointer, draft, document = place
        base, draft = self._context(schema, base, draft)
        return self.node(schema, base, draft, pointer, document, self._extend(node.scope, base))

    def _descend(
        self, place: tuple[Any, str, str, int, Document], tokens: list[str]
    ) -> tuple[Any, str, str, int, Document] | None:
        schema, base, pointer, draft, document = place
        base, draft = self._context(schema, base, draft)
        for key in tokens:
            if isinstance(schema, dict) and key in schema:
                schema = schema[key]
            elif isinstance(schema, list) and key.isdigit() and int(key) < len(schema):
                schema = schema[int(key)]
            else:
                return None
            pointer += "/" + escape(key)
            base, draft = self._context(schema, base, draft)
        return schema, base, pointer, draft, document

    def _find(self, uri: str, draft: int) -> tuple[Any, str, str, int, Document] | None:
        found = self._places.get(uri)
        if found is None and uri not in self._loaded and uri in self.extra:
            self._load(self.extra[uri], uri, draft)  # without `$schema`, what refers to it decides
            found = self._places.get(uri)
        if found is None and uri not in self._loaded:
            meta = _metaschema(uri)
            if meta is not None:
                self._load(meta, uri)
                found = self._places.get(uri)
        return found

    def resolve_dynamic(self, node: SchemaNode, reference: str, keyword: str) -> SchemaNode:
        """Return the node that a dynamic (or recursive) reference leads to, met in the scope of `node`."""
        found = self.resolve(node, reference, keyword)
        name = reference.partition("#")[2]
        # only where the reference itself leads to a dynamic anchor does the scope count
        if name in self._dynamic.get(found.base, {}) and self._dynamic[found.base][name][0] is found.schema:
            outermost = dict(node.scope).get(name)
            if outermost is not None:
                return self._enter(node, self._dynamic[outermost][name])
        return found


def dialect(schema: Any, default: int) -> int:
    """The draft that `$schema` names; unknown ones count as `default`."""
    name = schema.get("$schema") if isinstance(schema, dict) else None
    if not isinstance(name, str):
        return default
    return _DIALECTS.get(name.split("://", 1)[-1].rstrip("#").rstrip("/"), default)


def escape(token: str) -> str:
    """A key as a part of a JSON pointer."""
    return token.replace("~", "~0").replace("/", "~1")


def _join(base: str, reference: str) -> str:
    try:
        if base.startswith("urn:") and reference.startswith("#"):
            return base + reference
        return urljoin(base, reference)
    except ValueError:
        raise InvalidSchema(f"{reference!r} is not a URI reference") from None


def _kind(value: Any) -> str:
    return {dict: "an object", list: "an array", str: "a string", type(None): "null"}.get(type(value), "a number")


def _metaschema(uri: str) -> Any | None:
    """The draft metaschemas are known to everyone, when the package that ships them is installed."""
    if "json-schema.org/draft" not in uri:
        return None
    try:
        from jsonschema_specifications import REGISTRY  # type: ignore[import-untyped]
    except ImportError:
        return None
    try:
        return REGISTRY.contents(uri if uri in REGISTRY else uri + "#")
    except LookupError:
        return None
