"""Fan-out: one text, one branch a language, all decoded together."""

from ramet import State, function, gen

LANGUAGES = ["French", "Spanish", "German", "Italian"]
EXAMPLE = {"text": "The garden is quiet in the morning."}
SCRIPT = {
    "French:": " Le jardin est calme.",
    "Spanish:": " El jardín.",
    "German:": " Der Garten.",
    "Italian:": " Il giardino.",
}


@function(temperature=0, max_tokens=32)
def translate(s: State, text: str) -> dict[str, str]:
    s += f"English: {text}\n"
    branches = s.fork(len(LANGUAGES))
    branches += [f"{language}:" for language in LANGUAGES]
    branches += gen("translation", stop="\n")
    branches.join()
    return dict(zip(LANGUAGES, s["translation"], strict=True))


def main() -> None:
    for language, text in translate.run(**EXAMPLE).result.items():
        print(f"{language:8} {text.strip()}")


if __name__ == "__main__":
    main()
