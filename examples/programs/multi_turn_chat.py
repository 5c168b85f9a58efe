"""A chat of several turns: each turn computes its own new tokens only."""

from ramet import State, function, gen

EXAMPLE = {"questions": ["What is a cloud?", "Why is it white?", "And why is it sometimes grey?"]}
SCRIPT = {"a cloud?": "Water drops in the air.", "white?": "They scatter all light.", "grey?": "It is thick."}


@function(temperature=0, max_tokens=40)
def chat(s: State, questions: list[str]) -> None:
    s.system("You explain things to children, in one sentence.")
    for question in questions:
        s.user(question)
        s.assistant(gen("answer"))


def main() -> None:
    state = chat.run(**EXAMPLE)
    for message in state.messages():
        print(f"{message['role']:>9}: {message['content']}")


if __name__ == "__main__":
    main()
