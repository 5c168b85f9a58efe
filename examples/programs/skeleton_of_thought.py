"""Skeleton of thought: first the points, then every point is written out at the same time.

Source: Ning et al. 2023 (arXiv:2307.15337).
"""

from ramet import State, function, gen

EXAMPLE = {"question": "How do I keep a houseplant alive?", "points": 3}
SCRIPT = {"1.": "Light", "2.": "Water", "3.": "Soil", "in one sentence:": " It matters more than one thinks."}


@function(temperature=0)
def answer(s: State, question: str, points: int) -> str:
    s += f"Question: {question}\nThe {points} most important points, in two or three words each:\n"
    skeleton = []
    for i in range(1, points + 1):
        s += f"{i}." + gen("point", max_tokens=8, stop="\n") + "\n"
        skeleton.append(s["point"])

    def expand(branch: State, point: object) -> None:
        branch += f"\nThe point '{point}' in one sentence:" + gen("text", max_tokens=40, stop="\n")

    s.map(skeleton, expand).join()
    return "\n".join(f"{point}: {text}" for point, text in zip(skeleton, s["text"], strict=True))


def main() -> None:
    print(answer.run(**EXAMPLE).result)


if __name__ == "__main__":
    main()
