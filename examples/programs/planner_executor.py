"""Planner and executor: one program plans, another one works on each step, a third puts it together."""

from ramet import State, function, gen

EXAMPLE = {"goal": "Open a small bakery.", "num_steps": 3}
SCRIPT = {"Step 1:": "Find a shop", "Step 2:": "Buy an oven", "Step 3:": "Hire a baker", "How?": "Ask a neighbour."}


@function(temperature=0, max_tokens=24)
def work(s: State, goal: str, step: str) -> None:
    s += f"Goal: {goal}\nStep:{step}\nHow?" + gen("how", stop="\n")


@function(temperature=0, max_tokens=16)
def plan(s: State, goal: str, num_steps: int) -> list[tuple[str, str]]:
    s += f"Goal: {goal}\n"
    steps = []
    for i in range(1, num_steps + 1):
        s += f"Step {i}:" + gen("step", stop="\n") + "\n"
        steps.append(s["step"])
    branches = s.fork(num_steps)
    for branch, step in zip(branches, steps, strict=True):
        work(branch, goal, step)  # becomes a part of this program, on that branch
    branches.join()
    return list(zip(steps, s["how"], strict=True))


def main() -> None:
    for step, how in plan.run(**EXAMPLE).result:
        print(f"{step.strip()}: {how.strip()}")


if __name__ == "__main__":
    main()
