"""Every kernel but attention against its reference, on fresh random input; part of `bench_kernels.py`."""

from __future__ import annotations

import dataclasses
import math
import traceback
from collections.abc import Callable

import torch
from kernel_cases import (
    DEVICE,
    DIM,
    DOT_CONFIGS,
    DRY,
    GATE_ROWS,
    HIDDEN,
    INTER,
    KV_HEADS,
    MODES,
    QKV,
    SUM_CONFIGS,
    TILE_CONFIGS,
    VOCAB,
    Record,
    difference,
    integers,
    name_of,
    randn,
    random_automaton,
    rope_arguments,
    sampling_tables,
    token_table,
)  # fmt: skip
from race_checks import check_races
from torch import Tensor

from ramet.kernels.grammar.arena import GrammarArena
from ramet.kernels.grammar.mask import Budgets, advance_states_reference, build_masks_reference
from ramet.kernels.grammar.mask_triton import advance_states_triton, build_masks_triton
from ramet.kernels.layers import activation, adapters, gemv, matmul_invariant, norm, quantize_fp8, rope
from ramet.kernels.layers.matmul_invariant import gated_product_triton
from ramet.kernels.sampling import logit_edits
from ramet.kernels.sampling import sample as sampling
from ramet.kernels.sampling.sample_triton import sample_triton
from ramet.kernels.slots import copy_pages
from ramet.kernels.slots import tables as step_inputs


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


class Checks:
    """What was checked, and of what failed where."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def __call__(self, name: str, error: float, limit: float, where: str = "") -> None:
        """NaN is not right."""
        found = {"section": "check", "name": name, "error": error, "limit": limit, "ok": error <= limit}
        self.records.append(found if error <= limit else {**found, "where": where})

    def compare(self, name: str, actual: Tensor, expected: Tensor, limit: float) -> None:
        error = relative(actual, expected)
        self(name, error, limit, "" if error <= limit else difference(actual, expected))

    def attempt(self, what: Callable[[Checks], None]) -> None:
        """Checks that end with an error are a failed one; the others still tell something."""
        try:
            what(self)
        except Exception as error:
            traceback.print_exc()
            self(what.__name__, math.nan, 0.0, f"{type(error).__name__}: {error}"[:300])


def check() -> list[Record]:
    record = Checks()
    groups = check_layers, check_steps, check_sampling, check_edits, check_masks, check_gemv, check_gate
    for group in (*groups, check_products, check_races):
        record.attempt(group)
    return record.records


def check_layers(record: Checks) -> None:
    for num_tokens in (1, 7, 300):
        x, residual, weight = randn(num_tokens, HIDDEN), randn(num_tokens, HIDDEN), randn(HIDDEN)
        record.compare(f"rms_norm T={num_tokens}", norm.rms_norm_triton(x, weight, 1e-5),
               norm.rms_norm_reference(x.float(), weight.float(), 1e-5), 1e-2)  # fmt: skip
        normed, total = norm.fused_add_rms_norm_triton(x, residual, weight, 1e-5)
        expected = norm.fused_add_rms_norm_reference(x, residual, weight, 1e-5)
        record.compare(f"fused_add T={num_tokens}", total, expected[1], 0.0 if not DRY else 1e-2)
        record.compare(f"fused_add_rms_norm T={num_tokens}", normed, expected[0], 1e-2)
        rounded, wanted = (f(x) for f in (quantize_fp8.quantize_fp8_triton, quantize_fp8.quantize_fp8_reference))
        record.compare(f"quantize_fp8 T={num_tokens}", rounded[0].float() * rounded[1], wanted[0].float() * wanted[1],
               1e-3 if not DRY else 0.2)  # fmt: skip
        gate_up = randn(num_tokens, 2 * INTER)
        record.compare(f"silu_and_mul T={num_tokens}", activation.silu_and_mul_triton(gate_up),
               activation.silu_and_mul_reference(gate_up.float()), 1e-2)  # fmt: skip
        record.compare(f"gelu_tanh_and_mul T={num_tokens}", activation.gelu_tanh_and_mul_triton(gate_up),
               activation.gelu_tanh_and_mul_reference(gate_up.float()), 1e-2)  # fmt: skip
        for has_norm in (False, True):
            arguments = rope_arguments(num_tokens)
            norms = (randn(DIM), randn(DIM)) if has_norm else (None, None)
            k_cache, v_cache = arguments[-2].clone(), arguments[-1].clone()
            expected_q = rope.rope_and_write_kv_reference(*arguments[:-2], k_cache, v_cache, *norms)
            actual_q = rope.rope_and_write_kv_triton(*arguments, *norms)
            record.compare(f"rope q T={num_tokens} norm={has_norm}", actual_q, expected_q, 1e-2)
            record.compare(f"rope k T={num_tokens} norm={has_norm}", arguments[-2], k_cache, 1e-2)
            record.compare(f"rope v T={num_tokens} norm={has_norm}", arguments[-1], v_cache, 0.0)
    caches = randn(3, 2, 9, KV_HEADS, 16, DIM)
    expected_caches = caches.clone()
    pages = torch.tensor([[1, 2], [5, 6], [9, 16]], dtype=torch.int32, device=DEVICE)
    copy_pages.copy_pages_triton(caches, *pages)
    copy_pages.copy_pages_reference(expected_caches, *pages)
    record.compare("copy_pages", caches, expected_caches, 0.0)


def check_products(record: Checks) -> None:
    """Batch-invariant products, of weights in 16 bits and in FP8 with blocks of columns, and adapters."""
    for num_rows in (1, 3, 65):
        x, weight = randn(num_rows, 256), randn(200, 256)
        record.compare(f"invariant product T={num_rows}", matmul_invariant.matmul_invariant_triton(x, weight),
               matmul_invariant.matmul_invariant_reference(x.float(), weight.float()), 1e-2)  # fmt: skip
        values, scale = randn(200, 256).to(torch.float8_e4m3fn), torch.rand(200, 2, device=DEVICE)
        record.compare(f"product with FP8 blocks T={num_rows}",
               matmul_invariant.matmul_invariant_triton(x, values, None, scale),
                        matmul_invariant.matmul_invariant_reference(x.float(), values, None, scale), 1e-2)  # fmt: skip
        ranks = torch.tensor([[0, 0], [8, 4], [3, 0]], dtype=torch.int32)
        a, b = randn(3, 2, 8, 256), randn(3, 200, 8)
        for adapter, parts in enumerate(ranks.tolist()):
            for part, rank in enumerate(parts):
                a[adapter, part, rank:] = 0
        table = adapters.AdapterTable(a, b, (0, 120, 200), ranks)
        out, chosen = randn(num_rows, 200), integers(3, num_rows)
        expected = adapters.add_adapters_reference(out.clone(), x, table, chosen)
        record.compare(f"adapters T={num_rows}", adapters.add_adapters_triton(out, x, table, chosen), expected, 1e-2)


def check_steps(record: Checks) -> None:
    results = []
    rows = torch.cat((torch.randperm(300)[:200], torch.full((17,), 300))).to(torch.int32).to(DEVICE)
    new_page, lengths, tokens = integers(2, 217) * integers(999, 217), integers(700, 300), integers(999, 217)
    updates = torch.stack(
        (integers(300, 1).expand(40), torch.randperm(100)[:40].to(DEVICE), integers(9999, 40)), 1
    ).int()
    for kind in ("reference", "triton"):
        slots, out = step_inputs.SlotTables.create(300, 100, DEVICE), step_inputs.DecodeInputs.create(217, DEVICE)
        slots.kv_len[:300] = lengths
        getattr(step_inputs, f"prepare_decode_{kind}")(
            rows, new_page, slots.last_token, slots.kv_len, slots.page_table, 16, out
        )
        getattr(step_inputs, f"commit_decode_{kind}")(rows, tokens, slots.last_token, slots.kv_len)
        getattr(step_inputs, f"scatter_rows_{kind}")(updates, slots.arena)
        results.append([slots.arena, out.token_ids, out.positions, out.kv_slots, out.kv_lens])
    for name, expected, actual in zip(("tables", "tokens", "positions", "slots", "lengths"), *results, strict=True):
        record.compare(f"step_inputs, {name}", actual, expected, 0.0)


def check_sampling(record: Checks) -> None:
    for mode, columns in MODES.items():
        for batch in (1, 40):
            tables = sampling_tables(batch, **columns)
            logits, positions = randn(batch, VOCAB) * 3, integers(9999, batch)
            rows = torch.arange(batch, dtype=torch.int32, device=DEVICE)
            expected = sampling.sample_reference(logits, tables, rows, positions)
            actual = sample_triton(logits, tables, rows, positions)
            # Sums of masses and logarithms differ in their last bits: a few border cases may fall on the other side.
            limit = 0 if mode == "greedy" else batch // 20
            record(f"sample {mode} B={batch}", int((actual != expected).sum()), limit, difference(actual, expected))


def check_edits(record: Checks) -> None:
    """Half of the slots have edits; a greedy token from them is the best of what the reference edits."""
    batch = 40
    slot_row = torch.zeros(batch + 1, dtype=torch.int32, device=DEVICE)
    slot_row[:batch:2] = torch.arange(1, batch // 2 + 1, dtype=torch.int32, device=DEVICE)
    tables = logit_edits.EditTables.create(batch // 2, VOCAB, DEVICE).of_slots(slot_row)
    tables.words.copy_(integers(3, batch // 2 + 1, VOCAB) + logit_edits.ENDS_TEXT * integers(2, batch // 2 + 1, VOCAB))
    tables.bias.copy_(randn(batch // 2 + 1, VOCAB))
    for name, value in (("repetition", 1.3), ("frequency", 0.4), ("presence", -0.2)):
        tables.parameters[:, logit_edits.PARAMETERS[name]] = step_inputs.float_bits(value)
    tables.parameters[:, logit_edits.PARAMETERS["minimum"]] = 50
    logits, positions = randn(batch, VOCAB) * 3, integers(99, batch)
    rows = torch.arange(batch, dtype=torch.int32, device=DEVICE)
    logit_edits.edit_logits_reference(logits, tables, rows, positions)
    expected = tables.edited.clone()
    tables.edited.zero_()
    logit_edits.edit_logits_triton(logits, tables, rows, positions)
    finite = expected.isfinite()
    record.compare("edit_logits", tables.edited[finite], expected[finite], 1e-6)
    record("edit_logits minimum", float((tables.edited.isfinite() != finite).sum()), 0.0)
    sampled = dataclasses.replace(sampling_tables(batch, temperature=0.0), edits=tables)
    tokens = sample_triton(logits, sampled, rows, positions)
    best = tables.edited[slot_row[:batch:2].long()].argmax(-1)
    record("sample edited", float((tokens[::2] != best).sum() + (tokens[1::2] != logits[1::2].argmax(-1)).sum()), 0.0)
    counted = tables.words.clone()
    counted[slot_row[:batch:2].long(), tokens[::2].long()] += 1
    logit_edits.count_tokens_triton(tables, rows, tokens)
    record.compare("count_tokens", tables.words, counted, 0.0)


def check_masks(record: Checks) -> None:
    arena = GrammarArena(token_table(), 8, max_mask_rows=64, max_states=500)
    automaton = random_automaton(40)
    base = arena.acquire("check", automaton)
    states = torch.arange(base, base + 40, dtype=torch.int32, device=DEVICE)
    expected, actual = (torch.full((40, -(-VOCAB // 32)), 3, dtype=torch.int32, device=DEVICE) for _ in range(2))
    for has_ends, name in ((True, "build_masks with ends"), (False, "build_masks")):
        build_masks_reference(states[:12], arena.automata, arena.tokens, expected, has_ends=has_ends)
        build_masks_triton(states, arena.automata, arena.tokens, actual, has_ends=has_ends)
        record.compare(name, actual[:12], expected[:12], 0.0)
    resident = arena.mask_rows[arena.mask_index[states.long()].long()]
    record.compare("masks by class equal masks by state", resident, actual, 0.0)
    column = integers(40, 9) + base
    column[0], column[1], column[2] = 0, arena.host_state(1), arena.final_state
    moved = column.clone()
    rows, tokens = torch.arange(9, dtype=torch.int32, device=DEVICE), integers(VOCAB, 9)
    budgets = Budgets(integers(99, 9), integers(99, 9), integers(VOCAB, 9))
    taken = tokens.clone()
    advance_states_reference(rows, tokens, column, arena.automata, arena.tokens, budgets)
    advance_states_triton(rows, taken, moved, arena.automata, arena.tokens, budgets)
    record.compare("advance_states", moved, column, 0.0)
    record.compare("advance_states, tokens", taken, tokens, 0.0)
    tables = sampling_tables(9, temperature=1.0)
    masked = dataclasses.replace(tables, grammar=arena.masks(moved))
    logits, positions = randn(9, VOCAB) * 3, integers(99, 9)
    differs = sample_triton(logits, masked, rows, positions) != sampling.sample_reference(
        logits, masked, rows, positions
    )
    record("sample under grammars", int(differs.sum()), 0)


def check_gemv(record: Checks) -> None:
    for num_rows in (1, 3, 16):
        check_small_products(record, num_rows)


def check_small_products(record: Checks, num_rows: int) -> None:
    x, weight, gain, residual = randn(num_rows, HIDDEN), randn(QKV, HIDDEN) / 64, randn(HIDDEN), randn(num_rows, QKV)
    exact = gemv.gemv_reference(x.double(), weight.double(), None, residual.double(), gain.double(), 1e-5)
    gated = gemv.gemv_silu_and_mul_reference(x.double(), weight.double(), gain.double(), 1e-5)
    for config in checked_configs(num_rows):
        actual = gemv.gemv_triton(x, weight, None, residual, gain, 1e-5, config)
        record.compare(f"gemv B={num_rows} {name_of(config)}", actual, exact, 1e-2)
        if fits_gated(config):
            actual = gemv.gemv_silu_and_mul_triton(x, weight, gain, 1e-5, config)
            record.compare(f"gemv gated B={num_rows} {name_of(config)}", actual, gated, 1e-2)


def check_gate(record: Checks) -> None:
    for rows in GATE_ROWS[:3]:
        x, weight = randn(rows, HIDDEN), randn(2 * INTER, HIDDEN) / HIDDEN**0.5
        exact = activation.silu_and_mul_reference(x.double() @ weight.double().T)
        for config in TILE_CONFIGS:
            actual = gated_product_triton(x, weight, config)
            record.compare(f"gated product B={rows} {name_of(config)}", actual, exact, 1e-2)


def checked_configs(num_rows: int) -> list[gemv.GemvConfig]:
    """All tile sizes at 1 and 3 rows, some at 16; early launch for two of each kernel."""
    configs = (SUM_CONFIGS if num_rows == 1 else []) + (DOT_CONFIGS[:3] if num_rows == 16 else DOT_CONFIGS)
    early = [] if DRY or num_rows == 16 else [*(SUM_CONFIGS[4:6] if num_rows == 1 else []), *DOT_CONFIGS[:2]]
    return configs + [dataclasses.replace(config, early_launch=True) for config in early]


def fits_gated(config: gemv.GemvConfig) -> bool:
    """Two tiles at a time must fit shared memory (227 KiB)."""
    return 4 * config.block_n * config.block_k * config.num_stages <= 160 << 10
