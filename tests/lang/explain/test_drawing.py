"""Pictures of programs: what is on a card, where it stands, and that every form is well-formed and self-contained."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from ramet import MockBackend, State, function, gen, select
from ramet.cli.main import main
from ramet.errors import InvalidRequest
from ramet.lang.explain.cards import MAX_BRANCHES, Card
from ramet.lang.explain.drawing import Drawing
from ramet.lang.explain.svg import CHARS
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "programs"


@pytest.fixture
def backend() -> Iterator[MockBackend]:
    with MockBackend({"pro:": "Yes <b>&", "contra:": 'No "really"'}, tokenizer=ByteTokenizer()) as mock:
        yield mock
    mock.engine.shutdown()


@function(max_tokens=8)
def debate(s: State, topic: str) -> None:
    with s.user():
        s += f"About {topic}. "
    left, right = s.fork(2)
    left += "pro:" + gen("pro")
    right += "contra:" + gen("contra")
    s.join(left, right)
    s += f"They said {left['pro']} and {right['contra']}. " + select("winner", ["pro", "contra"])
    late = s.copy()
    late += "One more thing: " + gen("more")


def by_name(drawing: Drawing) -> dict[str, Card]:
    return {card.name or card.kind: card for card in drawing.cards}


def test_a_run_becomes_cards_with_what_was_measured(backend: MockBackend) -> None:
    state = debate.run("rain")
    drawing = state.graph()
    cards = by_name(drawing)
    assert list(cards) == ["text", "pro", "contra", "winner", "more"]
    assert cards["text"].prompt == "user: About rain. \n"
    assert cards["pro"].written_text == "Yes <b>&"
    usage = state.record.events[next(n.id for n in state.record.graph.nodes if getattr(n, "name", "") == "pro")].usage
    assert usage is not None
    assert (cards["pro"].cached, cards["pro"].computed) == (usage.cached_tokens, usage.computed_tokens)
    assert cards["pro"].end_s is not None
    assert f"{state.usage.computed_tokens:,} computed" in drawing.summary


def test_a_selection_shows_its_probabilities_and_a_run_its_timeline(backend: MockBackend) -> None:
    state = debate.run("rain")
    probs = dict(zip(state.meta("winner")["choices"], state.meta("winner")["probs"], strict=True))
    likeliest = sorted(probs, key=lambda choice: -probs[choice])
    expected = ", ".join(f"{choice} {probs[choice]:.0%}" for choice in likeliest)
    drawing = state.graph()
    assert by_name(drawing)["winner"].probs == expected
    assert by_name(drawing)["pro"].probs == ""
    root = ElementTree.fromstring(drawing.svg())
    (times,) = (group for group in root.iter() if group.get("class") == "times")
    told = [text.text for text in times.iter() if text.get("class") == "label"]
    assert sorted(map(str, told)) == ["gen contra", "gen more", "gen pro", "select winner"]
    bars = [one for one in times if one.tag.endswith("rect")]
    assert all(float(bar.get("width", 0)) > 0 for bar in bars)
    assert max(float(bar.get("x", 0)) + float(bar.get("width", 0)) for bar in bars) <= float(root.get("width", 0))
    assert expected in "".join(root.itertext())
    assert 'class="times"' not in debate.graph(topic="rain").svg(), "a plan has no times"


def test_the_roles_of_messages_have_colours_and_texts_that_look_like_them_do_not(backend: MockBackend) -> None:
    @function
    def program(s: State) -> None:
        s.system("Be brief.")
        s.user("the user: Bob")
        s.assistant(gen("x", max_tokens=3))

    root = ElementTree.fromstring(program.run(backend=backend).graph().svg())
    spans = [one for one in root.iter() if one.tag.endswith("tspan")]
    assert [(one.get("class"), one.text) for one in spans] == [
        (f"role {role}", f"{role}:") for role in ("system", "user", "assistant")
    ]


def test_a_generation_that_wrote_nothing_says_so(backend: MockBackend) -> None:
    @function
    def program(s: State) -> None:
        s += "Nothing: " + gen("x", regex="")

    assert "(no text)" in program.run().graph().svg()
    assert "(no text)" not in program.graph().svg()
    assert "(no text)" not in debate.run("rain").graph().svg()


def test_edges_are_prefixes_joins_and_values(backend: MockBackend) -> None:
    cards = by_name(debate.run("rain").graph())
    root, pro, contra, winner = (cards[name].id for name in ("text", "pro", "contra", "winner"))
    assert [cards[name].parent for name in ("pro", "contra", "winner", "more")] == [root, root, root, winner]
    assert cards["winner"].joins == [pro, contra]
    assert cards["winner"].uses == []  # they are joined already
    assert cards["text"].num_readers == 4
    assert cards["text"].prefix_tokens == str(len("user\nAbout rain. \n") + 2)


def test_branches_of_one_fork_have_one_colour_and_lanes_of_their_own(backend: MockBackend) -> None:
    cards = by_name(debate.run("rain").graph())
    assert cards["pro"].hue == cards["contra"].hue != cards["text"].hue == cards["winner"].hue
    assert cards["text"].lane == cards["winner"].lane == cards["more"].lane == 0
    assert {cards["pro"].lane, cards["contra"].lane} == {1, 2}
    assert [cards[name].column for name in cards] == [0, 1, 1, 2, 3]


def test_a_plan_is_drawn_with_its_counts(backend: MockBackend) -> None:
    drawing = debate.graph(topic="rain")
    cards = by_name(drawing)
    assert cards["pro"].label.endswith("≤ 8 written")
    assert cards["pro"].computed == len("user\nAbout rain. \npro:") + 2
    assert "⟨pro⟩" in cards["winner"].prompt
    assert drawing.summary.startswith("prompt ")


def test_an_argument_that_is_not_given_is_shown_by_its_name(backend: MockBackend) -> None:
    assert by_name(debate.graph())["text"].prompt == "user: About ⟨topic⟩. \n"


def test_a_plan_ends_at_the_line_that_needs_a_value(backend: MockBackend) -> None:
    @function
    def program(s: State) -> None:
        s += "A number: " + gen("n", int)
        for _ in range(int(s["n"])):
            s += "x"

    assert re.search(r"up to test_drawing.py:\d+, which needs a value", program.graph().summary)


def test_a_wide_fork_is_drawn_in_part(backend: MockBackend) -> None:
    @function(max_tokens=4)
    def program(s: State) -> None:
        s += "Go. "
        for i, branch in enumerate(s.fork(100)):
            branch += f"{i}: " + gen("x", stop=" ")

    drawing = program.run().graph()
    assert sum(card.kind == "gen" for card in drawing.cards) == MAX_BRANCHES
    (more,) = (card for card in drawing.cards if card.num_hidden)
    assert more.name == f"{100 - MAX_BRANCHES} more branches"
    assert more.lane == max(card.lane for card in drawing.cards), "below the others"
    assert drawing.cards[0].num_readers == 100, "those that are not drawn read it as well"
    assert more.name in drawing.svg()


def test_wide_characters_stay_inside_of_a_card(backend: MockBackend) -> None:
    @function(max_tokens=4)
    def program(s: State) -> None:
        s += "日本語のテキスト🦊" * 9 + gen("x", stop=" ")

    lines = re.findall(r'class="mono prompt"[^>]*>([^<]*)<', program.run().graph().svg())
    assert len(lines) == 2
    assert all(cell_len(line) <= CHARS for line in lines)


def test_a_failed_node_is_marked() -> None:
    with MockBackend(failures={"Bad": ValueError("no such thing")}) as mock:

        @function
        def program(s: State) -> None:
            s += "Bad " + gen("x")

        drawing = program.run(failures="keep").graph()
    assert by_name(drawing)["x"].error == "ValueError: no such thing"
    assert "no such thing" in drawing.svg()
    mock.engine.shutdown()


# Forms.


def test_the_svg_is_xml_without_anything_from_elsewhere(backend: MockBackend) -> None:
    svg = debate.run("rain").graph().svg()
    root = ElementTree.fromstring(svg)
    shown = "".join(root.itertext())
    assert "Yes <b>&" in shown
    assert "prefers-color-scheme: dark" in svg
    assert not re.search(r"(href|src|url\()", svg)
    assert re.findall(r"https?://[^\"]*", svg) == ["http://www.w3.org/2000/svg"]


def test_the_page_holds_all_it_needs_and_no_text_can_end_its_script(backend: MockBackend) -> None:
    @function(max_tokens=4)
    def program(s: State) -> None:
        s += "</script><script>alert(1)</script> " + gen("x")

    page = program.run().graph().html()
    assert "</script><script>alert(1)" not in page
    assert not re.search(r"(src=|href=|@import|url\()", page)
    data = re.search(r'<script type="application/json" id="cards">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    assert json.loads(data[1])[0]["prompt"].startswith("</script>")
    assert page.count("<script") == 2


def test_mermaid_has_every_card_and_edge(backend: MockBackend) -> None:
    text = debate.run("rain").graph().mermaid()
    assert text.startswith("flowchart LR\n")
    assert len(re.findall(r"^    n\d+\[", text, re.MULTILINE)) == 5
    assert text.count(" --> ") == 4
    assert text.count(" -.- ") == 2
    assert '"Yes' not in text.replace('["', "")  # quotes inside of a label are written as codes


@pytest.mark.parametrize("suffix", [".html", ".svg", ".mmd"])
def test_a_drawing_is_saved_by_its_name(backend: MockBackend, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"graph{suffix}"
    debate.graph(topic="rain").save(path)
    assert path.read_text(encoding="utf-8")
    with pytest.raises(InvalidRequest, match="saved as"):
        debate.graph(topic="rain").save(tmp_path / "graph.pdf")


def test_the_command_draws_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.html"
    assert main(["explain", str(EXAMPLES / "rag_shared_documents.py"), "--draw", str(path)]) == 0
    assert "<svg" in path.read_text(encoding="utf-8")


# Places: random trees of branches.

shapes: st.SearchStrategy[list[object]] = st.recursive(
    st.just([]), lambda inner: st.lists(inner, max_size=3), max_leaves=14
)


@function(max_tokens=2)
def tree(s: State, shape: list[object]) -> None:
    def grow(branch: State, below: object) -> None:
        branch += "text " + gen("x", stop=" ")
        assert isinstance(below, list)
        if below:
            branches = branch.fork(len(below))
            for one, inner in zip(branches, below, strict=True):
                grow(one, inner)
            if len(below) > 1:
                branches.join()
                branch += "after " + gen("y", stop=" ")

    grow(s, shape)


@given(shapes)
def test_no_two_cards_stand_on_one_place_and_time_goes_to_the_right(shape: list[object]) -> None:
    cards = tree.graph(shape=shape, backend=MockBackend()).cards
    places = [(card.column, card.lane) for card in cards]
    assert len(set(places)) == len(places)
    for card in cards:
        for before in (card.parent, *card.joins, *card.uses):
            assert before is None or cards[before].column < card.column
