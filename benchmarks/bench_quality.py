"""How good constrained answers are: facts read from notes, by a real model, greedily; the right ones are counted.

    python benchmarks/bench_quality.py --task ages              the age from 40 notes, four ways to ask for a number
    python benchmarks/bench_quality.py --task fields            seven fields from 80 notes
    python benchmarks/bench_quality.py --task ages --show 5     with the first wrong outputs of each row

Notes and facts are made from a seed (`quality_data.py`). Each row is asked with three examples in the prompt and
without. `right`: values that are exactly the fact. `valid`: outputs that are of the type, or fit the schema.
`tokens`: generated tokens; `ratio`: those over the tokens of the tokenizer's own split of the same texts.
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from json_line import commit, print_record
from quality_data import SCHEMA, Facts, Note, notes
from rich.console import Console
from rich.table import Table

from ramet import Engine, State, function, gen

Json = Any  # a decoded JSON value
KEYS = [one.name for one in fields(Facts)]
RESULTS = Path(__file__).parent / "results" / "quality.jsonl"

# Options of `gen` that change how a value is written, by the name of their row. A row whose option this version of
# Ramet doesn't have is skipped, with a word.
OPTIONS: dict[str, dict[str, Json]] = {
    "default": {},
    "compact": {"whitespace": "compact"},
    "any whitespace": {"whitespace": "any"},
    "indent=2": {"whitespace": "indent=2"},
    "any tokenization": {"tokenization": "any"},
    "any order": {"order": "any"},
}


@dataclass(slots=True)
class Score:
    """Figures of one row: `right` of `asked` values, `valid` of `outputs` texts."""

    system: str
    examples: int
    asked: int = 0
    right: int = 0
    outputs: int = 0
    valid: int = 0
    tokens: int = 0
    own_tokens: int = 0
    seconds: float = 0.0
    note: str = ""
    wrong: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float | None:
        return round(self.tokens / self.own_tokens, 3) if self.own_tokens else None

    def to_dict(self) -> dict[str, Json]:
        if self.note:
            return {"system": self.system, "examples": self.examples, "note": self.note}
        counts = {name: getattr(self, name) for name in ("asked", "right", "outputs", "valid", "tokens")}
        return {
            "system": self.system,
            "examples": self.examples,
            **counts,
            "ratio": self.ratio,
            "seconds": round(self.seconds, 2),
        }


@dataclass(frozen=True, slots=True)
class Run:
    """What a row needs: the model, and how many programs run at once."""

    engine: Engine
    at_once: int

    def states(self, program: Callable[..., Json], prompts: Sequence[str]) -> tuple[list[State], float]:
        """Run a program for each prompt. Returns the states, and the seconds."""
        self.engine.flush_cache()
        wanted = function(temperature=0)(program)
        begin = time.perf_counter()
        states = wanted.run_batch(list(prompts), backend=self.engine, max_live=self.at_once)
        return states, time.perf_counter() - begin

    def own_split(self, text: str) -> int:
        """The number of tokens by which the tokenizer writes a text in the middle of a prompt."""
        return len(self.engine.tokenizer.encode(text, continues=True))


# -- ages ------------------------------------------------------------------------------------------------------------


def age_prompts(asked: Sequence[Note], examples: Sequence[Note]) -> list[str]:
    def question(one: Note) -> str:
        return f"Note: {one.text}\nQuestion: How old is {one.facts.name}?\nAnswer: {one.facts.name} is"

    shots = "".join(f"{question(one)} {one.facts.age} years old.\n\n" for one in examples)
    return [shots + question(one) for one in asked]


def _age_int(s: State, prompt: str) -> None:
    s += prompt + " "
    s += gen("age", int) + " years old."


def _age_int_no_space(s: State, prompt: str) -> None:
    s += prompt
    s += gen("age", int) + " years old."


def _age_regex(s: State, prompt: str) -> None:
    s += prompt + " "
    s += gen("age", int, regex="[0-9]{1,3}") + " years old."


def _age_what_follows(s: State, prompt: str) -> None:
    s += prompt
    s += gen("age", regex=" [0-9]{1,3} years") + " old."


def _age_free(s: State, prompt: str) -> None:
    s += prompt
    s += gen("age", stop=" years", max_tokens=24)


AGE_ROWS: dict[str, Callable[[State, str], None]] = {
    'gen(int) + " years old."': _age_int,
    'gen(int) + " years old.", no space before': _age_int_no_space,
    'gen(int, regex="[0-9]{1,3}") + " years old."': _age_regex,
    'gen(regex=" [0-9]{1,3} years")': _age_what_follows,
    'free, stop=" years"': _age_free,
}


def ages(run: Run, count: int, seed: int) -> list[Score]:
    asked = notes(count, seed)
    rows = []
    for examples in (3, 0):
        prompts = age_prompts(asked, notes(examples, seed, "example"))
        for name, program in AGE_ROWS.items():
            states, seconds = run.states(program, prompts)
            score = Score(f"ramet: {name}", examples, seconds=seconds)
            for state, one in zip(states, asked, strict=True):
                _count_age(run, score, state, one)
            rows.append(score)
    return rows


def _count_age(run: Run, score: Score, state: State, one: Note) -> None:
    score.asked += 1
    score.outputs += 1
    error = state.error()
    if error is not None:
        score.wrong.append(f"{error} | {one.text}")
        return
    text = str(state["age"])
    number = re.fullmatch(r"\s*(-?[0-9]+)( years)?\s*", text)
    score.valid += number is not None
    is_right = number is not None and int(number[1]) == one.facts.age
    score.right += is_right
    score.tokens += state.meta("age")["usage"].completion_tokens
    if not is_right:
        score.wrong.append(f"{text!r} not {one.facts.age} | {one.text}")


# -- seven fields ----------------------------------------------------------------------------------------------------


def field_prompts(asked: Sequence[Note], examples: Sequence[Note]) -> list[str]:
    shots = "".join(f"Note: {one.text}\nJSON: {json.dumps(asdict(one.facts))}\n\n" for one in examples)
    head = "" if examples else f"Read the note and write its facts as JSON with the keys {', '.join(KEYS)}.\n\n"
    return [f"{head}{shots}Note: {one.text}\nJSON:" for one in asked]


def _fields_by_schema(options: dict[str, Json]) -> Callable[[State, str], None]:
    def program(s: State, prompt: str) -> None:
        s += prompt + " "
        s += gen("answer", SCHEMA, max_tokens=160, **options)

    return program


def _fields_by_program(s: State, prompt: str) -> None:
    """Keys are text of the program; the pattern of each value includes the comma or brace behind it."""
    s += prompt
    s += ' {"name":' + gen("name", regex=r' "[^"\n]{1,40}",', max_tokens=24)
    s += ' "age":' + gen("age", regex=r" [0-9]{1,3},")
    s += ' "job":' + gen("job", regex=r' "[^"\n]{1,40}",', max_tokens=24)
    s += ' "city":' + gen("city", regex=r' "[^"\n]{1,40}",', max_tokens=24)
    s += ' "joined":' + gen("joined", regex=r" [0-9]{4},")
    s += ' "fee":' + gen("fee", regex=r" [0-9]{1,3}(\.[0-9]{1,2})?,")
    s += ' "member":' + gen("member", regex=r" (true|false)}")


def _fields_by_types(s: State, prompt: str) -> None:
    """Keys are text of the program, values are types and literal text follows each."""
    s += prompt
    s += ' {"name": "' + gen("name", regex=r'[^"\n]{1,40}', max_tokens=24)
    s += '", "age": ' + gen("age", int)
    s += ', "job": "' + gen("job", regex=r'[^"\n]{1,40}', max_tokens=24)
    s += '", "city": "' + gen("city", regex=r'[^"\n]{1,40}', max_tokens=24)
    s += '", "joined": ' + gen("joined", int)
    s += ', "fee": ' + gen("fee", float)
    s += ', "member": ' + gen("member", bool)
    s += "}"


def _fields_free(s: State, prompt: str) -> None:
    s += prompt
    s += gen("answer", stop=["\n\n", "\nNote:"], max_tokens=160)


def extraction(run: Run, count: int, seed: int) -> list[Score]:
    asked = notes(count, seed)
    has = set(inspect.signature(gen).parameters)
    rows = []
    for examples in (3, 0):
        prompts = field_prompts(asked, notes(examples, seed, "example"))
        programs: dict[str, Callable[[State, str], None]] = {"free": _fields_free}
        for name, options in OPTIONS.items():
            absent = sorted(set(options) - has)
            if absent:
                rows.append(Score(f"ramet: schema, {name}", examples, note=f"skipped: gen has no {absent[0]}"))
            else:
                programs[f"schema, {name}"] = _fields_by_schema(options)
        programs["keys by the program, patterns end with ','"] = _fields_by_program
        programs["keys by the program, types"] = _fields_by_types
        for name, program in programs.items():
            states, seconds = run.states(program, prompts)
            score = Score(f"ramet: {name}", examples, seconds=seconds)
            for state, one in zip(states, asked, strict=True):
                text, tokens, error = _answer(state, prompts[0])
                own = run.own_split(text) if "keys" not in name else 0  # those rows generate only the values
                count_fields(score, text, tokens, own, one, error)
            rows.append(score)
    return rows


def _answer(state: State, prompt: str) -> tuple[str, int, str]:
    """The JSON that a program wrote, the number of generated tokens, and the error if it failed."""
    error = state.error()
    if error is not None:
        return "", 0, str(error)
    text = state.text()
    metas = [state.meta(name) for name in state.variables]
    tokens = sum(meta["usage"].completion_tokens - (meta["finish_reason"] == "stop") for meta in metas)
    return text[text.rindex("JSON:") + len("JSON:") :].lstrip(" "), tokens, ""


def count_fields(score: Score, text: str, tokens: int, own_tokens: int, one: Note, error: str = "") -> None:
    """Add one answer to a row."""
    found = lenient(text)
    facts = asdict(one.facts)
    right = [key for key in KEYS if same(found.get(key), facts[key])]
    score.asked += len(KEYS)
    score.right += len(right)
    score.outputs += 1
    score.valid += is_valid(text)
    score.tokens += tokens
    score.own_tokens += own_tokens
    if len(right) < len(KEYS):
        missed = ", ".join(f"{key} {found.get(key)!r} not {facts[key]!r}" for key in KEYS if key not in right)
        score.wrong.append(f"{missed} | {error or text!r} | {one.text}")


def lenient(text: str) -> dict[str, Json]:
    """The fields of a text: of its first JSON object, or those that a search for `"key": value` finds."""
    start = text.find("{")
    if start >= 0:
        try:
            found, _ = json.JSONDecoder().raw_decode(text[start:])
        except ValueError:
            pass  # the search below reads what can be read
        else:
            return found if isinstance(found, dict) else {}
    fields_found: dict[str, Json] = {}
    for key in KEYS:
        match = re.search(rf'"?{key}"?\s*[:=]\s*("[^"\n]*"|[^\s,}}]+)', text, re.IGNORECASE)
        if match:
            fields_found[key] = match[1].strip('"')
    return fields_found


def same(found: Json, fact: Json) -> bool:
    """True if a value says the fact. A quoted number or boolean counts as the number or boolean."""
    if isinstance(fact, bool):
        return str(found).strip().lower() == str(fact).lower()
    if isinstance(fact, int | float):
        try:
            return not isinstance(found, bool) and float(found) == fact
        except (TypeError, ValueError):
            return False
    return isinstance(found, str) and found.strip() == fact


def is_valid(text: str) -> bool:
    """True if the text is one JSON object that fits the schema."""
    import jsonschema

    try:
        jsonschema.validate(json.loads(text), SCHEMA)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


# -- the table -------------------------------------------------------------------------------------------------------

TASKS: dict[str, Callable[[Run, int, int], list[Score]]] = {"ages": ages, "fields": extraction}
COUNTS = {"ages": 40, "fields": 80}


def show(console: Console, task: str, rows: Sequence[Score], num_wrong: int) -> None:
    table = Table("system", "examples", "right", "valid", "tokens", "ratio", "s", title=task)
    for row in rows:
        if row.note:
            table.add_row(row.system, str(row.examples), row.note)
            continue
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        right, valid = f"{row.right} / {row.asked}", f"{row.valid} / {row.outputs}"
        table.add_row(row.system, str(row.examples), right, valid, str(row.tokens), ratio, f"{row.seconds:.1f}")
    console.print(table)
    for row in rows:
        for line in row.wrong[:num_wrong]:
            console.print(f"{row.system}, {row.examples} examples: {line}", markup=False, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="ages,fields", help=f"some of {','.join(TASKS)}")
    parser.add_argument("--count", type=int, help="notes of a task; default: its own")
    parser.add_argument("--seed", type=int, default=0, help="of the notes")
    parser.add_argument("--at-once", type=int, default=8, help="programs that run at once")
    parser.add_argument("--show", type=int, default=0, help="wrong outputs that are printed for each row")
    parser.add_argument("--out", type=Path, help=f"append the JSON line to this file, such as {RESULTS.name}")
    arguments = parser.parse_args()
    tasks = arguments.task.split(",")
    for task in tasks:
        if task not in TASKS:
            parser.error(f"--task {task!r} is not one of {', '.join(TASKS)}")
    console = Console(width=140)
    figures = {}
    with Engine(arguments.model, num_kv_tokens=16_384) as engine:
        run = Run(engine, arguments.at_once)
        run.states(_age_free, ["Age:"])  # warm-up
        for task in tasks:
            rows = TASKS[task](run, arguments.count or COUNTS[task], arguments.seed)
            show(console, task, rows, arguments.show)
            figures[task] = [row.to_dict() for row in rows]
    print_record(
        {
            "bench": "quality",
            "commit": commit(),
            "device": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "model": arguments.model,
            "seed": arguments.seed,
            "at_once": arguments.at_once,
            "tasks": figures,
        },
        arguments.out,
    )


if __name__ == "__main__":
    main()
