"""The situations that bench_attention.py times: shapes, page tables, runs to compare, fp32 results, floors."""

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
from ramet.kernels.attention.plan import (
    TREE_PROGRAMS_PER_SM,
    TileConfig,
    TreeCostModel,
    choose_num_parts,
    decode_config,
    extend_config,
    tree_config,
)
from ramet.kernels.attention.tree import TreePlan, find_shared_segments, plan_tree
from ramet.kernels.attention.tree_triton import attention_tree_triton

BANDWIDTH = 3.04e12  # bytes/s read, measured
PEAK = 798e12  # flop/s, bf16 product of 8192 x 8192 x 8192, measured

# Tiles that are tried beside the default ones (rows, keys, warps, stages), of which compile_kernels.py compiles all.
# Rows of decode are the heads of a group. Not here: 128 keys for 64 rows, which four warps cannot hold in registers;
# 32 keys for 128 rows, twice the barriers for no more programs on a processor; decode with 7 stages, fewer programs.
SHORT_EXTEND_TILES = [(64, 32, 4, 5), (64, 64, 4, 3), (64, 64, 4, 5)]  # a table adopts none with fewer rows
EXTEND_TILES = [*SHORT_EXTEND_TILES, (128, 64, 8, 3), (128, 64, 8, 5), (128, 128, 8, 3)]
DECODE_TILES = [(32, 2, 5), (32, 4, 5), (64, 2, 5), (64, 4, 3), (64, 4, 5), (64, 8, 5), (128, 4, 3), (128, 8, 3)]
TREE_TILES = [(64, 32, 4, 5), (64, 64, 4, 3), (64, 64, 4, 5), (128, 64, 8, 3), (128, 64, 8, 5), (128, 128, 8, 3)]


@dataclass(frozen=True, slots=True)
class Shape:
    """Heads of a model."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int


LLAMA = Shape("llama-8b", 32, 8, 128)
SMOL = Shape("smollm2", 9, 3, 64)
GEMMA = Shape("gemma3-4b", 8, 4, 256)


@dataclass(slots=True)
class Options:
    """What the cases need to know of the command line and the card."""

    device: str
    dry_run: bool
    num_sms: int
    min_cache_bytes: int
    dtype: torch.dtype
    page: int = 16  # positions of a KV page


@dataclass(slots=True)
class Case:
    """One timed situation: its caches, and the runs to compare."""

    name: str
    flops: float
    floor_bytes: float
    runs: list[tuple[str, Callable[[int], Tensor]]]  # label, launch on cache i
    reference: Callable[[], Tensor] | None  # fp32 result on cache 0
    num_caches: int
    free: Callable[[], None]
    facts: dict[str, object] = dataclasses.field(default_factory=dict)  # copied to the JSON, for fitting the cost model

    @property
    def floor_s(self) -> float:
        return max(self.flops / PEAK, self.floor_bytes / BANDWIDTH)


class Pool:
    """Caches of random values, one pair a layer, with pages handed out in random order."""

    def __init__(self, shape: Shape, num_pages: int, min_bytes: int, args: Options) -> None:
        device, dtype, self._page = args.device, args.dtype, args.page
        generator = torch.Generator(device=device).manual_seed(0)
        page_bytes = 2 * shape.num_kv_heads * args.page * shape.head_dim * 2
        self.num_caches = max(2, min(40, -(-min_bytes // (page_bytes * num_pages))))
        size = (num_pages + 1, shape.num_kv_heads, args.page, shape.head_dim)

        def random() -> Tensor:
            return torch.randn(size, generator=generator, device=device, dtype=dtype)

        self.caches = [(random(), random()) for _ in range(self.num_caches)]
        self._free = (1 + torch.randperm(num_pages, generator=torch.Generator().manual_seed(0))).tolist()

    def take(self, num_tokens: int) -> list[int]:
        return [self._free.pop() for _ in range(-(-num_tokens // self._page))]


def is_tuned(shape: Shape, window: int | None) -> bool:
    """Whether tiles are compared; a table has none for other shapes, whose default is checked and timed."""
    return shape is LLAMA and window is None


def page_table(lists: list[list[int]], device: str) -> Tensor:
    width = -(-(max(map(len, lists)) + 1) // 64) * 64
    table = torch.zeros(len(lists), width, dtype=torch.int32)
    for row, pages in enumerate(lists):
        table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
    return table.to(device)


def random_q(num_rows: int, shape: Shape, args: Options) -> Tensor:
    generator = torch.Generator(device=args.device).manual_seed(1)
    q = torch.randn(num_rows, shape.num_heads, shape.head_dim, generator=generator, device=args.device)
    return (q * 1.5).to(args.dtype)


def exact(q: Tensor, cache: tuple[Tensor, Tensor], pages: list[int], positions: Tensor, window: int | None) -> Tensor:
    """fp32 attention of rows `q [n, H, D]` at `positions` over one sequence's pages, some rows at a time."""
    index = torch.tensor(pages, device=q.device)
    keys, values = (c[index].transpose(0, 1).flatten(1, 2).float() for c in cache)
    group = q.shape[1] // keys.shape[0]
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    at = torch.arange(keys.shape[1], device=q.device)
    outs = []
    for low in range(0, q.shape[0], 512):
        part, where = q[low : low + 512].float().transpose(0, 1), positions[low : low + 512]
        mask = at[None, :] <= where[:, None]
        if window is not None:
            mask &= at[None, :] > where[:, None] - window
        scores = (part @ keys.transpose(1, 2)) * q.shape[2] ** -0.5
        outs.append((scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outs)


def extend_case(args: Options, shape: Shape, lens: list[tuple[int, int]], window: int | None = None) -> Case:
    """Time new tokens over prefixes: `lens` holds (new, prefix + new) of each sequence."""

    q_lens, kv_lens = [a for a, _ in lens], [b for _, b in lens]
    pool = Pool(shape, sum(-(-n // args.page) for n in kv_lens), 0, args)
    lists = [pool.take(n) for n in kv_lens]
    table = page_table(lists, args.device)
    q = random_q(sum(q_lens), shape, args)
    starts = torch.tensor([0, *q_lens]).cumsum(0).to(torch.int32).to(args.device)
    lengths = torch.tensor(kv_lens, dtype=torch.int32, device=args.device)
    rows = torch.arange(len(lens), dtype=torch.int32, device=args.device)
    meta = ExtendMetadata(starts, lengths, rows, table, max(q_lens), max(kv_lens), q_lens, kv_lens)
    scale, out = shape.head_dim**-0.5, torch.empty_like(q)
    group = shape.num_heads // shape.num_kv_heads
    rows_of_tile = max(q_lens) * group
    if args.dry_run:
        tiles = [(16, 16, 4, 3), (32, 32, 4, 2)]
    elif is_tuned(shape, window):
        tiles = SHORT_EXTEND_TILES if rows_of_tile <= 64 else EXTEND_TILES
    else:
        tiles = []

    def run(config: TileConfig, i: int) -> Tensor:
        return attention_extend_triton(q, *pool.caches[i], meta, scale, window, out, config)

    def reference() -> Tensor:
        parts = []
        for b, (new, total) in enumerate(lens):
            rows_q = q[int(starts[b]) : int(starts[b]) + new]
            at = torch.arange(total - new, total, device=args.device)
            parts.append(exact(rows_q, pool.caches[0], lists[b], at, window))
        return torch.cat(parts)

    pairs = sum(
        sum(min(p + 1, window or total) for p in range(total - new, total)) for new, total in lens
    )  # (query, key) pairs of one head
    default = extend_config(shape.head_dim, q.dtype, rows_of_tile)
    configs = [default, *(c for c in (TileConfig(*t) for t in tiles) if c != default)]
    name = f"extend {shape.name} {len(lens)}x{q_lens[0]} over {kv_lens[0] - q_lens[0]}" + (
        f" w{window}" if window else ""
    )
    element = 2 * shape.num_kv_heads * shape.head_dim * 2
    return Case(
        name,
        4.0 * shape.num_heads * shape.head_dim * pairs,
        sum(kv_lens) * element + 4.0 * q.numel(),
        [(label(c) + (" *" if c == default else ""), partial(run, c)) for c in configs],
        reference,
        pool.num_caches,
        pool.caches.clear,
    )


def decode_case(args: Options, shape: Shape, lens: list[int], window: int | None = None) -> Case:
    """Time one token a row over `lens` cached positions: tiles, numbers of parts, and both ways to merge."""

    pool = Pool(shape, sum(-(-n // args.page) for n in lens), args.min_cache_bytes, args)
    lists = [pool.take(n) for n in lens]
    table = page_table(lists, args.device)
    q = random_q(len(lens), shape, args)
    lengths = torch.tensor(lens, dtype=torch.int32, device=args.device)
    rows = torch.arange(len(lens), dtype=torch.int32, device=args.device)
    counters = torch.zeros(len(lens) * shape.num_kv_heads, dtype=torch.int32, device=args.device)
    scale, out = shape.head_dim**-0.5, torch.empty_like(q)
    group = shape.num_heads // shape.num_kv_heads
    default = decode_config(shape.head_dim, q.dtype, group)
    tiles = DECODE_TILES if is_tuned(shape, window) else []
    if args.dry_run:
        tiles = [(16, 4, 3)]
    configs = [default, *(c for c in (TileConfig(default.block_m, *t) for t in tiles) if c != default)]
    auto = choose_num_parts(shape.num_kv_heads, args.num_sms)

    def run(config: TileConfig, num_parts: int, fused: bool, i: int) -> Tensor:
        meta = DecodeMetadata(lengths, rows, table, num_parts, merge_counters=counters if fused else None)
        return attention_decode_triton(q, *pool.caches[i], meta, scale, window, out, config)

    variants = [(c, auto, True) for c in configs]
    variants += [(default, num_parts, True) for num_parts in (1, max(1, auto // 2), auto * 2, auto * 3)]
    variants.append((default, auto, False))
    variants = list(dict.fromkeys(variants))

    def reference() -> Tensor:
        at = lengths.long() - 1
        return torch.cat(
            [exact(q[b : b + 1], pool.caches[0], lists[b], at[b : b + 1], window) for b in range(len(lens))]
        )

    element = 2 * shape.num_kv_heads * shape.head_dim * 2
    visible = sum(min(n, window or n) for n in lens)
    name = f"decode {shape.name} {len(lens)}x{lens[0]}" + (f" w{window}" if window else "")
    return Case(
        name,
        4.0 * shape.num_heads * shape.head_dim * visible,
        visible * element + 4.0 * q.numel(),
        [
            (
                f"{label(c)} parts {s} {'fused' if f else 'merge'}"
                + (" *" if (c, s, f) == (default, auto, True) else ""),
                partial(run, c, s, f),
            )
            for c, s, f in variants
        ],
        reference,
        pool.num_caches,
        pool.caches.clear,
    )


@dataclass(frozen=True, slots=True)
class Group:
    """Rows [first, first + count) share the positions up to `end` tokens (and, by outer groups, all before)."""

    first: int
    count: int
    end: int


def tree_case(args: Options, name: str, shape: Shape, groups: list[Group], lens: list[int]) -> Case:
    """Time decode where rows share prefixes: plain, and tree over tiles, numbers of items, and orders."""
    inherited = [
        max((g for g in groups if g.first < row < g.first + g.count), key=lambda g: g.end, default=Group(row, 1, 0))
        for row in range(len(lens))
    ]
    num_pages = sum(-(-(n - g.end) // args.page) for n, g in zip(lens, inherited, strict=True))
    pool = Pool(shape, num_pages, args.min_cache_bytes, args)
    lists: list[list[int]] = []
    for n, group in zip(lens, inherited, strict=True):
        lists.append((lists[group.first][: group.end // args.page] if group.end else []) + pool.take(n - group.end))
    table = page_table(lists, args.device)
    q = random_q(len(lens), shape, args)
    lengths = torch.tensor(lens, dtype=torch.int32, device=args.device)
    rows = torch.arange(len(lens), dtype=torch.int32, device=args.device)
    counters = torch.zeros(len(lens) * shape.num_kv_heads, dtype=torch.int32, device=args.device)
    scale, out = shape.head_dim**-0.5, torch.empty_like(q)
    group_size = shape.num_heads // shape.num_kv_heads
    segments = find_shared_segments(table.cpu().numpy(), lengths.cpu().numpy(), args.page, lambda n, t: True)
    suffix = sum(lens) - sum((s.end - s.start) * len(s.member_rows) for s in segments)
    num_parts = choose_num_parts(shape.num_kv_heads, args.num_sms)
    default = tree_config(shape.head_dim, q.dtype, group_size)
    tiles = TREE_TILES
    if args.dry_run:
        tiles = [(16, 16, 4, 3)]
    configs = [default, *(c for c in (TileConfig(*t) for t in tiles) if c != default)]

    def plan_of(config: TileConfig, per_sm: int, side: bool) -> TreePlan:
        stream = torch.cuda.Stream() if side else None  # type: ignore[no-untyped-call]
        plan = TreePlan(len(lens), config, torch.device(args.device), side_stream=stream)
        work = plan_tree(
            segments, len(lens), group_size, shape.num_kv_heads, config, per_sm * args.num_sms, plan.max_items,
            plan.max_slots,
        )  # fmt: skip
        assert work is not None, "the plan does not fit"
        plan.load(work)
        return plan

    def plain(i: int) -> Tensor:
        meta = DecodeMetadata(lengths, rows, table, num_parts, merge_counters=counters)
        return attention_decode_triton(q, *pool.caches[i], meta, scale, None, out)

    def tree(plan: TreePlan, num_parts: int, i: int) -> Tensor:
        meta = DecodeMetadata(lengths, rows, table, num_parts, False, plan, merge_counters=counters)
        return attention_tree_triton(q, *pool.caches[i], meta, plan, scale, out)

    runs: list[tuple[str, Callable[[int], Tensor]]] = [(f"plain parts {num_parts}", plain)]
    for config in configs:
        for per_sm in (1, 2, 3):
            mark = " *" if config == default and per_sm == TREE_PROGRAMS_PER_SM else ""
            run = partial(tree, plan_of(config, per_sm, False), num_parts)
            runs.append((f"tree {label(config)} x{per_sm} parts {num_parts}{mark}", run))
    if not args.dry_run:
        for config in (default, TileConfig(64, 64, 4, 5)):
            run = partial(tree, plan_of(config, 1, True), num_parts)
            runs.append((f"tree {label(config)} x1 parts {num_parts} side stream", run))
    runs.append((f"tree {label(default)} x1 parts 1", partial(tree, plan_of(default, 1, False), 1)))

    def reference() -> Tensor:
        at = lengths.long() - 1
        return torch.cat([exact(q[b : b + 1], pool.caches[0], lists[b], at[b : b + 1], None) for b in range(len(lens))])

    model = TreeCostModel(shape.num_heads, shape.num_kv_heads, shape.head_dim, default)
    sizes = [(len(s.member_rows), s.end - s.start) for s in segments]
    predicted = model.tree_s(sizes) + model.costs.fixed_s + model.plain_s(1, suffix)
    whole = model.plain_s(1, sum(lens))
    choice = "tree" if model.should_use_tree(sizes, suffix) else "plain"
    token = 2 * shape.num_kv_heads * shape.head_dim * 2
    return Case(
        f"{name} (model: plain {whole * 1e6:.1f}, tree {predicted * 1e6:.1f} us, takes {choice})",
        4.0 * shape.num_heads * shape.head_dim * sum(lens),
        (suffix + sum(tokens for _, tokens in sizes)) * token + 4.0 * q.numel(),
        runs,
        reference,
        pool.num_caches,
        pool.caches.clear,
        {
            "segments": sizes,
            "suffix_tokens": suffix,
            "rows": len(lens),
        },
    )


def label(config: TileConfig) -> str:
    """Name a TileConfig: rows x keys, warps, stages."""
    m, n, w, s = dataclasses.astuple(config)
    return f"{m}x{n} w{w} s{s}"


CaseBuilder = Callable[[Options], Case]


def all_cases(dry_run: bool, sections: set[str]) -> list[tuple[str, CaseBuilder]]:
    """Name and build every case; building allocates, so the caller builds one at a time."""
    cases: list[tuple[str, CaseBuilder]] = []
    if dry_run:
        toy = Shape("toy", 4, 2, 32)
        cases = [
            ("extend", lambda a: extend_case(a, toy, [(20, 40), (3, 3)])),
            ("extend", lambda a: extend_case(a, toy, [(20, 40)], 16)),
            ("decode", lambda a: decode_case(a, toy, [40, 17, 70])),
            ("tree", lambda a: tree_case(a, "tree toy", toy, [Group(0, 3, 32), Group(1, 2, 64)], [40, 70, 81, 20])),
        ]
        return [c for c in cases if c[0] in sections]
    for lens in [
        [(4096, 4096)], [(512, 512)], [(1024, 1024)] * 8, [(128, 2176)] * 50, [(128, 2176)], [(2048, 10240)],
        [(512, 1536)] * 16, [(16, 2064)], [(1, 8193)] * 16,
    ]:  # fmt: skip
        cases.append(("extend", partial(extend_case, shape=LLAMA, lens=lens)))
    cases += [
        ("extend", lambda a: extend_case(a, LLAMA, [(4096, 4096)], 1024)),
        ("extend", lambda a: extend_case(a, SMOL, [(2048, 2048)])),
        ("extend", lambda a: extend_case(a, GEMMA, [(2048, 2048)])),
    ]
    for rows in [[600], [8192], [1100] * 10, [1100] * 50, [1100] * 256, [2240] * 50, [192] * 64, [192] * 256]:
        cases.append(("decode", partial(decode_case, shape=LLAMA, lens=rows)))
    cases += [
        ("decode", lambda a: decode_case(a, LLAMA, [300, 1100, 5000, 700] * 16)),
        ("decode", lambda a: decode_case(a, LLAMA, [500] * 63 + [16_000])),
        ("decode", lambda a: decode_case(a, LLAMA, [4096] * 16, 1024)),
        ("decode", lambda a: decode_case(a, SMOL, [1000] * 32)),
        ("decode", lambda a: decode_case(a, GEMMA, [1000] * 32)),
    ]
    for name, count, prefix, own in [
        ("fork", 64, 8192, 17), ("fork", 64, 8192, 144), ("rag", 50, 2048, 17), ("rag", 50, 2048, 192),
        ("rag", 256, 2048, 17), ("rag", 256, 2048, 192), ("agentic", 50, 1024, 800), ("agentic", 256, 1024, 800),
        ("few", 8, 8192, 100), ("few", 64, 1024, 17), ("few", 4, 512, 100), ("few", 2, 4096, 100),
        ("few", 16, 256, 300),
    ]:  # fmt: skip
        title = f"tree {name} {count} x ({prefix} shared + {own})"
        shared = [Group(0, count, prefix)]
        cases.append(("tree", partial(tree_case, name=title, shape=LLAMA, groups=shared, lens=[prefix + own] * count)))
    pairs = [Group(2 * i, 2, 2048) for i in range(16)]
    title = "tree 16 pairs x (2048 shared + 200)"
    cases.append(("tree", partial(tree_case, name=title, shape=LLAMA, groups=pairs, lens=[2248] * 32)))
    levels = [Group(0, 64, 1024), *(Group(4 * i, 4, 2048) for i in range(16))]
    title = "tree 64 x (1024 shared by all + 1024 by fours + 200)"
    cases.append(("tree", partial(tree_case, name=title, shape=LLAMA, groups=levels, lens=[2248] * 64)))
    return [c for c in cases if c[0] in sections]
