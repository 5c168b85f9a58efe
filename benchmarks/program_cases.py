"""The programs of bench_programs.py: shapes that people write, over one long beginning, greedy, of fixed length.

Every free generation writes TOKENS tokens whatever the model would say, so that all ways to run a program do the same
work.
"""

from __future__ import annotations

from collections.abc import Sequence

from ramet import Function, State, function, gen, select
from ramet.lang.recording.generations import Gen

TOKENS = 12


RULES = (
    "You work for a small town. You are patient and exact, and you never repeat yourself. You answer in one sentence "
    "of plain words. You do not guess: where you don't know a thing you say so, and name who might. You give numbers "
    "with their units, dates with their year, and names in full when they come up for the first time. You do not "
    "apologise, you do not promise, and you do not talk about yourself. When somebody is in danger you say what to do "
    "first, and only then why. When a question is about money you say what is included. When it is about time you say "
    "when it begins and when it ends. When it is about a place you say how to get there on foot. What you are told by "
    "the people of the town stays between you and them.\n"
)


def text() -> Gen:
    return gen("x", max_tokens=TOKENS, ignore_eos=True)


@function(temperature=0)
def chat(s: State) -> None:
    s.system(RULES)
    for question in (
        "When do I sow beans?",
        "And peas?",
        "How deep?",
        "How much water?",
        "In the shade?",
        "Until when?",
    ):
        s.user(question)
        s.assistant(text())


@function(temperature=0)
def react(s: State) -> None:
    s += (
        RULES + "Answer with the tools search(words) and read(page).\nQuestion: Who built the old bridge of the town?\n"
    )
    for i, found in enumerate(["3 pages", "a page about bridges", "a page about the town", "built in 1788"]):
        s += f"Thought {i}:" + text() + f"\nAction {i}: " + select("tool", ["search", "read"]) + "(" + text() + ")\n"
        s += f"Observation {i}: {found}\n"
    s += "Answer:" + text()


@function(temperature=0)
def debate(s: State) -> None:
    s += RULES + "A debate about the motion: cities should be free of cars. Each side speaks one sentence at a time.\n"
    for _ in range(4):
        s += "For:" + text() + "\nAgainst:" + text() + "\n"
    s += "The better side was " + select("winner", ["for", "against"])


@function(temperature=0)
def map_reduce(s: State) -> None:
    s += RULES + "You write summaries of one short sentence, in plain words, and you leave out what does not matter.\n"
    branches = s.fork(8)
    branches += lambda i: f"Text: On day {i} the ship sailed {7 * i + 3} miles to the north.\nSummary:"
    branches += text()
    branches.join()
    s += (
        "".join(f"-{summary}\n" for summary in s["x"])
        + "All in one sentence:"
        + gen("all", max_tokens=TOKENS, ignore_eos=True)
    )


@function(temperature=0)
def tree_of_thoughts(s: State) -> None:
    s += RULES + "A riddle: what has a bed but never sleeps? Think of ways to solve it, and judge each.\n"
    ways = s.fork(3)
    ways += lambda i: f"Way {i}:"
    ways += text()
    for way in ways:
        steps = way.fork(2)
        steps += lambda i: f"\nStep {i}:"
        steps += text()
        steps += "\nThis is " + select("judged", ["sure", "likely", "impossible"])
        steps.join()
    ways.join()
    s += "So the answer is" + text()


@function(temperature=0)
def classify(s: State) -> None:
    """Many selections and little text."""
    s += RULES + "Sort letters to the town by what they are about and how urgent they are.\n"
    letters = s.map(
        [
            "The lamp in our street is out.",
            "A pipe burst in the mill.",
            "When is the market?",
            "My bin was not emptied.",
        ],
        lambda branch, letter: branch.append(f"Letter: {letter}\nAbout: "),
    )
    letters += select("about", ["light", "water", "market", "waste"])
    letters += (
        ". Urgent: " + select("urgent", ["yes", "no"]) + ". For the office of " + select("office", ["works", "trade"])
    )
    letters.join()
    s += "Today it is mostly about" + text()


PROGRAMS: Sequence[Function] = (chat, react, debate, map_reduce, tree_of_thoughts, classify)
