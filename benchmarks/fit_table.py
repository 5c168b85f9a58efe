"""From the records of bench_kernels.py and bench_attention.py to a card's table (`ramet.kernels.card_table`).

    python benchmarks/fit_table.py --kernels kernels.json --attention attention.json --out table.json

A product is taken from the library only where it is at least 3 % faster, and a batch is folded only where the whole
stack of products, norms and activations is at least 2 % faster. Tiles of attention are those that lose least against
the best of each case, where they beat the default by 1 % on average. The rates of tree attention are fitted to its
tile; its fixed cost is then raised until no measured case that the model would take is slower than 1.02 times plain.
Use the table with `--kernel-table table.json`, or keep it as kernels/tables/<card>.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attention_cases import label

from ramet.kernels.attention.plan import (
    PROGRAMS_PER_SM,
    TREE_PROGRAMS_PER_SM,
    AttentionTiles,
    TileConfig,
    TreeCostModel,
    TreeCosts,
    tree_config,
)
from ramet.kernels.card_table import CardTable, Product
from ramet.kernels.layers.gemv import GemvConfig

PRODUCT_GAIN, STACK_GAIN, TILE_GAIN = 0.97, 0.98, 0.01
SHAPE = 32, 8, 128  # H, K, D of the measured cases
DEFAULT_TREE = tree_config(128, torch.bfloat16, 4)
Record = dict[str, Any]  # JSON


@dataclass(frozen=True, slots=True)
class TreeCase:
    """Seconds of one layer's attention, plain and as a tree: what the cost model predicts."""

    segments: tuple[tuple[int, int], ...]  # members, tokens
    suffix_tokens: int
    plain_s: float
    tree_s: float

    def predicted(self, model: TreeCostModel) -> float:
        return model.tree_s(self.segments) + model.costs.fixed_s + model.plain_s(1, self.suffix_tokens)

    def takes_tree(self, model: TreeCostModel) -> bool:
        worth = [segment for segment in self.segments if model.is_worth(*segment)]
        return len(worth) == len(self.segments) and model.should_use_tree(worth, self.suffix_tokens)


def fit_products(records: list[Record]) -> tuple[dict[Product, GemvConfig], dict[Product, GemvConfig], set[int]]:
    """Products faster than the library's, and the folded ones of the batches whose stack is faster folded."""
    shapes = {r["shape"]: (r["outputs"], r["depth"]) for r in records if r["section"] == "gemv" and "outputs" in r}
    products: dict[Product, GemvConfig] = {}
    folded: dict[Product, GemvConfig] = {}
    folded_rows: set[int] = set()
    batches = sorted({r["B"] for r in records if r["section"] == "gemv"})
    for batch in batches:
        stack = {r["name"]: r["us"] for r in records if r["section"] == "stack" and r["B"] == batch}
        plain = stack.get("with norm, silu, residual: cuBLAS + kernels")
        ours = {name: us for name, us in stack.items() if "folded" in name}
        fastest = min(ours, key=lambda name: ours[name], default=None)
        is_folded = plain is not None and fastest is not None and ours[fastest] < STACK_GAIN * plain
        is_early = is_folded and fastest is not None and "early" in fastest
        for shape, (outputs, depth) in shapes.items():
            mine = [r for r in records if (r["section"], r.get("shape"), r.get("B")) == ("gemv", shape, batch)]
            mine = [r for r in mine if r["us"] is not None]
            library = next((r["us"] for r in mine if r["name"] == "cuBLAS"), None)
            ranked = sorted((r for r in mine if "config" in r), key=lambda r: r["us"])
            if not ranked:
                continue
            config = dataclasses.replace(GemvConfig(*ranked[0]["config"]), early_launch=is_early)
            is_gated = shape == "gate_up+silu"
            product = Product(batch, outputs, depth, is_gated)
            if is_folded and shape not in ("gate_up", "head"):
                folded[product] = config
            if not is_gated and library is not None and ranked[0]["us"] < PRODUCT_GAIN * library:
                products[product] = dataclasses.replace(config, early_launch=is_early and shape == "head")
        if is_folded:
            folded_rows.add(batch)
    return products, folded, folded_rows


def fit_gated(records: list[Record]) -> dict[Product, GemvConfig]:
    """The tile of each larger batch whose activation is faster in the product's kernel than in one of its own."""
    found: dict[Product, GemvConfig] = {}
    mine = [r for r in records if r["section"] == "gate" and r["us"] is not None]
    for rows in sorted({r["B"] for r in mine}):
        apart = next(r["us"] for r in mine if r["B"] == rows and r["name"] == "cuBLAS")
        best = min((r for r in mine if r["B"] == rows and "config" in r), key=lambda r: r["us"], default=None)
        if best is not None and best["us"] < STACK_GAIN * apart:
            found[Product(rows, best["outputs"], best["depth"], True)] = GemvConfig(*best["config"])
    return found


def fit_early(records: list[Record]) -> bool:
    """Whether layers are faster where their kernels start early: on average over the measured batches."""
    plain = "with norm, silu, residual: cuBLAS + kernels"
    stack = {(r["B"], r["name"]): r["us"] for r in records if r["section"] == "stack"}
    gains = [
        np.log(us / early)
        for (b, name), us in stack.items()
        if name == plain and (early := stack.get((b, f"{plain}, early launch")))
    ]
    return bool(gains) and float(np.mean(gains)) > TILE_GAIN


def fit_page_size(records: list[Record], with_64: list[Record]) -> int | None:
    """64, if decode with its default tile is faster with pages of 64 on average over the cases; else None."""
    times = {(r["case"], r["run"]): r["us"] for r in records if "us" in r and r["run"].endswith("*")}
    gains = [np.log(times[key] / r["us"]) for r in with_64 if "us" in r and (key := (r["case"], r["run"])) in times]
    return 64 if gains and float(np.mean(gains)) > TILE_GAIN else None


def tile_of(run: str) -> tuple[TileConfig, str] | None:
    """The tile in a run's name, and the rest of the name: how work is cut."""
    found = re.fullmatch(r"(?:tree )?(\d+)x(\d+) w(\d+) s(\d+)(.*?)(?: \*)?", run)
    return found and (TileConfig(*map(int, found.groups()[:4])), found[5])


def fit_tile(records: list[Record], kind: str) -> tuple[TileConfig, str] | None:
    """The tile, and how work is cut, that lose least on Llama's cases; None where that is the default, marked by *."""
    times: dict[str, dict[tuple[TileConfig, str], float]] = {}
    defaults: dict[str, tuple[TileConfig, str]] = {}
    for r in records:
        named = tile_of(r["run"]) if r["case"].startswith(kind) and "us" in r else None
        if named is None or "side stream" in r["run"] or "merge" in r["run"]:
            continue
        # The number of parts has another rule; of the same tile, the default ones are compared.
        tile, cut = named[0], "".join(re.findall(r" x\d", named[1]))
        key = tile, cut
        times.setdefault(r["case"], {}).setdefault(key, r["us"])
        if r["run"].endswith("*"):
            defaults[r["case"]], times[r["case"]][key] = key, r["us"]
    if not defaults:
        return None
    # Short prompts have other tiles by default: only cases of the most frequent one are compared.
    default = Counter(defaults.values()).most_common(1)[0][0]
    cases = [times[case] for case, key in defaults.items() if key == default]
    losses = {
        key: float(np.mean([np.log(case[key] / min(case.values())) for case in cases]))
        for key in cases[0]
        if all(key in case for case in cases)
    }
    best = min(losses, key=lambda key: losses[key])
    return best if losses[best] < losses[default] - TILE_GAIN else None


def fit_parts(records: list[Record]) -> int | None:
    """Programs a processor that rows are cut for: the default's number times what loses least; None for once."""
    losses: list[dict[int, float]] = []
    for case in dict.fromkeys(r["case"] for r in records if r["case"].startswith("decode llama-8b")):
        runs = {r["run"]: r["us"] for r in records if r["case"] == case and "us" in r}
        marked = [re.fullmatch(r"(.* parts )(\d+) fused \*", run) for run in runs]
        for default in [found for found in marked if found is not None]:
            tile, splits = default[1], int(default[2])
            times = {1: runs[default[0]]}
            times |= {n: us for n in (2, 3) if (us := runs.get(f"{tile}{n * splits} fused")) is not None}
            losses.append({n: float(np.log(us / min(times.values()))) for n, us in times.items()})
    if not losses:
        return None
    means = {n: float(np.mean([case.get(n, case[max(case)]) for case in losses])) for n in (1, 2, 3)}
    best = min(means, key=lambda n: means[n])
    return best * PROGRAMS_PER_SM if means[best] < means[1] - TILE_GAIN else None


def tree_cases(records: list[Record], tile: TileConfig, cut: str) -> list[TreeCase]:
    """The plain run of every case, and the tree's with this tile."""
    cases = []
    for name in dict.fromkeys(r["case"] for r in records if "segments" in r):
        mine = [r for r in records if r["case"] == name and "us" in r]
        plain = [r["us"] for r in mine if r["run"].startswith("plain")]
        tree = [r["us"] for r in mine if r["run"].startswith(f"tree {label(tile)}{cut} ") and "side" not in r["run"]]
        if plain and tree:
            segments = tuple((int(n), int(t)) for n, t in mine[0]["segments"])
            cases.append(TreeCase(segments, mine[0]["suffix_tokens"], plain[0] * 1e-6, tree[0] * 1e-6))
    return cases


def fit_costs(cases: list[TreeCase], tile: TileConfig) -> TreeCosts | None:
    """Rates that predict the cases best, by relative error; None with fewer than four."""
    if len(cases) < 4:
        return None
    tokens = [sum(n * t for n, t in c.segments) + c.suffix_tokens for c in cases]
    bandwidth = float(np.median([n * 2 * 8 * 128 * 2 / c.plain_s for n, c in zip(tokens, cases, strict=True)]))

    def error(costs: TreeCosts) -> float:
        model = TreeCostModel(*SHAPE, tile, costs)
        return sum(abs(np.log(c.predicted(model) / c.tree_s)) for c in cases)

    rates = [1.0e14, 1.5e14, 2.0e14, 2.5e14, 3.0e14, 4.0e14, 5.0e14, 6.0e14]
    widths = [1.0e12, 1.5e12, 2.0e12, 2.5e12, 3.0e12]
    parts = [0.5e12, 1.0e12, 2.0e12, 4.0e12]
    fixed = [2e-6, 4e-6, 6e-6, 8e-6, 12e-6]
    caches = [None, 4.0e12, 6.0e12]
    best = min(
        (
            TreeCosts(bandwidth, width, rate, part, start, cache)
            for rate, width, part, start, cache in itertools.product(rates, widths, parts, fixed, caches)
        ),
        key=error,
    )
    while any(is_loss(c, tile, best) for c in cases):
        best = dataclasses.replace(best, fixed_s=best.fixed_s * 1.1)
    return best


def is_loss(case: TreeCase, tile: TileConfig, costs: TreeCosts) -> bool:
    """Whether the model takes the tree where it was measured to be slower than 1.02 times plain."""
    return case.tree_s > 1.02 * case.plain_s and case.takes_tree(TreeCostModel(*SHAPE, tile, costs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", type=Path, nargs="*", default=[])
    parser.add_argument("--attention", type=Path, nargs="*", default=[])
    parser.add_argument("--pages", type=Path, help="decode, measured with pages of 64")
    parser.add_argument("--out", type=Path, required=True)
    for name, what in (("fold", "fold no layers"), ("early", "launch no kernel early"), ("gate", "no gated products")):
        parser.add_argument(f"--no-{name}", action="store_true", help=f"{what}: ladder.py found that they fail")
    args = parser.parse_args()
    card = "unknown"
    found: dict[str, list[Record]] = {"kernels": [], "attention": []}
    for kind, paths in (("kernels", args.kernels), ("attention", args.attention)):
        for path in paths:
            if path.is_file():
                read: Mapping[str, Any] = json.loads(path.read_text())
                card = read["device"]
                found[kind] += read["records"]
            else:
                print(f"{path} is missing: nothing is taken from it")
    timed = [r for r in found["kernels"] if not (args.no_fold and "folded" in r["name"])]
    if args.no_early:
        timed = [r for r in timed if "early" not in r["name"]]
    gated = {} if args.no_gate else fit_gated(timed)
    products, folded, folded_rows = fit_products(timed)
    pages = json.loads(args.pages.read_text())["records"] if args.pages and args.pages.is_file() else []
    page_size = fit_page_size(found["attention"], pages)
    extend, tree = (fit_tile(found["attention"], kind) for kind in ("extend llama-8b", "tree"))
    of_pages = pages if page_size else found["attention"]  # the tile is the one for the pages that are taken
    decode, splits = fit_tile(of_pages, "decode llama-8b"), fit_parts(of_pages)
    tile, cut = tree or (DEFAULT_TREE, f" x{TREE_PROGRAMS_PER_SM}")
    tiles = AttentionTiles(extend and extend[0], decode and decode[0], tile, int(cut[2:]), splits)
    cases = tree_cases(found["attention"], tile, cut)
    costs = fit_costs(cases, tile)
    early = fit_early(timed)
    table = CardTable(card, products, folded, frozenset(folded_rows), costs, tiles, early, gated, page_size)
    args.out.write_text(table.to_json())
    for case in cases:
        model = TreeCostModel(*SHAPE, tile, costs)
        choice = "tree" if case.takes_tree(model) else "plain"
        print(
            f"{case.segments[:2]} + {case.suffix_tokens}: plain {case.plain_s * 1e6:.1f} us, tree "
            f"{case.tree_s * 1e6:.1f}, predicted {case.predicted(model) * 1e6:.1f}, takes {choice}"
        )
    print(f"{card}: {len(products)} products, {sorted(folded_rows)} folded, {tiles}, {costs}")
    print(f"early launch {early}, page size {page_size}, gated up to {sorted(product.rows for product in gated)} rows")


if __name__ == "__main__":
    main()
