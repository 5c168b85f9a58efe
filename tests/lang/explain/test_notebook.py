"""What a notebook shows of programs."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from ramet import MockBackend, State, function, gen
from ramet.errors import UndefinedVariable

HOSTILE = "<script>alert(1)</script>"


@function(temperature=0, max_tokens=60)
def guide(s: State, city: str) -> None:
    s.system("You know every river.")
    s.user(f"Name a river near {city}.")
    s.assistant(gen("river"))


def test_states_records_batches_and_drawings_show_texts_and_never_run_them() -> None:
    backend = MockBackend({"Name a river": f"The Tagus {HOSTILE}"})
    state = guide.run(HOSTILE, backend=backend)
    batch = guide.run_batch([HOSTILE, "Porto"], backend=backend)
    every: list[Any] = [state, state.record, batch, state.graph(), state.explain()]
    for shown in (*every, guide.explain("Porto", backend=backend)):
        html = shown._repr_html_()
        assert HOSTILE not in html
        assert len(html) > 40
    turns = state._repr_html_()
    assert turns.index("system") < turns.index("You know every river.") < turns.index("user") < turns.index("assistant")
    assert "The Tagus &lt;script&gt;" in turns


def test_the_text_of_an_explanation_is_its_text_in_a_notebook_too(monkeypatch: pytest.MonkeyPatch) -> None:
    found = guide.explain("Porto", backend=MockBackend())
    expected = str(found)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert str(found) == expected
    assert "generate river" in expected


def test_a_stream_shows_itself_while_it_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []

    class Handle:
        def update(self, content: Any) -> None:
            shown.append(content)

    module: Any = ModuleType("IPython.display")
    module.HTML, module.display = str, lambda content, display_id: Handle()
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    guide.stream("Porto", backend=MockBackend({"Name a river": "The Douro."}))._ipython_display_()
    assert isinstance(shown[-1], State)
    assert shown[-1]["river"] == "The Douro."
    assert all("<script" not in one for one in shown[:-1])


def test_a_variable_of_a_branch_that_is_not_joined_says_so() -> None:
    @function(max_tokens=3)
    def program(s: State) -> None:
        branches = s.fork(2)
        branches += gen("q")
        s["q"]

    with pytest.raises(UndefinedVariable, match="written on another branch: join it first"):
        program.run(backend=MockBackend())
