"""First of several: two ways to ask run at once; the first answer wins, the other one is cancelled."""

from ramet import State, function, gen

EXAMPLE = {"question": "What is the capital of Italy?"}
SCRIPT = {"In one word:": " Rome", "With an explanation:": " The capital of Italy is Rome, as it has been since 1871."}


@function(temperature=0, max_tokens=40)
def ask(s: State, question: str) -> str:
    s += f"Question: {question}\n"
    ways = ["In one word:", "With an explanation:"]
    winner = s.first_of(*(way + gen("answer", stop="\n") for way in ways))
    return ways[winner]


def main() -> None:
    state = ask.run(**EXAMPLE)
    print(f"{state.result}{state['answer']}")


if __name__ == "__main__":
    main()
