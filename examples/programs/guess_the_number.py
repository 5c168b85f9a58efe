"""A game: the model guesses, Python answers higher or lower, until it is right."""

from ramet import State, function, gen

EXAMPLE = {"secret": 42, "max_guesses": 6}
SCRIPT = {"Guess 1:": "50", "Guess 2:": "25", "Guess 3:": "42"}


@function(temperature=0)
def play(s: State, secret: int, max_guesses: int) -> int | None:
    s += "I think of a number from 0 to 99. Guess it.\n"
    for i in range(1, max_guesses + 1):
        s += f"Guess {i}: " + gen("guess", int, regex="[0-9]{1,2}")
        guess = int(s["guess"])
        if guess == secret:
            s += " Right!"
            return i
        s += " Higher!\n" if guess < secret else " Lower!\n"
    return None


def main() -> None:
    state = play.run(**EXAMPLE)
    print(state.text())
    print("guesses:", state.result)


if __name__ == "__main__":
    main()
