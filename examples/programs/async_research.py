"""Async branches: questions are asked at the same time, and each looks something up in between."""

import asyncio

from ramet import State, function, gen

FACTS = {"bees": "A bee visits fifty flowers in one flight.", "ants": "An ant lifts fifty times its weight."}
EXAMPLE = {"topics": ["bees", "ants"]}
SCRIPT = {
    "about bees": " flights",
    "about ants": " strength",
    "flight.": "Bees are busy.",
    "weight.": "Ants are strong.",
}


async def look_up(topic: str) -> str:
    await asyncio.sleep(0)
    return FACTS[topic]


@function(temperature=0, max_tokens=24)
async def research(s: State, topics: list[str]) -> None:
    s += "Notes of a biologist.\n"

    async def one(branch: State, topic: str) -> None:
        branch += f"A keyword about {topic}:" + gen("keyword", stop="\n")
        keyword = str(await branch["keyword"]).strip()
        branch += f"\nFound for {keyword!r}: {await look_up(topic)}\nIn my words:" + gen("note", stop="\n")

    branches = s.fork(len(topics))
    await asyncio.gather(*(one(branch, topic) for branch, topic in zip(branches, topics, strict=True)))
    branches.join()


def main() -> None:
    state = research.run(**EXAMPLE)
    print(state["keyword"], state["note"])


if __name__ == "__main__":
    main()
