"""Draft, criticise, revise: the critic sees the draft only, the writer sees the criticism.

Source: Madaan et al. 2023, Self-Refine (arXiv:2303.17651).
"""

from ramet import State, function, gen

EXAMPLE = {"task": "Write one sentence that explains why we sleep.", "rounds": 2}
SCRIPT = {
    "why we sleep.": ["We sleep to rest.", "Sleep repairs body and mind."],
    "What is missing": "Say what is repaired.",
}


@function(temperature=0, max_tokens=40)
def refine(s: State, task: str, rounds: int) -> None:
    s.user(task)
    s.assistant(gen("draft", stop="\n"))
    for _ in range(rounds - 1):
        (critic,) = s.fork(1)
        critic.user("What is missing in this sentence? Say it in a few words.")
        critic.assistant(gen("criticism", stop="\n"))
        s.user(f"Write it again. Mind this: {critic['criticism']}\n{task}")
        s.assistant(gen("draft", stop="\n"))


def main() -> None:
    state = refine.run(**EXAMPLE)
    print(state["draft"])
    print(len(state.messages()), "messages,", state.usage)


if __name__ == "__main__":
    main()
