"""Tree of thoughts: propose steps on branches, let the model rate each, keep the best, go deeper.

Source: Yao et al. 2023 (arXiv:2305.10601).
"""

from typing import Any

from ramet import State, function, gen

EXAMPLE = {"task": "Plan a birthday party for twenty people with a budget of 200 dollars.", "width": 3, "depth": 2}
SCRIPT = {"Step 1:": ["rent a hall", "ask a friend for a garden", "book a hotel"], "Rate this plan": ["4", "9", "2"]}


def rating(branch: State) -> Any:
    """What the model thinks of a branch; asked on a copy, so the branch itself stays clean."""
    judge = branch.copy()
    judge += "\nRate this plan from 0 to 9: " + gen("rating", int, regex="[0-9]", temperature=0)
    return judge["rating"]  # not read here, so all branches are rated at once


@function
def plan(s: State, task: str, width: int, depth: int) -> None:
    s += f"Task: {task}\nA plan, step by step.\n"
    for step in range(1, depth + 1):
        s += f"Step {step}:"
        s.best_of(width, gen("step", max_tokens=24, stop="\n"), by=rating)
        s += "\n"


def main() -> None:
    print(plan.run(**EXAMPLE, seed=7).text())


if __name__ == "__main__":
    main()
