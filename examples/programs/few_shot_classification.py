"""Few-shot classification of a batch: the examples are the shared prefix of every row."""

from enum import Enum

from ramet import State, function, gen


class Topic(Enum):
    SPORT = "sport"
    SCIENCE = "science"
    MONEY = "money"


SHOTS = [
    ("The match ended in a draw.", "sport"),
    ("Shares fell on Friday.", "money"),
    ("A new comet was seen.", "science"),
]
ROWS = ["The bank raised its rates.", "The runner broke the record.", "Cells divide in two."]
EXAMPLE = {"headline": ROWS[0]}
SCRIPT = {"rates.": "money", "record.": "sport", "in two.": "science"}


@function(temperature=0)
def classify(s: State, headline: str) -> None:
    for text, topic in SHOTS:
        s += f"Headline: {text}\nTopic: {topic}\n\n"
    s += f"Headline: {headline}\nTopic: " + gen("topic", Topic)


def main() -> None:
    for state, row in zip(classify.run_batch(ROWS), ROWS, strict=True):
        print(f"{row:30} {state['topic']!r:28} computed {state.usage.computed_tokens} tokens")


if __name__ == "__main__":
    main()
