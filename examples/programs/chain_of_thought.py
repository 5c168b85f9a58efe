"""Chain of thought: let the model reason first, then read the number off."""

from ramet import State, function, gen

EXAMPLE = {"question": "A farmer has 3 fields with 12 apple trees each. How many apple trees has he?"}
SCRIPT = {"step by step.": " There are 3 fields. 3 times 12 is 36.", "The answer is ": "36"}


@function(temperature=0)
def solve(s: State, question: str) -> None:
    with s.user():
        s += f"{question}\nThink step by step."
    with s.assistant():
        s += gen("reasoning", max_tokens=80, stop="\n\n")
        s += "\n\nThe answer is " + gen("answer", int) + "."


def main() -> None:
    state = solve.run(**EXAMPLE)
    print(state["reasoning"].strip())
    print("answer:", state["answer"])


if __name__ == "__main__":
    main()
