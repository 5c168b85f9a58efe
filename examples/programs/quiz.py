"""A quiz: questions are written, answered and marked by the same model; wrong marks are retried with `where`."""

from ramet import State, function, gen

EXAMPLE = {"subject": "the sea", "n": 2}
SCRIPT = {
    "Question 1:": "Is it salty?",
    "Question 2:": "Is it deep?",
    "short:": " Yes.",
    "Points (0 to 10): ": ["11", "8", "9"],
}


@function(temperature=0, max_tokens=24)
def quiz(s: State, subject: str, n: int) -> int:
    s += f"A quiz about {subject}.\n"
    total = 0
    for i in range(1, n + 1):
        s += f"Question {i}:" + gen("question", stop="\n") + "\nThe answer, short:" + gen("answer", stop="\n")
        s += "\nPoints (0 to 10): " + gen("points", int, regex="[0-9]{1,2}", where=lambda points: points <= 10) + "\n"
        total += s["points"]
    return total


def main() -> None:
    state = quiz.run(**EXAMPLE)
    print(state.text())
    print("points:", state.result)


if __name__ == "__main__":
    main()
