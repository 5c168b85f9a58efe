"""The graph of a program: frozen nodes that are checked when loaded. Its JSON is the wire format of the program API.

There are two kinds of edges. A *prefix edge* (`parent`) leads to the node whose text precedes a node; the path from a
node to its root is a branch. A *data edge* (`Ref`) leads to the node whose value is used in a text, a choice or a
tool's arguments. Parents and used values come before their users, so the order of `nodes` is a valid order of
execution.

A staged program sends several graphs, its parts. `first` is the id of a part's first node; lower ids belong to earlier
parts. Nothing here runs anything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final, Literal, Protocol, Self, TypeAlias

import msgspec

from ramet.errors import InvalidProgram
from ramet.lang.graph.checks import Check as Check
from ramet.lang.graph.checks import check_problem
from ramet.lang.graph.constraint import Constraint as Constraint
from ramet.lang.graph.events import NodeError as NodeError
from ramet.lang.graph.events import NodeEvent as NodeEvent
from ramet.lang.graph.events import NodeResult as NodeResult
from ramet.lang.graph.events import Usage as Usage
from ramet.lang.graph.narrowing import Narrowing, narrowing
from ramet.lang.graph.operations import Operation, Step, follow, path_problem, path_text
from ramet.lang.graph.sampling import Sampling as Sampling
from ramet.lang.graph.sampling import is_repeatable as is_repeatable
from ramet.lang.graph.sampling import retry_sampling as retry_sampling
from ramet.lang.graph.sampling import sampling_problem as sampling_problem

VERSION = 2  # 1 has no operations in paths; it is read, too
MAX_RETRIES = 1000
DEFAULT_SCORER: Final = "calibrated"  # of selections: choice_scores.py

JsonValue: TypeAlias = Any  # a JSON value; msgspec does not understand recursive aliases


class Ref(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The value of another node.

    `path` leads into a structured value. A string at its end is inserted as it is, any other value as compact JSON; but
    the result of an operation (operations.py) as Python's `format()` writes it. `format` is a Python format
    specification, or "!r" for the value's repr. Without both, the generated text is inserted unchanged.
    """

    node: int
    path: tuple[Step, ...] = ()
    format: str = ""


Part: TypeAlias = str | Ref
Template: TypeAlias = tuple[Part, ...]


class Scope(Protocol):
    """The part of a run that a node may use when it is evaluated. All its dependencies are then done."""

    def render(self, template: Template) -> str: ...

    def argument(self, name: str) -> JsonValue: ...

    def text_after(self, start: int | None, tip: int | None) -> str:
        """Return the text of the branch that ends at `tip`, after node `start` (None: from the branch's beginning)."""

    def mark(self, node: Marked) -> str:
        """Return the text that the model's chat template writes at this node."""

    def tokens(self, tip: int | None) -> JsonValue:
        """Return the token path of the branch that ends at `tip` (WrittenPath), or None where nobody knows it."""


class Node(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind"):
    """The fields of every node, and the defaults of a kind of node.

    A new kind is a class here and a member of AnyNode. Passes and runtimes use the attributes and methods below. They
    test a node's class only for work that a single kind needs. `line`: `file:line` of the source that recorded it.
    """

    id: int
    parent: int | None = None
    line: str = ""

    # Who gives the result: whoever runs the graph, by `evaluate`; a model; or the caller of the program. The result of
    # `evaluate` is then the question to the caller.
    run_by: ClassVar[Literal["runner", "model", "caller"]] = "runner"
    takes_failures: ClassVar[bool] = False  # runs once its dependencies are over, even if they failed
    is_markup: ClassVar[bool] = False  # its text is a chat template's: spellings of special tokens become tokens
    is_border: ClassVar[bool] = False  # texts before and after it are tokenised separately

    @property
    def kind_name(self) -> str:
        """The name of the kind in messages and tables."""
        return type(self).__name__.lower()

    @property
    def label(self) -> str | None:
        """The name of the variable or argument, or None for nodes without one."""
        return None

    def templates(self) -> tuple[Template, ...]:
        """Its texts that may contain values of other nodes."""
        return ()

    def joined(self) -> tuple[int, ...]:
        """The nodes that it needs besides its parent and the nodes whose values it uses."""
        return ()

    def changed(self, template: Callable[[Template], Template], node: Callable[[int], int]) -> Self:
        """Return a copy in which each template, and each id of another node in the kind's own fields, is replaced."""
        return self

    def problem(self, before: GraphIndex) -> str | None:
        """Return the problem of the node, which follows those in `before`, or None."""
        return None

    def evaluate(self, scope: Scope) -> NodeResult:
        """Return the result of a node that no model runs. Any exception fails the node."""
        return NodeResult()


class ValueNode(Node, frozen=True, kw_only=True):
    """A node with a value, which texts and choices may contain. `name`: of the variable or argument that has it."""

    name: str | None = None

    @property
    def label(self) -> str | None:
        return self.name


class Text(Node, frozen=True, tag="text"):
    """Literal text that may contain values of other nodes.

    `moved`: the number of texts that it was moved past. The author wrote it before them and allowed it to follow them.
    """

    parts: Template
    moved: int = 0

    def templates(self) -> tuple[Template, ...]:
        return (self.parts,)

    def changed(self, template: Callable[[Template], Template], node: Callable[[int], int]) -> Self:
        return msgspec.structs.replace(self, parts=template(self.parts))

    def problem(self, before: GraphIndex) -> str | None:
        left, at = self.moved, self.parent
        while left > 0 and at is not None and isinstance(above := before.nodes[at], Text):
            left, at = left - (not above.moved), above.parent
        return f"is moved behind {self.moved} texts, which don't stand right before it" if left else None

    def evaluate(self, scope: Scope) -> NodeResult:
        return NodeResult(scope.render(self.parts))


class Argument(ValueNode, frozen=True, tag="argument"):
    """A value that is given when the graph is run. It belongs to no branch; texts refer to it."""

    name: str

    def problem(self, before: GraphIndex) -> str | None:
        if self.parent is not None:
            return "is an argument and can't have a parent"
        return f"declares argument {self.name!r} a second time" if self.name in before.arguments else None

    def evaluate(self, scope: Scope) -> NodeResult:
        value = scope.argument(self.name)
        return NodeResult(value=value, value_text=value_text(value))


class Generate(ValueNode, frozen=True, tag="generate"):
    """Text that the model writes. `type`: how the text becomes a JSON value: `str` (unchanged), `int`, ...

    The value of type `tools` is {"text": ..., "calls": [{"name": ..., "arguments": {...}}]}, parsed from the model's
    own format. The value of type `captures` is {"text": ..., "captures": {name: value}}, of a constraint of kind
    `grammar`; a capture that may be there several times has a list.

    `checks` narrow the constraint where they can (narrowing.py). A value that fails one is generated again, up to
    `retries` times. Its text never joins the branch. `tells_text`: its text is reported as it is generated, whatever
    the options of the run say. `draft`: what the text is expected to be like; only its speed depends on it.
    `adapter`: the name of the adapter that writes it; empty: that of the run's options. `model`: the name of the model,
    where the backend has several; empty: the first one. `tells_calls`: each of its tool calls is reported (NodeEvent of
    kind `call`) as soon as its text is closed, so that the tool can start while the text goes on.
    """

    sampling: Sampling = Sampling()
    constraint: Constraint | None = None
    checks: tuple[Check, ...] = ()
    retries: int = 0
    tells_text: bool = False
    tells_calls: bool = False
    draft: str = ""
    adapter: str = ""
    model: str = ""
    type: Literal["str", "int", "float", "bool", "json", "tools", "captures"] = "str"

    run_by = "model"
    is_border = True

    @property
    def is_readable_early(self) -> bool:
        """True if parts of the value are sure as soon as they are written: JSON that no check may still refuse."""
        return self.type == "json" and not self.checks

    @property
    def is_typed(self) -> bool:
        """True if the value is read from the text, so that a space before it does not change it."""
        return self.type in ("int", "float", "bool", "json")

    def problem(self, before: GraphIndex) -> str | None:
        problem = sampling_problem(self.sampling)
        if problem:
            return f"has bad sampling: {problem}"
        problem = next((found for check in self.checks if (found := check_problem(check))), None)
        if problem:
            return f"has a bad check: {problem}"
        if self.type == "captures" and (self.constraint is None or self.constraint.kind != "grammar"):
            return "has type captures, but its constraint is no grammar"
        if not 0 <= self.retries <= MAX_RETRIES:
            return f"may be tried {self.retries:,} times more; retries must be in [0, {MAX_RETRIES:,}]"
        return None

    def narrowed(self) -> Narrowing:
        """Return the constraint with the checks that become masks, and which checks these are."""
        if self.sampling.stop_regex:
            return Narrowing(self.constraint, (), self.checks)  # a mask cannot know where the text is cut off
        return narrowing(self.constraint, self.checks, self.type, self.sampling.stop or ())


class Select(ValueNode, frozen=True, tag="select"):
    """The likeliest of `choices` by `scorer`, or a draw from their probabilities if `temperature` > 0.

    `model`: as in Generate.
    """

    choices: tuple[Template, ...]
    scorer: Literal["calibrated", "likelihood", "token_normalized", "greedy", "unconditional"] = DEFAULT_SCORER
    temperature: float = 0.0
    seed: int | None = None
    model: str = ""

    run_by = "model"
    is_border = True

    def templates(self) -> tuple[Template, ...]:
        return self.choices

    def changed(self, template: Callable[[Template], Template], node: Callable[[int], int]) -> Self:
        return msgspec.structs.replace(self, choices=tuple(template(choice) for choice in self.choices))

    def problem(self, before: GraphIndex) -> str | None:
        if not self.choices:
            return "selects from no choices"
        if any(not choice or choice == ("",) for choice in self.choices):
            return "has an empty choice"
        if len(set(self.choices)) < len(self.choices):
            return "has the same choice twice"
        problem = sampling_problem(Sampling(temperature=self.temperature))
        return problem and f"has bad sampling: {problem}"


class Fork(Node, frozen=True, tag="fork"):
    """The start of branch `index` of `width`.

    All Fork nodes of one fork have the same parent and the same `group`, the id of the first of them. `is_race`: one
    branch of the fork is enough, so a failure does not end the program while another branch has not failed.
    """

    group: int
    index: int
    width: int
    is_race: bool = False

    is_border = True

    def changed(self, template: Callable[[Template], Template], node: Callable[[int], int]) -> Self:
        return msgspec.structs.replace(self, group=node(self.group))

    def problem(self, before: GraphIndex) -> str | None:
        if self.width < 1:
            return f"forks into {self.width} branches; at least one is needed"
        if not 0 <= self.index < self.width:
            return f"is branch {self.index} of a fork of {self.width}"
        return None


class Join(Node, frozen=True, tag="join"):
    """Done when all `branches` (their last nodes) are done. Adds no text; nodes that don't use it don't wait for it."""

    branches: tuple[int, ...]

    takes_failures = True

    def joined(self) -> tuple[int, ...]:
        return self.branches

    def changed(self, template: Callable[[Template], Template], node: Callable[[int], int]) -> Self:
        return msgspec.structs.replace(self, branches=tuple(dict.fromkeys(map(node, self.branches))))

    def problem(self, before: GraphIndex) -> str | None:
        return None if self.branches else "joins no branches"


class Role(Node, frozen=True, tag="role"):
    """The start or end of a chat message. Its text comes from the model's chat template."""

    role: str
    is_open: bool

    is_markup = True

    def problem(self, before: GraphIndex) -> str | None:
        return None if self.role in ROLES else f"has role {self.role!r}; roles are {', '.join(ROLES)}"

    def evaluate(self, scope: Scope) -> NodeResult:
        return NodeResult(scope.mark(self))


class Tools(Node, frozen=True, tag="tools"):
    """The tools that the model may call from here on: a JSON list of functions in the form of OpenAI's API.

    At the start of a branch the chat template shows them. Later ones are described in a message.
    """

    tools: str

    is_markup = True

    def problem(self, before: GraphIndex) -> str | None:
        if _is_tool_list(self.tools):
            return None
        return f"declares tools that are no JSON list of functions with a name: {self.tools[:80]!r}"

    def evaluate(self, scope: Scope) -> NodeResult:
        return NodeResult(scope.mark(self))


class Thinking(Node, frozen=True, tag="thinking"):
    """The start or end of the model's thinking before an answer. Its text comes from the model's chat template.

    A generation right after a start writes the thinking. It ends where the model writes the end, or by `max_tokens`.
    `model`: as in Generate.
    """

    is_open: bool
    model: str = ""

    is_markup = True

    def evaluate(self, scope: Scope) -> NodeResult:
        return NodeResult(scope.mark(self))


class ToolCall(ValueNode, frozen=True, tag="tool_call"):
    """A call of one of the caller's tools. `arguments` render to a JSON object; the value is the tool's result.

    `on_error`: a tool's failure ends the program ("raise"), or becomes the value {"error": ...} ("report").
    `is_written`: the result is what another model writes here: {"text": what joins the branch, "value": ..., "shown":
    what a template inserts for the value}.
    """

    tool: str
    arguments: Template
    on_error: Literal["raise", "report"] = "raise"
    is_written: bool = False

    run_by = "caller"

    def templates(self) -> tuple[Template, ...]:
        return (self.arguments,)

    def changed(self, template: Callable[[Template], Template], node: Callable[[int], int]) -> Self:
        return msgspec.structs.replace(self, arguments=template(self.arguments))

    def evaluate(self, scope: Scope) -> NodeResult:
        return NodeResult(value={"tool": self.tool, "arguments": parse_value("json", scope.render(self.arguments))})

    def answered(self, value: JsonValue) -> NodeResult:
        """Return the result that the caller's answer gives. Raises InvalidProgram for a wrong one."""
        if not self.is_written:
            return NodeResult(value=value, value_text=value_text(value))
        found = value if isinstance(value, dict) else {}
        text, shown = found.get("text"), found.get("shown")
        if not isinstance(text, str) or not isinstance(shown, str) or "value" not in found:
            raise InvalidProgram(f"{self.tool} was answered by {repr(value)[:200]}; it needs text, value and shown")
        return NodeResult(text, value=found["value"], value_text=shown)


class Capture(ValueNode, frozen=True, tag="capture"):
    """What is written on this branch, as a value.

    `of` "text": its text after node `start` (None: from the branch's beginning). `of` "tokens": its token path up to
    here (WrittenPath); null on an endpoint that takes text.
    """

    start: int | None = None
    of: Literal["text", "tokens"] = "text"

    def changed(self, template: Callable[[Template], Template], node: Callable[[int], int]) -> Self:
        return self if self.start is None else msgspec.structs.replace(self, start=node(self.start))

    def problem(self, before: GraphIndex) -> str | None:
        if self.of == "tokens" and self.start is not None:
            return f"captures tokens from node {self.start}, but a token path begins with the branch"
        above = self.parent
        while self.start is not None and above is not None and above > self.start:
            above = before.nodes[above].parent
        if self.start is None or above == self.start:
            return None
        return f"captures from node {self.start}, which is not on its branch"

    def evaluate(self, scope: Scope) -> NodeResult:
        if self.of == "tokens":
            return NodeResult(value=scope.tokens(self.parent))
        text = scope.text_after(self.start, self.parent)
        return NodeResult(value=text, value_text=text)


class WrittenPath(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The tokens of a branch, and the text after them that is not tokenised yet.

    `vocabulary`: what tells the tokens of one tokenizer from those of another. `digest`: of the branch's text.
    """

    tokens: tuple[int, ...]
    rest: str
    vocabulary: str
    digest: str


class Recalled(Node, frozen=True, tag="recalled"):
    """The token path that the branch had, when it was written up to here.

    The runtime goes on from these tokens, which its cache may hold, instead of tokenising the text again; unless the
    text or the vocabulary is another one by now.
    """

    path: WrittenPath


Marked: TypeAlias = Role | Tools | Thinking  # nodes whose text a chat template writes
AnyNode: TypeAlias = (
    Text | Argument | Generate | Select | Fork | Join | Role | Tools | Thinking | ToolCall | Capture | Recalled
)
ROLES = ("system", "user", "assistant", "tool")
SCORERS = ("calibrated", "likelihood", "token_normalized", "greedy", "unconditional")


class Graph(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Nodes in a valid order of execution. `arguments`: values of all or some Argument nodes, by name."""

    nodes: tuple[AnyNode, ...]
    arguments: dict[str, JsonValue] = {}
    first: int = 0
    version: int = VERSION

    def to_json(self) -> bytes:
        """Return the wire form. Raises InvalidProgram if an argument has no JSON form."""
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
            graph = msgspec.json.decode(data, type=Graph)
        except msgspec.MsgspecError as error:
            version = _version(data)
            if version not in (None, *_READ):
                raise InvalidProgram(_other_version(version)) from error
            raise InvalidProgram(f"not a program graph: {error}") from error
        if graph.version not in _READ:
            raise InvalidProgram(_other_version(graph.version))
        if graph.first == 0:
            GraphIndex().add(graph)
        return graph


_READ = (1, VERSION)
_SEVERAL = "give the run backends by name, backend={'small': ..., 'big': ...}"


def _version(data: bytes | str) -> JsonValue:
    """Return the version of a graph that can't be read, as far as it has one."""
    try:
        head = msgspec.json.decode(data, type=dict)
    except msgspec.MsgspecError:
        return None
    return head.get("version")


def _other_version(version: JsonValue) -> str:
    return f"the graph has version {version}, but this Ramet reads versions up to {VERSION}"


def refs(node: AnyNode) -> Iterator[Ref]:
    """Yield the data edges of a node."""
    for template in node.templates():
        for part in template:
            if not isinstance(part, str):
                yield part


def dependencies(node: AnyNode) -> list[int]:
    """Return the ids that `node` waits for: its parent, the nodes whose values it uses, the branches it joins."""
    found = [] if node.parent is None else [node.parent]
    found.extend(ref.node for ref in refs(node))
    found.extend(node.joined())
    return found


def renumbered(node: AnyNode, new_id: Mapping[int, int]) -> AnyNode:
    """Return a node with other ids: its own, and those of the nodes that it needs."""

    def moved(template: Template) -> Template:
        return tuple(p if isinstance(p, str) else msgspec.structs.replace(p, node=new_id[p.node]) for p in template)

    parent = None if node.parent is None else new_id[node.parent]
    return msgspec.structs.replace(node.changed(moved, new_id.__getitem__), id=new_id[node.id], parent=parent)


def model_of(node: AnyNode) -> str:
    """Return the name of the model that a node asks for. Empty: none, as where no model writes anything."""
    return node.model if isinstance(node, Generate | Select | Thinking) else ""


def shown_text(node: AnyNode, text: str) -> str:
    """Return what a template inserts for the value of a generated text: without the space before a typed value."""
    return text.removeprefix(" ") if isinstance(node, Generate) and node.is_typed else text


def parts_used(node: AnyNode) -> dict[int, set[tuple[str | int, ...]]]:
    """Return the nodes of whose values only parts are used, with the paths to these parts: fields and items."""
    found: dict[int, set[tuple[str | int, ...]]] = {}
    for ref in refs(node):
        is_step = [isinstance(step, str) or (isinstance(step, int) and step >= 0) for step in ref.path]
        length = is_step.index(False) if False in is_step else len(is_step)
        found.setdefault(ref.node, set()).add(ref.path[:length])  # type: ignore[arg-type]
    whole = {node.parent, *node.joined()}
    return {used: paths for used, paths in found.items() if used not in whole and () not in paths}


def branch(nodes: Sequence[AnyNode], tip: int | None, start: int | None = None) -> list[AnyNode]:
    """Return the nodes of the branch that ends at `tip`, root first. With `start`, only those after it."""
    found: list[AnyNode] = []
    while tip is not None and tip != start:
        found.append(nodes[tip])
        tip = nodes[tip].parent
    return found[::-1]


def is_in_message(nodes: Sequence[AnyNode], node: AnyNode) -> bool:
    """Return whether a node is inside an open chat message."""
    at = node.parent
    while at is not None:
        above = nodes[at]
        if isinstance(above, Role):
            return above.is_open
        at = above.parent
    return False


def is_thinking(nodes: Sequence[AnyNode], node: AnyNode) -> bool:
    """Return whether a generation writes the model's thinking."""
    above = None if node.parent is None else nodes[node.parent]
    return isinstance(above, Thinking) and above.is_open


def thinking_of(nodes: Sequence[AnyNode], node: AnyNode) -> int | None:
    """Return the generation that wrote the thinking before a generation, or None if there was none."""
    above = None if node.parent is None else nodes[node.parent]
    return above.parent if isinstance(above, Thinking) and not above.is_open else None


def text_digest(text: str) -> str:
    """Return what tells one text from another."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def variable(name: str) -> str:
    """Return the program's name of a variable. Nodes that write it again on one branch are `name#2`, `name#3`, ..."""
    return name.partition("#")[0]


def render(template: Template, text_of: Callable[[int], str], value_of: Callable[[int], JsonValue]) -> str:
    """Return the text of a template. `text_of(node)`: its generated text; `value_of(node)`: its JSON value."""
    return "".join(part if isinstance(part, str) else _render_ref(part, text_of, value_of) for part in template)


def _render_ref(ref: Ref, text_of: Callable[[int], str], value_of: Callable[[int], JsonValue]) -> str:
    if not ref.path and not ref.format:
        return text_of(ref.node)
    value = value_of(ref.node)
    for step in ref.path:
        try:
            value = follow(value, (step,))
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            where = f"the value of node {ref.node}"
            if isinstance(step, Operation):
                raise InvalidProgram(f"{path_text((step,))} of {where} failed: {error}", node=ref.node) from error
            raise InvalidProgram(f"{where} has no {step!r}: {value!r}", node=ref.node) from error
    if ref.format == "!r":
        return repr(value)
    if not ref.format and not any(isinstance(step, Operation) for step in ref.path):
        return value_text(value)
    try:
        return format(value, ref.format)
    except (TypeError, ValueError) as error:
        where = f"the value of node {ref.node}"
        raise InvalidProgram(f"{where} can't be formatted by {ref.format!r}: {error}", node=ref.node) from error


def value_text(value: JsonValue) -> str:
    """Return a JSON value as text for a prompt: a string unchanged, any other value as compact JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def parse_value(kind: str, text: str) -> JsonValue:
    """Return the JSON value of a generated text. Raises ValueError for other text, such as text that was cut off."""
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
    """All nodes of a program so far, checked. Each stage adds a part. Owner: whoever runs or reads the program."""

    def __init__(self) -> None:
        self.nodes: list[AnyNode] = []
        self.arguments: dict[str, int] = {}  # name -> node
        self._named: list[int | None] = []  # nearest node with a name, the node itself included, on its branch

    def add(self, graph: Graph, *, is_bound: bool = False) -> None:
        """Check one part and append it. Raises InvalidProgram for a wrong part, of which nothing is appended.

        `is_bound`: every argument must have its value, and no node name a model, because one model is to run the graph.
        """
        unbound = [n.name for n in graph.nodes if isinstance(n, Argument) and n.name not in graph.arguments]
        asked = next((node for node in graph.nodes if model_of(node)), None) if is_bound else None
        if asked is not None:
            raise _wrong(asked, f"asks for model {model_of(asked)!r}, but the backend has one model: {_SEVERAL}")
        if is_bound and unbound:
            raise InvalidProgram(f"argument {unbound[0]!r} has no value; give it when the graph is run")
        if graph.version not in _READ:
            raise InvalidProgram(_other_version(graph.version))
        if graph.first != len(self.nodes):
            raise InvalidProgram(f"the part begins at node {graph.first}, but the program has {len(self.nodes)} nodes")
        before, arguments = len(self.nodes), dict(self.arguments)
        try:
            self._check_order(graph)
            for node in graph.nodes:
                self._check(node)
                self.nodes.append(node)
            self._check_names(graph)
            self._check_forks(graph)
            for name in graph.arguments:
                if name not in self.arguments:
                    raise InvalidProgram(f"argument {name!r} is given, but no node uses it")
        except InvalidProgram:
            del self.nodes[before:], self._named[before:]
            self.arguments = arguments
            raise

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
            if not isinstance(self.nodes[ref.node], ValueNode):
                raise _wrong(
                    node, f"uses the value of node {ref.node}, but a {self.nodes[ref.node].kind_name} has none"
                )
            problem = path_problem(ref.path) if ref.path else None
            if problem is not None:
                raise _wrong(node, problem)
        if node.parent is not None and isinstance(self.nodes[node.parent], Argument):
            raise _wrong(node, f"stands behind node {node.parent}, but an argument is in no branch")
        problem = node.problem(self)
        if problem is not None:
            raise _wrong(node, problem)
        if isinstance(node, Argument):
            self.arguments[node.name] = node.id
        if node.label == "":
            raise _wrong(node, "has an empty name; give one, or none at all")
        above = None if node.parent is None else self._named[node.parent]
        self._named.append(node.id if _writes_variable(node) else above)

    def _check_names(self, graph: Graph) -> None:
        """Check that no branch writes a variable twice: one walk over the new nodes with names and those above them."""
        below: dict[int | None, list[int]] = {}  # nodes with names, by the nearest one above them
        todo = [node.id for node in graph.nodes if _writes_variable(node)]
        while todo:
            step = todo.pop()
            parent = self.nodes[step].parent
            above = None if parent is None else self._named[parent]
            if above is not None and above < graph.first and above not in below:
                todo.append(above)
            below.setdefault(above, []).append(step)
        written: dict[str | None, int] = {}  # variables of the branch, each with its node
        steps = below.get(None, [])
        while steps:
            step = steps.pop()
            if step < 0:  # the end of the branch below node ~step
                del written[self.nodes[~step].label]
                continue
            name = self.nodes[step].label
            if name in written:
                other = written[name]
                raise _wrong(
                    self.nodes[step], f"writes variable {name!r}, which node {other} on the same branch already wrote"
                )
            written[name] = step
            steps += [~step, *below.get(step, ())]

    def _check_forks(self, graph: Graph) -> None:
        groups: dict[int, list[Fork]] = {}
        for node in graph.nodes:
            if isinstance(node, Fork):
                groups.setdefault(node.group, []).append(node)
        for group, forks in groups.items():
            head = forks[0]
            same = all((f.parent, f.width) == (head.parent, head.width) for f in forks)
            is_whole = len(forks) == head.width and all(fork.index == i for i, fork in enumerate(forks))
            if group != head.id or not same or not is_whole:
                raise _wrong(head, f"belongs to fork {group} of {head.width}, whose branches don't fit together")


def _find_cycle(graph: Graph, start: int) -> list[int] | None:
    """Return the nodes of a cycle through `start`, from it to itself, or None."""
    edges: Mapping[int, list[int]] = {node.id: dependencies(node) for node in graph.nodes}
    stack, user_of = [start], dict[int, int]()
    while stack:
        at = stack.pop()
        for used in edges.get(at, ()):
            if used == start:
                way = [start, at]
                while way[-1] != start:
                    way.append(user_of[way[-1]])
                return way[::-1]
            if used not in user_of:
                user_of[used] = at
                stack.append(used)
    return None


def _writes_variable(node: AnyNode) -> bool:
    return bool(node.label) and not isinstance(node, Argument)


def _is_tool_list(source: str) -> bool:
    try:
        found = json.loads(source)
        return bool(found) and all(isinstance(one["function"]["name"], str) for one in found)
    except (ValueError, TypeError, LookupError):
        return False


def _wrong(node: AnyNode, problem: str) -> InvalidProgram:
    where = f" ({node.line})" if node.line else ""
    return InvalidProgram(
        f"{node.kind_name} node {node.id}{where} {problem}", node=node.id, source_line=node.line or None
    )


def is_json(value: object) -> bool:
    """Return whether a value can be sent as JSON."""
    try:
        msgspec.json.encode(value)
    except (TypeError, ValueError, msgspec.MsgspecError):  # ValueError: a lone surrogate
        return False
    return True
