"""Two agents talk: each has a state of its own, with the other's words as user messages; async."""

from ramet import State, function, gen

EXAMPLE = {"topic": "whether cats or dogs are better company", "turns": 2}
SCRIPT = {
    "like cats": ["Cats are calm.", "They wash themselves."],
    "like dogs": ["Dogs are loyal.", "They love to walk."],
}


@function(temperature=0, max_tokens=32)
async def talk(s: State, topic: str, turns: int) -> list[str]:
    first, second = s.fork(2)
    first.system(f"You like cats. You talk about {topic}, one sentence at a time.")
    second.system(f"You like dogs. You talk about {topic}, one sentence at a time.")
    said = "Hello! What do you think?"
    heard: list[str] = []
    for _ in range(turns):
        for agent in (first, second):
            agent.user(said)
            agent.assistant(gen("line", stop="\n"))
            said = str(await agent["line"])
            heard.append(said)
    return heard


def main() -> None:
    for i, line in enumerate(talk.run(**EXAMPLE).result):
        print("AB"[i % 2] + ":", line)


if __name__ == "__main__":
    main()
