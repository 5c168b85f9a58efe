"""A debate: two sides that see each other's arguments, and a judge with probabilities."""

from ramet import State, function, gen, select

EXAMPLE = {"motion": "Cities should be free of cars.", "rounds": 2}
SCRIPT = {
    "For:": ["The air is better.", "Children can play."],
    "Against:": ["Who brings the bread?", "Buses are late."],
}


@function(temperature=0, max_tokens=32)
def debate(s: State, motion: str, rounds: int) -> None:
    s += f"A debate about the motion: {motion}\n"
    for _ in range(rounds):
        s += "For:" + gen("pro", stop="\n") + "\n"
        s += "Against:" + gen("contra", stop="\n") + "\n"
    s += "The judge's verdict: the better arguments came from the side "
    s += select("winner", ["for", "against"]) + " the motion."


def main() -> None:
    state = debate.run(**EXAMPLE)
    print(state.text())
    print(dict(zip(["for", "against"], state.meta("winner")["probs"], strict=True)))


if __name__ == "__main__":
    main()
