"""A story with choices: turns are drawn from the model's own probabilities, so a seed is a story."""

from ramet import State, function, gen, select

EXAMPLE = {"hero": "a curious fox", "chapters": 2}
SCRIPT = {"Chapter 1:": " The fox found a map.", "Chapter 2:": " It led to a lake."}


@function(max_tokens=32)
def story(s: State, hero: str, chapters: int) -> None:
    s += f"A story about {hero}.\n"
    for i in range(1, chapters + 1):
        s += f"Chapter {i}:" + gen("chapter", stop="\n", temperature=0.7) + "\nThen the hero decided to "
        s += select("turn", ["turn back", "go on", "ask for help", "fall asleep"], temperature=1.0) + ".\n"


def main() -> None:
    for seed in (1, 2):
        print(f"--- seed {seed}")
        print(story.run(**EXAMPLE, seed=seed).text())


if __name__ == "__main__":
    main()
