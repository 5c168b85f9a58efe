"""Several researchers with the same tool, each on a branch: while one waits for its tool, the others decode."""

from ramet import State, ToolUse, ends_with, function, gen, length, tool

NOTES = {"bees": "A colony has up to 60,000 bees.", "ants": "Ants live for up to 30 years."}
EXAMPLE = {"animals": ["bees", "ants"]}
SCRIPT = {
    "a good fact?": "It surprises.",
    "about bees.": '<tool_call>\n{"name": "notes", "arguments": {"animal": "bees"}}\n</tool_call>',
    "about ants.": '<tool_call>\n{"name": "notes", "arguments": {"animal": "ants"}}\n</tool_call>',
    "60,000 bees.": "A colony holds up to 60,000 of them.",
    "30 years.": "One may live for 30 years.",
    "Headline:": [" " + "Small animals, " * 9, " Small animals, big numbers."],
}


@tool
def notes(animal: str) -> str:
    """What our library has about an animal."""
    return NOTES.get(animal, f"nothing about {animal}")


@function(temperature=0, max_tokens=120, tools=[notes])
def research(s: State, animals: list[str]) -> list[list[ToolUse]]:
    s.system("Look things up before you answer.")
    s.user("What makes a good fact?")
    s.assistant(gen("criterion", max_tokens=24, stop="\n"))
    branches = s.map(animals, lambda branch, animal: branch.user(f"Tell me one fact about {animal}."))
    branches.call_tools(max_steps=2, name="fact")
    branches.join()
    s += "".join(f"- {fact}\n" for fact in s["fact"])
    s += "Headline:" + gen("headline", stop="\n", where=[length(2, 8, unit="words"), ends_with(".", "!")])
    found: list[list[ToolUse]] = s["calls"]
    return found


def main() -> None:
    state = research.run(**EXAMPLE)
    for uses, fact in zip(state.result, state["fact"], strict=True):
        print(f"{len(uses)} call(s): {fact}")
    print(state["headline"])


if __name__ == "__main__":
    main()
