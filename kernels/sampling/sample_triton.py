# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""The Triton kernels of `sample.sample`: two launches, no sort, no atomics.

1. `_scan_kernel`, grid (B, chunks): each program reads one chunk of the row, applies the masks, and keeps the
   chunk's best score (logit, or scaled logit + noise), its token, and the largest scaled logit.
2. `_choose_kernel`, grid (B): reduces the chunks. Rows without top-k, top-p or min-p are done. For other rows, the
   winner among all tokens is the result if the filters keep it; one pass over the row tests that. If they do not keep
   it, they keep no token at or below its value, so the next winner is searched above it. This ends, because the value
   only rises and the largest logit is always kept. With top-k, the k-th largest value is found by bisection between
   values that occur in the row, starting from a lower bound given by the chunks' maxima.

A tile is [words, 32] tokens, so one mask word covers one tile row. Arithmetic in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ramet.kernels.sampling.logit_edits import edit_logits_triton
from ramet.kernels.sampling.sample import SamplingTables
from ramet.kernels.triton_support import cdiv, jit, jit_any_value, next_power_of_two, tl

_MAX_CHUNKS = 128


def sample_triton(
    logits: Tensor,
    tables: SamplingTables,
    rows: Tensor,
    positions: Tensor,
    mask: Tensor | None = None,
    out: Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Launch the kernels of `sample`. Allocates only the [B, chunks] partial results."""
    num_rows = logits.shape[0]
    vocab_size = logits.shape[1] if vocab_size is None else vocab_size
    if out is None:
        out = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    if num_rows == 0:
        return out
    # Small batches: many short chunks, to fill the card. Large ones: rows do that, and longer chunks cost less.
    chunk = max(1024 if num_rows <= 16 else 4096, next_power_of_two(cdiv(vocab_size, _MAX_CHUNKS)))
    num_chunks = cdiv(vocab_size, chunk)
    # Each of the three begins on 16 bytes whatever the batch: one binary serves all.
    scores = torch.empty((3, cdiv(num_rows * num_chunks, 4) * 4), dtype=torch.float32, device=logits.device)
    grammar, edits = tables.grammar, tables.edits
    if edits is not None:
        edit_logits_triton(logits, edits, rows, positions)
    # A kernel cannot take None as an address: `rows` replaces absent tensors and is not read in their place.
    masks = {
        "mask_ptr": rows if mask is None else mask,
        "mask_stride": 0 if mask is None else mask.stride(0),
        "state_ptr": rows if grammar is None else grammar.state,
        "state_stride": 0 if grammar is None else grammar.state.stride(0),
        "mask_index_ptr": rows if grammar is None else grammar.mask_index,
        "mask_rows_ptr": rows if grammar is None else grammar.mask_rows,
        "mask_rows_stride": 0 if grammar is None else grammar.mask_rows.stride(0),
        "edited_ptr": rows if edits is None else edits.edited,
        "edited_stride": 0 if edits is None else edits.edited.stride(0),
        "edit_row_ptr": rows if edits is None else edits.slot_row,
        "HAS_MASK": mask is not None,
        "HAS_GRAMMAR": grammar is not None,
        "HAS_EDITS": edits is not None,
    }
    shared = {
        "logits_ptr": logits,
        "logits_stride": logits.stride(0),
        "rows_ptr": rows,
        "positions_ptr": positions,
        "temperature_ptr": tables.temperature,
        "top_k_ptr": tables.top_k,
        "seed_low_ptr": tables.seed_low,
        "seed_high_ptr": tables.seed_high,
        "slot_stride": tables.temperature.stride(0),
        "best_ptr": scores[0],
        "token_ptr": scores[1].view(torch.int32),
        "largest_ptr": scores[2],
        "vocab_size": vocab_size,
        "num_chunks": num_chunks,
    }
    edit_row = tables.temperature if edits is None else edits.slot_row
    columns = (edit_row, tables.top_k, tables.top_p, tables.min_p, tables.seed_low, tables.seed_high, tables.error)
    assert all(column.stride(0) == tables.temperature.stride(0) for column in columns)
    tile = min(chunk, 2048)
    _scan_kernel[(num_rows, num_chunks)](**shared, **masks, CHUNK=chunk, WORDS=tile // 32, num_warps=4)
    tile = min(8192, next_power_of_two(max(vocab_size, 32)))
    _choose_kernel[(num_rows,)](
        **shared,
        **masks,
        top_p_ptr=tables.top_p,
        min_p_ptr=tables.min_p,
        error_ptr=tables.error,
        out_ptr=out,
        CHUNKS=max(next_power_of_two(num_chunks), 2),
        WORDS=tile // 32,
        num_warps=16 if tile == 8192 else 4,
    )
    return out


@jit_any_value("num_chunks")
def _scan_kernel(
    logits_ptr, logits_stride, rows_ptr, positions_ptr, temperature_ptr, top_k_ptr, seed_low_ptr, seed_high_ptr,
    slot_stride, best_ptr, token_ptr, largest_ptr, vocab_size, num_chunks, mask_ptr, mask_stride, state_ptr,
    state_stride, mask_index_ptr, mask_rows_ptr, mask_rows_stride, edited_ptr, edited_stride, edit_row_ptr,
    HAS_MASK: tl.constexpr, HAS_GRAMMAR: tl.constexpr, HAS_EDITS: tl.constexpr, CHUNK: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    slot = tl.load(rows_ptr + row).to(tl.int64)
    temperature = tl.load(temperature_ptr + slot * slot_stride)
    top_k = tl.load(top_k_ptr + slot * slot_stride)
    is_random = (temperature > 1e-5) & (top_k != 1)
    scale = tl.where(is_random, 1.0 / tl.where(is_random, temperature, 1.0), 1.0)
    key, second_key = noise_keys(seed_low_ptr, seed_high_ptr, positions_ptr, slot * slot_stride, row)
    source = row_source(
        row, slot, logits_ptr, logits_stride, mask_ptr, mask_stride, state_ptr, state_stride, mask_index_ptr,
        mask_rows_ptr, mask_rows_stride, edited_ptr, edited_stride, edit_row_ptr, slot_stride, vocab_size,
        HAS_MASK, HAS_GRAMMAR, HAS_EDITS,
    )  # fmt: skip
    best = tl.full((WORDS, 32), float("-inf"), tl.float32)
    best_token = tl.full((WORDS, 32), 0, tl.int32)
    largest = tl.full((WORDS, 32), float("-inf"), tl.float32)
    for start in range(0, CHUNK, WORDS * 32):
        token, x = load_scaled(
            source, chunk * CHUNK + start, vocab_size, scale, HAS_MASK, HAS_GRAMMAR, HAS_EDITS, WORDS,
        )  # fmt: skip
        largest = tl.maximum(largest, x)
        if is_random:
            x = x + gumbel_noise(token, key, second_key)
        best_token = tl.where(x > best, token, best_token)
        best = tl.maximum(best, x)
    score, winner = best_of_tile(best, best_token)
    cell = row * num_chunks + chunk
    tl.store(best_ptr + cell, score)
    tl.store(token_ptr + cell, winner)
    tl.store(largest_ptr + cell, tl.max(tl.max(largest, axis=1), axis=0))


@jit_any_value("num_chunks")
def _choose_kernel(
    logits_ptr, logits_stride, rows_ptr, positions_ptr, temperature_ptr, top_k_ptr, seed_low_ptr, seed_high_ptr,
    slot_stride, best_ptr, token_ptr, largest_ptr, vocab_size, num_chunks, mask_ptr, mask_stride, state_ptr,
    state_stride, mask_index_ptr, mask_rows_ptr, mask_rows_stride, edited_ptr, edited_stride, edit_row_ptr, top_p_ptr,
    min_p_ptr, error_ptr, out_ptr, HAS_MASK: tl.constexpr, HAS_GRAMMAR: tl.constexpr, HAS_EDITS: tl.constexpr,
    CHUNKS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(rows_ptr + row).to(tl.int64)
    entry = slot * slot_stride
    temperature = tl.load(temperature_ptr + entry)
    top_k = tl.load(top_k_ptr + entry)
    top_p = tl.load(top_p_ptr + entry)
    min_p = tl.load(min_p_ptr + entry)
    chunk = tl.arange(0, CHUNKS)
    cell = row * num_chunks + chunk
    inside = chunk < num_chunks
    scores = tl.load(best_ptr + cell, mask=inside, other=float("-inf"))
    tokens = tl.load(token_ptr + cell, mask=inside, other=0)
    best = tl.max(scores, axis=0)
    is_empty = best == float("-inf")
    winner = tl.min(tl.where((scores == best) & inside, tokens, 0x7FFFFFFF), axis=0)
    winner = tl.where(is_empty, 0, winner)
    has_top_k = (top_k > 0) & (top_k < vocab_size)
    is_random = (temperature > 1e-5) & (top_k != 1)
    if is_random & (has_top_k | (top_p < 1.0) | (min_p > 0.0)) & (best > float("-inf")):
        scale = 1.0 / temperature
        key, second_key = noise_keys(seed_low_ptr, seed_high_ptr, positions_ptr, entry, row)
        source = row_source(
            row, slot, logits_ptr, logits_stride, mask_ptr, mask_stride, state_ptr, state_stride, mask_index_ptr,
            mask_rows_ptr, mask_rows_stride, edited_ptr, edited_stride, edit_row_ptr, slot_stride, vocab_size,
            HAS_MASK, HAS_GRAMMAR, HAS_EDITS,
        )  # fmt: skip
        maxima = tl.load(largest_ptr + cell, mask=inside, other=float("-inf"))
        largest = tl.max(maxima, axis=0)
        top_k_floor = tl.full((), float("-inf"), tl.float32)
        if has_top_k:
            top_k_floor = kth_largest(
                source, vocab_size, scale, maxima, largest, top_k, HAS_MASK, HAS_GRAMMAR, HAS_EDITS, CHUNKS, WORDS,
            )  # fmt: skip
        floor = top_k_floor
        if min_p > 0.0:
            floor = tl.maximum(floor, largest + tl.log(min_p))
        # The winner's own value is read again, because its score minus its noise is not exact.
        value = tl.minimum(logit_of(source, winner, HAS_EDITS), 1e30) * scale
        rejected = tl.where(value >= floor, float("-inf"), value)  # everything <= rejected is out
        is_kept = value >= floor
        is_done = is_kept & (top_p >= 1.0)
        while is_done == 0:
            if is_kept:
                total, above = masses(
                    source, vocab_size, scale, largest, top_k_floor, value, HAS_MASK, HAS_GRAMMAR, HAS_EDITS, WORDS,
                )  # fmt: skip
                is_done = above < top_p * total
                rejected = tl.where(is_done, rejected, value)
            if is_done == 0:
                winner, value = best_above(
                    source, vocab_size, scale, floor, rejected, key, second_key,
                    HAS_MASK, HAS_GRAMMAR, HAS_EDITS, WORDS,
                )  # fmt: skip
                is_kept = value > float("-inf")
                is_done = is_kept & (top_p >= 1.0)
    tl.store(out_ptr + row, winner)
    tl.store(error_ptr + entry, 1, mask=is_empty)


@jit
def load_scaled(
    source, start, vocab_size, scale,
    HAS_MASK: tl.constexpr, HAS_GRAMMAR: tl.constexpr, HAS_EDITS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Return the tile's token ids and logit * scale; -inf where masked, padded, or NaN."""
    row_ptr, edited_row_ptr, mask_row_ptr, grammar_row_ptr, num_edited, num_constrained = source
    word = start // 32 + tl.arange(0, WORDS)
    bit = tl.arange(0, 32)[None, :]
    token = word[:, None] * 32 + bit
    x = tl.load(row_ptr + token, mask=(token >= num_edited) & (token < vocab_size), other=float("-inf")).to(tl.float32)
    if HAS_EDITS:
        x = tl.maximum(x, tl.load(edited_row_ptr + token, mask=token < num_edited, other=float("-inf")))
    x = tl.where(x == x, tl.minimum(x, 1e30), float("-inf"))
    if HAS_MASK:
        words = tl.load(mask_row_ptr + word, mask=word * 32 < vocab_size, other=0)
        x = tl.where(((words[:, None] >> bit) & 1) != 0, x, float("-inf"))
    if HAS_GRAMMAR:
        words = tl.load(grammar_row_ptr + word, mask=word * 32 < num_constrained, other=-1)
        x = tl.where(((words[:, None] >> bit) & 1) != 0, x, float("-inf"))
    return token, x * scale


@jit
def row_source(
    row, slot, logits_ptr, logits_stride, mask_ptr, mask_stride, state_ptr, state_stride, mask_index_ptr,
    mask_rows_ptr, mask_rows_stride, edited_ptr, edited_stride, edit_row_ptr, slot_stride, vocab_size,
    HAS_MASK: tl.constexpr, HAS_GRAMMAR: tl.constexpr, HAS_EDITS: tl.constexpr,
):  # fmt: skip
    """Return the sources of a row's logits: the addresses of the logits, of the edited logits, of the caller's mask
    words and of the grammar's; and the numbers of tokens that are edited and that the grammar covers, all or none."""
    edited_row_ptr = edited_ptr
    num_edited = 0
    mask_row_ptr = mask_ptr
    grammar_row_ptr = mask_rows_ptr
    num_constrained = 0
    if HAS_EDITS:
        edit_row = tl.load(edit_row_ptr + slot * slot_stride)
        num_edited = tl.where(edit_row != 0, vocab_size, 0)
        edited_row_ptr = edited_ptr + edit_row.to(tl.int64) * edited_stride
    if HAS_MASK:
        mask_row_ptr = mask_ptr + row.to(tl.int64) * mask_stride
    if HAS_GRAMMAR:
        state = tl.load(state_ptr + slot * state_stride)
        num_constrained = tl.where(state != 0, vocab_size, 0)
        grammar_row_ptr = mask_rows_ptr + tl.load(mask_index_ptr + state).to(tl.int64) * mask_rows_stride
    row_ptr = logits_ptr + row.to(tl.int64) * logits_stride
    return row_ptr, edited_row_ptr, mask_row_ptr, grammar_row_ptr, num_edited, num_constrained


@jit
def logit_of(source, token, HAS_EDITS: tl.constexpr):
    """Return one logit of a row in fp32, edited if the row has edits."""
    row_ptr, edited_row_ptr, _, _, num_edited, _ = source
    x = tl.load(row_ptr + token).to(tl.float32)
    if HAS_EDITS:
        x = tl.load(edited_row_ptr + token, mask=token < num_edited, other=x)
    return x


@jit
def best_of_tile(best, best_token):
    """Return the largest score of a tile and, among equals, the lowest token."""
    score = tl.max(tl.max(best, axis=1), axis=0)
    token = tl.min(tl.min(tl.where(best == score, best_token, 0x7FFFFFFF), axis=1), axis=0)
    return score, token


@jit
def masses(
    source, vocab_size, scale, largest, floor, value,
    HAS_MASK: tl.constexpr, HAS_GRAMMAR: tl.constexpr, HAS_EDITS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Return the mass of all x >= floor, and of all x > value (value >= floor), both relative to exp(largest)."""
    total = tl.zeros((WORDS, 32), tl.float32)
    above = tl.zeros((WORDS, 32), tl.float32)
    for start in range(0, vocab_size, WORDS * 32):
        _, x = load_scaled(
            source, start, vocab_size, scale, HAS_MASK, HAS_GRAMMAR, HAS_EDITS, WORDS,
        )  # fmt: skip
        mass = tl.exp(x - largest)
        total += tl.where(x >= floor, mass, 0.0)
        above += tl.where(x > value, mass, 0.0)
    return tl.sum(tl.sum(total, axis=1), axis=0), tl.sum(tl.sum(above, axis=1), axis=0)


@jit
def best_above(
    source, vocab_size, scale, floor, rejected, key, second_key,
    HAS_MASK: tl.constexpr, HAS_GRAMMAR: tl.constexpr, HAS_EDITS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Return the token of the best noisy score among floor <= x, rejected < x, and its x."""
    best = tl.full((WORDS, 32), float("-inf"), tl.float32)
    best_token = tl.full((WORDS, 32), 0, tl.int32)
    for start in range(0, vocab_size, WORDS * 32):
        token, x = load_scaled(
            source, start, vocab_size, scale, HAS_MASK, HAS_GRAMMAR, HAS_EDITS, WORDS,
        )  # fmt: skip
        allowed = (x >= floor) & (x > rejected)
        # Most tiles have no candidate: their noise is not computed.
        if tl.max(tl.max(allowed.to(tl.int32), axis=1), axis=0) != 0:
            score = tl.where(allowed, x + gumbel_noise(token, key, second_key), float("-inf"))
            best_token = tl.where(score > best, token, best_token)
            best = tl.maximum(best, score)
    _, winner = best_of_tile(best, best_token)
    return winner, tl.minimum(logit_of(source, winner, HAS_EDITS), 1e30) * scale


@jit
def count_from(
    source, vocab_size, scale, threshold,
    HAS_MASK: tl.constexpr, HAS_GRAMMAR: tl.constexpr, HAS_EDITS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Return the number of x >= threshold, the smallest of these, and the largest of the others."""
    count = tl.zeros((WORDS, 32), tl.int32)
    lowest = tl.full((WORDS, 32), float("inf"), tl.float32)
    below = tl.full((WORDS, 32), float("-inf"), tl.float32)
    for start in range(0, vocab_size, WORDS * 32):
        _, x = load_scaled(
            source, start, vocab_size, scale, HAS_MASK, HAS_GRAMMAR, HAS_EDITS, WORDS,
        )  # fmt: skip
        is_above = x >= threshold
        count += is_above.to(tl.int32)
        lowest = tl.minimum(lowest, tl.where(is_above, x, float("inf")))
        below = tl.maximum(below, tl.where(is_above, float("-inf"), x))
    return (
        tl.sum(tl.sum(count, axis=1), axis=0),
        tl.min(tl.min(lowest, axis=1), axis=0),
        tl.max(tl.max(below, axis=1), axis=0),
    )


@jit
def kth_largest(
    source, vocab_size, scale, maxima, largest, k,
    HAS_MASK: tl.constexpr, HAS_GRAMMAR: tl.constexpr, HAS_EDITS: tl.constexpr, CHUNKS: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """Return the k-th largest x, or -inf if fewer than k tokens are allowed."""
    # [low, high] holds the answer, and count(x >= low) >= k. The k-th largest of the chunks' maxima is such a low.
    rank = tl.sum((maxima[None, :] > maxima[:, None]).to(tl.int32), axis=1)
    low = tl.min(tl.where(rank < k, maxima, float("inf")), axis=0)
    low = tl.where(k > CHUNKS, float("-inf"), low)
    high = largest
    step = tl.full((), 8.0, tl.float32)
    # Without a bound: step down from the largest until k tokens are above, or all allowed ones.
    while (low == float("-inf")) & (step < 1e30):
        count, lowest, below = count_from(
            source, vocab_size, scale, largest - step, HAS_MASK, HAS_GRAMMAR, HAS_EDITS, WORDS,
        )  # fmt: skip
        if count >= k:
            low = lowest
        else:
            high = below
        step = tl.where(below == float("-inf"), 1e30, step * 4.0)
    is_exact = (low == float("-inf")) | (low >= high)
    while is_exact == 0:
        middle = 0.5 * low + 0.5 * high
        middle = tl.where(middle > low, middle, high)
        count, lowest, below = count_from(
            source, vocab_size, scale, middle, HAS_MASK, HAS_GRAMMAR, HAS_EDITS, WORDS,
        )  # fmt: skip
        if count >= k:
            low = lowest
        else:
            high = below
        is_exact = (low >= high) | (count == k)
    return low


@jit
def noise_keys(seed_low_ptr, seed_high_ptr, positions_ptr, entry, row):
    """Return the two 32-bit keys of a row's noise, as `sample._noise_keys`."""
    seed_low = tl.load(seed_low_ptr + entry).to(tl.uint32, bitcast=True)
    seed_high = tl.load(seed_high_ptr + entry).to(tl.uint32, bitcast=True)
    position = tl.load(positions_ptr + row).to(tl.uint32)
    key = mix_bits(seed_low ^ 0x9E3779B9)
    key = mix_bits(key ^ seed_high)
    first = mix_bits(key + position)
    return first, mix_bits(first ^ 0x85EBCA6B)


@jit
def mix_bits(value):
    """Mix 32 bits, uint32; as `sample._mix`."""
    value ^= value >> 16
    value *= 0x21F0AAAD
    value ^= value >> 15
    value *= 0x735A2D97
    return value ^ (value >> 15)


@jit
def gumbel_noise(token, key, second_key):
    """Return standard Gumbel noise of int32 tokens; as `sample.gumbel_noise_reference`."""
    bits = mix_bits(mix_bits((token.to(tl.uint32) * 0x9E3779B9) ^ key) + second_key)
    uniform = ((bits >> 1).to(tl.float32) + 0.5) * 4.656612873077393e-10
    uniform = tl.minimum(uniform, 0.99999994)
    # -log(1 - u): a series where 1 - u would lose u's digits (error under 2e-7 relative at 1/16).
    series = uniform * (1.0 + uniform * (0.5 + uniform * (0.33333334 + uniform * (0.25 + uniform * 0.2))))
    exponential = tl.where(uniform < 0.0625, series, -tl.log(1.0 - uniform))
    return -tl.log(exponential)
