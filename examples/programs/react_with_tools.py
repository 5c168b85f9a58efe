"""ReAct with `@tool`: the model writes calls in its own format, the tools are typed functions.

Source: Yao et al. 2022 (arXiv:2210.03629).
"""

from ramet import State, function, tool

CAPITALS = {"France": "Paris", "Portugal": "Lisbon", "Japan": "Tokyo"}
PEOPLE = {"Paris": 2_100_000, "Lisbon": 550_000, "Tokyo": 14_000_000}
EXAMPLE = {"question": "How many people live in the capital of Portugal?"}
SCRIPT = {
    "the capital of Portugal?": '<tool_call>\n{"name": "capital", "arguments": {"country": "Portugal"}}\n</tool_call>',
    "tool\nLisbon": '<tool_call>\n{"name": "population", "arguments": {"city": "Lisbon"}}\n</tool_call>',
    "tool\n550000": "About 550,000 people live in Lisbon.",
}


@tool
def capital(country: str) -> str:
    """The capital of a country."""
    return CAPITALS.get(country, f"no country {country!r} is known")


@tool(timeout_s=5)
def population(city: str, year: int = 2024) -> int:
    """How many people live in a city.

    Args:
        city: its English name
        year: of the census
    """
    return PEOPLE[city]


@function(temperature=0, max_tokens=160, tools=[capital, population])
def react(s: State, question: str) -> str:
    s.system("Use the tools. Answer in one sentence when you know enough.")
    s.user(question)
    return str(s.call_tools(max_steps=4, on_error="report"))


def main() -> None:
    state = react.run(**EXAMPLE)
    for use in state["calls"]:
        print(f"{use.name}({use.arguments}) -> {use.result}")
    print(state["answer"])


if __name__ == "__main__":
    main()
