"""A batch with a progress bar: one row of work a document, results in order as they are ready."""

from ramet import State, function, gen

ROWS = [
    {"text": f"Note {i}: call {name} about the {thing}."}
    for i, (name, thing) in enumerate([("Ann", "roof"), ("Bo", "car")])
]
EXAMPLE = ROWS[0]
SCRIPT = {"roof.": "house, repair", "car.": "traffic, sale"}


@function(temperature=0)
def tag(s: State, text: str) -> list[str]:
    s += f"Text: {text}\nTwo tags, with a comma between: " + gen("tags", regex=r"[a-z]{2,12}, [a-z]{2,12}")
    tags: list[str] = s["tags"].split(", ")  # a value of the program, like s["tags"]
    return tags


def main() -> None:
    for state in tag.run_batch(ROWS, progress_bar=True, generator_style=True):
        print(state.result)


if __name__ == "__main__":
    main()
