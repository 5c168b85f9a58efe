"""Self-consistency: several chains of thought vote on the answer; the winner's chain goes on.

Source: Wang et al. 2022 (arXiv:2203.11171).
"""

from ramet import State, function, gen

EXAMPLE = {"question": "A train leaves at 9:40 and arrives at 11:10. How many minutes does it take?", "n": 5}
SCRIPT = {
    "step by step.": [" One hour is 60.", " 20 plus 70.", " 90 minutes."],
    "So the answer is ": ["60", "90", "90"],
}


@function
def solve(s: State, question: str, n: int) -> int:
    s += f"Question: {question}\nLet us think step by step."
    chain = gen("reasoning", max_tokens=60, stop="\n", temperature=0.8) + "\nSo the answer is " + gen("answer", int)
    return int(s.vote(n, chain, "answer"))


def main() -> None:
    state = solve.run(**EXAMPLE, seed=1)
    print("voted:", state.result)
    print(state.text())


if __name__ == "__main__":
    main()
