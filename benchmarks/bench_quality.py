"""How good constrained answers are: a real model, greedy; right answers are counted, for Ramet and for others.

    python benchmarks/bench_quality.py --task ages       ages from 40 notes, five ways to ask for a number
    python benchmarks/bench_quality.py --task fields     seven fields from 200 notes
    python benchmarks/bench_quality.py --task tools,kinds --systems ramet,llama.cpp --peers-python peers/bin/python
    python benchmarks/bench_quality.py --show 5          with the first wrong outputs of each row

Tasks: `ages`; `fields`; `tools` (which of eight tools, and its arguments); `kinds` (a definition's kind, one of ten
labels), `words` (which of four words is defined), `meanings` (which of four definitions a word has) and `quiz`. The
texts of these four come from the Debian packages wordnet-base and bsdgames: installed, or unpacked below --root. The
rest is made from a seed (`quality_data.py`). Each row is asked with three examples in the prompt
(`kinds`: one of each kind) and without.

`right`: values that are exactly the fact; `whole`: answers in which all values are. `valid`: outputs of the type, or
that fit the schema. `tokens`: generated tokens; the first one of a text is not among them where it holds the space at
the prompt's end. `ratio`: those over the tokens of the tokenizer's own split of the same texts. Other engines run in a
process of their own (`quality_peers.py`), one question at a time: --peers-python names the Python that has them.
`server` is Ramet's own server, asked by OpenAI's API with its defaults; it alone of these is asked for ages, by a
pattern.
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import jsonschema
import quality_data as data
import torch
from json_line import commit, print_record
from quality_data import CALL_SCHEMA, SCHEMA, TOOLS, Facts, Item, Note, NotInstalled
from rich.console import Console
from rich.table import Table

from ramet import Engine, State, function, gen, select
from ramet.lang.graph.ir import SCORERS
from ramet.runtime.models.catalog import resolve_model

Json = Any  # a decoded JSON value
Program = Callable[[State, str], None]
KEYS = [one.name for one in fields(Facts)]
RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
PEERS = ("llama.cpp", "guidance", "outlines", "server")
SYSTEMS = ("ramet", *PEERS)

# Options of `gen` that change how a value is written, by the name of their row. A row whose option this version of
# Ramet doesn't have is skipped, with a word.
OPTIONS: dict[str, dict[str, Json]] = {
    "default": {},
    "compact": {"whitespace": "compact"},
    "any whitespace": {"whitespace": "any"},
    "indent=2": {"whitespace": "indent=2"},
    "any tokenization": {"tokenization": "any"},
    "any order": {"order": "any"},
    "compact and any tokenization": {"whitespace": "compact", "tokenization": "any"},
}


@dataclass(slots=True)
class Score:
    """Figures of one row: `right` of `asked` values; of `outputs` texts, `whole` have no wrong value."""

    system: str
    examples: int
    asked: int = 0
    right: int = 0
    outputs: int = 0
    whole: int = 0
    valid: int = 0
    tokens: int = 0
    own_tokens: int = 0
    seconds: float = 0.0
    note: str = ""
    wrong: list[str] = field(default_factory=list)

    def add(self, asked: int, wrong: Sequence[str], is_valid: bool, text: str, about: str) -> None:
        """Count one answer. `wrong`: what is wrong about it, one line for each of its `asked` values that is wrong."""
        self.asked += asked
        self.right += asked - len(wrong)
        self.outputs += 1
        self.whole += not wrong
        self.valid += is_valid
        if wrong:
            self.wrong.append(f"{', '.join(wrong)} | {text!r} | {about}")

    @property
    def ratio(self) -> float | None:
        return round(self.tokens / self.own_tokens, 3) if self.own_tokens else None

    def to_dict(self) -> dict[str, Json]:
        named = {"system": self.system, "examples": self.examples}
        if self.note:
            return {**named, "note": self.note}
        counts = {name: getattr(self, name) for name in ("asked", "right", "outputs", "whole", "valid", "tokens")}
        return {**named, **counts, "ratio": self.ratio, "seconds": round(self.seconds, 2)}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a system answered to one prompt. `own_tokens` is 0 where the text has parts that were not generated."""

    text: str
    tokens: int = 0
    own_tokens: int = 0
    error: str = ""


class Task(ABC):
    """Questions, the ways in which Ramet is asked them, and who is right."""

    name: str
    count: int  # how many questions, by default
    stop: tuple[str, ...]  # ends a free answer
    max_tokens: int
    kind: str | None = None  # of the constraint for other engines; None: they are not asked

    @abstractmethod
    def prompts(self, examples: int) -> list[str]:
        """The prompts, without the space that stands before an answer."""

    @abstractmethod
    def programs(self) -> dict[str, Program | str]:
        """By the name of its row, a program that keeps its answer in `answer`; or why it can't be run."""

    @abstractmethod
    def add(self, score: Score, index: int, answer: Answer) -> None:
        """Count the answer to question `index`."""

    def source(self, index: int) -> Json:
        """The constraint of question `index` for other engines, which are asked only tasks with a `kind`."""
        raise AssertionError(f"the task {self.name} has no kind, so other engines are not asked")

    def free(self, s: State, prompt: str) -> None:
        s += prompt
        s += gen("answer", stop=list(self.stop), max_tokens=self.max_tokens)


def by_options(name: str, make: Callable[[dict[str, Json]], Program]) -> dict[str, Program | str]:
    """One program for each row of OPTIONS."""
    has = set(inspect.signature(gen).parameters)
    rows: dict[str, Program | str] = {}
    for option, values in OPTIONS.items():
        absent = sorted(set(values) - has)
        rows[f"{name}, {option}"] = f"skipped: gen has no option {absent[0]}" if absent else make(values)
    return rows


# -- ages ------------------------------------------------------------------------------------------------------------


class Ages(Task):
    """The age of a person, four ways to ask for a number with text behind it."""

    name, count, stop, max_tokens, kind = "ages", 40, (" years",), 24, "regex"

    def __init__(self, count: int, seed: int) -> None:
        self.seed, self.notes = seed, data.notes(count, seed)

    def prompts(self, examples: int) -> list[str]:
        def question(one: Note) -> str:
            return f"Note: {one.text}\nQuestion: How old is {one.facts.name}?\nAnswer: {one.facts.name} is"

        shown = data.notes(examples, self.seed, "example")
        shots = "".join(f"{question(one)} {one.facts.age} years old.\n\n" for one in shown)
        return [shots + question(one) for one in self.notes]

    def source(self, index: int) -> Json:
        return "[0-9]{1,3}"

    def programs(self) -> dict[str, Program | str]:
        def typed(s: State, prompt: str) -> None:
            s += prompt + " "
            s += gen("answer", int) + " years old."

        def no_space(s: State, prompt: str) -> None:
            s += prompt
            s += gen("answer", int) + " years old."

        def pattern(s: State, prompt: str) -> None:
            s += prompt + " "
            s += gen("answer", int, regex="[0-9]{1,3}") + " years old."

        def what_follows(s: State, prompt: str) -> None:
            s += prompt
            s += gen("answer", regex=" [0-9]{1,3} years") + " old."

        return {
            'gen(int) + " years old."': typed,
            'gen(int) + " years old.", no space before': no_space,
            'gen(int, regex="[0-9]{1,3}") + " years old."': pattern,
            'gen(regex=" [0-9]{1,3} years")': what_follows,
            'free, stop=" years"': self.free,
        }

    def add(self, score: Score, index: int, answer: Answer) -> None:
        one = self.notes[index]
        number = re.fullmatch(r"\s*(-?[0-9]+)( years)?\s*", answer.text)
        is_right = number is not None and int(number[1]) == one.facts.age
        score.tokens += answer.tokens
        wrong = [] if is_right else [answer.error or f"not {one.facts.age}"]
        score.add(1, wrong, number is not None, answer.text, one.text)


# -- seven fields ----------------------------------------------------------------------------------------------------


class Fields(Task):
    """Seven facts of a note as JSON."""

    name, count, stop, max_tokens, kind = "fields", 200, ("\n\n", "\nNote:"), 160, "json"

    def __init__(self, count: int, seed: int) -> None:
        self.seed, self.notes = seed, data.notes(count, seed)

    def prompts(self, examples: int) -> list[str]:
        shown = data.notes(examples, self.seed, "example")
        shots = "".join(f"Note: {one.text}\nJSON: {json.dumps(asdict(one.facts))}\n\n" for one in shown)
        head = "" if examples else f"Read the note and write its facts as JSON with the keys {', '.join(KEYS)}.\n\n"
        return [f"{head}{shots}Note: {one.text}\nJSON:" for one in self.notes]

    def source(self, index: int) -> Json:
        return SCHEMA

    def programs(self) -> dict[str, Program | str]:
        return {
            "free": self.free,
            **by_options("schema", lambda options: _by_schema(SCHEMA, self.max_tokens, options)),
            "keys by the program, patterns end with ','": _keys_and_patterns,
            "keys by the program, text behind each value": _keys_and_types,
        }

    def add(self, score: Score, index: int, answer: Answer) -> None:
        one = self.notes[index]
        found, facts = lenient(answer.text, KEYS), asdict(one.facts)
        wrong = [f"{key} {found.get(key)!r} not {facts[key]!r}" for key in KEYS if not same(found.get(key), facts[key])]
        _count_json(score, answer, len(KEYS), wrong, SCHEMA, one.text)


def _by_schema(schema: dict[str, Json], max_tokens: int, options: dict[str, Json]) -> Program:
    def program(s: State, prompt: str) -> None:
        s += prompt + " "
        s += gen("answer", schema, max_tokens=max_tokens, **options)

    return program


def _keys_and_patterns(s: State, prompt: str) -> None:
    """Keys are text of the program; the pattern of each value includes the comma or brace behind it."""
    s += prompt
    s += ' {"name":' + gen("name", regex=r' "[^"\n]{1,40}",', max_tokens=24)
    s += ' "age":' + gen("age", regex=r" [0-9]{1,3},")
    s += ' "job":' + gen("job", regex=r' "[^"\n]{1,40}",', max_tokens=24)
    s += ' "city":' + gen("city", regex=r' "[^"\n]{1,40}",', max_tokens=24)
    s += ' "joined":' + gen("joined", regex=r" [0-9]{4},")
    s += ' "fee":' + gen("fee", regex=r" [0-9]{1,3}(\.[0-9]{1,2})?,")
    s += ' "member":' + gen("member", regex=r" (true|false)}")


def _keys_and_types(s: State, prompt: str) -> None:
    """Keys are text of the program, and text of the program stands behind each value."""
    s += prompt
    s += ' {"name": "' + gen("name", regex=r'[^"\n]{1,40}', max_tokens=24)
    s += '", "age": ' + gen("age", int)
    s += ', "job": "' + gen("job", regex=r'[^"\n]{1,40}', max_tokens=24)
    s += '", "city": "' + gen("city", regex=r'[^"\n]{1,40}', max_tokens=24)
    s += '", "joined": ' + gen("joined", int)
    s += ', "fee": ' + gen("fee", float)
    s += ', "member": ' + gen("member", bool)
    s += "}"


def _count_json(
    score: Score, answer: Answer, asked: int, wrong: list[str], schema: dict[str, Json], about: str
) -> None:
    score.tokens += answer.tokens
    score.own_tokens += answer.own_tokens
    score.add(asked, [answer.error] * asked if answer.error else wrong, fits(answer.text, schema), answer.text, about)


def lenient(text: str, keys: Sequence[str]) -> dict[str, Json]:
    """The fields of a text: of its first JSON object, or those that a search for `"key": value` finds."""
    start = text.find("{")
    if start >= 0:
        try:
            found, _ = json.JSONDecoder().raw_decode(text[start:])
        except ValueError:
            pass  # the search below reads what can be read
        else:
            return found if isinstance(found, dict) else {}
    read: dict[str, Json] = {}
    for key in keys:
        match = re.search(rf'"?{key}"?\s*[:=]\s*("[^"\n]*"|[^\s,}}]+)', text, re.IGNORECASE)
        if match:
            read[key] = match[1].strip('"')
    return read


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


def fits(text: str, schema: dict[str, Json]) -> bool:
    """True if the text is one JSON value that fits the schema."""
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


# -- tools -----------------------------------------------------------------------------------------------------------


class Tools(Task):
    """Which of eight tools a request needs, and its arguments: the tool and each argument count as one value."""

    name, count, stop, max_tokens, kind = "tools", 200, ("\n\n", "\nRequest:"), 96, "json"

    def __init__(self, count: int, seed: int) -> None:
        self.seed, self.requests = seed, data.requests(count, seed)

    def prompts(self, examples: int) -> list[str]:
        def shown(name: str) -> str:
            properties = TOOLS[name]["properties"].items()
            return f"{name}({', '.join(f'{key}: {_type(schema)}' for key, schema in properties)})"

        head = "Tools:\n" + "\n".join(map(shown, TOOLS)) + "\n\n"
        if not examples:
            head += 'Write the call that does what the user wants as JSON: {"name": tool, "arguments": {...}}\n\n'
        calls = data.requests(examples, self.seed, "example")
        shots = "".join(f"Request: {one.text}\nCall: {json.dumps(one.call, ensure_ascii=False)}\n\n" for one in calls)
        return [f"{head}{shots}Request: {one.text}\nCall:" for one in self.requests]

    def source(self, index: int) -> Json:
        return CALL_SCHEMA

    def programs(self) -> dict[str, Program | str]:
        def by(scorer: str) -> Program:
            def program(s: State, prompt: str) -> None:
                s += prompt + ' {"name": "'
                s += select("tool", list(TOOLS), scorer=scorer)
                s += '", "arguments": ' + gen("arguments", TOOLS[str(s["tool"])], max_tokens=self.max_tokens) + "}"

            return program

        rows: dict[str, Program | str] = {"free": self.free}
        rows |= by_options("schema", lambda options: _by_schema(CALL_SCHEMA, self.max_tokens, options))
        rows |= {f"name by select, {scorer}": by(scorer) for scorer in ("likelihood", "calibrated")}
        return rows | {"the likeliest of all tools' calls": self._likeliest}

    def _likeliest(self, s: State, prompt: str) -> None:
        """Write a call of every tool, and keep the likeliest: by its log-probability over the root of its length."""
        s += prompt + ' {"name": "'
        choice, *calls = s.fork(1 + len(TOOLS))
        choice += select("tool", [f'{name}"' for name in TOOLS], scorer="likelihood")
        for call, (name, schema) in zip(calls, TOOLS.items(), strict=True):
            call += f'{name}", "arguments": ' + gen("arguments", schema, max_tokens=self.max_tokens, logprobs=0)
        names = choice.meta("tool")["logprobs"]
        rows = [[*row, *call.meta("arguments")["logprobs"]] for row, call in zip(names, calls, strict=True)]
        best = max(range(len(rows)), key=lambda index: sum(rows[index]) / len(rows[index]) ** 0.5)
        s += calls[best].text().removeprefix(s.text()) + "}"

    def add(self, score: Score, index: int, answer: Answer) -> None:
        one = self.requests[index]
        found = lenient(answer.text, ("name",))
        given = (
            found.get("arguments") if isinstance(found.get("arguments"), dict) else lenient(answer.text, one.arguments)
        )
        is_tool = found.get("name") == one.tool
        wrong = [] if is_tool else [f"tool {found.get('name')!r} not {one.tool!r}"]
        for key, value in one.arguments.items():  # an argument of the wrong tool is wrong
            if not is_tool or not same(given.get(key), value):
                wrong.append(f"{key} {given.get(key)!r} not {value!r}")
        _count_json(score, answer, 1 + len(one.arguments), wrong, CALL_SCHEMA, one.text)


def _type(schema: dict[str, Json]) -> str:
    return "|".join(schema["enum"]) if "enum" in schema else str(schema["type"])


# -- choices ---------------------------------------------------------------------------------------------------------


class Choose(Task):
    """The right one of some choices, by `select` with each scorer, by a mask, and by free text."""

    kind, stop, max_tokens = "choice", ("\n",), 24

    def __init__(self, name: str, items: list[Item], shown: list[Item], form: str) -> None:
        """`shown`: the examples of a prompt; `form`: the question."""
        self.name, self.items, self.shown, self.form = name, items, shown, form
        self.choices = {prompt: one.choices for examples in (3, 0) for prompt, one in self._pairs(examples)}

    def _pairs(self, examples: int) -> list[tuple[str, Item]]:
        shots = "".join(f"{self.form.format(one.text)} {one.answer}\n\n" for one in (self.shown if examples else ()))
        return [(f"{shots}{self.form.format(one.text)}", one) for one in self.items]

    def prompts(self, examples: int) -> list[str]:
        return [prompt for prompt, _ in self._pairs(examples)]

    def source(self, index: int) -> Json:
        return [f" {choice}" for choice in self.items[index].choices]

    def programs(self) -> dict[str, Program | str]:
        def masked(s: State, prompt: str) -> None:
            s += prompt + " "
            s += gen("answer", choices=self.choices[prompt])

        def by(scorer: str) -> Program:
            def program(s: State, prompt: str) -> None:
                s += prompt + " "
                s += select("answer", self.choices[prompt], **({} if scorer == "default" else {"scorer": scorer}))

            return program

        rows: dict[str, Program | str] = {"free": self.free, "gen(choices=...)": masked}
        return rows | {f"select, {scorer}": by(scorer) for scorer in ("default", *SCORERS)}

    def add(self, score: Score, index: int, answer: Answer) -> None:
        one, said = self.items[index], answer.text.strip().rstrip(".").lower()
        is_right = said == one.answer.lower()
        score.tokens += answer.tokens
        is_valid = said in {choice.lower() for choice in one.choices}
        score.add(1, [] if is_right else [answer.error or f"not {one.answer!r}"], is_valid, answer.text, one.text)


# By name: who draws the items, the form of a question, and the number of examples.
CHOICES: dict[str, tuple[Callable[..., list[Item]], str, int]] = {
    "kinds": (data.kinds, "Definition: {}\nKind:", len(data.KINDS)),
    "words": (data.words, "Definition: {}\nWord:", 3),
    "meanings": (data.meanings, "Word: {}\nDefinition:", 3),
    "quiz": (data.quiz, "Question: {}\nAnswer:", 3),
}
TASKS = ("ages", "fields", "tools", *CHOICES)


def make_task(name: str, count: int | None, seed: int, root: Path) -> Task:
    """Raises NotInstalled if a task's texts are not there."""
    for kind in (Ages, Fields, Tools):
        if kind.name == name:
            return kind(count or kind.count, seed)
    draw, form, num_shown = CHOICES[name]
    return Choose(name, draw(root, count or 300, seed), draw(root, num_shown, seed, "example"), form)


# -- systems ---------------------------------------------------------------------------------------------------------


def ramet_rows(engine: Engine, task: Task, at_once: int, rows_named: str) -> list[Score]:
    """Run the programs of a task that are so named, for all prompts, from an empty cache, `at_once` together."""
    rows = []
    for examples in (3, 0):
        prompts = task.prompts(examples)
        for name, program in task.programs().items():
            score = Score(f"ramet: {name}", examples)
            if not re.search(rows_named, score.system):
                continue
            rows.append(score)
            if isinstance(program, str):
                score.note = program
                continue
            engine.flush_cache()
            begin = time.perf_counter()
            states = function(temperature=0)(program).run_batch(prompts, backend=engine, max_live=at_once)
            score.seconds = time.perf_counter() - begin
            for index, (prompt, state) in enumerate(zip(prompts, states, strict=True)):
                task.add(score, index, _answer(engine, prompt, state))
            print(f"{task.name}: {score.system}, {examples} examples: {score.right} of {score.asked}", flush=True)
    return rows


def _answer(engine: Engine, prompt: str, state: State) -> Answer:
    error = state.error()
    if error is not None:
        return Answer("", error=str(error))
    if "answer" not in state:  # a program of several values: its text is the answer
        metas = [state.meta(name) for name in state.variables]
        return Answer(state.text().removeprefix(prompt).lstrip(" "), sum(map(_generated, metas)))
    meta = state.meta("answer")
    text = next(event.text for event in state.record.events.values() if event.name == "answer")
    return Answer(text, _generated(meta), own_split(engine, text))


def _generated(meta: dict[str, Json]) -> int:
    return int(meta["usage"].completion_tokens)


def own_split(engine: Engine, text: str) -> int:
    """The number of tokens by which the tokenizer writes a text in the middle of a prompt."""
    return len(engine.tokenizer.encode(text, continues=True))


def peer_rows(
    engine: Engine,
    task: Task,
    peer: str,
    model: Path,
    python: str,
    count: int | None,
    rows_named: str,
    limit_s: float | None,
) -> tuple[list[Score], dict[str, str]]:
    """Ask another engine, free and constrained, for the rows so named. Returns them, and its packages' versions.

    Each row is asked in a process of its own, which is ended after `limit_s`.
    """
    rows, versions = list[Score](), dict[str, str]()
    if task.kind is None or (task.kind == "regex" and peer != "server"):
        return rows, versions
    for examples in (3, 0):
        prompts = task.prompts(examples)[:count]
        for kind in ("free", task.kind):
            score = Score(f"{peer}: {kind}", examples)
            if not re.search(rows_named, score.system):
                continue
            rows.append(score)
            # Free text begins with its own space, and so do choices here; JSON can't.
            space, stop = " " * (kind in ("json", "regex")), list(task.stop) if kind == "free" else []
            asks = [
                {
                    "kind": kind,
                    "source": None if kind == "free" else task.source(index),
                    "prompt": prompt + space,
                    "stop": stop,
                    "max_tokens": task.max_tokens,
                }
                for index, prompt in enumerate(prompts)
            ]
            own = peer == "server"
            found = _asked(peer, model, sys.executable if own else python, asks, None if own else limit_s)
            if found is None or "missing" in found:
                absent = "" if found is None else " ".join(found["missing"])
                score.note = f"not installed: pip install {absent}" if absent else f"did not end in {limit_s:g} s"
                continue
            versions |= found["versions"]
            for index, one in enumerate(found["answers"]):
                score.seconds += one["seconds"]
                text = one["text"].lstrip(" ")
                task.add(score, index, Answer(text, one["tokens"], own_split(engine, text), one["error"]))
    return rows, versions


def _asked(
    peer: str, model: Path, python: str, asks: list[dict[str, Json]], limit_s: float | None
) -> dict[str, Json] | None:
    """The answers of another engine's process (see quality_peers.py); None if it did not end in time."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "asks.json", Path(folder) / "answers.json"
        asked.write_text(json.dumps(asks))
        script = Path(__file__).with_name("quality_peers.py")
        command = [python, script, "--peer", peer, "--model", model, "--asks", asked, "--answers", answered]
        try:
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL, timeout=limit_s)
        except subprocess.TimeoutExpired:
            return None
        answers: dict[str, Json] = json.loads(answered.read_text())
        return answers


# -- the table -------------------------------------------------------------------------------------------------------


def show(console: Console, task: str, rows: Sequence[Score], num_wrong: int) -> None:
    table = Table("system", "examples", "right", "whole", "valid", "tokens", "ratio", "s", title=task)
    for row in rows:
        if row.note:
            table.add_row(row.system, str(row.examples), row.note)
            continue
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        figures = (f"{row.right} / {row.asked}", f"{row.whole} / {row.outputs}", str(row.valid), str(row.tokens), ratio)
        table.add_row(row.system, str(row.examples), *figures, f"{row.seconds:.1f}")
    console.print(table)
    for row in rows:
        for line in row.wrong[:num_wrong]:
            console.print(f"{row.system}, {row.examples} examples: {line}", markup=False, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a catalogue model, or a .gguf file")
    parser.add_argument("--task", default="ages,fields,tools,kinds", help=f"some of {','.join(TASKS)}")
    parser.add_argument("--systems", default="ramet", help=f"some of {','.join(SYSTEMS)}")
    parser.add_argument("--rows", default="", help="a pattern: the rows whose names have it")
    parser.add_argument("--count", type=int, help="questions of a task; default: its own number")
    parser.add_argument("--peer-count", type=int, help="questions for other engines; default: all")
    parser.add_argument("--peer-seconds", type=float, help="for a row of another engine; then it counts as not ended")
    parser.add_argument("--seed", type=int, default=0, help="of the data")
    parser.add_argument("--at-once", type=int, default=8, help="programs that Ramet runs at once")
    parser.add_argument("--peers-python", default=sys.executable, help="the Python that has the other engines")
    parser.add_argument("--root", type=Path, default=Path("/"), help="below it are the files of Debian packages")
    parser.add_argument("--show", type=int, default=0, help="wrong outputs that are printed for each row")
    parser.add_argument("--out", type=Path, help=f"append the JSON line to this file, such as {RESULTS.name}")
    arguments = parser.parse_args()
    tasks, systems = arguments.task.split(","), arguments.systems.split(",")
    for flag, given, known in (("--task", tasks, TASKS), ("--systems", systems, SYSTEMS)):
        wrong = sorted(set(given) - set(known))
        if wrong:
            parser.error(f"{flag} has {wrong[0]!r}, but must be some of {','.join(known)}")
    console = Console(width=150)
    model = resolve_model(arguments.model)
    figures, versions = dict[str, list[Json]](), dict[str, str]()
    with Engine(arguments.model, num_kv_tokens=16_384) as engine:
        engine.generate("warm-up")
        for name in tasks:
            try:
                task = make_task(name, arguments.count, arguments.seed, arguments.root)
            except NotInstalled as missing:
                console.print(f"{name}: {missing}", markup=False)
                continue
            rows = ramet_rows(engine, task, arguments.at_once, arguments.rows) if "ramet" in systems else []
            for peer in systems:
                if peer in PEERS:
                    more, used = peer_rows(
                        engine,
                        task,
                        peer,
                        model,
                        arguments.peers_python,
                        arguments.peer_count,
                        arguments.rows,
                        arguments.peer_seconds,
                    )
                    rows, versions = rows + more, versions | used
            show(console, name, rows, arguments.show)
            figures[name] = [row.to_dict() for row in rows]
    print_record(
        {
            "bench": "quality",
            "commit": commit(),
            "device": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "peers": versions,
            "model": arguments.model,
            "seed": arguments.seed,
            "at_once": arguments.at_once,
            "tasks": figures,
        },
        arguments.out,
    )


if __name__ == "__main__":
    main()
