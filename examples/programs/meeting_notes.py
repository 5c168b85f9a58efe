"""Meeting notes: blocks of text kept as variables, and a summary written from them on a clean branch."""

from ramet import State, function, gen

EXAMPLE = {"transcript": "Ann: The roof leaks. Bo: I call the builder on Monday. Ann: And who pays? Bo: The insurance."}
SCRIPT = {
    "Problem:": " The roof leaks.",
    "Task:": " Bo calls the builder.",
    "Open:": " Nothing.",
    "Subject:": " The roof",
}


@function(temperature=0, max_tokens=24)
def minutes(s: State, transcript: str) -> None:
    clean = s.copy()
    s += f"Transcript: {transcript}\n"
    with s.var_scope("minutes"):
        for heading in ("Problem", "Task", "Open"):
            s += f"{heading}:" + gen(heading.lower(), stop="\n") + "\n"
    clean += f"Minutes of a meeting:\n{s['minutes']}Subject:" + gen("subject", stop="\n")
    s["subject"] = clean["subject"]


def main() -> None:
    state = minutes.run(**EXAMPLE)
    print("Subject:" + state["subject"])
    print(state["minutes"])


if __name__ == "__main__":
    main()
