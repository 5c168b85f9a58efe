"""Recursion: every heading is opened into smaller ones, on branches, to a given depth."""

from typing import Any

from ramet import State, function, gen

EXAMPLE = {"title": "A short history of bread", "depth": 2, "width": 2}
SCRIPT = {"part 1 of": "Grain", "part 2 of": "Ovens"}


@function(temperature=0, max_tokens=12)
def outline(s: State, title: Any, depth: int, width: int) -> list[Any]:
    if depth == 0:
        return []
    branches = s.fork(width)
    found = []
    for i, branch in enumerate(branches, 1):
        branch += f"The heading of part {i} of '{title}':" + gen("heading", stop="\n") + "\n"
        found.append([branch["heading"], outline(branch, branch["heading"], depth - 1, width)])
    return found


def show(parts: list[Any], indent: int = 0) -> None:
    for heading, below in parts:
        print("  " * indent + str(heading).strip())
        show(below, indent + 1)


def main() -> None:
    show(outline.run(**EXAMPLE).result)


if __name__ == "__main__":
    main()
