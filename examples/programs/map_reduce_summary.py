"""Map and reduce: summarise chapters on branches of one instruction, then the summaries."""

from ramet import State, function, gen

EXAMPLE = {
    "chapters": [
        "The ship left the harbour at dawn. The sea was calm, and the crew sang.",
        "On the third day a storm came from the west. The mast broke in the night.",
        "They drifted for a week, until a fishing boat found them near the northern islands.",
    ]
}
SCRIPT = {"sang.": "A calm start.", "in the night.": "A storm.", "islands.": "A rescue.", "whole story": "A voyage."}


@function(temperature=0, max_tokens=40)
def summarise(s: State, chapters: list[str]) -> None:
    s += "You write summaries of one short sentence.\n"

    def one(branch: State, chapter: str) -> None:
        branch += f"Text: {chapter}\nSummary: In this chapter," + gen("summary", stop="\n")

    s.map(chapters, one).join()
    s += "\n".join(f"{i}. {summary}" for i, summary in enumerate(s["summary"], 1))
    s += "\nThe whole story: First," + gen("story", stop="\n")


def main() -> None:
    state = summarise.run(**EXAMPLE)
    for summary in state["summary"]:
        print("-", summary.strip())
    print("=>", state["story"].strip())


if __name__ == "__main__":
    main()
