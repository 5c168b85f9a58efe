"""Verbatim quotes: the evidence can only be a piece of the text, whatever the model would like to say."""

from ramet import State, function, gen

TEXT = "The museum was built in 1902. It burned down in 1951 and was opened again ten years later."
EXAMPLE = {"text": TEXT, "question": "When did the museum burn down?"}
SCRIPT = {"Quote:": "It burned down in 1951", "The answer:": " In 1951."}


@function(temperature=0)
def quote(s: State, text: str, question: str) -> None:
    s += f"Text: {text}\nQuestion: {question}\n"
    s += "Quote: " + gen("evidence", substring_of=text, max_tokens=24) + "\n"
    s += "The answer:" + gen("answer", max_tokens=16, stop="\n")


def main() -> None:
    state = quote.run(**EXAMPLE)
    print(repr(state["evidence"]), "->", state["answer"].strip())


if __name__ == "__main__":
    main()
