"""Schema documents: the draft that a schema is written in, its identifiers, and the targets of its references.

A *node* is one schema object in its place. A reference leads to a place in the same document, or in another document
that the caller gives by its URI. Nothing is ever fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
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
MAX_DEPTH = 500
Scope = tuple[tuple[str, str], ...]  # (dynamic anchor, the outermost resource with that anchor on the way here)


Subschemas = Literal["direct", "named"]
"""How the value of a keyword holds schemas: it is a schema or a list of them, or an object whose values are schemas."""


@dataclass(frozen=True, slots=True, eq=False)
class SchemaNode:
    """One schema in its place, reached through one dynamic scope.

    number: its index in `registry.nodes`. base: the URI, without fragment, that its references are relative to.
    children: the nodes of its subschemas, made when asked for, by `id` of the subschema. Only the registry makes nodes.
    """

    number: int
    schema: Any  # a JSON schema: dict or bool
    base: str
    pointer: str
    draft: int
    document: Place
    scope: Scope
    registry: Registry
    children: dict[int, SchemaNode] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """A possible target of a reference: a JSON value in a document, and the identifiers on the way to it.

    base: of a whole document, the URI by which it was loaded. document: the place of the whole document; None: this
    is it.
    """

    schema: Any  # any JSON value: making a node checks that it is a schema
    base: str
    pointer: str
    draft: int
    document: Place | None = None


class Registry:
    """One schema with all documents that its references lead to, and the nodes made of them.

    extra: the other documents, by URI. subschemas: the keywords that hold schemas. Identifiers are searched in these
    only.
    """

    def __init__(self, root: Any, extra: Mapping[str, Any], subschemas: Mapping[str, Subschemas]) -> None:
        self.extra = {urldefrag(uri)[0]: schema for uri, schema in extra.items()}
        self._subschemas = subschemas
        self.nodes: list[SchemaNode] = []
        self._by_place: dict[tuple[object, ...], SchemaNode] = {}
        self._places: dict[str, Place] = {}  # by absolute URI; the fragment is an anchor
        # base -> dynamic anchor -> place; "" stands for $recursiveAnchor
        self._dynamic: dict[str, dict[str, Place]] = {}
        self._loaded: set[str] = set()
        self._bases: dict[int, tuple[str, int]] = {}
        self.root = self._load(root, "")

    def _load(self, schema: Any, base: str, default: int = DRAFT2020) -> SchemaNode:
        draft = dialect(schema, default)
        document = Place(schema, base, "", draft)
        self._loaded.add(base)
        self._scan(document)
        base, draft = self._context(schema, base, draft)
        return self._node(schema, base, "", draft, document, self._extend((), base))

    def _extend(self, scope: Scope, base: str) -> Scope:
        """Return the dynamic scope inside a resource that is entered from `scope`."""
        here = self._dynamic.get(base)
        if not here:
            return scope
        known = dict(scope)
        return tuple(sorted({**dict.fromkeys(here, base), **known}.items()))

    def _context(self, schema: Any, base: str, draft: int) -> tuple[str, int]:
        found = self._bases.get(id(schema)) if isinstance(schema, dict) else None
        return found or (base, draft)

    def _scan(self, document: Place) -> None:
        """Walk all subschemas once, and record bases, identifiers and anchors."""
        self._places.setdefault(document.base, document)
        stack: list[tuple[Any, str, str, int, int]] = [(document.schema, document.base, "", document.draft, 0)]
        subschemas = self._subschemas
        while stack:
            schema, base, pointer, draft, depth = stack.pop()
            deadline.check(pointer or "/")
            if not isinstance(schema, dict):
                continue
            if depth > MAX_DEPTH:
                raise InvalidSchema(f"schemas are nested deeper than {MAX_DEPTH} at {pointer[:200]}", pointer)
            base, draft = self._identify(schema, base, pointer, draft, document)
            for key, value in schema.items():
                kind = subschemas.get(key)
                if kind is None:
                    continue
                where = f"{pointer}/{key}"
                if isinstance(value, list):
                    stack += [(v, base, f"{where}/{i}", draft, depth + 1) for i, v in enumerate(value)]
                elif not isinstance(value, dict):
                    continue
                elif kind == "named":
                    stack += [(v, base, f"{where}/{escape(k)}", draft, depth + 1) for k, v in value.items()]
                else:
                    stack.append((value, base, where, draft, depth + 1))

    def _identify(
        self, schema: dict[str, Any], base: str, pointer: str, draft: int, document: Place
    ) -> tuple[str, int]:
        if "$schema" in schema:
            draft = dialect(schema, draft)
        name = schema.get("id" if draft == DRAFT4 else "$id")
        hides = "$ref" in schema and draft <= DRAFT7
        if isinstance(name, str) and not hides:
            uri, fragment = urldefrag(_join(base, name))
            if fragment and draft <= DRAFT7:
                self._places.setdefault(f"{uri}#{fragment}", Place(schema, base, pointer, draft, document))
            if uri != base:
                base = uri
                self._places.setdefault(uri, Place(schema, base, pointer, draft, document))
        self._bases[id(schema)] = (base, draft)
        if draft >= DRAFT2019:
            for key in ("$anchor", "$dynamicAnchor"):
                anchor = schema.get(key)
                if isinstance(anchor, str):
                    place = Place(schema, base, pointer, draft, document)
                    self._places.setdefault(f"{base}#{anchor}", place)
                    if key == "$dynamicAnchor":
                        self._dynamic.setdefault(base, {}).setdefault(anchor, place)
            if schema.get("$recursiveAnchor") is True:
                self._dynamic.setdefault(base, {}).setdefault("", Place(schema, base, pointer, draft, document))
        return base, draft

    def _node(self, schema: Any, base: str, pointer: str, draft: int, document: Place, scope: Scope) -> SchemaNode:
        key = (id(schema if isinstance(schema, dict) else document), pointer, scope)
        found = self._by_place.get(key)
        if found is None:
            if not isinstance(schema, dict | bool):
                raise InvalidSchema(
                    f"{pointer or '/'}: a schema must be an object or a boolean, not {_kind(schema)}", pointer
                )
            found = SchemaNode(len(self.nodes), schema, base, pointer, draft, document, scope, self)
            self.nodes.append(found)
            self._by_place[key] = found
        return found

    def child(self, node: SchemaNode, schema: Any, suffix: str) -> SchemaNode:
        """Return the node of a subschema of `node`. suffix: the JSON pointer from `node` to the subschema."""
        if not isinstance(schema, dict):  # true and false are the same object in every place
            return self._node(schema, node.base, node.pointer + suffix, node.draft, node.document, node.scope)
        found = node.children.get(id(schema))
        if found is None:
            pointer = node.pointer + suffix
            base, draft = self._context(schema, node.base, node.draft)
            scope = node.scope if base == node.base else self._extend(node.scope, base)
            found = node.children[id(schema)] = self._node(schema, base, pointer, draft, node.document, scope)
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
            found_at: Place | None = place
        elif fragment.startswith("/"):
            tokens = [unquote(t).replace("~1", "/").replace("~0", "~") for t in fragment[1:].split("/")]
            found_at = self._descend(place, tokens)
            if found_at is None and place.document is not None:
                # an `id` that was meant as a name, not as a new base: pointers are then relative to the whole document
                found_at = self._descend(place.document, tokens)
        else:
            found_at = self._places.get(f"{uri}#{fragment}") or self._places.get(f"{place.base}#{fragment}")
        if found_at is None:
            raise InvalidSchema(f"{node.pointer or '/'}: {keyword} {reference!r} leads nowhere", node.pointer)
        return self._enter(node, found_at)

    def _enter(self, node: SchemaNode, place: Place) -> SchemaNode:
        base, draft = self._context(place.schema, place.base, place.draft)
        document, scope = place.document or place, self._extend(node.scope, base)
        return self._node(place.schema, base, place.pointer, draft, document, scope)

    def _descend(self, place: Place, tokens: list[str]) -> Place | None:
        schema, pointer = place.schema, place.pointer
        base, draft = self._context(schema, place.base, place.draft)
        for key in tokens:
            if isinstance(schema, dict) and key in schema:
                schema = schema[key]
            elif isinstance(schema, list) and key.isdigit() and int(key) < len(schema):
                schema = schema[int(key)]
            else:
                return None
            pointer += "/" + escape(key)
            base, draft = self._context(schema, base, draft)
        return Place(schema, base, pointer, draft, place.document or place)

    def _find(self, uri: str, draft: int) -> Place | None:
        found = self._places.get(uri)
        if found is None and uri not in self._loaded and uri in self.extra:
            self._load(self.extra[uri], uri, draft)  # without `$schema`, it has the draft of the referring schema
            found = self._places.get(uri)
        if found is None and uri not in self._loaded:
            meta = _metaschema(uri)
            if meta is not None:
                self._load(meta, uri)
                found = self._places.get(uri)
        return found

    def resolve_dynamic(self, node: SchemaNode, reference: str, keyword: str) -> SchemaNode:
        """Return the node that a dynamic (or recursive) reference leads to from the scope of `node`."""
        found = self.resolve(node, reference, keyword)
        name = reference.partition("#")[2]
        # the scope counts only if the reference itself leads to a dynamic anchor
        if name in self._dynamic.get(found.base, {}) and self._dynamic[found.base][name].schema is found.schema:
            outermost = dict(node.scope).get(name)
            if outermost is not None:
                return self._enter(node, self._dynamic[outermost][name])
        return found


def dialect(schema: Any, default: int) -> int:
    """Return the draft that `$schema` names; `default` if it is unknown."""
    name = schema.get("$schema") if isinstance(schema, dict) else None
    if not isinstance(name, str):
        return default
    return _DIALECTS.get(name.split("://", 1)[-1].rstrip("#").rstrip("/"), default)


def escape(token: str) -> str:
    """Return a key as a part of a JSON pointer."""
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
    """Return a metaschema of a draft, if the package that ships them is installed."""
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
