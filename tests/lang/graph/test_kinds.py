"""A kind of nodes says in one place how it is checked, changed and run; what works on graphs asks it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Self, get_args, get_type_hints

import msgspec
import pytest

from ramet import MockBackend
from ramet.errors import InvalidProgram
from ramet.lang.backends.openai import OpenAI
from ramet.lang.backends.protocol import Backend
from ramet.lang.graph import ir
from ramet.lang.graph.options import ProgramOptions
from ramet.lang.passes.fold import fold_constants
from ramet.lang.passes.requests import run_order

KINDS: tuple[type[ir.Node], ...] = get_args(ir.AnyNode)


class Shout(ir.ValueNode, frozen=True, tag="shout"):
    """A kind that exists in this test alone: text in capital letters."""

    parts: ir.Template

    def templates(self) -> tuple[ir.Template, ...]:
        return (self.parts,)

    def changed(self, template: Callable[[ir.Template], ir.Template], node: Callable[[int], int]) -> Self:
        return msgspec.structs.replace(self, parts=template(self.parts))

    def problem(self, before: ir.GraphIndex) -> str | None:
        return None if self.parts else "has nothing to shout"

    def evaluate(self, scope: ir.Scope) -> ir.NodeResult:
        text = scope.render(self.parts).upper()
        return ir.NodeResult(text, value=text)


def graph_with_shout() -> ir.Graph:
    nodes: Any = (
        ir.Argument(id=0, name="who"),
        ir.Text(id=1, parts=("Call: ",)),
        Shout(id=2, parent=1, parts=("hey ", ir.Ref(0))),
        ir.Text(id=3, parent=2, parts=(" and again ", ir.Ref(2))),
        ir.Capture(id=4, parent=3),
    )
    return ir.Graph(nodes, {"who": "Ann"})


def run(backend: Backend, graph: ir.Graph) -> dict[int, ir.NodeEvent]:
    ended: dict[int, ir.NodeEvent] = {}
    is_over = threading.Event()

    def on_event(event: ir.NodeEvent) -> None:
        ended[event.node] = event
        if len(ended) == len(graph.nodes):
            is_over.set()

    session = backend.start(ProgramOptions(), on_event)
    session.extend(graph)
    session.finish()
    assert is_over.wait(10)
    return ended


def test_a_new_kind_is_checked_and_runs_on_every_backend_without_a_change_elsewhere() -> None:
    with MockBackend() as here, OpenAI("http://127.0.0.1:1/v1") as there:
        for backend in (here, there):
            assert run(backend, graph_with_shout())[4].value == "Call: HEY ANN and again HEY ANN"
    bad: Any = (Shout(id=0, parts=(), line="f.py:3"),)
    with pytest.raises(InvalidProgram, match=r"shout node 0 \(f.py:3\) has nothing to shout"):
        ir.GraphIndex().add(ir.Graph(bad))


def test_a_new_kind_is_folded_and_ordered_like_the_others() -> None:
    folded = fold_constants(graph_with_shout())
    (shout,) = (node for node in folded.nodes if isinstance(node, Shout))
    assert shout.parts == ("hey Ann",)
    assert [node.id for node in run_order(graph_with_shout())] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_kind_reports_every_template_and_every_node_that_its_fields_name(kind: type[ir.Node]) -> None:
    hints = get_type_hints(kind)
    values: dict[str, Any] = {"id": 9}
    templates = []
    for field in msgspec.structs.fields(kind):
        if hints[field.name] == ir.Template:
            values[field.name] = (f"in {field.name}", ir.Ref(5))
            templates.append(values[field.name])
        elif hints[field.name] == tuple[ir.Template, ...]:
            values[field.name] = ((f"in {field.name}", ir.Ref(5)),)
            templates += values[field.name]
        elif field.name in ("group", "start"):
            values[field.name] = 5
        elif field.name == "branches":
            values[field.name] = (5,)
        elif field.required and field.name != "id":
            path = ir.WrittenPath((1,), "x", "x", "x")
            values[field.name] = {str: "x", int: 1, bool: True, ir.WrittenPath: path}[hints[field.name]]
    node: Any = kind(**values)
    assert list(node.templates()) == templates
    assert node.changed(lambda template: template, lambda other: other) == node
    moved = node.changed(lambda template: (template[0], ir.Ref(6)), lambda other: other + 1)
    assert b"5" not in msgspec.json.encode(moved), "a place that names node 5 was not changed"
    assert ir.dependencies(moved) == [6] * (len(templates) + len(node.joined()))
