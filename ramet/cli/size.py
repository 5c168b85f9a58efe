"""`ramet size`: what fits on which GPUs, from a model's config.json alone, and the flags that make it fit."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ramet.errors import ConfigError, ModelNotFound

if TYPE_CHECKING:
    from ramet.runtime.engine.config import EngineConfig
    from ramet.runtime.engine.sizing import GpuModel, ModelShape, Sizing

    Wanted = tuple[GpuModel, EngineConfig]  # the cards, and how the model is to be served on them

_GIB = 2**30
_LENGTHS = (2_048, 8_192, 32_768, 131_072)


def add_size(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Read config.json (no weights) and print what a model needs and what fits. Give a config.json, a folder with "
        "one, a .gguf file, or a hub id, of which config.json alone is fetched. Without --tp, the fewest cards that do."
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--gpu", default="h100", metavar="NAME", help="the card: h100, h200, b200, a100, ... [h100]")
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="how many of them there are [as many as it takes, up to 8]"
    )
    parser.add_argument("--tp", type=int, metavar="N", help="cards of one replica")
    parser.add_argument(
        "--quantization", default="none", metavar="NAME", help="of weights: none (bf16), fp8, int8, int4"
    )
    parser.add_argument("--kv-cache-dtype", choices=["auto", "fp8_e4m3"], help="keys and values: auto (bf16), fp8_e4m3")
    parser.add_argument("--context-length", type=int, metavar="N", help="tokens that one sequence must be able to have")
    parser.add_argument("--max-running-requests", type=int, metavar="N", help="sequences that run at once [256]")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one line of JSON a model")
    form.add_argument(
        "--markdown", action="store_true", help="print the models as a table over cards and weight formats"
    )


def run_size(arguments: argparse.Namespace) -> int:
    """Print what fits. Exit status 1 where a model does not."""
    shapes = [_read(name) for name in arguments.models]
    if arguments.markdown:
        print(markdown(shapes), end="")
        return 0
    wanted = _wanted(arguments)
    fits_all = True
    for shape in shapes:
        found = _found(shape, wanted, arguments)
        fits_all &= found is not None
        if arguments.json:
            print(json.dumps(_record(shape, found, wanted, arguments.gpus)))
        else:
            _print(shape, found, wanted, arguments)
    return 0 if fits_all else 1


def _read(name: str) -> ModelShape:
    """The shape of a model by its path or hub id."""
    from ramet.runtime.engine.sizing import ModelShape
    from ramet.runtime.models.catalog import CATALOG, resolve_model
    from ramet.runtime.models.description import load_gguf_config
    from ramet.runtime.models.gguf_file import GgufFile
    from ramet.runtime.models.json_file import read_json

    path = Path(name).expanduser()
    if path.suffix == ".gguf" or name in CATALOG:
        return ModelShape(path.stem, load_gguf_config(GgufFile(resolve_model(name))))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFound(f"the folder {path} has no config.json")
        return ModelShape.from_hf(path.resolve().name, read_json(path / "config.json"))
    if path.is_file():
        return ModelShape.from_hf(
            path.resolve().parent.name if path.name == "config.json" else path.stem, read_json(path)
        )
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return ModelShape.from_hf(name.split("/")[1], read_json(_from_hub(name)))
    raise ModelNotFound(
        f"no model {name!r}: give a config.json, a folder with one, a .gguf file, or a hub id (owner/name)"
    )


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    from ramet.errors import DownloadFailed

    try:
        return Path(hf_hub_download(name, "config.json"))
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors; ValueError: no such name can be
        raise DownloadFailed(f"cannot fetch config.json of {name}: {error}") from error


def _wanted(arguments: argparse.Namespace) -> Wanted:
    from ramet.runtime.engine.config import EngineConfig
    from ramet.runtime.engine.sizing import CARDS, WEIGHT_BITS

    card = CARDS.get(arguments.gpu.lower())
    if card is None:
        raise ConfigError(f"gpu is {arguments.gpu!r} but must be one of {', '.join(CARDS)}")
    if arguments.quantization not in WEIGHT_BITS:
        raise ConfigError(f"quantization is {arguments.quantization!r} but must be one of {', '.join(WEIGHT_BITS)}")
    for flag in ("gpus", "tp"):
        value = getattr(arguments, flag)
        if value is not None and not 1 <= value <= 1024:
            raise ConfigError(f"{flag} is {value} but must be in [1, 1024]")
    if arguments.tp and arguments.gpus and arguments.tp > arguments.gpus:
        raise ConfigError(f"tp is {arguments.tp} but there are {arguments.gpus} GPUs; raise --gpus or lower --tp")
    values = {name: getattr(arguments, name) for name in ("kv_cache_dtype", "context_length", "max_running_requests")}
    values |= {"tp": arguments.tp, "quantization": None if arguments.quantization == "none" else arguments.quantization}
    return card, EngineConfig().changed({name: value for name, value in values.items() if value is not None})


def _found(shape: ModelShape, wanted: Wanted, arguments: argparse.Namespace) -> Sizing | None:
    from ramet.runtime.engine.sizing import fitting, smallest

    return fitting(shape, *wanted) if arguments.tp else smallest(shape, *wanted, arguments.gpus or 8)


def _nearest(shape: ModelShape, wanted: Wanted, gpus: int | None) -> list[Sizing]:
    from ramet.runtime.engine.sizing import nearest

    return nearest(shape, *wanted, gpus or 8)


def _record(shape: ModelShape, found: Sizing | None, wanted: Wanted, gpus: int | None) -> dict[str, Any]:  # Any: JSON
    from ramet.runtime.engine.sizing import flags

    matrices, others = shape.num_params()
    record: dict[str, Any] = {
        "model": shape.name,
        "parameters": matrices + others,
        "fits": found is not None,
        "not_supported_yet": _reasons(shape, wanted[1]),
    }
    if found is None:
        return record | {"nearest": [_summary(one) for one in _nearest(shape, wanted, gpus)]}
    return record | {
        "gpu": found.card.name,
        "tp": found.engine.tp,
        "flags": flags(found.engine),
        "plan_bytes": asdict(found.plan),
        "kv_bytes_per_token": found.kv_bytes_per_token,
        "kv_tokens": found.num_kv_tokens,
        "longest_context": found.context,
        "decode_floor_ms": round(1e3 * found.decode_floor_s, 3),
        "prefill_floor_us_per_token": round(1e6 * found.prefill_floor_s, 3),
    }


def _summary(found: Sizing) -> str:
    from ramet.runtime.engine.sizing import flags

    tp, name = found.engine.tp, found.card.name
    cards, given = f"{tp} x {name}" if tp > 1 else name, " ".join(flags(found.engine)) or "no flags"
    return f"{cards}, {given}: KV for {found.num_kv_tokens:,} tokens"


def _reasons(shape: ModelShape, engine: EngineConfig) -> list[str]:
    """Why this version cannot do what is sized."""
    found = [shape.reason] if shape.reason is not None else []
    if engine.quantization not in (None, "fp8"):
        found.append(f"{engine.quantization} weights on a GPU are not supported yet")
    return found


def _print(shape: ModelShape, found: Sizing | None, wanted: Wanted, arguments: argparse.Namespace) -> None:
    from ramet.runtime.engine.sizing import flags

    console = Console(highlight=False, soft_wrap=True)
    matrices, others = shape.num_params()
    console.print(f"[bold]{shape.name}[/]: {(matrices + others) / 1e9:.2f} billion weights", end="")
    if shape.config.experts is not None:
        active = sum(shape.num_params(is_active=True))
        console.print(f", {active / 1e9:.2f} of them used by a token", end="")
    console.print()
    for reason in _reasons(shape, wanted[1]):
        console.print(f"  [yellow]{reason}: what follows is arithmetic[/]")
    if found is None:
        count = arguments.tp or arguments.gpus or 8
        console.print(f"  [bold red]does not fit[/] on {count} x {wanted[0].name}")
        for one in _nearest(shape, wanted, arguments.gpus):
            console.print(f"  fits: {_summary(one)}")
        return
    plan = found.plan
    console.print(f"  [bold green]fits[/] on {found.engine.tp} x {found.card.name}", end="")
    console.print(f": [bold]ramet serve {shape.name} {' '.join(flags(found.engine))}[/]".rstrip())
    console.print(f"  each card   {plan}")
    console.print(f"  KV          {found.kv_bytes_per_token:,} bytes a token and card, {found.num_kv_tokens:,} tokens")
    console.print(f"  context     {found.context:,} of {shape.config.max_position_embeddings:,}")
    at_once = ", ".join(f"{found.num_sequences(n):,} of {n:,}" for n in _LENGTHS if n <= found.context)
    console.print(f"  at once     {at_once or 'less than one of 2,048'} tokens")
    console.print(
        f"  floors      a step reads the weights in {1e3 * found.decode_floor_s:.2f} ms, "
        f"a prompt's token takes {1e6 * found.prefill_floor_s:.2f} us"
    )
    if arguments.gpus and arguments.gpus >= 2 * found.engine.tp:
        console.print(f"  {arguments.gpus} cards    {arguments.gpus // found.engine.tp} replicas")


def markdown(shapes: list[ModelShape]) -> str:
    """The table of the documents: for each card and weight format the fewest cards, and their tokens of KV."""
    from ramet.runtime.engine.config import EngineConfig
    from ramet.runtime.engine.sizing import CARDS, TABLE_CARDS, smallest

    cards = [CARDS[name] for name in TABLE_CARDS]
    lines = [
        "| model | weights | " + " | ".join(f"{card.gigabytes} GB ({card.name})" for card in cards) + " |",
        "|---|---|" + "---|" * len(cards),
    ]
    for shape in shapes:
        for name, quantization in (("bf16", None), ("FP8", "fp8"), ("4-bit", "int4")):
            cells = []
            for card in cards:
                found = smallest(shape, card, EngineConfig(quantization=quantization))
                cells.append("–" if found is None else _cell(found))
            lines.append(f"| {shape.name} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(found: Sizing) -> str:
    """The number of cards and thousands of tokens of KV; a star where flags other than --tp are needed."""
    from ramet.runtime.engine.sizing import flags

    needs_flags = any(not flag.startswith(("--tp", "--quantization")) for flag in flags(found.engine))
    return f"{found.engine.tp} x: {found.num_kv_tokens // 1000:,}k{'*' if needs_flags else ''}"
