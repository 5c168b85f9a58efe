"""One launch of every kernel variant that a model's steps use, on `meta` tensors: what compile_kernels.py compiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ramet.kernels.attention.decode import DecodeMetadata
from ramet.kernels.attention.decode_triton import attention_decode_triton
from ramet.kernels.attention.extend import ExtendMetadata
from ramet.kernels.attention.extend_triton import attention_extend_triton
from ramet.kernels.attention.plan import TileConfig, decode_config, extend_config, tree_config
from ramet.kernels.attention.tree import TreePlan
from ramet.kernels.attention.tree_triton import attention_tree_triton
from ramet.kernels.card_table import CardTable
from ramet.kernels.grammar.mask import Budgets, ResidentAutomata, TokenTable
from ramet.kernels.grammar.mask_triton import advance_states_triton, build_masks_triton
from ramet.kernels.layers import activation, adapters, gemv, kv_fp8, norm, quantize_fp8, rope
from ramet.kernels.layers.gemv import GemvConfig
from ramet.kernels.layers.matmul_invariant import gated_product_triton, matmul_invariant_triton
from ramet.kernels.ops import EARLY_TRITON
from ramet.kernels.sampling.logit_edits import EditTables, count_tokens_triton, edit_logits_triton
from ramet.kernels.sampling.sample import GrammarTables
from ramet.kernels.sampling.sample_triton import sample_triton
from ramet.kernels.slots import copy_pages
from ramet.kernels.slots import tables as step_inputs

DTYPE = torch.bfloat16
PAGE = 16
SLOTS = 256
MAX_PAGES = 1024


@dataclass(frozen=True, slots=True)
class Launch:
    """`in_use`: the configuration that the tables choose, not one that the timing scripts only try."""

    name: str
    run: Callable[[], object]
    in_use: bool = True


@dataclass(frozen=True, slots=True)
class Model:
    """What the kernels' variants depend on."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    inner: int
    vocab: int
    window: int | None = None
    has_qk_norm: bool = False

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads


MODELS = [
    Model("llama-8b", 32, 8, 128, 4096, 14336, 128_256),
    Model("smollm2", 9, 3, 64, 576, 1536, 49_152),
    Model("qwen3-8b", 32, 8, 128, 4096, 12288, 151_936, has_qk_norm=True),
    Model("gemma3-4b", 8, 4, 256, 2560, 10240, 262_208, window=1024, has_qk_norm=True),
]


def tensor(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ints(*shape: int) -> Tensor:
    return tensor(*shape, dtype=torch.int32)


def caches(model: Model, *, is_fp8: bool = False, page: int = PAGE) -> tuple[Tensor, Tensor]:
    shape = (20_000, model.num_kv_heads, page, model.head_dim)
    if not is_fp8:
        return tensor(*shape), tensor(*shape)
    size = page * kv_fp8.cell_bytes(model.head_dim, kv_fp8.FP8)
    k, v = (kv_fp8.values_of(tensor(*shape[:2], size, dtype=torch.uint8), page) for _ in range(2))
    return k, v


def page_table() -> Tensor:
    return ints(SLOTS + 1, step_inputs.NUM_HEADER_COLUMNS + MAX_PAGES)[:, step_inputs.NUM_HEADER_COLUMNS :]


def all_launches() -> list[Launch]:
    """Every launch, those of the models in order."""
    launches: list[Launch] = []
    for model in MODELS:
        launches += [
            *elementwise(model), *extends(model), *decodes(model), *trees(model), *samplers(model), *products(model),
            *early(model),
        ]  # fmt: skip
    return launches + steps() + grammars() + candidates()


def elementwise(model: Model) -> list[Launch]:
    name, hidden = model.name, model.hidden
    x, residual, weight = tensor(64, hidden), tensor(64, hidden), tensor(hidden)
    gated = activation.gelu_tanh_and_mul_triton if model.name.startswith("gemma") else activation.silu_and_mul_triton
    launches = [
        Launch(f"{name} norm", partial(norm.rms_norm_triton, x, weight, 1e-5)),
        Launch(f"{name} add+norm", partial(norm.fused_add_rms_norm_triton, x, residual, weight, 1e-5)),
        Launch(f"{name} gated T=64", partial(gated, tensor(64, 2 * model.inner))),
        Launch(f"{name} gated T=2048", partial(gated, tensor(2048, 2 * model.inner))),
        Launch(f"{name} to fp8", partial(quantize_fp8.quantize_fp8_triton, x)),
        Launch(f"{name} to fp8, inner", partial(quantize_fp8.quantize_fp8_triton, tensor(64, model.inner))),
    ]
    outputs = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    bounds = (0, model.num_heads * model.head_dim, outputs - model.num_kv_heads * model.head_dim, outputs)
    a, b, chosen = tensor(9, 3, 64, hidden), tensor(9, outputs, 64), ints(64)
    adapted = adapters.AdapterTable(a, b, bounds, torch.zeros((9, 3), dtype=torch.int32))
    add = partial(adapters.add_adapters_triton, tensor(64, outputs), x, adapted, chosen)
    launches.append(Launch(f"{name} adapters", add))
    qkv = tensor(64, model.num_heads + 2 * model.num_kv_heads, model.head_dim)
    q, k, v = qkv.split([model.num_heads, model.num_kv_heads, model.num_kv_heads], dim=1)
    angles = tensor(16384, model.head_dim // 2, dtype=torch.float32)
    norms = (tensor(model.head_dim), tensor(model.head_dim)) if model.has_qk_norm else (None, None)
    for is_fp8 in (False, True):
        held = caches(model, is_fp8=is_fp8)
        run = partial(rope.rope_and_write_kv_triton, q, k, v, angles, angles, ints(64), ints(64), *held, *norms)
        launches.append(Launch(f"{name} rope{' fp8' * is_fp8}", run))
    return launches


def extends(model: Model) -> list[Launch]:
    """All tiles that the table can choose: by rows of the longest sequence."""
    chosen = dict.fromkeys(extend_config(model.head_dim, DTYPE, tokens * model.group) for tokens in (1, 4, 8, 16, 4096))
    windows = [None] if model.window is None else [None, model.window]
    return [
        Launch(
            f"{model.name} extend {label(config)} window {window}{' fp8' * is_fp8}",
            partial(run_extend, model, config, window, is_fp8=is_fp8),
        )
        for config in chosen
        for window in windows
        for is_fp8 in (False, True)
    ]


def run_extend(
    model: Model, config: TileConfig, window: int | None, *, is_fp8: bool = False, early_launch: bool = False
) -> object:
    q = tensor(512, model.num_heads, model.head_dim)
    meta = ExtendMetadata(ints(9), ints(8), ints(8), page_table(), 64, 4096, [64] * 8, [4096] * 8)
    held, scale = caches(model, is_fp8=is_fp8), model.head_dim**-0.5
    return attention_extend_triton(q, *held, meta, scale, window, None, config, early_launch)


def early(model: Model) -> list[Launch]:
    """What a card's table may have launched early."""
    ops, hidden, heads = EARLY_TRITON, model.hidden, model.num_heads + 2 * model.num_kv_heads
    x, weight = tensor(64, hidden), tensor(hidden)
    q, k, v = tensor(64, heads, model.head_dim).split([model.num_heads, *[model.num_kv_heads] * 2], dim=1)
    held, angles = caches(model), tensor(16384, model.head_dim // 2, dtype=torch.float32)
    norms = (tensor(model.head_dim), tensor(model.head_dim)) if model.has_qk_norm else (None, None)
    gated = ops.gelu_tanh_and_mul if model.name.startswith("gemma") else ops.silu_and_mul
    run: dict[str, Callable[[], object]] = {
        "norm": partial(ops.rms_norm, x, weight, 1e-5, None),
        "add+norm": partial(ops.fused_add_rms_norm, x, x, weight, 1e-5, None),
        "gated": partial(gated, tensor(64, 2 * model.inner)),
        "rope": partial(ops.rope_and_write_kv, q, k, v, angles, angles, ints(64), ints(64), *held, *norms, 1e-6),
    }
    config, plan = decode_config(model.head_dim, DTYPE, model.group), tree_config(model.head_dim, DTYPE, model.group)
    for batch in (1, 16, 64):
        run[f"decode B={batch}"] = partial(run_decode, model, config, batch, early_launch=True)
    run["tree"] = partial(run_tree, model, plan, early_launch=True)
    tile = extend_config(model.head_dim, DTYPE, 4096)
    run["extend"] = partial(run_extend, model, tile, model.window, early_launch=True)
    return [Launch(f"early {model.name} {name}", launch, in_use=False) for name, launch in run.items()]


PARTS = 49  # of all rows' keys, with 8 KV heads on 132 processors


def decodes(model: Model) -> list[Launch]:
    """Small, middling and large batches find their rows among as many lengths; fixed parts are those of each row."""
    launches = []
    config = decode_config(model.head_dim, DTYPE, model.group)
    for batch, kind in ((1, ""), (16, ""), (64, ""), (64, " fixed"), (64, " by another kernel")):
        for window in [None] if model.window is None else [None, model.window]:
            name = f"{model.name} decode B={batch}{kind} window {window}"
            for is_fp8 in (False, True):
                run = partial(run_decode, model, config, batch, kind, window, is_fp8=is_fp8)
                launches.append(Launch(name + " fp8" * is_fp8, run))
    return launches


def run_decode(
    model: Model,
    config: TileConfig,
    batch: int = 64,
    kind: str = "",
    window: int | None = None,
    *,
    is_fp8: bool = False,
    early_launch: bool = False,
    page: int = PAGE,
) -> object:
    q = tensor(batch, model.num_heads, model.head_dim)
    counters = None if kind == " by another kernel" else ints(batch * model.num_kv_heads)
    lens, parts = ints(batch), 1 if kind == " in one part" else PARTS
    meta = DecodeMetadata(lens, lens, page_table(), parts, kind == " fixed", merge_counters=counters)
    held, scale = caches(model, is_fp8=is_fp8, page=page), model.head_dim**-0.5
    return attention_decode_triton(q, *held, meta, scale, window, None, config, early_launch=early_launch)


def trees(model: Model) -> list[Launch]:
    config = tree_config(model.head_dim, DTYPE, model.group)
    return [
        Launch(f"{model.name} tree{' fp8' * is_fp8}", partial(run_tree, model, config, is_fp8=is_fp8))
        for is_fp8 in (False, True)
    ]


def run_tree(
    model: Model,
    config: TileConfig,
    suffix: TileConfig | None = None,
    *,
    is_fp8: bool = False,
    early_launch: bool = False,
    batch: int = 64,
    kind: str = "",
) -> object:
    q = tensor(batch, model.num_heads, model.head_dim)
    plan = TreePlan(batch, config, torch.device("meta"))
    counters, lens, parts = ints(batch * model.num_kv_heads), ints(batch), 1 if kind == " in one part" else PARTS
    meta = DecodeMetadata(lens, lens, page_table(), parts, False, plan, merge_counters=counters)
    held, scale = caches(model, is_fp8=is_fp8), model.head_dim**-0.5
    if kind == " beside":
        shared = tensor(4096, *q.shape[1:], dtype=torch.float32), tensor(4096, q.shape[1], dtype=torch.float32)
        return attention_decode_triton(q, *held, meta, scale, None, None, suffix, plan, shared, lambda: None)
    return attention_tree_triton(q, *held, meta, plan, scale, None, suffix, early_launch)


def samplers(model: Model) -> list[Launch]:
    """With and without a grammar arena, and with a mask of the host; few and many rows choose other chunks."""
    arena = ints(SLOTS + 1, step_inputs.NUM_HEADER_COLUMNS + MAX_PAGES)
    words = -(-model.vocab // 32)
    launches = []
    for rows in (8, 64):
        for has_grammar in (True, False):
            for has_mask in (False, True):
                edits = EditTables.create(64, model.vocab, "meta")
                tables = step_inputs.SlotTables(arena).sampling(edits=edits)
                if has_grammar:
                    grammar = GrammarTables(arena[:, 2], ints(65_536), ints(9_000, words))
                    tables = dataclasses.replace(tables, grammar=grammar)
                mask = ints(rows, words) if has_mask else None
                run = partial(sample_triton, tensor(rows, model.vocab), tables, ints(rows), ints(rows), mask)
                name = f"{model.name} sample B={rows}{' grammar' * has_grammar}{' mask' * has_mask}"
                launches.append(Launch(name, run))
    assert tables.edits is not None
    count = partial(count_tokens_triton, tables.edits, ints(64), ints(64))
    edit = partial(edit_logits_triton, tensor(64, model.vocab), tables.edits, ints(64), ints(64))
    launches.append(Launch(f"{model.name} edit logits", edit))
    return [*launches, Launch(f"{model.name} count tokens", count)]


def products(model: Model) -> list[Launch]:
    """Small-batch products with the tile that the default table has for them."""
    shapes = {
        "o": (model.hidden, model.num_heads * model.head_dim),
        "down": (model.hidden, model.inner),
        "head": (model.vocab, model.hidden),
    }
    launches = []
    for rows in (1, 4):
        for part, (outputs, depth) in shapes.items():
            run = partial(gemv.gemv_triton, tensor(rows, depth), tensor(outputs, depth))
            launches.append(Launch(f"{model.name} gemv {part} B={rows}", run))
        x, residual, gain = tensor(rows, model.hidden), tensor(rows, model.hidden), tensor(model.hidden)
        square, wide = tensor(model.hidden, model.hidden), tensor(2 * model.inner, model.hidden)
        added = partial(gemv.gemv_triton, x, square, None, residual)
        gated = partial(gemv.gemv_silu_and_mul_triton, x, wide, gain, 1e-5)
        normed = partial(gemv.gemv_triton, x, square, None, None, gain, 1e-5)
        for part, run in (("residual", added), ("gated", gated), ("normed", normed)):
            launches.append(Launch(f"{model.name} gemv {part} B={rows}", run))
    invariant = partial(matmul_invariant_triton, tensor(64, model.hidden), tensor(model.vocab, model.hidden))
    weight, scale = tensor(model.inner, 4096, dtype=torch.float8_e4m3fn), tensor(model.inner, 32, dtype=torch.float32)
    blocks = partial(matmul_invariant_triton, tensor(64, 4096), weight, None, scale)
    launches.append(Launch(f"{model.name} product with FP8 blocks", blocks))
    return [*launches, Launch(f"{model.name} invariant product", invariant)]


def of_table(table: CardTable) -> list[Launch]:
    """What Llama-3.1-8B launches by a card's table instead of the defaults."""
    model, launches = MODELS[0], []
    tiles = table.tiles
    if tiles is not None:
        extend = extend_config(model.head_dim, DTYPE, 4096, tiles)
        decode = decode_config(model.head_dim, DTYPE, model.group, tiles)
        tree = tree_config(model.head_dim, DTYPE, model.group, tiles)
        launches.append(Launch(f"table extend {label(extend)}", partial(run_extend, model, extend, None)))
        launches.append(Launch(f"table decode {label(decode)}", partial(run_decode, model, decode)))
        launches.append(Launch(f"table tree {label(tree)}", partial(run_tree, model, tree, decode)))
    if table.early_launch:
        launches += [dataclasses.replace(launch, name=f"table {launch.name}", in_use=True) for launch in early(model)]
    for product, config in table.products.items():
        x, weight = tensor(product.rows, product.depth), tensor(product.outputs, product.depth)
        launches.append(Launch(f"table {product}", partial(gemv.gemv_triton, x, weight, config=config)))
    for product, config in table.gated.items():
        weight = tensor(2 * product.outputs, product.depth)
        run = partial(gated_product_triton, tensor(product.rows, product.depth), weight, config)
        launches.append(Launch(f"table gated {product}", run))
    for product, config in table.folded.items():
        x, gain = tensor(product.rows, product.depth), tensor(product.depth)
        weight = tensor(product.outputs * (2 if product.is_gated else 1), product.depth)
        if product.is_gated:
            run = partial(gemv.gemv_silu_and_mul_triton, x, weight, gain, 1e-5, config)
        elif product.outputs == model.hidden:
            run = partial(gemv.gemv_triton, x, weight, None, tensor(product.rows, product.outputs), config=config)
        else:
            run = partial(gemv.gemv_triton, x, weight, None, None, gain, 1e-5, config)
        launches.append(Launch(f"table folded {product}", run))
    return launches


def steps() -> list[Launch]:
    tables = step_inputs.SlotTables(ints(SLOTS + 1, step_inputs.NUM_HEADER_COLUMNS + MAX_PAGES))
    launches = []
    for rows in (1, 64):
        out = step_inputs.DecodeInputs(*(ints(rows) for _ in range(4)))
        columns = tables.last_token, tables.kv_len
        prepare = partial(
            step_inputs.prepare_decode_triton, ints(rows), ints(rows), *columns, tables.page_table, PAGE, out
        )
        launches.append(Launch(f"prepare_decode B={rows}", prepare))
        launches.append(
            Launch(
                f"commit_decode B={rows}", partial(step_inputs.commit_decode_triton, ints(rows), ints(rows), *columns)
            )
        )
    mixed = partial(
        step_inputs.prepare_decode_triton, ints(64), ints(64), *columns, tables.page_table, PAGE, out,
        fills_padding=False,
    )  # fmt: skip
    launches.append(Launch("prepare_decode beside prompts", mixed))
    model = MODELS[0]
    kv = tensor(32, 2, 20_000, model.num_kv_heads, PAGE, model.head_dim)
    launches.append(Launch("copy_pages", partial(copy_pages.copy_pages_triton, kv, ints(3), ints(3), ints(3))))
    launches.append(Launch("scatter_rows", partial(step_inputs.scatter_rows_triton, ints(40, 3), tables.arena)))
    return launches


def grammars() -> list[Launch]:
    vocab = 128_256
    tokens = TokenTable(
        ints(vocab), tensor(16, vocab, dtype=torch.uint8), tensor(10**6, dtype=torch.uint8), ints(vocab), (0,)
    )
    automata = ResidentAutomata(
        ints(4_194_304),
        tensor(65_794, dtype=torch.int64),
        ints(65_794),
        tensor(256, 256, dtype=torch.uint8),
        tensor(65_794, dtype=torch.uint8),
        ints(65_794),
        ints(65_794),
        257,
    )
    state = ints(SLOTS + 1, step_inputs.NUM_HEADER_COLUMNS + MAX_PAGES)[:, 2]
    budgets = Budgets(ints(64), state, state)
    build = partial(build_masks_triton, ints(64), automata, tokens, ints(64, -(-vocab // 32)))
    return [
        Launch("build_masks", build),
        Launch("build_masks with ends", partial(build, has_ends=True)),
        Launch("advance_states", partial(advance_states_triton, ints(64), ints(64), state, automata, tokens, budgets)),
    ]


def candidates() -> list[Launch]:
    """What the timing scripts and their checks launch for Llama-3.1-8B's shapes beside what is in use: on a card, a
    minute that compiles is a minute less of measurements.
    """
    from attention_cases import DECODE_TILES, EXTEND_TILES, TREE_TILES
    from kernel_cases import DOT_CONFIGS, SUM_CONFIGS, TILE_CONFIGS, name_of

    model = MODELS[0]
    run: dict[str, Callable[[], object]] = {}
    for config in (TileConfig(*tile) for tile in EXTEND_TILES):
        run[f"extend {label(config)}"] = partial(run_extend, model, config, None)
    for config in (TileConfig(*tile) for tile in TREE_TILES):
        run[f"tree {label(config)}"] = partial(run_tree, model, config)
    plan = tree_config(model.head_dim, DTYPE, model.group)
    for batch, kind in ((16, ""), (16, " in one part"), (64, " in one part"), (64, " beside")):
        run[f"tree B={batch}{kind}"] = partial(run_tree, model, plan, batch=batch, kind=kind)
    default = decode_config(model.head_dim, DTYPE, model.group)
    for page in (PAGE, 64):
        for batch in (1, 16, 64):
            for config in (default, *(TileConfig(default.block_m, *tile) for tile in DECODE_TILES)):
                name = f"decode {label(config)} B={batch} page {page}"
                run[name] = partial(run_decode, model, config, batch, page=page)
            for kind in (" in one part", " by another kernel"):
                run[f"decode B={batch}{kind} page {page}"] = partial(run_decode, model, default, batch, kind, page=page)
    for cut in SUM_CONFIGS + DOT_CONFIGS:
        for rows in (1,) if cut.kernel == "sum" else (1, 4, 16):
            run |= {f"gemv {name} B={rows}": launch for name, launch in folds(cut, rows).items()}
    for cut in TILE_CONFIGS:
        for rows in (64, 512):
            launch = partial(gated_product_triton, tensor(rows, 4096), tensor(28_672, 4096), cut)
            run[f"gate {name_of(cut)} T={rows}"] = launch
    return [Launch(f"try {name}", launch, False) for name, launch in run.items()]


def folds(cut: GemvConfig, rows: int) -> dict[str, Callable[[], object]]:
    """A product alone and with all that is folded into it, late and early."""
    from kernel_cases import name_of
    from kernel_checks import fits_gated

    x, weight, gain = tensor(rows, 4096), tensor(4096, 4096), tensor(4096)
    found: dict[str, Callable[[], object]] = {}
    for config in (cut, dataclasses.replace(cut, early_launch=True)):
        name = name_of(config)
        run = partial(gemv.gemv_triton, x, weight, None, config=config)
        found |= {
            name: run,
            f"{name} normed": partial(run, norm_weight=gain),
            f"{name} residual": partial(run, residual=x),
            f"{name} normed, residual": partial(run, norm_weight=gain, residual=x),
        }
        if fits_gated(config):
            gated = partial(gemv.gemv_silu_and_mul_triton, x, weight, config=config)
            found |= {f"{name} gated": gated, f"{name} normed, gated": partial(gated, norm_weight=gain)}
    return found


def label(config: TileConfig) -> str:
    return f"{config.block_m}x{config.block_n} w{config.num_warps} s{config.num_stages}"
