"""The data of the quality benchmark: notes whose facts are known, made from a seed by sentences of many forms.

python benchmarks/quality_data.py            a few notes with their facts
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from typing import Any

WOMEN = ("Ann", "Carla", "Elena", "Greta", "Ines", "Katrin", "Maya", "Olga", "Rosa", "Tanja", "Vera", "Xenia", "Zoe")
MEN = ("Bruno", "Dmitri", "Farid", "Hugo", "Jonas", "Liam", "Nils", "Pavel", "Quentin", "Stefan", "Umar", "Walter")
LAST = (
    *("Adler", "Bauer", "Costa", "Dvorak", "Eriksen", "Fischer", "Garcia", "Hansen", "Ivanov", "Jensen", "Kowalski"),
    *("Larsen", "Moreau", "Novak", "Olsen", "Petit", "Quist", "Rossi", "Silva", "Toth", "Urban", "Vogel", "Weber"),
)
CITIES = (
    *("Oslo", "Bergen", "Porto", "Turin", "Lyon", "Ghent", "Graz", "Brno", "Cork", "Leeds", "Malaga", "Tartu", "Riga"),
    *("New Haven", "San Diego", "Cape Town", "The Hague", "Buenos Aires", "St. Gallen", "Kyoto", "Austin", "Dakar"),
)
JOBS = (
    *("nurse", "baker", "teacher", "plumber", "lawyer", "pilot", "carpenter", "dentist", "farmer", "librarian"),
    *("bus driver", "software engineer", "graphic designer", "history teacher", "sound engineer", "tax adviser"),
)
PETS = ("a dog", "two cats", "three hens", "a parrot", "no pets")
HOBBIES = ("plays chess", "sings in a choir", "runs 10 km every Sunday", "collects stamps", "paints", "swims")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a note says about one person. `fee`: euros a month; `joined`: a year; `member`: still one today."""

    name: str
    age: int
    job: str
    city: str
    joined: int
    fee: float
    member: bool


@dataclass(frozen=True, slots=True)
class Note:
    text: str
    facts: Facts


SCHEMA: dict[str, Any] = {  # Any: JSON
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "job": {"type": "string"},
        "city": {"type": "string"},
        "joined": {"type": "integer"},
        "fee": {"type": "number"},
        "member": {"type": "boolean"},
    },
    "required": ["name", "age", "job", "city", "joined", "fee", "member"],
    "additionalProperties": False,
}

_OPENINGS = (
    "{name}, {age}, works as {a_job} in {city}.",
    "{name} is {age} years old and lives in {city}, where {she} is {a_job}.",
    "Our member in {city} is {name}, {a_job} of {age}.",
    "{name} ({age}) is {a_job} from {city}.",
    "Now {age}, {name} works in {city} as {a_job}.",
    "{name} lives in {city}. {She} is {age} and earns {her} living as {a_job}.",
    "I spoke to {name} today: {a_job}, {age} years of age, home in {city}.",
    "The {job} {name} from {city} turned {age} last week.",
)
_JOINED = (
    "{She} joined the club in {joined}.",
    "{She} has been with us since {joined}.",
    "{Her} first year in the club was {joined}.",
    "In {joined} {she} signed up with the club.",
)
_FEES = (
    "{Her} fee is {fee} euros a month.",
    "{She} pays {fee} euros each month.",
    "The monthly fee that {she} pays is {fee} euros.",
    "Every month we get {fee} euros from {her_object}.",
)
_MEMBER = {
    True: ("{She} is a member.", "{Her} membership is active.", "{She} is still a member today."),
    False: ("{She} is no longer a member.", "{Her} membership has ended.", "{She} left and is not a member now."),
}
_ASIDES = ("{She} {hobby}.", "{She} has {pet}.", "{Her} locker is number {locker}.", "{She} has {children} children.")


def note(rng: random.Random) -> Note:
    """Draw the facts, then the form of each sentence and their order; about half of the notes have an aside."""
    is_she = rng.random() < 0.5
    facts = Facts(
        f"{rng.choice(WOMEN if is_she else MEN)} {rng.choice(LAST)}",
        rng.randrange(18, 90),
        rng.choice(JOBS),
        rng.choice(CITIES),
        rng.randrange(1985, 2025),
        rng.choice((0.0, 0.5, 0.25, 0.75, 0.9)) + rng.randrange(5, 60),
        rng.random() < 0.6,
    )
    words = {
        **asdict(facts),
        "fee": f"{facts.fee:.2f}" if facts.fee % 1 else str(int(facts.fee)),
        "a_job": f"{'an' if facts.job[0] in 'aeiou' else 'a'} {facts.job}",
        "she": "she" if is_she else "he",
        "She": "She" if is_she else "He",
        "her": "her" if is_she else "his",
        "Her": "Her" if is_she else "His",
        "her_object": "her" if is_she else "him",
        "hobby": rng.choice(HOBBIES),
        "pet": rng.choice(PETS),
        "locker": rng.randrange(100, 400),
        "children": rng.randrange(2, 5),
    }
    rest = [rng.choice(forms) for forms in (_JOINED, _FEES, _MEMBER[facts.member])]
    if rng.random() < 0.5:
        rest.append(rng.choice(_ASIDES))
    rng.shuffle(rest)
    return Note(" ".join(form.format(**words) for form in (rng.choice(_OPENINGS), *rest)), facts)


def notes(count: int, seed: int, part: str = "test") -> list[Note]:
    """Different notes. Other parts of the same seed (the examples of a prompt) have other people."""
    rng = random.Random(f"{part} notes {seed}")
    found: dict[str, Note] = {}
    while len(found) < count:
        drawn = note(rng)
        found.setdefault(drawn.facts.name, drawn)
    return list(found.values())


if __name__ == "__main__":
    for one in notes(8, 0):
        print(one.text, json.dumps(asdict(one.facts)), sep="\n", end="\n\n")
