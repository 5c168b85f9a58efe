"""A judge: several criteria are rated on branches that share the essay, each with its probabilities."""

from ramet import State, function, select

CRITERIA = ["clarity", "structure", "evidence"]
GRADES = ["poor", "fair", "good", "excellent"]
EXAMPLE = {"essay": "Bees matter. Without bees there is less fruit. A garden with flowers helps them."}
SCRIPT = {"The clarity of this essay is ": "good", "The evidence of this essay is ": "fair"}


@function
def judge(s: State, essay: str) -> None:
    s += f"Essay: {essay}\n"

    def rate(branch: State, criterion: str) -> None:
        branch += f"The {criterion} of this essay is " + select("grade", GRADES)

    s.map(CRITERIA, rate).join()


def expectation(probabilities: list[float]) -> float:
    """The mean grade, 0 to 3, by the probability of each: finer than the grade that won."""
    return sum(grade * probability for grade, probability in enumerate(probabilities))


def main() -> None:
    state = judge.run(**EXAMPLE)
    for criterion, grade, meta in zip(CRITERIA, state["grade"], state.meta("grade")["branches"], strict=True):
        print(f"{criterion:10} {grade:10} {expectation(meta['probs']):.2f} of 3")


if __name__ == "__main__":
    main()
