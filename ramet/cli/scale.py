"""`ramet scale`: change the number of a running server's engines, or restart them one after the other."""

from __future__ import annotations

import argparse
import os

from ramet.cli.flags import add_flags, given_values
from ramet.errors import ConfigError, RemoteError


def add_scale(parser: argparse.ArgumentParser) -> None:
    from ramet.runtime.engine.config import EngineConfig

    parser.description = (
        "Tell a server that was started with --dp how many engines it is to have. Returns when the new ones are ready, "
        "and those that go have ended what they had."
    )
    parser.add_argument("replicas", nargs="?", type=int, metavar="N", help="engines; default: as many as now")
    parser.add_argument("--restart", action="store_true", help="restart them one after the other")
    parser.add_argument("--model", help="with --restart: serve this one, which has the same tokens")
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="the server [http://127.0.0.1:30000]")
    parser.add_argument("--api-key", help="the server's admin key [$RAMET_ADMIN_API_KEY, else $RAMET_API_KEY]")
    add_flags(parser, EngineConfig, "with --restart: what differs from the server's start")


def run_scale(arguments: argparse.Namespace) -> int:
    """Ask the server, and print the numbers of its engines."""
    import httpx

    from ramet.runtime.engine.config import EngineConfig

    if arguments.replicas is None and not arguments.restart:
        raise ConfigError("nothing to do: give the number of engines, or --restart")
    keys = os.environ.get("RAMET_ADMIN_API_KEY") or os.environ.get("RAMET_API_KEY", "").split(",")[0]
    key = arguments.api_key or keys
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body = {
        "replicas": arguments.replicas,
        "restart": arguments.restart,
        "model": arguments.model,
        "engine": given_values(arguments, EngineConfig),
    }
    try:
        answer = httpx.post(f"{arguments.url.rstrip('/')}/scale", json=body, headers=headers, timeout=None)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise RemoteError(f"no server answers at {arguments.url}: {error}") from error
    try:
        value = answer.json()
        if answer.status_code != 200:
            raise RemoteError(f"the server refused ({answer.status_code}): {value['error']['message']}")
        print(f"engines: {', '.join(map(str, value['replicas']))}")
    except (ValueError, KeyError, TypeError) as error:
        raise RemoteError(f"{arguments.url} answered {answer.status_code}, not as a Ramet server does") from error
    return 0
