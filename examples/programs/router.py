"""A router: the kind of question decides, in plain Python, how it is answered."""

from typing import Literal

from ramet import State, function, gen

EXAMPLE = {"question": "What is 17 plus 25?"}
SCRIPT = {"kind of question": "arithmetic", "plus 25?\nkind": "arithmetic", "Result:": "42", "Answer:": " Because."}


@function(temperature=0)
def route(s: State, question: str) -> object:
    s += f"Question: {question}\n"
    s += "The kind of question (arithmetic, history or other): " + gen(
        "kind", Literal["arithmetic", "history", "other"]
    )
    if s["kind"] == "arithmetic":
        s += "\nResult: " + gen("result", int)
        return s["result"]
    if s["kind"] == "history":
        s += "\nThe year was " + gen("year", int, regex="[12][0-9]{3}")
        return s["year"]
    s += "\nAnswer:" + gen("text", max_tokens=32, stop="\n")
    return s["text"]


def main() -> None:
    state = route.run(**EXAMPLE)
    print(state["kind"], "->", state.result)
    for stage in state.record.stages:
        print(f"waited at {stage.line} for {stage.why}")


if __name__ == "__main__":
    main()
