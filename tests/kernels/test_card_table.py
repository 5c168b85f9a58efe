"""Tables of a card: what is written is read again, and what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ramet.errors import ConfigError
from ramet.kernels.attention.plan import (
    AttentionTiles,
    TileConfig,
    TreeCosts,
    decode_config,
    extend_config,
    tree_config,
)
from ramet.kernels.card_table import CardTable, Product, file_stem, load_card_table
from ramet.kernels.layers.gemv import GemvConfig

TABLE = CardTable(
    "NVIDIA H100 80GB HBM3",
    {Product(1, 6144, 4096): GemvConfig("sum", 4, 1024, 3, 4)},
    {Product(2, 14336, 4096, True): GemvConfig("dot", 16, 256, 4, 4, True)},
    frozenset({2}),
    TreeCosts(fixed_s=5e-6),
    AttentionTiles(decode=TileConfig(16, 128, 4, 3), tree=TileConfig(64, 64, 4, 3), tree_programs=2),
    early_launch=True,
    gated={Product(64, 14336, 4096, True): GemvConfig("tile", 128, 64, 4, 8, block_m=64)},
    page_size=64,
)


def test_a_written_table_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(TABLE.to_json())
    assert load_card_table("whatever", path) == TABLE


def test_a_card_without_measurements_has_an_empty_table() -> None:
    table = load_card_table("a card that nobody has")
    assert table == CardTable("a card that nobody has")


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_card_table("x", tmp_path / "none.json")


def test_a_gated_product_of_too_many_rows_is_an_error(tmp_path: Path) -> None:
    """Its graphs would not launch what larger steps do, which then compile while requests wait."""
    path = tmp_path / "table.json"
    gated = {Product(512, 14336, 4096, True): GemvConfig("tile", 128, 64, 4, 8, block_m=64)}
    path.write_text(CardTable("x", gated=gated).to_json())
    with pytest.raises(ConfigError, match="is not what"):
        load_card_table("x", path)


@pytest.mark.parametrize("text", ["", "[]", '{"card": "x"}', TABLE.to_json().replace('"sum"', '"none"')])
def test_a_file_that_is_no_table_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="is not what"):
        load_card_table("x", path)


def test_file_names_have_no_blanks() -> None:
    assert file_stem("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_measured_tiles_go_before_the_defaults_where_they_were_measured() -> None:
    tiles = AttentionTiles(TileConfig(128, 128, 8, 3), TileConfig(16, 32, 2, 7), TileConfig(64, 64, 4, 3))
    half, single = torch.bfloat16, torch.float32
    assert extend_config(128, half, 4096, tiles) == tiles.extend
    assert extend_config(128, half, 16, tiles) == extend_config(128, half, 16), "too few rows for it"
    assert len({extend_config(128, half, rows, tiles) for rows in range(1, 5000)}) == 2, "the start compiles both"
    assert decode_config(128, half, 4, tiles) == tiles.decode
    assert decode_config(128, half, 32, tiles) == TileConfig(32, 32, 2, 7), "the heads of a group are its rows"
    assert tree_config(128, half, 128, tiles) == TileConfig(128, 64, 4, 3), "a member at least"
    for head_dim, dtype in ((64, half), (256, half), (128, single)):
        assert extend_config(head_dim, dtype, 4096, tiles) == extend_config(head_dim, dtype, 4096)
        assert decode_config(head_dim, dtype, 4, tiles) == decode_config(head_dim, dtype, 4)
        assert tree_config(head_dim, dtype, 4, tiles) == tree_config(head_dim, dtype, 4)
