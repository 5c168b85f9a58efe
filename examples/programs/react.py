"""ReAct: thought, action, observation, in a plain Python loop; the tools are plain functions.

Source: Yao et al. 2022 (arXiv:2210.03629).
"""

from ramet import State, function, gen, select

CAPITALS = {"France": "Paris", "Portugal": "Lisbon", "Japan": "Tokyo"}
PEOPLE = {"Paris": "2.1 million", "Lisbon": "0.5 million", "Tokyo": "14 million"}


def capital(country: str) -> str:
    return CAPITALS.get(country, "unknown country")


def population(city: str) -> str:
    return PEOPLE.get(city, "unknown city")


TOOLS = {"capital": capital, "population": population}
EXAMPLE = {"question": "How many people live in the capital of Portugal?", "max_steps": 4}
SCRIPT = {
    "Thought 1:": "I need the capital.",
    "Action 1:": "capital",
    "capital(": "Portugal",
    "Thought 2:": "Now the population.",
    "Action 2:": "population",
    "population(": "Lisbon",
    "Thought 3:": "I know it.",
    "Action 3:": "finish",
    "finish(": "0.5 million",
}


@function(temperature=0, max_tokens=40)
def react(s: State, question: str, max_steps: int) -> str:
    s += "Answer with the tools capital(country) and population(city); say finish(answer) when you know it.\n"
    s += f"Question: {question}\n"
    for step in range(1, max_steps + 1):
        s += f"Thought {step}:" + gen("thought", stop="\n") + f"\nAction {step}: "
        s += select("tool", [*TOOLS, "finish"]) + "(" + gen("argument", stop=[")", "\n"]) + ")\n"
        argument = str(s["argument"]).strip()
        if s["tool"] == "finish":
            return argument
        s += f"Observation {step}: {TOOLS[s['tool'].value](argument)}\n"
    return "no answer"


def main() -> None:
    state = react.run(**EXAMPLE)
    print(state.text())
    print("answer:", state.result)


if __name__ == "__main__":
    main()
