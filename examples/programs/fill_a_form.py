"""A form as an f-string: every field is generated in its place, with its own type or pattern."""

from datetime import date
from typing import Literal

from ramet import State, function, gen

EXAMPLE = {"story": "On 3 May 2021 Ms Olga Berg, 44, took the night train to Vienna and paid 89 euros."}
SCRIPT = {
    "Name:": " Olga Berg",
    "Age:": "44",
    "Date:": "2021-05-03",
    "Means:": "train",
    "Price:": "89.0",
    "Phone:": "555-0199",
}


@function(temperature=0)
def fill(s: State, story: str) -> None:
    s += f"{story}\n\n"
    s += (
        f"Name:{gen('name', max_tokens=12, stop=chr(10))}\n"
        f"Age: {gen('age', int, regex='[1-9][0-9]?')}\n"
        f"Date: {gen('day', date)}\n"
        f"Means: {gen('means', Literal['car', 'train', 'plane', 'ship'])}\n"
        f"Price: {gen('price', float)}\n"
        f"Phone: {gen('phone', regex='555-[0-9]{4}')}\n"
    )


def main() -> None:
    state = fill.run(**EXAMPLE)
    for name, value in state.variables.items():
        print(f"{name:6} {value!r}")


if __name__ == "__main__":
    main()
