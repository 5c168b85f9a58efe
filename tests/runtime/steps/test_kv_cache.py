"""The memory of KV pages in FP8: how many tokens it holds, and what engines compute from it."""

from __future__ import annotations

import pytest
import torch

from ramet.kernels.layers.kv_fp8 import FP8
from ramet.runtime.engine.engine import Engine
from ramet.runtime.models.build import apply_fp8_cache
from ramet.runtime.models.config import llama_3_1_8b
from ramet.runtime.steps.kv_cache import KVCache, bytes_per_token
from ramet.runtime.testing.bare_cache import BareCache
from ramet.runtime.testing.dummy import tiny_model
from ramet.runtime.types import SamplingParams

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
PROMPT = list(b"Once upon a time there was a small engine, which had a cache.")


def test_the_same_bytes_hold_nearly_twice_the_tokens_of_16_bits() -> None:
    wide, narrow = (bytes_per_token(llama_3_1_8b(), dtype) for dtype in (torch.bfloat16, FP8))
    assert (wide, narrow) == (131_072, 66_048)  # a byte of scale for 128 values
    pages = {}
    for name in ("auto", "fp8_e4m3"):
        with Engine(tiny_model(), kv_cpu_bytes=1 << 20, kv_cache_dtype=name) as engine:
            pages[name] = engine.stats()["num_pages"]
    head_dim = tiny_model().config.head_dim
    assert pages["fp8_e4m3"] / pages["auto"] == pytest.approx(4 * head_dim / (head_dim + 1), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, FP8])
def test_a_copied_page_has_the_first_positions_of_its_source_in_every_layer(dtype: torch.dtype) -> None:
    cache = KVCache(tiny_model().config, 5, 8, device=CPU, dtype=dtype)
    assert cache.num_bytes == 5 * 8 * bytes_per_token(tiny_model().config, dtype)
    cache.storage.copy_(torch.randint(1, 100, cache.storage.shape))
    before = cache.storage.clone()
    source, target, counts = (torch.tensor(values, dtype=torch.int32) for values in ([1, 2], [4, 3], [5, 8]))
    cache.copy_pages(source, target, counts)
    for k_or_v in (part for layer in cache.layers for part in layer):
        for a, b, count in ((1, 4, 5), (2, 3, 8)):
            assert torch.equal(k_or_v[a, :, :count].float(), k_or_v[b, :, :count].float())
    assert torch.equal(cache.storage[:, :, :3], before[:, :, :3])


def test_rounded_keys_and_values_move_the_logits_a_little() -> None:
    decoder = tiny_model().decoder
    exact = BareCache(decoder, 1, 64).step([], [(0, PROMPT)])
    rounded = BareCache(apply_fp8_cache(decoder), 1, 64, kv_dtype=FP8).step([], [(0, PROMPT)])
    assert not torch.equal(exact, rounded)
    assert float(torch.corrcoef(torch.stack((exact.flatten(), rounded.flatten())))[0, 1]) > 0.998


def test_cached_is_cold_batched_is_alone_and_forks_share_partial_pages() -> None:
    with Engine(tiny_model(), num_kv_tokens=2048, kv_cache_dtype="fp8_e4m3") as engine:
        cold = engine.generate(PROMPT, GREEDY)
        assert engine.generate(PROMPT, GREEDY).token_ids == cold.token_ids
        prompts = [PROMPT + list(text) for text in (b" One", b" Two of them", b" Three", b"")]
        handles = [engine.submit(prompt, GREEDY) for prompt in prompts]
        forked = [handle.result(timeout_s=60) for handle in handles]
        assert max(result.usage.cached_tokens for result in forked) > len(PROMPT) - 2  # a part of a page was copied
        for prompt, result in zip(prompts, forked, strict=True):
            engine.flush_cache()
            assert engine.generate(prompt, GREEDY).token_ids == result.token_ids
        engine.check_integrity()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
def test_pages_that_are_read_from_one_cache_and_written_to_another_are_the_same(dtype: torch.dtype) -> None:
    source, target = (KVCache(tiny_model().config, 9, 16, device=CPU, dtype=dtype) for _ in range(2))
    source.storage.view(torch.uint8).random_(0, 255, generator=torch.Generator().manual_seed(1))
    pages = source.read([3, 8, 1])
    assert (pages.dtype, pages.numel()) == (torch.uint8, 3 * source.page_bytes)
    target.write([2, 4, 6], pages)
    for old, new in ((3, 2), (8, 4), (1, 6)):
        here, there = (cache.storage.view(torch.uint8)[:, :, page] for cache, page in ((source, old), (target, new)))
        assert torch.equal(here, there)
    assert not target.storage.view(torch.uint8)[:, :, [0, 1, 3, 5, 7, 8]].any()
    assert target.read([]).numel() == 0
