"""Retrieval: many questions about the same documents; the documents are computed once."""

from ramet import State, function, gen

DOCUMENTS = [
    "The library opens at nine and closes at six. On Sundays it is closed.",
    "A reader's card costs five dollars a year. Children pay nothing.",
    "Books may be kept for three weeks; films for one.",
]
QUESTIONS = ["When does the library close?", "What does a card cost?", "How long may I keep a film?"]
EXAMPLE = {"documents": DOCUMENTS, "questions": QUESTIONS}
SCRIPT = {"library close?": "At six.", "card cost?": "Five dollars.", "keep a film?": "One week."}


@function(temperature=0, max_tokens=32)
def ask(s: State, documents: list[str], questions: list[str]) -> None:
    with s.system():
        s += "Answer from these documents alone.\n" + "\n".join(f"[{i}] {d}" for i, d in enumerate(documents, 1))

    def one(branch: State, question: str) -> None:
        branch.user(question)
        branch.assistant(gen("answer"))

    s.map(questions, one).join()


def main() -> None:
    state = ask.run(**EXAMPLE)
    for question, answer in zip(QUESTIONS, state["answer"], strict=True):
        print(question, "->", answer)
    print(state.usage)


if __name__ == "__main__":
    main()
