"""KV pages of one engine in another one's cache: the same text, and no page lost, whatever happens in between."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from ramet.errors import InvalidRequest
from ramet.runtime.engine.config import EngineConfig
from ramet.runtime.engine.engine import Engine
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.types import SamplingParams, TokenIds

SIZE = 16
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@pytest.fixture
def make(tiny_model: LoadedModel) -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def one(num_kv_tokens: int = 1024, *, radix_cache: bool = True) -> Engine:
        config = EngineConfig(device="cpu", page_size=SIZE, num_kv_tokens=num_kv_tokens, radix_cache=radix_cache)
        made.append(Engine(tiny_model, config))
        return made[-1]

    yield one
    for engine in made:
        engine.check_integrity()
        engine.shutdown()


def prompt(seed: int, length: int) -> TokenIds:
    return np.random.default_rng(seed).integers(32, 127, length).astype(np.int32)


def copy(source: Engine, target: Engine, tokens: TokenIds, part: int, salt: str = "") -> int:
    """Move pages in parts of so many. Returns the number of pages that the target has."""
    cached = target.import_pages(tokens, salt, 0, torch.empty(0, dtype=torch.uint8))
    while (pages := source.export_pages(tokens, salt, cached, part)).numel():
        before, cached = cached, target.import_pages(tokens, salt, cached, pages)
        source.check_integrity()
        target.check_integrity()
        if cached <= before:
            break
    return cached


@pytest.mark.parametrize("part", [1, 3, 100])
def test_text_with_pages_of_another_engine_is_that_with_own_pages(make: Callable[..., Engine], part: int) -> None:
    source, target, alone = make(), make(), make()
    tokens = prompt(part, 300)
    expected = alone.generate(tokens.tolist(), GREEDY)
    assert source.generate(tokens.tolist(), GREEDY).text == expected.text
    assert copy(source, target, tokens, part) == 300 // SIZE
    found = target.generate(tokens.tolist(), GREEDY)
    assert (found.text, found.usage.cached_tokens) == (expected.text, 288)
    other = np.concatenate([tokens[:160], prompt(99, 40)])  # it shares what came from elsewhere
    assert target.generate(other.tolist(), GREEDY).text == alone.generate(other.tolist(), GREEDY).text


def test_imported_pages_belong_to_their_cache_salt_alone(make: Callable[..., Engine]) -> None:
    source, target = make(), make()
    tokens = prompt(1, 100)
    source.generate(tokens.tolist(), GREEDY, cache_salt="me")
    assert copy(source, target, tokens, 4) == 0
    assert copy(source, target, tokens, 4, "me") == 6
    assert target.generate(tokens.tolist(), GREEDY).usage.cached_tokens == 0
    assert target.generate(tokens.tolist(), GREEDY, cache_salt="me").usage.cached_tokens == 96


def test_random_moves_between_two_full_caches_lose_no_page_and_change_no_text(make: Callable[..., Engine]) -> None:
    rng = random.Random(5)
    engines = make(num_kv_tokens=512), make(num_kv_tokens=400)
    texts: dict[int, str] = {}
    for _ in range(60):
        seed, (source, target) = rng.randrange(8), rng.sample(engines, 2)
        tokens = prompt(seed % 4, 60 + 20 * seed)  # of two prompts, one begins as the other
        result = target.generate(tokens.tolist(), SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
        assert texts.setdefault(seed, result.text) == result.text
        length = rng.randrange(1, len(tokens))
        copy(source, target, tokens[:length], rng.choice([1, 2, 5]))
        if rng.random() < 0.2:
            source.flush_cache()


def test_a_target_without_room_takes_nothing_from_what_runs(make: Callable[..., Engine]) -> None:
    source, target = make(), make(num_kv_tokens=256)
    tokens = prompt(2, 200)
    source.generate(tokens.tolist(), GREEDY)
    running = target.submit(prompt(3, 60).tolist(), SamplingParams(temperature=0.0, max_tokens=180, ignore_eos=True))
    assert copy(source, target, tokens, 12) == 0  # its reservation has all pages
    assert len(running.result().token_ids) == 180
    assert copy(source, target, tokens, 12) == 12


def test_a_gap_in_the_pages_is_told_and_pages_of_a_wrong_size_are_refused(make: Callable[..., Engine]) -> None:
    source, target = make(), make()
    tokens = prompt(4, 64)
    source.generate(tokens.tolist(), GREEDY)
    pages = source.export_pages(tokens, "", 2, 2)
    assert pages.numel() == 2 * source.page_bytes
    assert target.import_pages(tokens, "", 2, pages) == 0  # the first two are missing
    for wrong in (pages[:-1], torch.cat([pages, pages])):
        with pytest.raises(InvalidRequest, match="nothing was taken in"):
            target.import_pages(tokens, "", 2, wrong)
    assert source.export_pages(tokens, "", 100, 5).numel() == 0
    assert source.export_pages(tokens[:0], "", 0, 5).numel() == 0
    with pytest.raises(InvalidRequest, match="no-radix-cache"):
        make(radix_cache=False).import_pages(tokens, "", 0, source.export_pages(tokens, "", 0, 2))


def test_the_latest_prefixes_come_first_and_within_the_limit(make: Callable[..., Engine]) -> None:
    engine = make()
    for seed in (1, 2, 3):
        engine.generate(prompt(seed, 100).tolist(), SamplingParams(max_tokens=1), cache_salt=str(seed))
    found = engine.latest_prefixes(200)
    assert [salt for salt, _ in found] == ["3", "2"]
    assert all((tokens == prompt(int(salt), 100)[:96]).all() for salt, tokens in found)
    assert engine.latest_prefixes(0) == []
