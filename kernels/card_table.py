"""A file of measurements on one GPU model (card): products faster than the library's, tiles, rates of tree attention.

A timing script writes such a file (`benchmarks/fit_table.py`). An engine reads the file at a given path, or the file in
`tables/` with its card's name. Without a file the library computes all products, and tiles and the cost model have
their defaults (`attention/plan.py`).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ramet.errors import ConfigError
from ramet.kernels.attention.plan import AttentionTiles, TileConfig, TreeCosts
from ramet.kernels.layers.gemv import MAX_ROWS, GemvConfig

_FOLDER = Path(__file__).parent / "tables"
MOST_GATED_ROWS = 384  # fewer than the largest graphs have tokens: they compile what any larger step launches


@dataclass(frozen=True, slots=True)
class Product:
    """One product of a small batch: x [rows, depth] by a matrix [outputs, depth]; `is_gated`: outputs of one half."""

    rows: int
    outputs: int
    depth: int
    is_gated: bool = False


@dataclass(frozen=True, slots=True)
class CardTable:
    """`products`: products that are faster than the library's. `folded_rows`: batch sizes for which whole layers are
    faster with norm, activation and residual folded into the products; these products are in `folded`. `early_launch`:
    the other kernels of a layer start while the one before ends. `gated`: products of larger batches with the
    activation behind them that are faster than both apart; each is for batches up to its rows, from the next smaller
    one's on. `page_size`: that of the cache, unless the configuration says otherwise; None: the default.
    """

    card: str
    products: Mapping[Product, GemvConfig] = field(default_factory=dict)
    folded: Mapping[Product, GemvConfig] = field(default_factory=dict)
    folded_rows: frozenset[int] = frozenset()
    tree_costs: TreeCosts | None = None
    tiles: AttentionTiles | None = None
    early_launch: bool = False
    gated: Mapping[Product, GemvConfig] = field(default_factory=dict)
    page_size: int | None = None

    def to_json(self) -> str:
        """Return the file's text."""

        def listed(products: Mapping[Product, GemvConfig]) -> list[list[Any]]:
            return [[*dataclasses.astuple(p), *dataclasses.astuple(c)] for p, c in products.items()]

        return json.dumps(
            {
                "card": self.card,
                "products": listed(self.products),
                "folded": listed(self.folded),
                "folded_rows": sorted(self.folded_rows),
                "tree_costs": None if self.tree_costs is None else dataclasses.asdict(self.tree_costs),
                "tiles": None if self.tiles is None else dataclasses.asdict(self.tiles),
                "early_launch": self.early_launch,
                "gated": listed(self.gated),
                "page_size": self.page_size,
            },
            indent=1,
        )


def load_card_table(card: str, path: str | Path | None = None) -> CardTable:
    """Read the table of a card. Returns an empty table if the card was not measured.

    Raises:
        ConfigError: `path` is not a table, or the file has unknown entries.
    """
    source = _FOLDER / f"{file_stem(card)}.json" if path is None else Path(path)
    if not source.is_file():
        if path is None:
            return CardTable(card)
        raise ConfigError(f"the kernel table {source} does not exist; make one with benchmarks/fit_table.py")
    try:
        found = json.loads(source.read_text())
        costs = found["tree_costs"]
        return CardTable(
            str(found["card"]),
            _products(found["products"]),
            _products(found["folded"]),
            frozenset(map(int, found["folded_rows"])),
            None if costs is None else TreeCosts(**costs),
            _tiles(found["tiles"]),
            bool(found["early_launch"]),
            _products(found["gated"], most_rows=MOST_GATED_ROWS, kernels=("tile",)),
            found["page_size"] and int(found["page_size"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"the kernel table {source} is not what fit_table.py writes: {error!r}") from error


def file_stem(card: str) -> str:
    """A card's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def _tiles(found: dict[str, Any] | None) -> AttentionTiles | None:  # Any: JSON
    if found is None:
        return None
    extend, decode, tree = (found[name] and TileConfig(**found[name]) for name in ("extend", "decode", "tree"))
    return AttentionTiles(extend, decode, tree, found["tree_programs"], found["decode_programs"])


def _products(
    rows: list[list[Any]],  # JSON
    most_rows: int = MAX_ROWS,
    kernels: tuple[str, ...] = ("sum", "dot"),
) -> dict[Product, GemvConfig]:
    products = {}
    for row in rows:
        product, config = Product(*row[:4]), GemvConfig(*row[4:])
        if not 1 <= product.rows <= most_rows or config.kernel not in kernels:
            raise ValueError(f"{product} by {config}")
        products[product] = config
    return products
