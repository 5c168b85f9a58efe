"""Climb from the plainest engine to the fastest one, a feature a rung, and find those that a machine cannot do.

    python benchmarks/ladder.py --out OUT --seconds 170       on a card, 40 s a rung at most (the first: 120)
    python benchmarks/ladder.py --out OUT --device cpu --tiny --plant "tree=crash"     a rehearsal with a failure

Each rung is a process of its own: an engine with the features of all rungs below that passed, and one more. It gives
greedy texts, constrained ones among them, which are compared with those of rung 0 (eager, synchronous, no tree
attention, grammars on the host). On a GPU all KV pages begin as NaN, so a read of what nobody wrote shows in the
tokens. A rung that crashes, hangs or gives other tokens is left out of the rungs above. When all have run, it is run
again for its message while --seconds last: with CUDA_LAUNCH_BLOCKING=1, then under compute-sanitizer's memcheck.

OUT gets ladder.jsonl, two lines as each rung ends: its tokens, and what is said of them; ladder.log, all that rungs
print, with the stacks of those that crash or hang; flags.txt, settings without the rungs that failed, for the scripts
that come later (`--set LINE`; a line that begins with -- is an option of fit_table.py). Exit status 3 where rung 0
fails: nothing above it means anything then. Not here: times.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from bench_gpu import tiny_shapes
from check_gpu import SCHEMA, Setting, Tokens, greedy, num_same
from json_line import commit

from ramet.grammar import Vocabulary
from ramet.grammar.ir import AS_MODELS_WRITE
from ramet.grammar.service.sources import compile_constraint
from ramet.kernels.card_table import CardTable, Product
from ramet.kernels.layers.gemv import GemvConfig
from ramet.runtime.engine.engine import Engine
from ramet.runtime.models.config import ModelConfig, smollm2_135m
from ramet.runtime.types import SamplingParams

Values = dict[str, Any]  # of an engine's configuration
TABLE = "table.json"  # made for each rung
_NUM_TOKENS = 24
_NUM_ALONE = 2  # prompts that also run alone
_FOLDED_ROWS = (1, 2, 4, 8)
_FIRST = 3  # times the limit of the others: what is compiled or read from disk for the first time
_LEAST_S = 10.0  # no rung is begun with less
_STACKS_S = 2.0  # for the stacks of a rung that hangs
_LEAST_ON_GPU = 0.4  # of the tokens: bf16 breaks some ties otherwise; a wrong kernel differs early in every text


@dataclass(frozen=True, slots=True)
class Rung:
    """A feature. on, off: the settings with and without it. flag: what leaves it out of later scripts, if not `off`."""

    name: str
    on: Values
    off: Values
    flag: str = ""

    @property
    def flags(self) -> list[str]:
        return [self.flag] if self.flag else [f"{name}={json.dumps(value)}" for name, value in self.off.items()]


RUNGS = (
    Rung("eager", {}, {}),
    Rung("decode graphs", {"cuda_graph": True}, {"cuda_graph": False}),
    Rung("mixed graphs", {"cuda_graph_max_extend": 512}, {"cuda_graph_max_extend": 0}),
    Rung("overlap", {"overlap": True}, {"overlap": False}),
    Rung("tree", {"tree_attention": "on"}, {"tree_attention": "off"}),
    Rung("device grammar", {"grammar_on_device": True}, {"grammar_on_device": False}),
    Rung("drafts", {"speculative": "auto"}, {"speculative": "off"}),
    Rung("pages of 64", {"page_size": 64}, {"page_size": 16}),
    Rung("early launch", {"kernel_table": TABLE}, {}, "--no-early"),
    Rung("gated products", {"kernel_table": TABLE}, {}, "--no-gate"),
    Rung("folded layers", {"kernel_table": TABLE}, {}, "--no-fold"),
)


def values_of(on: Iterable[str], folder: Path) -> Values:
    """The settings of an engine with exactly these rungs."""
    values: Values = {}
    for rung in RUNGS:
        values |= rung.on if rung.name in on else rung.off
    if "kernel_table" in values:
        values["kernel_table"] = str(folder / TABLE)
    return values


def table_of(on: Iterable[str], shapes: ModelConfig) -> CardTable:
    """A table with what these rungs take from one: early launch, gated products, and whole layers that are folded for
    small batches of this model's shapes."""
    heads = (shapes.num_heads + 2 * shapes.num_kv_heads) * shapes.head_dim, shapes.num_heads * shapes.head_dim
    hidden, inner = shapes.hidden_size, shapes.intermediate_size
    products = (heads[0], hidden, False), (hidden, heads[1], False), (inner, hidden, True), (hidden, inner, False)
    config = GemvConfig("dot", 16, 128, 4, 4, early_launch=True)
    folded = {Product(rows, *product): config for rows in _FOLDED_ROWS for product in products}
    tiles = {Product(rows, inner, hidden, True): GemvConfig("tile", 64, 64, 4, 4, block_m=64) for rows in (64, 384)}
    is_folded = "folded layers" in on
    return CardTable(
        "ladder",
        folded=folded if is_folded else {},
        folded_rows=frozenset(_FOLDED_ROWS if is_folded else ()),
        early_launch="early launch" in on,
        gated=tiles if "gated products" in on else {},
    )


def texts(engine: Engine, prompts: list[list[int]]) -> Tokens:
    """Greedy texts of prompts alone and together, and of as many under a schema, all at once."""
    if engine._core.runner.device.type == "cuda":
        engine._core.runner.kv_cache.storage.fill_(float("nan"))
    tokenizer = engine.tokenizer
    vocabulary = Vocabulary(
        tokenizer.token_bytes, tokenizer.eos_ids, tokenizer.special_ids, tokenizer.vocab_size, tokenizer
    )
    schema = compile_constraint("json_schema", json.dumps(SCHEMA), vocabulary, **AS_MODELS_WRITE)
    schema.close()
    alone = greedy(engine, prompts[:_NUM_ALONE], _NUM_TOKENS, together=False)
    sampling = SamplingParams(temperature=0.0, max_tokens=_NUM_TOKENS)
    handles = [engine.submit(prompt, sampling, grammar=schema, detokenize=False) for prompt in prompts]
    together = greedy(engine, prompts, _NUM_TOKENS)
    constrained = [handle.result(timeout_s=120).token_ids for handle in handles]
    engine.check_integrity()
    return [*alone, *together, *constrained]


def climb_one(
    name: str, on: list[str], setting: Setting, out: Path, tables: Path, planted: str, environment: dict[str, str]
) -> None:
    """One rung, in a process of its own: append its tokens to OUT/ladder.jsonl. `tables`: the folder of TABLE."""
    log = (out / "ladder.log").open("a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    os.environ.update(environment)  # before this process speaks to a card
    faulthandler.enable(log)
    faulthandler.register(signal.SIGUSR1, log)
    print(f"== {name}: {on} {environment}", flush=True)
    start_s = time.monotonic()
    if planted == "crash":
        os.abort()
    if planted == "hang":
        time.sleep(1e6)
    with setting.engine(**values_of(on, tables)) as engine:
        tokens = texts(engine, setting.prompts(4 if setting.tiny else 12, seed=7))
        num_drafted = sum(value for name, value in engine.stats().items() if name.startswith("num_drafted"))
    if planted == "wrong":
        tokens = [tuple(token + 1 for token in text) for text in tokens]
    append(
        out,
        {
            "rung": name,
            "on": on,
            **environment,
            "tokens": tokens,
            "drafted": num_drafted,
            "seconds": time.monotonic() - start_s,
        },
    )


def append(out: Path, record: Values) -> None:
    with (out / "ladder.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


@dataclass(frozen=True, slots=True)
class Ladder:
    """Where rungs write, and what they share. deadline_s: of time.monotonic(); no rung reaches beyond."""

    setting: Setting
    out: Path
    tables: Path
    deadline_s: float

    @property
    def shapes(self) -> ModelConfig:
        return tiny_shapes() if self.setting.tiny else smollm2_135m()

    def left_s(self) -> float:
        return self.deadline_s - time.monotonic()

    def run_rung(
        self, name: str, on: list[str], limit_s: float, planted: str = "", environment: dict[str, str] | None = None
    ) -> tuple[Tokens, str]:
        """Run a rung in a forked process, which has all imports and has not spoken to a card. Returns its tokens, or
        none and the reason."""
        if self.left_s() < _LEAST_S:
            return [], "not run: no time left"
        limit_s = min(limit_s, self.left_s())
        (self.tables / TABLE).write_text(table_of(on, self.shapes).to_json())
        log = self.out / "ladder.log"
        begin = log.stat().st_size if log.exists() else 0
        arguments = name, on, self.setting, self.out, self.tables, planted, environment or {}
        process = multiprocessing.get_context("fork").Process(target=climb_one, args=arguments)
        process.start()
        process.join(limit_s)
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGUSR1)  # it says where it is
            process.join(_STACKS_S)
            process.kill()
            process.join(_STACKS_S)  # one that waits for a broken card may outlast even this
            return [], f"no end within {limit_s:.0f} s"
        if process.exitcode:
            said = log.read_bytes()[begin:].decode(errors="replace").splitlines()
            errors = [line for line in said if "Error" in line or line.startswith("Fatal")] or said
            return [], f"exit status {process.exitcode}: {errors[-1][:200]}"
        last = (self.out / "ladder.jsonl").read_text().splitlines()[-1]
        return [tuple(text) for text in json.loads(last)["tokens"]], ""

    def find_out(self, name: str, on: list[str], limit_s: float) -> None:
        """Run a rung that failed again, so that its message names the kernel."""
        self.run_rung(name, on, 2 * limit_s, "", {"CUDA_LAUNCH_BLOCKING": "1"})
        if self.left_s() < _LEAST_S:
            return
        (self.tables / TABLE).write_text(table_of(on, self.shapes).to_json())
        command = ["compute-sanitizer", "--tool", "memcheck", sys.executable, __file__, "--out", str(self.out)]
        command += ["--device", self.setting.device, "--only", ",".join([name, *on]), "--tables", str(self.tables)]
        with (self.out / "ladder.log").open("a") as log, suppress(FileNotFoundError, subprocess.TimeoutExpired):
            subprocess.run(command, stdout=log, stderr=log, timeout=min(3 * limit_s, self.left_s()), check=False)


def shares(tokens: Tokens, expected: Tokens) -> dict[str, float]:
    """How much of the texts is as expected, up to each text's first difference: of free and of constrained ones."""

    parts = [num_same(a, b) / max(len(a), len(b)) for a, b in zip(tokens, expected, strict=True)]
    num_free = (len(parts) + _NUM_ALONE) // 2
    return {"free": fmean(parts[:num_free]), "constrained": fmean(parts[num_free:])}


def first_difference(tokens: Tokens, expected: Tokens) -> str:
    """The first text that differs, and where."""
    texts = enumerate(zip(tokens, expected, strict=True))
    number, (text, other) = next((i, pair) for i, pair in texts if pair[0] != pair[1])
    at = num_same(text, other)
    return f"text {number} from token {at}: {text[at : at + 4]} instead of {other[at : at + 4]}"


def climb(ladder: Ladder, *, limit_s: float, plants: dict[str, str]) -> list[str]:
    """Run all rungs, and write flags.txt as they end. Returns the names of those that failed.

    A rung that did not run yet is left out of what comes later, too: the time may end before it does.
    """
    out, is_gpu = ladder.out, ladder.setting.device.startswith("cuda")
    least = _LEAST_ON_GPU if is_gpu else 1.0
    on: list[str] = []
    failed: list[str] = []
    expected: Tokens | None = None
    for rung in RUNGS:
        write_flags(on, out)
        limit = limit_s if on else _FIRST * limit_s
        tokens, why = ladder.run_rung(rung.name, [*on, rung.name], limit, plants.get(rung.name, ""))
        found = {} if why or expected is None else shares(tokens, expected)
        if expected is not None and min(found.values(), default=1.0) < least:
            why = f"other tokens than rung 0: {first_difference(tokens, expected)}"
        print(f"{rung.name:16} {why or 'ok'} {found or ''}", flush=True)
        append(out, {"rung": rung.name, "ok": not why, "why": why, "same": found, "commit": commit()})
        if not why:
            expected = tokens if expected is None else expected
            on.append(rung.name)
            continue
        failed.append(rung.name)
        if expected is None:
            break
    write_flags(on, out)
    for name in failed if is_gpu else ():
        ladder.find_out(name, [*on, name], limit_s)
    return failed


def write_flags(on: list[str], out: Path) -> None:
    flags = [flag for rung in RUNGS if rung.name not in on for flag in rung.flags]
    (out / "flags.txt").write_text("".join(flag + "\n" for flag in flags))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="two small layers: a rehearsal")
    parser.add_argument("--limit", type=float, default=40.0, help="seconds of a rung")
    parser.add_argument("--seconds", type=float, default=1e9, help="of all rungs")
    parser.add_argument("--plant", default="", help="failures to rehearse, as tree=crash,overlap=wrong (or hang)")
    parser.add_argument("--only", default="", help="a rung, and all that are on: in this process, nothing is compared")
    parser.add_argument("--tables", type=Path, help="folder of the card's table that --only takes")
    args = parser.parse_args()
    setting = Setting(args.device, args.tiny, "", 0.0)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.only:
        name, *on = args.only.split(",")
        climb_one(name, on, setting, args.out, args.tables, "", {"tool": "memcheck"})
        return
    plants = dict(item.split("=") for item in args.plant.split(",") if item)
    with tempfile.TemporaryDirectory() as tables:
        ladder = Ladder(setting, args.out, Path(tables), time.monotonic() + args.seconds)
        failed = climb(ladder, limit_s=args.limit, plants=plants)
    print(f"failed: {', '.join(failed) or 'none'}")
    sys.exit(3 if RUNGS[0].name in failed else 0)


if __name__ == "__main__":
    main()
