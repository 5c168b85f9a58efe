"""Choose each row's next token: mask, temperature, top-k, top-p, min-p, then Gumbel-max with counter-based noise.

Slots with penalties, biases or a minimum length are sampled from their edited logits (`logit_edits.py`). The filters
run in this order, each on the tokens that the previous ones kept:

    1. mask          remove tokens outside the grammar's (or the caller's) bit mask, and padded columns
    2. temperature   x = logit / temperature; temperature 0 (under 1e-5) takes the largest logit and skips the rest
    3. top-k         keep x >= the k-th largest x
    4. top-p         renormalise; keep the most likely tokens until their mass reaches p
    5. min-p         keep probability >= min_p * the largest probability

Every filter is a threshold on x, so tokens that tie at the threshold are all kept: the result does not depend on the
order of equal logits (bf16 logits tie often). top_k = 1 is greedy. The token is argmax(x + g) over the kept tokens,
where g is Gumbel noise from a hash of (seed, position, token id). The noise does not depend on the batch, its padding
or the filters. NaN logits count as -inf. A row without any finite logit gives token 0 and sets its slot's error flag.

The GPU kernels are in `sample_triton.py`, the CPU kernel for greedy rows in `cpu/greedy.py`. Log-probabilities are
computed outside CUDA graphs (`compute_logprobs`). Not here: penalties and biases (`logit_edits.py`).
Source of Gumbel-max: Gumbel 1954; of accepting or raising a pivot instead of sorting: FlashInfer's sampling kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ramet.kernels.sampling.logit_edits import EditTables, edit_logits_reference

_NEGATIVE_INFINITY = float("-inf")
_LARGEST_LOGIT = 1e30
GREEDY_TEMPERATURE = 1e-5  # below it noise is lost in the rounding of x, and 1 / temperature may overflow
_GOLDEN = 0x9E3779B9
_SECOND_KEY = 0x85EBCA6B
_UNIFORM_STEP = 2.0**-31
_LARGEST_UNIFORM = 1.0 - 2.0**-24


@dataclass(frozen=True, slots=True)
class GrammarTables:
    """Token masks by automaton state, resident on the device.

    state: int32 [S + 1], each slot's state. mask_index: int32 [num_states], the mask row of a state.
    mask_rows: int32 [M, W]; bit t % 32 of word t // 32 is 1 if token t is allowed. State 0 allows everything.
    """

    state: Tensor
    mask_index: Tensor
    mask_rows: Tensor


# The sampling values of a greedy slot. Values that are floats here are fp32 columns of the slot tables, the others are
# int32.
GREEDY_SLOT: Mapping[str, float] = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


@dataclass(frozen=True, slots=True)
class SamplingTables:
    """The sampling values of each slot; the last entry is the dummy slot's. Changed in place by their owner.

    temperature, top_p, min_p: fp32 [S + 1]. top_k: int32 [S + 1] (0: off). seed_low, seed_high: int32 [S + 1], halves
    of a 64-bit seed. error: int32 [S + 1]; `sample` sets it to 1 if a row has no finite logit, the owner clears it.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed_low: Tensor
    seed_high: Tensor
    error: Tensor
    grammar: GrammarTables | None = None
    edits: EditTables | None = None

    @classmethod
    def create(cls, num_slots: int, device: torch.device | str = "cpu") -> SamplingTables:
        """Make tables whose slots are all greedy."""
        values = {**GREEDY_SLOT, "seed_low": 0, "seed_high": 0, "error": 0}

        def column(value: float) -> Tensor:
            dtype = torch.float32 if isinstance(value, float) else torch.int32
            return torch.full((num_slots + 1,), value, dtype=dtype, device=device)

        return cls(**{name: column(value) for name, value in values.items()}, grammar=None, edits=None)


def split_seed(seed: int) -> tuple[int, int]:
    """Return the low and the high half of a seed's lowest 64 bits as signed 32-bit integers."""
    return _signed32(seed), _signed32(seed >> 32)


def sample_reference(
    logits: Tensor,
    tables: SamplingTables,
    rows: Tensor,
    positions: Tensor,
    mask: Tensor | None = None,
    out: Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Choose a token for every row of `logits` [B, V] (fp32, bf16 or fp16) as the module's docstring specifies.

    rows: int32 [B], the slot of each row. positions: int32 [B], the sampled token's index in its sequence: the noise
    counter. mask: int32 [B, W], applied in addition to the slots' grammar masks. out: int32 or int64 [B].
    vocab_size: columns from here on are padding (default: none).
    """
    vocab_size = logits.shape[1] if vocab_size is None else vocab_size
    slots = rows.long()
    if tables.edits is not None:
        logits = _edited_logits(logits, tables.edits, rows, positions)
    logits = _masked_logits(logits[:, :vocab_size], tables.grammar, slots, mask)
    value, token = logits.max(dim=-1)
    if not bool(torch.isfinite(value).all()):
        logits = logits.nan_to_num(_NEGATIVE_INFINITY, _LARGEST_LOGIT, _NEGATIVE_INFINITY)
        value, token = logits.max(dim=-1)
        is_empty = value == _NEGATIVE_INFINITY
        token = token.masked_fill(is_empty, 0)
        tables.error[slots[is_empty]] = 1
    temperature, top_k = tables.temperature[slots], tables.top_k[slots]
    is_random = (temperature > GREEDY_TEMPERATURE) & (top_k != 1) & (value > _NEGATIVE_INFINITY)
    for row in is_random.nonzero().flatten().tolist():
        slot = slots[row]
        scaled = logits[row].float() * (1.0 / temperature[row])
        seeds = int(tables.seed_low[slot]), int(tables.seed_high[slot])
        threshold = _filter_threshold(scaled, int(top_k[row]), float(tables.top_p[slot]), float(tables.min_p[slot]))
        if threshold is None:
            every = torch.arange(vocab_size, dtype=torch.int32, device=logits.device)
            token[row] = gumbel_noise_reference(*seeds, int(positions[row]), every).add_(scaled).argmax()
        else:
            kept = (scaled >= threshold).nonzero().flatten()
            noise = gumbel_noise_reference(*seeds, int(positions[row]), kept)
            token[row] = kept[noise.add_(scaled[kept]).argmax()]
    if out is None:
        return token.to(torch.int32)
    return out.copy_(token)


def gumbel_noise_reference(seed_low: int, seed_high: int, position: int, tokens: Tensor) -> Tensor:
    """Return standard Gumbel noise, fp32, of `tokens` (any integer dtype) at one position of one seed."""
    bits = _noise_bits(seed_low, seed_high, position, tokens)
    # 31 bits, so that the small values, whose tokens win, keep a float's full precision down to 2^-32.
    uniform = bits.bitwise_right_shift_(1).bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(_UNIFORM_STEP)
    uniform.clamp_(max=_LARGEST_UNIFORM)
    return -torch.log(-torch.log1p(-uniform))


def _filter_threshold(scaled: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor | None:
    """Return the smallest value that the filters keep, or None if they keep all tokens. `scaled`: fp32 [V]."""
    threshold = None
    if 0 < top_k < len(scaled):
        threshold = scaled.topk(top_k).values[-1]
    largest = scaled.max()
    if top_p < 1.0:
        left = scaled if threshold is None else scaled[scaled >= threshold]
        limit = top_p * (left - largest).exp().sum()
        # The nucleus is nearly always small: more is sorted only when less was not enough.
        for count in (256, 4096, len(left)):
            ranked = left.topk(min(count, len(left))).values
            mass = (ranked - largest).exp().cumsum(0)
            if mass[-1] >= limit:
                break
        threshold = ranked[(mass < limit).sum().clamp(max=len(ranked) - 1)]
    if min_p > 0.0:
        floor = largest + torch.log(scaled.new_tensor(min_p))
        threshold = floor if threshold is None else torch.maximum(threshold, floor)
    return threshold


def _edited_logits(logits: Tensor, edits: EditTables, rows: Tensor, positions: Tensor) -> Tensor:
    """All rows in fp32, with the edits of rows that have some."""
    edit_rows = edits.slot_row[rows.long()].long()
    edited = edit_rows.nonzero().flatten()
    if len(edited) == 0:
        return logits
    edit_logits_reference(logits, edits, rows, positions)
    return logits.float().index_copy(0, edited, edits.edited[edit_rows[edited]])


def _masked_logits(logits: Tensor, grammar: GrammarTables | None, slots: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        logits = logits.masked_fill(~unpack_mask(mask, logits.shape[1]), _NEGATIVE_INFINITY)
    if grammar is not None:
        states = grammar.state[slots]
        constrained = (states != 0).nonzero().flatten()
        if len(constrained):
            words = grammar.mask_rows[grammar.mask_index[states[constrained]]]
            refused = ~unpack_mask(words, logits.shape[1])
            logits = logits.index_copy(0, constrained, logits[constrained].masked_fill(refused, _NEGATIVE_INFINITY))
    return logits


def unpack_mask(mask: Tensor, vocab_size: int) -> Tensor:
    """Return bool [B, vocab_size], True if allowed, of packed int32 [B, W]."""
    bits = torch.arange(8, device=mask.device)
    table = (torch.arange(256, device=mask.device).unsqueeze(1) >> bits) & 1
    flags = table.bool()[mask.contiguous().view(torch.uint8).int()]
    return flags.view(mask.shape[0], -1)[:, :vocab_size]


def _noise_bits(seed_low: int, seed_high: int, position: int, tokens: Tensor) -> Tensor:
    """Return 32 random bits, int32, for each token: two keyed rounds of an integer mix (Even and Mansour's shape)."""
    first, second = _noise_keys(seed_low, seed_high, position)
    bits = tokens.to(torch.int32) * _signed32(_GOLDEN)
    return _mix_tensor_(_mix_tensor_(bits.bitwise_xor_(_signed32(first))).add_(_signed32(second)))


def _noise_keys(seed_low: int, seed_high: int, position: int) -> tuple[int, int]:
    key = _mix((seed_low ^ _GOLDEN) & 0xFFFFFFFF)
    key = _mix((key ^ seed_high) & 0xFFFFFFFF)
    first = _mix((key + position) & 0xFFFFFFFF)
    return first, _mix(first ^ _SECOND_KEY)


def _mix(value: int) -> int:
    """Mix 32 bits. Constants: Wellons, hash-prospector (a search for multipliers of low bias)."""
    value ^= value >> 16
    value = (value * 0x21F0AAAD) & 0xFFFFFFFF
    value ^= value >> 15
    value = (value * 0x735A2D97) & 0xFFFFFFFF
    return value ^ (value >> 15)


def _mix_tensor_(value: Tensor) -> Tensor:
    """Do `_mix` in place on int32: products wrap, and the mask makes the arithmetic shift a logical one."""
    value.bitwise_xor_((value >> 16).bitwise_and_(0xFFFF)).mul_(0x21F0AAAD)
    value.bitwise_xor_((value >> 15).bitwise_and_(0x1FFFF)).mul_(0x735A2D97)
    return value.bitwise_xor_((value >> 15).bitwise_and_(0x1FFFF))


def _signed32(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - 0x100000000 if value >= 0x80000000 else value


def compute_logprobs(logits: Tensor, tokens: Tensor, top_n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities of the unprocessed distribution: the log-softmax of the model's raw logits [B, V].

    Temperature, penalties and masks have no effect (OpenAI's and vLLM's default). Pass raw logits without padding.
    tokens: int [B]. Returns the chosen tokens' values fp32 [B], the top values fp32 [B, top_n], and ids int64
    [B, top_n].
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, tokens.long().unsqueeze(1)).squeeze(1)
    values, ids = logprobs.topk(top_n, dim=-1)
    return chosen, values, ids
