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
    from ramet.runtime.engine.sizing import ModelShape, Setup, Sizing

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
    setup = _setup(arguments)
    fits_all = True
    for shape in shapes:
        found = _found(shape, setup, arguments)
        fits_all &= found is not None
        if arguments.json:
            print(json.dumps(_record(shape, found, setup, arguments.gpus)))
        else:
            _print(shape, found, setup, arguments)
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


def _setup(arguments: argparse.Namespace) -> Setup:
    from ramet.runtime.engine.config import EngineConfig
    from ramet.runtime.engine.sizing import CARDS, WEIGHT_BITS, Setup

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
    engine = EngineConfig().changed({name: value for name, value in values.items() if value is not None})
    return Setup(card, arguments.tp or 1, arguments.quantization, engine)


def _found(shape: ModelShape, setup: Setup, arguments: argparse.Namespace) -> Sizing | None:
    from ramet.runtime.engine.sizing import fitting, smallest

    return fitting(shape, setup) if arguments.tp else smallest(shape, setup, arguments.gpus or 8)


def _nearest(shape: ModelShape, setup: Setup, gpus: int | None) -> list[Sizing]:
    from ramet.runtime.engine.sizing import nearest

    return nearest(shape, setup, gpus or 8)


def _record(shape: ModelShape, found: Sizing | None, setup: Setup, gpus: int | None) -> dict[str, Any]:  # Any: JSON
    matrices, others = shape.num_params()
    record: dict[str, Any] = {
        "model": shape.name,
        "parameters": matrices + others,
        "fits": found is not None,
        "not_supported_yet": _reasons(shape, setup),
    }
    if found is None:
        return record | {"nearest": [_summary(one) for one in _nearest(shape, setup, gpus)]}
    return record | {
        "gpu": found.setup.card.name,
        "tp": found.setup.tp,
        "flags": found.setup.flags(),
        "plan_bytes": asdict(found.plan),
        "kv_bytes_per_token": found.kv_bytes_per_token,
        "kv_tokens": found.num_kv_tokens,
        "longest_context": found.context,
        "decode_floor_ms": round(1e3 * found.decode_floor_s, 3),
        "prefill_floor_us_per_token": round(1e6 * found.prefill_floor_s, 3),
    }


def _summary(found: Sizing) -> str:
    setup = found.setup
    cards = f"{setup.tp} x {setup.card.name}" if setup.tp > 1 else setup.card.name
    flags = " ".join(setup.flags()) or "no flags"
    return f"{cards}, {flags}: KV for {found.num_kv_tokens:,} tokens"


def _reasons(shape: ModelShape, setup: Setup) -> list[str]:
    """Why this version cannot do what is sized."""
    found = [shape.reason] if shape.reason is not None else []
    if setup.quantization not in ("none", "fp8"):
        found.append(f"{setup.quantization} weights on a GPU are not supported yet")
    return found


def _print(shape: ModelShape, found: Sizing | None, setup: Setup, arguments: argparse.Namespace) -> None:
    console = Console(highlight=False, soft_wrap=True)
    matrices, others = shape.num_params()
    console.print(f"[bold]{shape.name}[/]: {(matrices + others) / 1e9:.2f} billion weights", end="")
    if shape.config.experts is not None:
        active = sum(shape.num_params(is_active=True))
        console.print(f", {active / 1e9:.2f} of them used by a token", end="")
    console.print()
    for reason in _reasons(shape, setup):
        console.print(f"  [yellow]{reason}: what follows is arithmetic[/]")
    if found is None:
        count = arguments.tp or arguments.gpus or 8
        console.print(f"  [bold red]does not fit[/] on {count} x {setup.card.name}")
        for one in _nearest(shape, setup, arguments.gpus):
            console.print(f"  fits: {_summary(one)}")
        return
    plan = found.plan
    console.print(f"  [bold green]fits[/] on {found.setup.tp} x {found.setup.card.name}", end="")
    console.print(f": [bold]ramet serve {shape.name} {' '.join(found.setup.flags())}[/]".rstrip())
    console.print(f"  each card   {plan}")
    console.print(f"  KV          {found.kv_bytes_per_token:,} bytes a token and card, {found.num_kv_tokens:,} tokens")
    console.print(f"  context     {found.context:,} of {shape.config.max_position_embeddings:,}")
    at_once = ", ".join(f"{found.num_sequences(n):,} of {n:,}" for n in _LENGTHS if n <= found.context)
    console.print(f"  at once     {at_once or 'less than one of 2,048'} tokens")
    console.print(
        f"  floors      a step reads the weights in {1e3 * found.decode_floor_s:.2f} ms, "
        f"a prompt's token takes {1e6 * found.prefill_floor_s:.2f} us"
    )
    if arguments.gpus and arguments.gpus >= 2 * found.setup.tp:
        console.print(f"  {arguments.gpus} cards    {arguments.gpus // found.setup.tp} replicas")


def markdown(shapes: list[ModelShape]) -> str:
    """The table of the documents: for each card and weight format the fewest cards, and their tokens of KV."""
    from ramet.runtime.engine.sizing import CARDS, TABLE_CARDS, Setup, smallest

    cards = [CARDS[name] for name in TABLE_CARDS]
    lines = [
        "| model | weights | " + " | ".join(f"{card.gigabytes} GB ({card.name})" for card in cards) + " |",
        "|---|---|" + "---|" * len(cards),
    ]
    for shape in shapes:
        for name, quantization in (("bf16", "none"), ("FP8", "fp8"), ("4-bit", "int4")):
            cells = []
            for card in cards:
                found = smallest(shape, Setup(card, quantization=quantization))
                cells.append("–" if found is None else _cell(found))
            lines.append(f"| {shape.name} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(found: Sizing) -> str:
    """The number of cards and thousands of tokens of KV; a star where flags other than --tp are needed."""
    needs_flags = any(not flag.startswith(("--tp", "--quantization")) for flag in found.setup.flags())
    return f"{found.setup.tp} x: {found.num_kv_tokens // 1000:,}k{'*' if needs_flags else ''}"
