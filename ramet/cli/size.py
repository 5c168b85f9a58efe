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
    from ramet.runtime.engine.sizing import GpuModel, Sizing
    from ramet.runtime.models.config import ModelConfig

    Named = tuple[str, ModelConfig]
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
    models = [_read(name) for name in arguments.models]
    if arguments.markdown:
        print(markdown(models), end="")
        return 0
    wanted = _wanted(arguments)
    fits_all = True
    for name, model in models:
        found = _found(model, wanted, arguments)
        fits_all &= found is not None
        if arguments.json:
            print(json.dumps(_record(name, model, found, wanted, arguments.gpus)))
        else:
            _print(name, model, found, wanted, arguments)
    return 0 if fits_all else 1


def _read(name: str) -> Named:
    """A model's name and sizes, by its path or hub id."""
    from ramet.runtime.models.catalog import CATALOG, resolve_model
    from ramet.runtime.models.description import load_gguf_config
    from ramet.runtime.models.gguf_file import GgufFile

    path = Path(name).expanduser()
    if path.suffix == ".gguf" or name in CATALOG:
        return path.stem, load_gguf_config(GgufFile(resolve_model(name)))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFound(f"the folder {path} has no config.json")
        return _named(path.resolve().name, path / "config.json")
    if path.is_file():
        return _named(path.resolve().parent.name if path.name == "config.json" else path.stem, path)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _named(name.split("/")[1], _from_hub(name))
    raise ModelNotFound(
        f"no model {name!r}: give a config.json, a folder with one, a .gguf file, or a hub id (owner/name)"
    )


def _named(name: str, path: Path) -> Named:
    from ramet.runtime.engine.sizing import read_config
    from ramet.runtime.models.json_file import read_json

    return name, read_config(name, read_json(path))


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


def _found(model: ModelConfig, wanted: Wanted, arguments: argparse.Namespace) -> Sizing | None:
    from ramet.runtime.engine.sizing import fitting, smallest

    return fitting(model, *wanted) if arguments.tp else smallest(model, *wanted, arguments.gpus or 8)


def _nearest(model: ModelConfig, wanted: Wanted, gpus: int | None) -> list[Sizing]:
    from ramet.runtime.engine.sizing import nearest

    return nearest(model, *wanted, gpus or 8)


def _record(
    name: str, model: ModelConfig, found: Sizing | None, wanted: Wanted, gpus: int | None
) -> dict[str, Any]:  # Any: JSON
    from ramet.runtime.engine.sizing import num_params

    matrices, others = num_params(model)
    record: dict[str, Any] = {
        "model": name,
        "parameters": matrices + others,
        "fits": found is not None,
        "not_supported_yet": _reasons(model, wanted[1]),
    }
    if found is None:
        return record | {"nearest": [_summary(one) for one in _nearest(model, wanted, gpus)]}
    return record | {
        "gpu": found.card.name,
        "tp": found.engine.tp,
        "flags": found.flags(),
        "plan_bytes": asdict(found.plan),
        "kv_bytes_per_token": found.kv_bytes_per_token,
        "kv_tokens": found.num_kv_tokens,
        "longest_context": found.context,
        "decode_floor_ms": round(1e3 * found.decode_floor_s, 3),
        "prefill_floor_us_per_token": round(1e6 * found.prefill_floor_s, 3),
    }


def _summary(found: Sizing) -> str:
    tp, name = found.engine.tp, found.card.name
    cards, given = f"{tp} x {name}" if tp > 1 else name, " ".join(found.flags()) or "no flags"
    return f"{cards}, {given}: KV for {found.num_kv_tokens:,} tokens"


def _reasons(model: ModelConfig, engine: EngineConfig) -> list[str]:
    """Why this version cannot do what is sized."""
    from ramet.runtime.engine.sizing import why_not_on_gpus

    reason = why_not_on_gpus(model)
    found = [] if reason is None else [reason]
    if engine.quantization not in (None, "fp8"):
        found.append(f"{engine.quantization} weights on a GPU are not supported yet")
    return found


def _print(name: str, model: ModelConfig, found: Sizing | None, wanted: Wanted, arguments: argparse.Namespace) -> None:
    from ramet.runtime.engine.sizing import num_params

    console = Console(highlight=False, soft_wrap=True)
    matrices, others = num_params(model)
    console.print(f"[bold]{name}[/]: {(matrices + others) / 1e9:.2f} billion weights", end="")
    if model.experts is not None:
        active = sum(num_params(model, is_active=True))
        console.print(f", {active / 1e9:.2f} of them used by a token", end="")
    console.print()
    for reason in _reasons(model, wanted[1]):
        console.print(f"  [yellow]{reason}: what follows is arithmetic[/]")
    if found is None:
        count = arguments.tp or arguments.gpus or 8
        console.print(f"  [bold red]does not fit[/] on {count} x {wanted[0].name}")
        for one in _nearest(model, wanted, arguments.gpus):
            console.print(f"  fits: {_summary(one)}")
        return
    plan = found.plan
    console.print(f"  [bold green]fits[/] on {found.engine.tp} x {found.card.name}", end="")
    console.print(f": [bold]ramet serve {name} {' '.join(found.flags())}[/]".rstrip())
    console.print(f"  each card   {plan}")
    console.print(f"  KV          {found.kv_bytes_per_token:,} bytes a token and card, {found.num_kv_tokens:,} tokens")
    console.print(f"  context     {found.context:,} of {model.max_position_embeddings:,}")
    at_once = ", ".join(f"{found.num_sequences(n):,} of {n:,}" for n in _LENGTHS if n <= found.context)
    console.print(f"  at once     {at_once or 'less than one of 2,048'} tokens")
    console.print(
        f"  floors      a step reads the weights in {1e3 * found.decode_floor_s:.2f} ms, "
        f"a prompt's token takes {1e6 * found.prefill_floor_s:.2f} us"
    )
    if arguments.gpus and arguments.gpus >= 2 * found.engine.tp:
        console.print(f"  {arguments.gpus} cards    {arguments.gpus // found.engine.tp} replicas")


def markdown(models: list[Named]) -> str:
    """The table of the documents: for each card and weight format the fewest cards, and their tokens of KV."""
    from ramet.runtime.engine.config import EngineConfig
    from ramet.runtime.engine.sizing import CARDS, TABLE_CARDS, smallest

    cards = [CARDS[name] for name in TABLE_CARDS]
    lines = [
        "| model | weights | " + " | ".join(f"{card.gigabytes} GB ({card.name})" for card in cards) + " |",
        "|---|---|" + "---|" * len(cards),
    ]
    for model_name, model in models:
        for name, quantization in (("bf16", None), ("FP8", "fp8"), ("4-bit", "int4")):
            cells = []
            for card in cards:
                found = smallest(model, card, EngineConfig(quantization=quantization))
                cells.append("–" if found is None else _cell(found))
            lines.append(f"| {model_name} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(found: Sizing) -> str:
    """The number of cards and thousands of tokens of KV; a star where flags other than --tp are needed."""
    needs_flags = any(not flag.startswith(("--tp", "--quantization")) for flag in found.flags())
    return f"{found.engine.tp} x: {found.num_kv_tokens // 1000:,}k{'*' if needs_flags else ''}"
