"""The graph of a program: frozen nodes, checked when loaded, in JSON the wire format of the program API.

Two kinds of edges. A *prefix edge* (`parent`) says which text precedes a node; the way from a node to its root is a
branch. A *data edge* (`Ref`) says whose value is used inside a text, a choice or a tool's arguments. Parents and used
values come before their users, so the order of `nodes` is a possible order of execution.

A staged program sends several graphs: `first` is the id of the first node of this part, lower ids belong to parts
sent before. Nothing here runs anything.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeAlias

import msgspec

from ramet.errors import InvalidProgram
from ramet.lang.graph.checks import Check as Check
from ramet.lang.graph.checks import check_problem
from ramet.lang.graph.events import NodeError as NodeError
from ramet.lang.graph.events import NodeEvent as NodeEvent
from ramet.lang.graph.events import Usage as Usage
from ramet.lang.graph.sampling import Sampling as Sampling
from ramet.lang.graph.sampling import retry_sampling as retry_sampling
from ramet.lang.graph.sampling import sampling_problem as sampling_problem

VERSION = 1
MAX_RETRIES = 1000

JsonValue: TypeAlias = Any  # a JSON value; recursive aliases are not understood by msgspec


class Ref(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The value of another node. `path` leads into a structured value; `format` is a Python format specification, or
    "!r" for the value's repr.

    Without either, the text as it was generated is inserted. At the end of a path a string is inserted as it is, any
    other value as compact JSON.
    """

    node: int
    path: tuple[str | int, ...] = ()
    format: str = ""


Part: TypeAlias = str | Ref
Template: TypeAlias = tuple[Part, ...]


class Constraint(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What a generated text must match. `source`: a pattern, a Lark grammar, a text, or canonical JSON.

    A set of tools (grammar/tools/tool_set.py) without a `format` has that of the model's chat template.
    `in_order`: properties of a JSON schema come in its order, and no others than those it names.
    """

    kind: Literal["json_schema", "regex", "cfg", "choice", "substring", "tools", "structural_tag"]
    source: str
    in_order: bool = False


class Node(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind"):
    """What all nodes have. `line` is `file:line` of the source that recorded it."""

    id: int
    parent: int | None = None
    line: str = ""


class Text(Node, frozen=True, tag="text"):
    """Literal text, with values of other nodes in it.

    `moved`: how many texts before it on its branch it was written in front of; the author let it stand behind them.
    """

    parts: Template
    moved: int = 0


class Argument(Node, frozen=True, tag="argument"):
    """A value given when the graph is run. It stands in no branch: texts refer to it."""

    name: str


class Generate(Node, frozen=True, tag="generate"):
    """Text that the model writes. `type` says how the text becomes a JSON value: `str` (as it is), `int`, ...

    The value of `tools` is {"text": ..., "calls": [{"name": ..., "arguments": {...}}]}, read in the model's own format.

    A value that fails one of `checks` is written anew, up to `retries` times; its text never joins the branch.
    """

    name: str | None = None
    sampling: Sampling = Sampling()
    constraint: Constraint | None = None
    checks: tuple[Check, ...] = ()
    retries: int = 0
    type: Literal["str", "int", "float", "bool", "json", "tools"] = "str"


class Select(Node, frozen=True, tag="select"):
    """The likeliest of `choices` by `scorer`, or one drawn from their probabilities where `temperature` > 0."""

    choices: tuple[Template, ...]
    name: str | None = None
    scorer: Literal["likelihood", "token_normalized", "greedy", "unconditional"] = "likelihood"
    temperature: float = 0.0
    seed: int | None = None


class Fork(Node, frozen=True, tag="fork"):
    """The start of branch `index` of `width`. All of one fork have the same parent and `group`, the first one's id."""

    group: int
    index: int
    width: int


class Join(Node, frozen=True, tag="join"):
    """Done when all `branches` (their last nodes) are. Adds no text, and holds nothing up that doesn't use them."""

    branches: tuple[int, ...]


class Role(Node, frozen=True, tag="role"):
    """The border of a chat message. What it looks like is the model's own affair: its template is applied there."""

    role: str
    is_open: bool


class Tools(Node, frozen=True, tag="tools"):
    """What may be called from here on: a JSON list of functions as OpenAI's API has it.

    At the start of a branch the chat template shows them its own way; later, they are described in a message.
    """

    tools: str


class ToolCall(Node, frozen=True, tag="tool_call"):
    """A call to the caller's tool. `arguments` render to a JSON object; the value is what the tool returned.

    `on_error`: a tool that fails ends the program ("raise"), or its error is the value: {"error": ...} ("report").
    """

    tool: str
    arguments: Template
    name: str | None = None
    on_error: Literal["raise", "report"] = "raise"


class Capture(Node, frozen=True, tag="capture"):
    """The text of this branch after node `start` (None: from its beginning), as a value."""

    name: str | None = None
    start: int | None = None


AnyNode: TypeAlias = Text | Argument | Generate | Select | Fork | Join | Role | Tools | ToolCall | Capture
ROLES = ("system", "user", "assistant", "tool")
SCORERS = ("likelihood", "token_normalized", "greedy", "unconditional")


class Graph(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Nodes in an order in which they could run. `arguments` binds (some of) the Argument nodes, by name."""

    nodes: tuple[AnyNode, ...]
    arguments: dict[str, JsonValue] = {}
    first: int = 0
    version: int = VERSION

    def to_json(self) -> bytes:
        """Return the wire form. Raises InvalidProgram where an argument has no JSON form."""
        try:
            return msgspec.json.encode(self)
        except (TypeError, msgspec.MsgspecError) as error:
            bad = next((n for n, v in self.arguments.items() if not is_json(v)), None)
            what = f"argument {bad!r}" if bad else "a node"
            raise InvalidProgram(f"{what} has no JSON form ({error}); pass a string, number, list or dict") from error

    @staticmethod
    def from_json(data: bytes | str) -> Graph:
        """Read and check a graph. Raises InvalidProgram."""
        try:
            head = msgspec.json.decode(data, type=_Head)
            if head.version != VERSION:
                raise InvalidProgram(f"the graph has version {head.version}, but this Ramet reads version {VERSION}")
            graph = msgspec.json.decode(data, type=Graph)
        except msgspec.MsgspecError as error:
            raise InvalidProgram(f"not a program graph: {error}") from error
        if graph.first == 0:
            GraphIndex().add(graph)
        return graph


class _Head(msgspec.Struct):
    version: int = VERSION


def refs(node: AnyNode) -> Iterator[Ref]:
    """The data edges of a node."""
    templates: Iterable[Template] = ()
    if isinstance(node, Text):
        templates = (node.parts,)
    elif isinstance(node, Select):
        templates = node.choices
    elif isinstance(node, ToolCall):
        templates = (node.arguments,)
    for template in templates:
        for part in template:
            if not isinstance(part, str):
                yield part


def dependencies(node: AnyNode) -> list[int]:
    """Ids that must be done before `node` can run: its parent, the values it uses, the branches it joins."""
    found = [] if node.parent is None else [node.parent]
    found.extend(ref.node for ref in refs(node))
    if isinstance(node, Join):
        found.extend(node.branches)
    return found


def has_value(node: AnyNode) -> bool:
    return isinstance(node, Argument | Generate | Select | ToolCall | Capture)


def variable(name: str) -> str:
    """The program's name of a variable: a name written twice on one branch is `name`, then `name#2`, ..."""
    return name.partition("#")[0]


def render(template: Template, text_of: Callable[[int], str], value_of: Callable[[int], JsonValue]) -> str:
    """The text of a template. `text_of` a node: as generated; `value_of` it: its JSON value."""
    return "".join(part if isinstance(part, str) else _render_ref(part, text_of, value_of) for part in template)


def _render_ref(ref: Ref, text_of: Callable[[int], str], value_of: Callable[[int], JsonValue]) -> str:
    if not ref.path and not ref.format:
        return text_of(ref.node)
    value = value_of(ref.node)
    for step in ref.path:
        try:
            value = value[step]
        except (LookupError, TypeError) as error:
            raise InvalidProgram(f"the value of node {ref.node} has no {step!r}: {value!r}", node=ref.node) from error
    if ref.format:
        return repr(value) if ref.format == "!r" else format(value, ref.format)
    return value_text(value)


def value_text(value: JsonValue) -> str:
    """A JSON value as text in a prompt: a string as it is, anything else as compact JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def parse_value(kind: str, text: str) -> JsonValue:
    """The JSON value of a generated text. Raises ValueError where the text is not one (it was cut, say)."""
    if kind == "int":
        return int(text)
    if kind == "float":
        return float(text)
    if kind == "bool":
        lowered = text.strip().lower()
        if lowered not in ("true", "false"):
            raise ValueError(f"neither true nor false: {text!r}")
        return lowered == "true"
    return json.loads(text) if kind == "json" else text


class GraphIndex:
    """All nodes of a program so far, checked; grows by one part per stage. Owner: whoever runs or reads the program."""

    def __init__(self) -> None:
        self.nodes: list[AnyNode] = []
        self.arguments: dict[str, int] = {}  # name -> node
        self._named: list[int | None] = []  # nearest node with a name, the node itself included, on its branch

    def add(self, graph: Graph, *, is_bound: bool = False) -> None:
        """Check one part and append it; nothing is appended where it is wrong. Raises InvalidProgram.

        `is_bound`: every argument must have its value, because the graph is to be run.
        """
        unbound = [n.name for n in graph.nodes if isinstance(n, Argument) and n.name not in graph.arguments]
        if is_bound and unbound:
            raise InvalidProgram(f"argument {unbound[0]!r} has no value; give it when the graph is run")
        if graph.version != VERSION:
            raise InvalidProgram(f"the graph has version {graph.version}, but this Ramet reads version {VERSION}")
        if graph.first != len(self.nodes):
            raise InvalidProgram(f"the part begins at node {graph.first}, but the program has {len(self.nodes)} nodes")
        before, arguments = len(self.nodes), dict(self.arguments)
        try:
            self._check_order(graph)
            for node in graph.nodes:
                self._check(node)
                self.nodes.append(node)
            self._check_forks(graph)
            for name in graph.arguments:
                if name not in self.arguments:
                    raise InvalidProgram(f"argument {name!r} is given, but no node uses it")
        except InvalidProgram:
            del self.nodes[before:], self._named[before:]
            self.arguments = arguments
            raise

    def path(self, tip: int | None) -> list[AnyNode]:
        """The nodes of the branch that ends at `tip`, root first."""
        found: list[AnyNode] = []
        while tip is not None:
            found.append(self.nodes[tip])
            tip = self.nodes[tip].parent
        return found[::-1]

    def _check_order(self, graph: Graph) -> None:
        total = graph.first + len(graph.nodes)
        forward: dict[int, list[int]] = {}
        for position, node in enumerate(graph.nodes, graph.first):
            if node.id != position:
                raise _wrong(node, f"has id {node.id} at position {position}; ids count from {graph.first}")
            for used in dependencies(node):
                if not 0 <= used < total:
                    raise _wrong(node, f"refers to node {used}, which doesn't exist (the graph has {total} nodes)")
                if used >= position:
                    forward.setdefault(position, []).append(used)
        for user, later in forward.items():
            cycle = _find_cycle(graph, user)
            if cycle:
                raise _wrong(graph.nodes[user - graph.first], "is part of a cycle: " + " -> ".join(map(str, cycle)))
            raise _wrong(graph.nodes[user - graph.first], f"uses node {later[0]} before it is generated")

    def _check(self, node: AnyNode) -> None:
        for ref in refs(node):
            if not has_value(self.nodes[ref.node]):
                raise _wrong(node, f"uses the value of node {ref.node}, but a {_kind(self.nodes[ref.node])} has none")
        if node.parent is not None and isinstance(self.nodes[node.parent], Argument):
            raise _wrong(node, f"stands behind node {node.parent}, but an argument is in no branch")
        if isinstance(node, Argument):
            if node.parent is not None:
                raise _wrong(node, "is an argument and can't have a parent")
            if node.name in self.arguments:
                raise _wrong(node, f"declares argument {node.name!r} a second time")
            self.arguments[node.name] = node.id
        elif isinstance(node, Generate):
            self._check_generate(node)
        elif isinstance(node, Select):
            self._check_select(node)
        elif isinstance(node, Fork):
            if node.width < 1:
                raise _wrong(node, f"forks into {node.width} branches; at least one is needed")
            if not 0 <= node.index < node.width:
                raise _wrong(node, f"is branch {node.index} of a fork of {node.width}")
        elif isinstance(node, Join) and not node.branches:
            raise _wrong(node, "joins no branches")
        elif isinstance(node, Text) and node.moved:
            self._check_moved(node)
        elif isinstance(node, Role) and node.role not in ROLES:
            raise _wrong(node, f"has role {node.role!r}; roles are {', '.join(ROLES)}")
        elif isinstance(node, Tools) and not _is_tool_list(node.tools):
            raise _wrong(node, f"declares tools that are no JSON list of functions with a name: {node.tools[:80]!r}")
        elif isinstance(node, Capture) and node.start is not None:
            self._check_capture(node, node.start)
        self._named.append(self._check_name(node))

    def _check_moved(self, node: Text) -> None:
        left, at = node.moved, node.parent
        while left > 0 and at is not None and isinstance(above := self.nodes[at], Text):
            left, at = left - (not above.moved), above.parent
        if left:
            raise _wrong(node, f"is moved behind {node.moved} texts, which don't stand right before it")

    def _check_generate(self, node: Generate) -> None:
        problem = sampling_problem(node.sampling)
        if problem:
            raise _wrong(node, f"has bad sampling: {problem}")
        problem = next((found for check in node.checks if (found := check_problem(check))), None)
        if problem:
            raise _wrong(node, f"has a bad check: {problem}")
        if not 0 <= node.retries <= MAX_RETRIES:
            raise _wrong(node, f"may be tried {node.retries:,} times more; retries must be in [0, {MAX_RETRIES:,}]")

    def _check_select(self, node: Select) -> None:
        if not node.choices:
            raise _wrong(node, "selects from no choices")
        if any(not choice or choice == ("",) for choice in node.choices):
            raise _wrong(node, "has an empty choice")
        if len(set(node.choices)) < len(node.choices):
            raise _wrong(node, "has the same choice twice")
        if not (math.isfinite(node.temperature) and 0 <= node.temperature <= 100):
            raise _wrong(node, f"has bad sampling: temperature is {node.temperature}, but must be in [0, 100]")

    def _check_capture(self, node: Capture, start: int) -> None:
        above = node.parent
        while above is not None and above > start:
            above = self.nodes[above].parent
        if above != start:
            raise _wrong(node, f"captures from node {start}, which is not on its branch")

    def _check_name(self, node: AnyNode) -> int | None:
        above = None if node.parent is None else self._named[node.parent]
        name = getattr(node, "name", None)
        if name is None or isinstance(node, Argument):
            return above
        if not name:
            raise _wrong(node, "has an empty name; give one, or none at all")
        step = above
        while step is not None:
            other = self.nodes[step]
            if getattr(other, "name", None) == name:
                raise _wrong(node, f"writes variable {name!r}, which node {step} on the same branch already wrote")
            step = None if other.parent is None else self._named[other.parent]
        return node.id

    def _check_forks(self, graph: Graph) -> None:
        groups: dict[int, list[Fork]] = {}
        for node in graph.nodes:
            if isinstance(node, Fork):
                groups.setdefault(node.group, []).append(node)
        for group, forks in groups.items():
            head = forks[0]
            same = all((f.parent, f.width) == (head.parent, head.width) for f in forks)
            if group != head.id or not same or [f.index for f in forks] != list(range(head.width)):
                raise _wrong(head, f"belongs to fork {group} of {head.width}, whose branches don't fit together")


def _find_cycle(graph: Graph, start: int) -> list[int] | None:
    edges: Mapping[int, list[int]] = {node.id: dependencies(node) for node in graph.nodes}
    stack: list[tuple[int, list[int]]] = [(start, [start])]
    seen: set[int] = set()
    while stack:
        at, way = stack.pop()
        for used in edges.get(at, ()):
            if used == start:
                return [*way, start]
            if used not in seen:
                seen.add(used)
                stack.append((used, [*way, used]))
    return None


def _is_tool_list(source: str) -> bool:
    try:
        found = json.loads(source)
        return bool(found) and all(isinstance(one["function"]["name"], str) for one in found)
    except (ValueError, TypeError, LookupError):
        return False


def _kind(node: AnyNode) -> str:
    return type(node).__name__.lower()


def _wrong(node: AnyNode, problem: str) -> InvalidProgram:
    where = f" ({node.line})" if node.line else ""
    return InvalidProgram(f"{_kind(node)} node {node.id}{where} {problem}", node=node.id, source_line=node.line or None)


def is_json(value: object) -> bool:
    """True where a value can be sent."""
    try:
        msgspec.json.encode(value)
    except (TypeError, ValueError, msgspec.MsgspecError):  # ValueError: half of a surrogate pair
        return False
    return True
