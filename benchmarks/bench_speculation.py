"""Several tokens a step on a CPU: with drafts in turns with none, on six kinds of work at batch 1, 4 and 16.

    python benchmarks/bench_speculation.py [--batches 1,4,16] [--rounds 3] [--threads 2] [--tokens 160]
    python benchmarks/bench_speculation.py --kinds free --rounds 15 --out benchmarks/results/speculation.jsonl
    python benchmarks/bench_speculation.py --clock cpu --threads 1      tokens a second of CPU time, on a busy machine
    python benchmarks/bench_speculation.py --draft smollm2-135m         with a draft model, asked as if it took no time
    python benchmarks/bench_speculation.py --sources      the drafts alone: time and memory with a large cache
    python benchmarks/bench_speculation.py --stale        reckoned: drafts on a GPU that are made one step before

One engine runs each round twice, with its drafts (auto) and without (off), on the same prompts, which are cached before
the clock starts: of two engines in a process, the second is slower by a few percent. Every round has other documents,
so that nothing is drafted from a round before; only the agent's loop is run again and again, as it would be. A row is
the median over rounds of tokens a second, and their ratio within rounds. The answers are compared. Drafting: the part
of the engine's time that looks for drafts and weighs them. Accepted: of drafted tokens, by source. With a draft model,
its part of the engine's time is shown, too.

    extraction   JSON under a schema from a document      chat    three turns of a conversation
    quotes       sentences quoted from a passage          agent   the same four steps, run `--runs` times
    edits        a file of 300 lines written again with   free    a story at temperature 1
                 a name changed; the file is the draft
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from json_line import commit, print_record
from rich.console import Console
from rich.table import Table

from ramet.grammar import Vocabulary
from ramet.grammar.service.sources import compile_constraint
from ramet.runtime.cache.page_pool import PagePool
from ramet.runtime.cache.radix_cache import RadixCache
from ramet.runtime.engine.engine import Engine
from ramet.runtime.speculation.speculation import Speculation, StepTimes
from ramet.runtime.steps.cuda_graph import VERIFIED_DRAFTS
from ramet.runtime.types import FinishReason, Grammar, Request, SamplingParams, Sequence, Status

Job = dict[str, Any]  # Any: the arguments of Engine.submit
Answer = tuple[Request, list[int]]  # and its tokens
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

GPU_STEP_S = 0.0058  # assumed: an 8B model's step at batch 1 on an H100
MOST_VERIFIED = VERIFIED_DRAFTS[-1]

NAMES = ["Ada Lovelace", "Alan Turing", "Grace Hopper", "Edsger Dijkstra", "Barbara Liskov", "Donald Knuth"]
CITIES = ["Lisbon", "Oslo", "Kyoto", "Nairobi", "Quito", "Riga", "Perth", "Dublin", "Tunis", "Hanoi"]
THINGS = ["telescope", "wooden table", "steam engine", "garden chair", "copper kettle", "bicycle", "glass lamp", "loom"]
FACTS = (
    "The {thing} was built in {city} in {year} by {name}.",
    "{name} sold the {thing} for {price} dollars to a museum in {city}.",
    "It is said that the {thing} of {city} weighs more than {price} pounds.",
    "In the spring of {year}, {name} moved from {city} to the coast and took the {thing} along.",
    "Nobody in {city} had seen a {thing} like that before the year {year}.",
)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "city": {"type": "string", "maxLength": 40},
        "year": {"type": "integer"},
        "thing": {"type": "string", "maxLength": 60},
        "price": {"type": "integer"},
        "summary": {"type": "string", "maxLength": 300},
    },
    "required": ["name", "city", "year", "thing", "price", "summary"],
}


def fact(rng: random.Random) -> str:
    values = {"name": rng.choice(NAMES), "city": rng.choice(CITIES), "thing": rng.choice(THINGS)}
    return rng.choice(FACTS).format(**values, year=rng.randrange(1700, 2000), price=rng.randrange(20, 9000))


def document(rng: random.Random, num_sentences: int) -> str:
    return " ".join(fact(rng) for _ in range(num_sentences))


def source_file(rng: random.Random, num_lines: int) -> str:
    """A file of functions that differ in their names and numbers."""
    lines = ["import math", ""]
    while len(lines) < num_lines:
        name, number = rng.choice(THINGS).split()[-1], rng.randrange(1000)
        lines += [
            f"def {name}_{number}(value, limit={rng.randrange(99)}):",
            f'    """Return the {name} of a value."""',
            f"    if value > {rng.randrange(9999)}:",
            f"        return math.sqrt(value - {rng.randrange(99)})",
            f"    return value * {rng.randrange(2, 9)} + limit",
            "",
        ]
    return "\n".join(lines[:num_lines])


class Work:
    """Makes the jobs of each kind."""

    def __init__(self, engine: Engine, num_tokens: int, clock: str) -> None:
        tokenizer = engine.tokenizer
        words = Vocabulary(tokenizer.token_bytes, tokenizer.eos_ids, tokenizer.special_ids, tokenizer.vocab_size)
        self.grammar: Grammar = compile_constraint("json_schema", SCHEMA, words)
        self.num_tokens = num_tokens
        self.clock = clock

    def sampling(self, **values: Any) -> SamplingParams:  # Any: fields of SamplingParams
        return SamplingParams(**{"temperature": 0.0, "max_tokens": self.num_tokens, "seed": 1, **values})

    def chat(self, *turns: str) -> str:
        roles = ("user", "assistant")
        said = "".join(f"<|im_start|>{roles[i % 2]}\n{turn}<|im_end|>\n" for i, turn in enumerate(turns))
        return f"{said}<|im_start|>assistant\n"

    def extraction(self, rng: random.Random) -> Job:
        prompt = self.chat(f"{document(rng, 12)}\n\nExtract the name, city, year, thing, price and a summary as JSON.")
        return {"prompt": prompt, "sampling": self.sampling(), "grammar": self.grammar}

    def quotes(self, rng: random.Random) -> Job:
        passages = "\n".join(f"[{i}] {document(rng, 4)}" for i in range(1, 9))
        question = f"Which passages speak of {rng.choice(CITIES)}? Quote the whole passages word by word."
        return {"prompt": self.chat(f"{passages}\n\n{question}"), "sampling": self.sampling()}

    def edits(self, rng: random.Random) -> Job:
        old = source_file(rng, 300)
        new = old.replace("limit", "bound")
        begin = "\n".join(new.splitlines()[:62])
        task = "The file with `limit` renamed to `bound`"
        prompt = f"The file before:\n```python\n{old}\n```\n\n{task}:\n```python\n{begin}\n"
        return {"prompt": prompt, "sampling": self.sampling(), "draft": "\n".join(old.splitlines()[62:])}

    def free(self, rng: random.Random) -> Job:
        prompt = self.chat(f"Write a story about a {rng.choice(THINGS)} in {rng.choice(CITIES)}.")
        return {"prompt": prompt, "sampling": self.sampling(temperature=1.0, seed=rng.randrange(10**6))}


def run_jobs(engine: Engine, jobs: list[Job], clock: str) -> tuple[float, list[Any]]:
    """Run jobs at once, with their prompts cached. Returns the seconds and the results."""
    for handle in [engine.submit(**{**job, "sampling": SamplingParams(max_tokens=1), "grammar": None}) for job in jobs]:
        handle.result()
    start = CLOCKS[clock]()
    results = [handle.result() for handle in [engine.submit(**job) for job in jobs]]
    return CLOCKS[clock]() - start, results


def run_one_turn(engine: Engine, work: Work, kind: str, batch: int, seed: int) -> tuple[float, list[Any]]:
    make: Callable[[random.Random], Job] = getattr(work, kind)
    return run_jobs(engine, [make(random.Random(1000 * seed + row)) for row in range(batch)], work.clock)


def run_chat(engine: Engine, work: Work, batch: int, seed: int) -> tuple[float, list[Any]]:
    """Three turns of conversations about documents; each turn sees the answers before it."""
    rng = random.Random(seed)
    turns = [[f"{document(rng, 8)}\n\nWhat is this about?"] for _ in range(batch)]
    seconds, results = 0.0, []
    for question in ("Say it again in one sentence.", "List all names and years in the text.", None):
        jobs = [{"prompt": work.chat(*said), "sampling": work.sampling()} for said in turns]
        passed, answers = run_jobs(engine, jobs, work.clock)
        seconds += passed
        results += answers
        for said, answer in zip(turns, answers, strict=True):
            said += [answer.text, question]
    return seconds, results


def run_agent(engine: Engine, work: Work, batch: int, seed: int, num_runs: int) -> tuple[float, list[Any]]:
    """A loop of four steps whose observations are the same in each run, at temperature 0."""
    rng = random.Random(seed)
    tasks = [fact(rng) for _ in range(batch)]
    steps = ("Make a plan in three steps.", "Do the first step.", "Do the next step.", "Give the final answer.")
    seconds, results = 0.0, []
    for _ in range(num_runs):
        turns = [[f"Task: check this claim. {task} {steps[0]}"] for task in tasks]
        for following in (*steps[1:], None):
            jobs = [{"prompt": work.chat(*said), "sampling": work.sampling(max_tokens=64)} for said in turns]
            passed, answers = run_jobs(engine, jobs, work.clock)
            seconds += passed
            results += answers
            for said, answer in zip(turns, answers, strict=True):
                said += [answer.text, following]
    return seconds, results


def measure_sources(num_sequences: int, num_cached: int) -> dict[str, float]:
    """Drafts of many live sequences, whose prompts were answered before: CPU time of a sequence and step, and memory.

    The tree has `num_cached` tokens, in 1,000 prompts with four answers each; as many answers are kept as runs. In each
    step every sequence has one new token. Half of the sequences repeat an answer, the others write something new. Steps
    of more rows than that get no drafts: drafts are asked for 16 sequences at a time.
    """
    rng = np.random.default_rng(0)
    length = num_cached // 5_000
    pool = PagePool(num_cached // 16 + 20_000, 16)
    cache = RadixCache(pool)
    speculation = Speculation(cache=cache)
    prompts, answers = [], []
    for _ in range(1_000):  # texts without a word in common
        prompt = rng.integers(0, 49_000, length, dtype=np.int32)
        prompts.append(prompt)
        for _ in range(4):
            answer = rng.integers(0, 49_000, length, dtype=np.int32)
            match = cache.match(np.concatenate([prompt, answer]))
            rest = np.concatenate([prompt, answer])[match.num_tokens :]
            pages = pool.allocate(-(-len(rest) // 16))
            assert pages is not None
            cache.lock(match.node)
            cache.insert(match.node, rest, pages)
            cache.unlock(match.node)
            done = Sequence(Request("done", prompt, SamplingParams(), length), output_ids=answer.tolist())
            done.finish_reason = FinishReason.LENGTH
            speculation.propose([done])
            speculation.release(done)  # keeps its answer
        answers.append(answer)
    live = [
        Sequence(Request(str(i), prompts[i % 1_000], SamplingParams(), length), status=Status.RUNNING, slot=i)
        for i in range(num_sequences)
    ]
    gc.collect()
    gc.freeze()  # as a server's engine does
    before = memory()
    seconds = []
    for step in range(20):
        for i, sequence in enumerate(live):
            new = answers[i % 1_000][step] if i % 2 else rng.integers(0, 49_000)
            sequence.output_ids.append(int(new))
        begin = time.process_time()
        for first in range(0, num_sequences, 16):
            speculation.propose(live[first : first + 16])
        seconds.append(time.process_time() - begin)
    return {
        "cached_tokens": num_cached,
        "live_sequences": num_sequences,
        "first_step_us": round(1e6 * seconds[0] / num_sequences, 1),
        "step_us": round(1e6 * statistics.median(seconds[1:]) / num_sequences, 1),
        "bytes_a_sequence": round((memory() - before) / num_sequences),
    }


class GpuTimes(StepTimes):
    """Assumed seconds of a GPU's steps: a hundredth more for each further token, and the host's part with drafts."""

    def __init__(self, host_s: float) -> None:
        super().__init__()
        self.host_s = host_s

    def knows(self, num_tokens: int, kv_len: float) -> bool:
        return True

    def seconds(self, num_tokens: int, kv_len: float) -> float:
        return GPU_STEP_S * (1 + 0.01 * (num_tokens - 1)) + self.host_s * (num_tokens > 1)


class Recorded(Speculation):
    """Drafts nothing, and keeps the requests and their answers."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[Answer] = []

    def propose(self, sequences: Iterable[Sequence]) -> dict[Sequence, list[int]]:
        return {}

    def release(self, sequence: Sequence) -> None:
        if sequence.request.max_tokens > 1 and sequence.output_ids:
            self.answers.append((sequence.request, list(sequence.output_ids)))


class StaleDrafts(Speculation):
    """Drafts behind the tokens that the step in flight will yield if its own draft is right."""

    def propose_behind(self, sequence: Sequence, num_running: int) -> list[int]:
        """Those tokens, of which there are `num_running`, and the draft; empty where no draft pays."""
        if self._look([sequence]) is None:
            return []
        found = self._live[sequence]
        draft = found.text.propose(num_running + MOST_VERIFIED)
        if draft is None:
            return []
        found.draft, found.success = draft, self._success(found, draft)
        places = range(1, len(draft.tokens) - num_running + 1)
        gains = [(found.success ** (num_running + place - 1), -place, sequence) for place in places]
        count = len(self._choose(gains, 1, 0.0).get(sequence, ()))
        self._num_idle = 0 if count else self._num_idle
        return draft.tokens[: num_running + count] if count else []


def num_right(draft: list[int], text: list[int]) -> int:
    pairs = enumerate(zip(draft, text, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(draft), max(len(text) - 1, 0)))


def reckon(answers: list[Answer], host_s: float, *, is_stale: bool) -> dict[str, float]:
    """The rate of answers at batch 1, one after another, over that of steps without drafts, and tokens a step.

    Drafts of known tokens: the host's part follows each step before one with a draft, and each step with one. Stale
    ones: all steps overlap; the device verifies what is behind the tokens of the step before, if they were foreseen.
    """
    times = GpuTimes(0.0 if is_stale else host_s)
    speculation = StaleDrafts(times) if is_stale else Speculation(times, most_drafted=MOST_VERIFIED)
    seconds, num_tokens, num_steps = 0.0, 0, 0
    for request, answer in answers:
        sequence = Sequence(request, output_ids=answer[:1], status=Status.RUNNING, slot=0)
        known, num_drafted = 1, 0  # known: to the device
        while known < len(answer):
            new = answer[len(sequence.output_ids) : known]
            if isinstance(speculation, StaleDrafts):
                ahead = speculation.propose_behind(sequence, num_drafted + 1) if new else []
                size = max(len(ahead) - num_drafted - 1, 0)
                draft = ahead[len(new) :][:size] if ahead[: len(new)] == new else []
                seconds += max(times.seconds(1 + size, 0.0), host_s)
            else:
                draft = speculation.propose([sequence]).get(sequence, [])
                size = len(draft)
                seconds += times.seconds(1 + size, 0.0) + host_s * (num_drafted > 0 and not size)
            right = num_right(draft, answer[known:])
            sequence.output_ids += new if is_stale else answer[known : known + right + 1]
            known = min(known + right + 1, len(answer))
            num_steps, num_drafted = num_steps + 1, size
        num_tokens += len(answer) - 1
        sequence.output_ids, sequence.finish_reason = list(answer), FinishReason.LENGTH
        speculation.release(sequence)
    return {
        "times_plain": round(num_tokens * GPU_STEP_S / seconds, 2),
        "tokens_a_step": round(num_tokens / num_steps, 2),
    }


def measure_stale(engine: Engine, work: Work, kinds: list[str], num_rounds: int, num_runs: int) -> list[dict[str, Any]]:
    """Both kinds of drafts of the same answers, for several times of the host's part."""
    rows = []
    for kind in kinds:
        recorded = engine._core.speculation = Recorded()
        for round_ in range(1, num_rounds + 1):
            engine.flush_cache()
            run_kind(engine, work, kind, 1, 100 * round_ + 1, num_runs)
        for host_ms in (0.3, 0.5, 1.0, 2.0):
            found = [reckon(recorded.answers, host_ms / 1000, is_stale=is_stale) for is_stale in (False, True)]
            rows.append({"work": kind, "host_ms": host_ms, "known": found[0], "stale": found[1]})
            print(rows[-1], flush=True)
    return rows


def run_kind(engine: Engine, work: Work, kind: str, batch: int, seed: int, num_runs: int) -> tuple[float, list[Any]]:
    if kind == "agent":
        return run_agent(engine, work, batch, seed, num_runs)
    if kind == "chat":
        return run_chat(engine, work, batch, seed)
    return run_one_turn(engine, work, kind, batch, seed)


class NoTime(StepTimes):
    """The times of a draft model that costs nothing: it is always asked, whatever it costs."""

    def knows(self, num_tokens: int, kv_len: float) -> bool:
        return True

    def seconds(self, num_tokens: int, kv_len: float) -> float:
        return 0.0


def memory() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Stopwatch:
    """The engine's thread's time for drafts. A draft model's is not counted."""

    def __init__(self, speculation: Speculation) -> None:
        self.seconds = 0.0
        self._speculation = speculation
        for name in ("propose", "note_step"):
            setattr(speculation, name, partial(self._timed, getattr(speculation, name)))

    def _timed(self, do: Callable[..., Any], *arguments: Any) -> Any:  # Any: of both methods
        begin_s = time.thread_time() - self._speculation.model_s
        result = do(*arguments)
        self.seconds += time.thread_time() - self._speculation.model_s - begin_s
        return result


def drafted(speculation: Speculation) -> dict[str, float]:
    return {name: value for name, value in speculation.stats().items() if "drafted" in name or "accepted" in name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kinds", default="extraction,quotes,edits,agent,chat,free")
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=10, help="of the agent's loop")
    parser.add_argument("--tokens", type=int, default=160, help="of an answer, at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--draft", help="a model that drafts, too")
    parser.add_argument("--sources", action="store_true", help="measure the drafts alone")
    parser.add_argument("--stale", action="store_true", help="reckon with drafts that are made one step before")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    configuration = {k: v for k, v in vars(arguments).items() if k != "out"}
    record = {"benchmark": "speculation", "commit": commit(), "cpu": platform.processor() or platform.machine()}
    if arguments.sources:
        found = measure_sources(10_000, 1_000_000)
        print(found)
        print_record({**record, "configuration": configuration, "sources": found}, arguments.out)
        return
    settings = {"dtype": arguments.dtype, "num_threads": arguments.threads, "num_kv_tokens": 1 << 17, "device": "cpu"}
    engine = Engine(arguments.model, speculative="auto", speculative_draft=arguments.draft, **settings)
    core, speculation = engine._core, engine._core.speculation
    assert speculation is not None
    drafting = Stopwatch(speculation)
    # Each mode has its own grammar: whoever is first at a state of a grammar makes its mask.
    works = {mode: Work(engine, arguments.tokens, arguments.clock) for mode in ("off", "auto")}
    for mode, work in works.items():  # compiled code, recorded steps
        core.speculation = speculation if mode == "auto" else None
        run_one_turn(engine, work, "free", 4, 0)
        run_one_turn(engine, work, "extraction", 1, 0)
        run_one_turn(engine, work, "edits", 1, 0)
    if arguments.draft:
        speculation._model_times = NoTime()
    if arguments.stale:
        shape = arguments.kinds.split(","), arguments.rounds, arguments.runs
        rows = measure_stale(engine, works["off"], *shape)
        engine.shutdown()
        print_record({**record, "configuration": configuration, "stale": rows}, arguments.out)
        return
    names = "work", "batch", "off tok/s", "auto tok/s", "auto / off", "tokens a step", "drafting", "same", "accepted"
    table = Table(*names)
    rows = []
    for kind in arguments.kinds.split(","):
        for batch in map(int, arguments.batches.split(",")):
            rates: dict[str, list[float]] = {mode: [] for mode in works}
            num_same = num_answers = num_tokens = num_steps = 0
            before = drafted(speculation)
            model_s, auto_s, drafting.seconds = speculation.model_s, 0.0, 0.0
            for round_ in range(1, arguments.rounds + 1):
                texts = {}
                for mode in ("off", "auto") if round_ % 2 else ("auto", "off"):
                    work, seed = works[mode], 100 * round_ + batch
                    engine.flush_cache()
                    core.speculation = speculation if mode == "auto" else None
                    steps = engine.stats()["num_steps"]
                    seconds, results = run_kind(engine, work, kind, batch, seed, arguments.runs)
                    count = sum(len(result.token_ids) for result in results)
                    rates[mode].append(count / seconds)
                    texts[mode] = [result.text for result in results]
                    if mode == "auto":
                        num_tokens, auto_s = num_tokens + count, auto_s + seconds
                        num_steps += engine.stats()["num_steps"] - steps
                num_same += sum(a == b for a, b in zip(texts["off"], texts["auto"], strict=True))
                num_answers += len(texts["off"])
            changes = {name: value - before[name] for name, value in drafted(speculation).items()}
            accepted = {
                source: [changes[f"num_accepted_tokens_{source}"], changes[f"num_drafted_tokens_{source}"]]
                for source in (name.rpartition("_")[2] for name in changes if "drafted" in name)
            }
            ratio = statistics.median(a / o for a, o in zip(rates["auto"], rates["off"], strict=True))
            row = {
                "work": kind,
                "batch": batch,
                "off": round(statistics.median(rates["off"]), 1),
                "auto": round(statistics.median(rates["auto"]), 1),
                "ratio": round(ratio, 3),
                "ratios": [round(a / o, 3) for a, o in zip(rates["auto"], rates["off"], strict=True)],
                "tokens_a_step": round(num_tokens / num_steps / batch, 2),
                "drafting": round(drafting.seconds / auto_s, 4),
                "same": f"{num_same}/{num_answers}",
                "accepted": accepted,
            }
            if arguments.draft:
                row["share_of_draft_model"] = round((speculation.model_s - model_s) / auto_s, 3)
            rows.append(row)
            shown = ", ".join(f"{name} {a:.0f}/{d:.0f}" for name, (a, d) in accepted.items() if d)
            table.add_row(
                *(str(row[k]) for k in ("work", "batch", "off", "auto", "ratio", "tokens_a_step", "drafting", "same")),
                shown,
            )
            print(row, flush=True)
    engine.shutdown()
    Console(width=160).print(table)
    print_record({**record, "configuration": configuration, "rows": rows}, arguments.out)


if __name__ == "__main__":
    main()
