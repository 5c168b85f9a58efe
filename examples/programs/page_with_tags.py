"""A page of headings and paragraphs as one constraint: one generation, its parts read back by name."""

from typing import Any

from ramet import State, function, gen, repeat, select, sequence

EXAMPLE = {"subject": "the sea"}
SCRIPT = {"A page about the sea:": "<h1>Sea</h1><p>It is wet.</p><p>It is deep.</p>", "Best paragraph:": " 1"}


def tag(name: str, part: str) -> Any:
    return sequence(f"<{name}>", gen(part, stop="<"), f"</{name}>")


@function(temperature=0)
def page(s: State, subject: str) -> None:
    s += f"A page about {subject}:" + gen(
        "page", repeat(select([tag("h1", "title"), tag("p", "text")]), 1, 4), max_tokens=200
    )
    s += f"\nIts titles are {s['title']}.\nBest paragraph:" + gen("best", int) + "\n"


def main() -> None:
    state = page.run(**EXAMPLE)
    print(state["title"], state["text"], "best:", state["best"])


if __name__ == "__main__":
    main()
