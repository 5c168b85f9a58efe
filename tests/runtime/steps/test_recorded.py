"""Steps recorded on the CPU: bit for bit those that run eagerly, for every kind of model."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from ramet.kernels.attention.decode import DecodeMetadata
from ramet.kernels.slots.tables import DecodeInputs
from ramet.runtime.models.adapters import Adapters
from ramet.runtime.models.build import build_decoder
from ramet.runtime.models.config_files import config_from_hf
from ramet.runtime.models.decoder import Decoder, ForwardContext
from ramet.runtime.models.linear_cpu import CpuFeatures
from ramet.runtime.models.weights import expected_tensors
from ramet.runtime.steps.recorded import Recordings
from ramet.runtime.testing.bare_cache import BareCache
from ramet.runtime.testing.dummy import SMALL_MODELS, dummy_decoder, small_weights


def decoder_of(name: str, quantization: str) -> Decoder:
    config = config_from_hf(SMALL_MODELS[name])
    return build_decoder(config, small_weights(config), device="cpu", quantization=quantization)


def prompt_of(row: int) -> list[int]:
    return [(7 * row + i) % 90 for i in range(3 + row)]


# The kernels for products of bytes cannot run elsewhere, and what stands in for them makes no such promise, so nothing
# could be compared. Equality of recorded and eager steps, in the tests above, is shown on every CPU.
needs_int8 = pytest.mark.skipif(
    not CpuFeatures.detect().int8,
    reason="this CPU does not multiply bytes (AVX512-VNNI), and its products round by the number of rows",
)


class Both:
    """The same rows eagerly and recorded, over caches of their own."""

    def __init__(self, decoder: Decoder, num_rows: int) -> None:
        self.decoder = decoder
        self.eager, self.cache = (BareCache(decoder, num_rows, 64) for _ in range(2))
        for row in range(num_rows):
            self.eager.step([], [(row, prompt_of(row))])
            self.cache.step([], [(row, prompt_of(row))])
        assert decoder.ops.make_record is not None
        self.steps = Recordings(decoder, decoder.ops.make_record(), self.context)

    def context(self, rows: torch.Tensor, inputs: DecodeInputs) -> ForwardContext:
        metadata = DecodeMetadata(inputs.kv_lens, rows, self.cache.page_table)
        caches = self.cache.kv_caches
        return ForwardContext(inputs.positions, inputs.kv_slots, rows.numel(), metadata, None, caches, rows.numel())

    def compare(self, rows: list[int]) -> None:
        step = self.steps.get(len(rows))
        assert step is not None
        now = self.cache.context(rows, [])
        assert now.decode is not None
        step.rows.copy_(now.decode.rows)
        step.inputs.kv_lens.copy_(now.decode.kv_lens)
        step.inputs.positions.copy_(now.positions)
        step.inputs.kv_slots.copy_(now.kv_slots)
        step.inputs.token_ids.copy_(torch.tensor([row + 5 for row in rows]))
        assert torch.equal(step.logits(), self.eager.step([(row, row + 5) for row in rows], []))

    def extend(self, chunks: list[tuple[int, list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of all new tokens, recorded, and computed eagerly as rows of a decode step; both [T, V]."""
        token_ids = torch.tensor([token for _, chunk in chunks for token in chunk], dtype=torch.int32)
        rows = torch.tensor([row for row, chunk in chunks for _ in chunk], dtype=torch.int32)
        now = self.cache.context([], [(row, len(chunk)) for row, chunk in chunks])
        step = self.steps.get_extend(len(rows), 0)
        assert step is not None
        recorded = step.hidden(rows, token_ids, now.positions, now.kv_slots)
        same = self.eager.context([], [(row, len(chunk)) for row, chunk in chunks])
        same.decode = DecodeMetadata(same.positions + 1, rows, self.eager.page_table)
        same.num_decode, same.extend = len(rows), None
        return self.decoder.logits(recorded), self.decoder.logits(self.decoder.forward(token_ids, same))


@torch.inference_mode()
@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("name", SMALL_MODELS)
def test_recorded_steps_equal_eager_ones(name: str, quantization: str) -> None:
    both = Both(decoder_of(name, quantization), 6)
    for rows in ([0], [1, 4], [0, 1, 2, 3, 4, 5], [5, 3], [2], [3, 1, 0, 2, 4, 5]):
        both.compare(rows)
        both.compare(rows)


@torch.inference_mode()
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_recorded_steps_with_adapters_equal_eager_ones(quantization: str) -> None:
    plain = decoder_of("llama", quantization)
    adapters, generator = Adapters(plain, 3, 8), torch.Generator().manual_seed(4)
    shapes = {name: shape for name, shape in expected_tensors(plain.config).items() if "proj" in name}
    for rank in (1, 8, 5):
        matrices = {
            name: (torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator))
            for name, (rows, columns) in shapes.items()
            if rank > 1 or "q_proj" in name or "down_proj" in name
        }
        adapters.add(f"rank {rank}", matrices)
    both = Both(adapters.decoder, 6)
    for rows, chosen in (
        ([0], [3]),
        ([1, 4], [0, 2]),
        ([0, 1, 2, 3, 4, 5], [1, 2, 3, 0, 2, 1]),
        ([0], [1]),
        ([2], [0]),
    ):
        adapters.choose(np.array(chosen, dtype=np.int32))
        both.compare(rows)
    for chunks in CHUNKS:  # of other numbers of tokens than the programs' sizes
        adapters.choose(np.array([row % 4 for row, chunk in chunks for _ in chunk], dtype=np.int32))
        recorded, eager = both.extend(chunks)
        assert torch.equal(recorded, eager)


CHUNKS: list[list[tuple[int, list[int]]]] = [
    [(0, [5])],
    [(1, [6, 7, 8])],
    [(2, [9]), (3, [10]), (4, [11, 12, 13, 14]), (0, [15, 16])],
    [(1, list(range(20, 37))), (5, list(range(40, 55)))],
    [(4, [17]), (2, [18] * 8)],
]


@torch.inference_mode()
@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("name", SMALL_MODELS)
def test_recorded_new_tokens_equal_eager_rows(name: str, quantization: str) -> None:
    both = Both(decoder_of(name, quantization), 6)
    for chunks in CHUNKS:
        recorded, eager = both.extend(chunks)
        assert torch.equal(recorded, eager)
        both.compare([0, 3])


@torch.inference_mode()
@pytest.mark.parametrize("name", SMALL_MODELS)
def test_recorded_new_tokens_are_those_of_attention_for_prompts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Exact products: rounded ones turn the last bits of attention into steps of int8.
    monkeypatch.setattr(CpuFeatures, "detect", lambda: CpuFeatures(bf16=False, int8=False, tiles=False))
    decoder = decoder_of(name, "int8")
    both, prompts = Both(decoder, 6), BareCache(decoder, 6, 64)
    for row in range(6):
        prompts.step([], [(row, prompt_of(row))])
    for chunks in CHUNKS:
        recorded, _ = both.extend(chunks)
        torch.testing.assert_close(recorded, prompts.step([], chunks), atol=2e-5, rtol=1e-4)


@needs_int8
@torch.inference_mode()
@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("name", SMALL_MODELS)
@pytest.mark.parametrize("seed", range(3))
def test_a_token_has_the_same_logits_cold_warm_in_chunks_alone_and_beside_others(
    name: str, quantization: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text after a prompt does not depend on how much of the prompt was cached, or on who else decodes."""
    monkeypatch.setattr(CpuFeatures, "detect", lambda: CpuFeatures(bf16=False, int8=True, tiles=False))
    both, rng = Both(decoder_of(name, quantization), 3), random.Random(seed)
    texts = [[*prompt_of(row), *(rng.randrange(90) for _ in range(57 - row))] for row in range(3)]
    cold = BareCache(both.decoder, 3, 64).step([], list(enumerate(texts))).view(3, 60, -1)
    done = both.cache.kv_lens
    while min(done) < 60:
        rows = rng.sample([row for row in range(3) if done[row] < 60], rng.randint(1, sum(n < 60 for n in done)))
        counts = [min(rng.choice((1, 1, 2, 5, 13, 40)), 60 - done[row]) for row in rows]
        expected = torch.cat([cold[row, done[row] :][:count] for row, count in zip(rows, counts, strict=True)])
        chunks = [(row, texts[row][done[row] :][:count]) for row, count in zip(rows, counts, strict=True)]
        if sum(counts) <= 64 and rng.random() < 0.7:
            for logits in both.extend(chunks):  # recorded, and as rows of a decode step
                assert torch.equal(logits, expected), chunks
            continue
        num_decode = next((i for i, count in enumerate(counts) if count > 1), len(counts))
        decode = [(row, chunk[0]) for row, chunk in chunks[:num_decode]]
        for cache in (both.cache, both.eager):
            assert torch.equal(cache.step(decode, chunks[num_decode:]), expected), chunks


@torch.inference_mode()
def test_many_new_tokens_and_many_keys_have_no_program() -> None:
    steps = Both(decoder_of("llama", "int8"), 2).steps
    assert steps.get_extend(64, 10_000) is not None
    assert steps.get_extend(65, 10_000) is None
    assert steps.get_extend(2, 1_000_000) is None


@torch.inference_mode()
def test_sizes_of_steps_with_new_tokens_share_programs() -> None:
    steps = Both(decoder_of("llama", "int8"), 2).steps
    assert len({id(steps.get_extend(count, 0)) for count in range(1, 65)}) == 18


@torch.inference_mode()
def test_steps_with_torch_products_have_no_program() -> None:
    """Of fp32 weights, torch multiplies more than 32 tokens."""
    decoder = dummy_decoder(config_from_hf(SMALL_MODELS["llama"]), "cpu", torch.float32)
    steps = Both(decoder, 2).steps
    assert steps.get(32) is not None
    assert steps.get(33) is None
    assert steps.get_extend(2, 0) is not None


def test_no_step_imports_torchs_compiler() -> None:
    """The import takes a second and more, which all that runs would wait for."""
    code = (
        "import sys\n"
        "from ramet.runtime.engine.engine import Engine\n"
        "from ramet.runtime.testing.dummy import tiny_model\n"
        "from ramet.runtime.types import SamplingParams\n"
        "with Engine(tiny_model(), num_kv_tokens=1024) as engine:\n"
        "    assert engine._core.runner.recorded is not None\n"
        "    engine.generate('a', SamplingParams(max_tokens=4, ignore_eos=True))\n"
        "    assert engine._core.runner.recorded.recordings._steps\n"
        "print([name for name in ('torch._dynamo', 'sympy') if name in sys.modules])\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert found.stdout.strip() == "[]", found.stderr
