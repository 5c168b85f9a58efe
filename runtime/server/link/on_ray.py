"""Engines on the nodes of a Ray cluster. Ray places each by its CPUs and GPUs, and elsewhere when its node is lost.

An engine has an actor, which starts and ends its processes on the node where it is. They talk to the server over TCP:
ZeroMQ's CURVE encrypts, and only the process that got the keys through Ray may connect. The server runs on a node of
the cluster, at whose address the others must reach it.

Not here: which engine gets a request (`cluster.router`), their number (`replicas`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import socket
from importlib.metadata import version
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec
import zmq
from zmq.auth.thread import ThreadAuthenticator

from ramet.errors import ConfigError
from ramet.runtime.engine.config import EngineConfig
from ramet.runtime.models.catalog import TINY_MODEL, resolve_model
from ramet.runtime.server.link.launchers import LocalLauncher, unbounded_socket
from ramet.runtime.server.link.protocol import Settings

if TYPE_CHECKING:
    import ray

logger = logging.getLogger(__name__)

_ANSWER_S = 5.0
_PLACE_S = 300.0  # for Ray to find a node with room
_SAMPLES, _SAMPLE_BYTES = 32, 1 << 16  # of each file of weights: its head, and places spread over all of it
_LAST_WORDS_S = 15.0  # for an actor to end its process: longer than a process gets to end by itself


def connect(address: str) -> None:
    """Join the Ray cluster at an address (HOST:PORT, or auto: the one of this machine). Raises ConfigError."""
    try:
        import ray
    except ImportError:
        raise ConfigError("--ray-address needs Ray, which is not installed: pip install 'ramet[ray]'") from None
    host, _, port = address.rpartition(":")
    if address != "auto" and (not host or "/" in host or not port.isdecimal()):
        raise ConfigError(f"ray_address is {address!r} but must be HOST:PORT, or auto for this machine's cluster")
    if ray.is_initialized():
        return
    try:
        if host:  # Ray itself tries for minutes
            socket.create_connection((host.strip("[]"), int(port)), _ANSWER_S).close()
        ray.init(address, namespace="ramet", logging_level=logging.WARNING)
    except Exception as error:  # Ray raises whatever its parts raise: ConnectionError, RuntimeError, ValueError, ...
        raise ConfigError(
            f"no Ray cluster can be joined at --ray-address {address}: {_first_line(error)}; this server must run on a "
            "node of the cluster: `ray start --head`, or `ray start --address HOST:PORT` on further nodes"
        ) from error


def check_room(count: int, config: EngineConfig) -> None:
    """Raise ConfigError if the nodes of the cluster, were they empty, could not hold so many engines."""
    import ray

    needs = resources(config)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(min(int(node.get(name, 0) // need) for name, need in needs.items()) for node in nodes)
    if room < count:
        asked = " and ".join(f"{need} {name}s" for name, need in needs.items())
        found = "; ".join(
            ", ".join(f"{node.get(name, 0):.0f} {name}s" for name in needs) for node in nodes
        )  # of each node
        raise ConfigError(
            f"{count} engines were asked for, each with {asked} of one node, but the Ray cluster has room for {room} "
            f"({len(nodes)} nodes: {found}); lower --dp{' or --tp' if config.tp > 1 else ''}, or add nodes"
        )


def resources(config: EngineConfig) -> dict[str, int]:
    """What one engine asks of a node: its GPUs, if it runs on any, and a CPU for each of its threads."""
    import ray

    kind, _, index = config.device.partition(":")
    if index:
        raise ConfigError(
            f"--device {config.device} names a card of one machine, but with --ray-address Ray chooses the cards; "
            f"write --device {kind}"
        )
    needs = {"CPU": (config.num_threads or 1) * (1 if kind == "cuda" else config.tp)}
    if kind == "cuda" or (kind == "auto" and ray.cluster_resources().get("GPU", 0) >= 1):
        needs["GPU"] = config.tp
    return needs


def fingerprint(model: str | None) -> str:
    """Tell whether two nodes have the same model: by the sizes and samples of its files. Raises ModelError."""
    if model == TINY_MODEL:
        return TINY_MODEL
    path = resolve_model(model)
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.gguf"), path / "config.json"]
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(files):
        if file.exists():
            size = file.stat().st_size
            digest.update(f"{file.name} {size} ".encode())
            with file.open("rb") as opened:
                for number in range(_SAMPLES):
                    opened.seek(number * size // _SAMPLES)
                    digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()


class EngineActor:
    """On a node of the cluster: an engine's processes, one after the other. They end with their actor."""

    def __init__(self) -> None:
        self._launcher: LocalLauncher | None = None  # of the process that runs

    async def place(self) -> tuple[str, str]:
        """Return this node's address, and the version of Ramet on it."""
        import ray

        return ray.util.get_node_ip_address(), version("ramet")

    async def run(self, settings: bytes) -> str:
        """Run a process until it ends. Returns its end in words."""
        launcher = self._launcher = LocalLauncher()
        try:
            await launcher.start(msgspec.json.decode(settings, type=Settings))
            return await launcher.wait()
        finally:
            self._launcher = None
            await launcher.close()

    async def end(self) -> None:
        if self._launcher is not None:
            await self._launcher.end()


class RayLauncher:
    """Processes wherever Ray has placed the engine's actor. See `launchers.Launcher`."""

    def __init__(self, config: EngineConfig) -> None:
        """config: says what the engine needs of its node. The cluster was joined by `connect`."""
        import ray

        self._needs = resources(config)
        self._host = ray.util.get_node_ip_address()
        self._actor: Any = None  # Any: Ray makes its class
        self._run: ray.ObjectRef[str] | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._public, self._secret = zmq.curve_keypair()
        self._engine_public, self._engine_secret = zmq.curve_keypair()
        self._guard = ThreadAuthenticator(self._context)
        self._guard.start()
        known = self._engine_public
        self._guard.configure_curve_callback("*", SimpleNamespace(callback=lambda domain, key: key == known))

    def listen(self, kind: int, name: str) -> tuple[zmq.Socket[bytes], str]:
        made = unbounded_socket(self._context, kind)
        made.curve_server = True
        made.curve_publickey, made.curve_secretkey = self._public, self._secret
        host = f"[{self._host}]" if ":" in self._host else self._host
        made.setsockopt(zmq.IPV6, int(":" in self._host))
        return made, f"tcp://{host}:{made.bind_to_random_port(f'tcp://{host}')}"

    async def start(self, settings: Settings) -> None:
        """Wait until Ray has placed the actor, and start a process there."""
        import ray

        if self._actor is None:
            made = ray.remote(EngineActor).options(
                num_cpus=self._needs["CPU"], num_gpus=self._needs.get("GPU", 0), max_restarts=-1
            )
            self._actor = made.remote()
        try:
            placed = self._actor.place.options(max_task_retries=-1).remote()
            host, found = await asyncio.wait_for(placed, _PLACE_S)
        except TimeoutError:
            needs = " and ".join(f"{need} {name}s" for name, need in self._needs.items())
            raise ConfigError(f"no node of the Ray cluster had {needs} free within {_PLACE_S:.0f} s") from None
        except ray.exceptions.RayActorError as error:
            raise ConfigError(f"the engine cannot run on the node that Ray chose: {_first_line(error)}") from error
        if found != (own := version("ramet")):
            raise ConfigError(f"the node {host} has Ramet {found}, but this server {own}; install the same there")
        logger.info("the engine %s runs on node %s", settings.replica, host)
        keys = (self._public.decode(), self._engine_public.decode(), self._engine_secret.decode())
        # Ray shows a process only the cards of its actor, so each engine is the first one there.
        same = await asyncio.to_thread(fingerprint, settings.model)
        told = msgspec.structs.replace(settings, replica=0, keys=keys, fingerprint=same)
        self._run = self._actor.run.remote(msgspec.json.encode(told))

    async def wait(self) -> str:
        import ray

        assert self._run is not None, "a process was started"
        try:
            return str(await self._run)
        except ray.exceptions.RayError as error:
            return f"its actor was lost: {_first_line(error)}"

    async def end(self) -> None:
        if self._run is not None:
            import ray

            with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
                await asyncio.wait_for(self._actor.end.remote(), _LAST_WORDS_S)

    def kill(self) -> None:
        import ray

        if self._actor is not None and ray.is_initialized():
            ray.kill(self._actor)

    async def close(self) -> None:
        self.kill()
        self._guard.stop()
        self._context.destroy(linger=0)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
