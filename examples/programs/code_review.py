"""Code review: reviewers with different eyes on branches of the same code, and one verdict."""

from typing import Literal

from ramet import State, function, gen

CODE = "def mean(xs):\n    total = 0\n    for x in xs:\n        total += x\n    return total / len(xs)\n"
ASPECTS = ["bugs", "naming", "speed"]
EXAMPLE = {"code": CODE}
SCRIPT = {"about bugs:": " An empty list divides by zero.", "about naming:": " Fine.", "Verdict:": "request changes"}


@function(temperature=0, max_tokens=40)
def review(s: State, code: str) -> None:
    s.user(f"Review this code.\n```python\n{code}```")
    with s.assistant():

        def look(branch: State, aspect: str) -> None:
            branch += f"My remark about {aspect}:" + gen("remark", stop="\n")

        s.map(ASPECTS, look).join()
        s += "\n".join(f"- {aspect}:{remark}" for aspect, remark in zip(ASPECTS, s["remark"], strict=True))
        s += "\nVerdict: " + gen("verdict", Literal["approve", "comment", "request changes"])


def main() -> None:
    state = review.run(**EXAMPLE)
    print(state.messages()[-1]["content"])


if __name__ == "__main__":
    main()
