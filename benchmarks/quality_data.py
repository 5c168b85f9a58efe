"""The data of the quality benchmark: notes whose facts are known, made from a seed by sentences of many forms.

python benchmarks/quality_data.py            a few notes with their facts
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
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


# -- tools -----------------------------------------------------------------------------------------------------------

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
CURRENCIES = {"EUR": "euros", "USD": "dollars", "GBP": "pounds", "JPY": "yen", "CHF": "francs"}
ARTISTS = ("Nina Simone", "Miles Davis", "Björk", "The Kinks", "Clara Schumann", "Daft Punk", "Fela Kuti", "ABBA")
RESTAURANTS = ("Blue Door", "Casa Lola", "The Old Mill", "Sakura", "Bistro 21", "Green Fork", "Da Marco")
GOODS = ("oat milk", "batteries", "green tea", "printer paper", "tomatoes", "light bulbs", "dish soap", "notebooks")
MESSAGES = ("I will be late", "dinner is ready", "the train is delayed", "call me back", "the keys are under the mat")


def _parameters(**properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_TEXT, _WHOLE, _FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
_DAY, _CURRENCY = {"enum": list(DAYS)}, {"enum": list(CURRENCIES)}
TOOLS: dict[str, dict[str, Any]] = {
    "get_weather": _parameters(city=_TEXT, days=_WHOLE),
    "convert_money": _parameters(amount={"type": "number"}, source=_CURRENCY, target=_CURRENCY),
    "set_alarm": _parameters(hour=_WHOLE, minute=_WHOLE, repeat=_FLAG),
    "play_music": _parameters(artist=_TEXT, shuffle=_FLAG),
    "book_table": _parameters(restaurant=_TEXT, people=_WHOLE, day=_DAY),
    "send_message": _parameters(to=_TEXT, text=_TEXT),
    "buy": _parameters(item=_TEXT, quantity=_WHOLE),
    "find_flights": _parameters(origin=_TEXT, destination=_TEXT, day=_DAY),
}
CALL_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": parameters},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name, parameters in TOOLS.items()
    ]
}

_ASKED: dict[str, tuple[str, ...]] = {
    "get_weather": (
        "What will the weather be like in {city} for the next {days} days?",
        "Do I need an umbrella in {city}? Look {days} days ahead.",
        "{days} days of forecast for {city}, please.",
    ),
    "convert_money": (
        "How much are {amount} {source_word} in {target_word}?",
        "I have {amount} {source_word}. What is that in {target_word}?",
        "Change {amount} {source} to {target}.",
    ),
    "set_alarm": (
        "Wake me at {hour}:{minute:02d}{every}.",
        "I have to get up at {hour}:{minute:02d}{every}.",
        "Set an alarm{every} for {hour}:{minute:02d}.",
    ),
    "play_music": (
        "Play something by {artist}{mixed}.",
        "I want to hear {artist}{mixed}.",
        "Put on {artist}{mixed}, please.",
    ),
    "book_table": (
        "We are {people} and would like to eat at {restaurant} on {day}.",
        "Get us a table at {restaurant} for {people} on {day}.",
        "On {day} I take {people_less} friends to {restaurant}: a table for {people}, please.",
    ),
    "send_message": (
        "Tell {to} that {text}.",
        "Write to {to}: {text}.",
        "Could you let {to} know that {text}?",
    ),
    "buy": (
        "Order {quantity} packs of {item}.",
        "We are out of {item}. Get {quantity}.",
        "Put {quantity} {item} into the basket.",
    ),
    "find_flights": (
        "Is there a flight from {origin} to {destination} on {day}?",
        "I need to be in {destination} on {day}; I start in {origin}.",
        "Flights {origin} - {destination}, {day}.",
    ),
}


@dataclass(frozen=True, slots=True)
class Request:
    """What a user asks for, and the call of a tool that does it."""

    text: str
    tool: str
    arguments: dict[str, Any]  # Any: JSON

    @property
    def call(self) -> dict[str, Any]:
        return {"name": self.tool, "arguments": self.arguments}


def request(rng: random.Random) -> Request:
    tool = rng.choice(list(TOOLS))
    source, target = rng.sample(list(CURRENCIES), 2)
    origin, destination = rng.sample(CITIES, 2)
    drawn: dict[str, Any] = {
        "city": rng.choice(CITIES),
        "days": rng.randrange(2, 11),
        "amount": rng.choice((rng.randrange(5, 900), rng.randrange(500, 9000) / 100)),
        "source": source,
        "target": target,
        "hour": rng.randrange(5, 23),
        "minute": rng.choice((0, 5, 15, 20, 30, 45, 50)),
        "repeat": rng.random() < 0.5,
        "artist": rng.choice(ARTISTS),
        "shuffle": rng.random() < 0.5,
        "restaurant": rng.choice(RESTAURANTS),
        "people": rng.randrange(3, 10),
        "day": rng.choice(DAYS),
        "to": rng.choice(WOMEN + MEN),
        "text": rng.choice(MESSAGES),
        "item": rng.choice(GOODS),
        "quantity": rng.randrange(2, 13),
        "origin": origin,
        "destination": destination,
    }
    words = {
        **drawn,
        "source_word": CURRENCIES[source],
        "target_word": CURRENCIES[target],
        "every": " every day" if drawn["repeat"] else rng.choice(("", " tomorrow")),
        "mixed": rng.choice((" in random order", ", shuffled")) if drawn["shuffle"] else rng.choice(("", " in order")),
        "people_less": drawn["people"] - 1,
    }
    arguments = {name: drawn[name] for name in TOOLS[tool]["properties"]}
    return Request(rng.choice(_ASKED[tool]).format(**words), tool, arguments)


def requests(count: int, seed: int, part: str = "test") -> list[Request]:
    """Different requests; another part of the same seed has others."""
    rng = random.Random(f"{part} requests {seed}")
    found: dict[str, Request] = {}
    while len(found) < count:
        drawn = request(rng)
        found.setdefault(drawn.text, drawn)
    return list(found.values())


# -- choices ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Item:
    """A text or question, and choices of which `answer` is right."""

    text: str
    choices: tuple[str, ...]
    answer: str


class NotInstalled(Exception):
    """A Debian package whose data a task needs is not there."""


def package_file(root: Path, package: str, path: str) -> Path:
    """A file of a Debian package: installed, or unpacked below `root` (`dpkg -x`). Raises NotInstalled."""
    found = root / path
    if not found.exists():
        raise NotInstalled(f"{found} is missing: apt-get install {package}, or unpack it below --root")
    return found


KINDS = {
    "05": "animal",
    "06": "man-made object",
    "08": "part of the body",
    "12": "feeling",
    "13": "food or drink",
    "15": "place",
    "18": "person",
    "20": "plant",
    "27": "substance",
    "28": "period of time",
}


def _nouns(root: Path) -> dict[str, list[tuple[str, str]]]:
    """WordNet's nouns by their kind (lexicographer file): (word, definition)."""
    file = package_file(root, "wordnet-base", "usr/share/wordnet/data.noun")
    found: dict[str, list[tuple[str, str]]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        head, _, gloss = line.partition(" | ")
        columns, definition = head.split(), gloss.split(";")[0].strip()
        if not line.startswith("  ") and 20 <= len(definition) <= 120:
            found.setdefault(columns[1], []).append((columns[4].replace("_", " "), definition))
    return found


def kinds(root: Path, count: int, seed: int, part: str = "test") -> list[Item]:
    """Definitions of WordNet's nouns (package `wordnet-base`): what kind of thing is defined? Kinds come in turns."""
    nouns, rng = _nouns(root), random.Random(f"{part} kinds {seed}")
    codes = [code for _ in range(0, count, len(KINDS)) for code in rng.sample(list(KINDS), len(KINDS))]
    choices = tuple(KINDS.values())
    return [Item(rng.choice(nouns[code])[1], choices, KINDS[code]) for code in codes[:count]]


def words(root: Path, count: int, seed: int, part: str = "test") -> list[Item]:
    """Definitions of WordNet's nouns: which of four words of one kind is meant?"""
    nouns, rng = _nouns(root), random.Random(f"{part} words {seed}")
    found = []
    for _ in range(count):
        (word, definition), *others = rng.sample(rng.choice(list(nouns.values())), 12)
        choices = [word, *sorted({other for other, _ in others} - {word})[:3]]
        rng.shuffle(choices)
        found.append(Item(definition, tuple(choices), word))
    return found


def meanings(root: Path, count: int, seed: int, part: str = "test") -> list[Item]:
    """WordNet's nouns: which of four definitions of one kind does a word have?"""
    nouns, rng = _nouns(root), random.Random(f"{part} meanings {seed}")
    found = []
    for _ in range(count):
        (word, definition), *others = rng.sample(rng.choice(list(nouns.values())), 12)
        choices = [definition, *sorted({other for _, other in others} - {definition})[:3]]
        rng.shuffle(choices)
        found.append(Item(word, tuple(choices), definition))
    return found


def quiz(root: Path, count: int, seed: int, part: str = "test") -> list[Item]:
    """Questions of the game `quiz` in the package `bsdgames`, each with three wrong answers of the same subject."""
    found = []
    for name, question in _QUIZ.items():
        file = package_file(root, "bsdgames", f"usr/share/games/bsdgames/quiz/{name}")
        pairs = [line.split(":") for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
        plain = [
            (pair[0], pair[1]) for pair in pairs if len(pair) == 2 and not set("[]{}|\\\ufffd") & set("".join(pair))
        ]
        rng = random.Random(f"{name} {seed}")
        for asked, answer in plain:
            others = sorted({other for _, other in plain} - {answer})
            if asked and answer and len(others) >= 3:
                choices = [answer, *rng.sample(others, 3)]
                rng.shuffle(choices)
                found.append(Item(question.format(asked), tuple(choices), answer))
    return _drawn(found, count, seed, part)


_QUIZ = {
    **dict.fromkeys(("africa", "america", "asia", "europe", "state", "province"), "What is the capital of {}?"),
    "babies": "What does a {} become when it is grown up?",
    "collectives": "What is a group of {} called?",
}


def _drawn(items: list[Item], count: int, seed: int, part: str) -> list[Item]:
    """Examples come from the first tenth of the shuffled items, the items of a test from the rest."""
    random.Random(f"items {seed}").shuffle(items)
    cut = len(items) // 10
    return items[:cut][:count] if part == "example" else items[cut:][:count]


if __name__ == "__main__":
    for one in notes(4, 0):
        print(one.text, json.dumps(asdict(one.facts)), sep="\n", end="\n\n")
    for call in requests(8, 0):
        print(call.text, json.dumps(call.call), sep="\n", end="\n\n")
