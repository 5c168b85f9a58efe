"""`ramet serve`: its flags, the API keys from the environment, and the line that it prints when it is ready."""

from __future__ import annotations

import argparse
import logging
import os
import re
import time
from typing import TYPE_CHECKING

from rich.console import Console

from ramet.cli.flags import add_flags, given_values
from ramet.errors import ConfigError

if TYPE_CHECKING:
    from ramet.runtime.server.config import ServerConfig
    from ramet.runtime.server.link.protocol import Hello

KEYS_VARIABLE = "RAMET_API_KEY"
ADMIN_KEY_VARIABLE = "RAMET_ADMIN_API_KEY"


def add_serve(parser: argparse.ArgumentParser) -> None:
    from ramet.runtime.engine.config import EngineConfig
    from ramet.runtime.server.config import ServerConfig

    parser.description = (
        "Serve a model over HTTP: the OpenAI API, the native API, programs and metrics. "
        f"Keys may also come from the environment ({KEYS_VARIABLE}, several with commas between; "
        f"{ADMIN_KEY_VARIABLE}), where other users of the machine do not see them."
    )
    parser.add_argument("model", nargs="?", help="a catalogue name, a directory, a .gguf file or a hub id")
    parser.add_argument("--model-path", help=argparse.SUPPRESS)
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    parser.add_argument("--enable-metrics", action="store_true", help="metrics are always on; taken for SGLang's sake")
    parser.add_argument("--disaggregation-mode", choices=("null", "prefill", "decode"), help=argparse.SUPPRESS)
    add_flags(parser, ServerConfig, "server")
    add_flags(parser, EngineConfig, "engine")


def run_serve(arguments: argparse.Namespace) -> int:
    """Serve until told to end: SIGTERM or Ctrl-C drains, a second one ends at once."""
    from ramet.lang.explain.plan import explain_on_server
    from ramet.runtime.engine.config import EngineConfig
    from ramet.runtime.server.app import serve
    from ramet.runtime.server.config import ServerConfig
    from ramet.runtime.server.link.logs import set_up_logging

    if arguments.model is not None and arguments.model_path is not None:
        raise ConfigError("the model is named twice; leave --model-path out")
    if arguments.disaggregation_mode in ("prefill", "decode"):
        raise ConfigError(
            f"--disaggregation-mode {arguments.disaggregation_mode} is for engines that are started apart; here one "
            "server starts those for prompts and those that decode: --prefill-replicas P --decode-replicas D, on "
            "several machines with --ray-address (docs/scaling.md)"
        )
    model = arguments.model if arguments.model is not None else arguments.model_path
    level = arguments.log_level.upper()
    config = ServerConfig(**{**_environment(), **given_values(arguments, ServerConfig)})
    set_up_logging(level, config.log_format, "server")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    _raise_file_limit()
    started_s = time.monotonic()
    serve(
        model,
        given_values(arguments, EngineConfig),
        config,
        log_level=level,
        on_ready=lambda hello, address: _announce(hello, address, config, time.monotonic() - started_s),
        explain=explain_on_server,
    )
    return 0


def _environment() -> dict[str, object]:
    """Read the API keys from the environment."""
    found: dict[str, object] = {}
    keys = tuple(key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip())
    if keys:
        found["api_key"] = keys
    if os.environ.get(ADMIN_KEY_VARIABLE):
        found["admin_api_key"] = os.environ[ADMIN_KEY_VARIABLE]
    return found


def _raise_file_limit() -> None:
    """A connection is an open file, and the soft limit is often 1,024; the hard one is ours to use."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _announce(hello: Hello, address: str, config: ServerConfig, seconds: float) -> None:
    """Print what is served on stderr, where somebody at a terminal looks first."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    name = config.served_model_name or hello.model
    has_keys = bool(config.api_key) or config.api_keys_file is not None
    key = "$RAMET_API_KEY" if has_keys else "none"
    console.print(f"[bold green]ready[/] in {seconds:.1f} s: [bold]{name}[/] at [bold]{address}[/]")
    console.print(
        f"  {hello.device} {hello.dtype}, context {hello.context_length:,} tokens, "
        f"KV for {hello.num_kv_tokens:,} tokens, engine process {hello.pid}"
    )
    console.print(f"  OpenAI clients: base_url={address}/v1  api_key={key}")
    console.print(f"  programs: POST {address}/v1/programs   API: {address}/docs   metrics: {address}/metrics")
    if config.ui:
        console.print(f"  watch it: {address}/ui")
    if not has_keys and not re.match(r"127\.|::1$|localhost$", config.host):
        console.print(
            f"  [bold yellow]anyone who reaches {config.host} can use this server; set --api-key or --api-keys-file[/]"
        )
