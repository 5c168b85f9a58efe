"""Best of n: write several slogans at once, score each by the model's own yes or no, keep the best."""

from ramet import State, function, gen, select

EXAMPLE = {"product": "a bicycle bell that plays jazz", "n": 4}
SCRIPT = {"Slogan:": ["Ring that swing!", "A bell.", "Jazz on two wheels.", "Buy it."]}


def appeal(branch: State) -> float:
    """P(yes) of the question whether the slogan is catchy."""
    judge = branch.copy()
    judge += "\nIs this slogan catchy? " + select("is_catchy", ["yes", "no"])
    return float(judge.meta("is_catchy")["probs"][0])


@function
def slogan(s: State, product: str, n: int) -> None:
    s += f"Product: {product}\nSlogan:"
    s.best_of(n, gen("slogan", max_tokens=16, stop="\n", temperature=1.0), by=appeal)


def main() -> None:
    print(slogan.run(**EXAMPLE, seed=5)["slogan"])


if __name__ == "__main__":
    main()
