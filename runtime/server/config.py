"""The server's configuration. Its fields and those of EngineConfig are the flags of `ramet serve`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ramet.errors import ConfigError

MAX_REPLICAS = 256


def _doc(default: Any, text: str) -> Any:  # Any: what dataclasses.field returns is typed as the field it stands for
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Network, limits and security. Impossible values raise ConfigError."""

    host: str = _doc("127.0.0.1", "address to listen on")
    port: int = _doc(30000, "port to listen on")
    dp: int = _doc(1, "replicas of the engine, each a process of its own; requests go where their prefixes are cached")
    max_dp: int | None = _doc(
        None, "replicas there may be: their number follows the load, between dp and this; default: it stays as it is"
    )
    prefill_replicas: int = _doc(
        0, "further engines that compute long prompts for the dp others, which decode: their KV pages move; 0: none"
    )
    ttft_objective_s: float = _doc(2.0, "seconds to the first token that max_dp keeps, at the 90th percentile")
    ray_address: str | None = _doc(
        None, "Ray cluster (HOST:PORT, or auto: this machine's) on whose nodes the engines run; default: this machine"
    )
    served_model_name: str | None = _doc(None, "the name that clients use; default: the model's own")
    api_key: tuple[str, ...] = _doc((), "keys of which a request must bring one (Authorization: Bearer ...)")
    api_keys_file: str | None = _doc(None, "file of keys with names and limits, read again on SIGHUP; see ramet keys")
    admin_api_key: str | None = _doc(
        None, "key for /flush_cache, /abort_request, /scale and adapters; default: any api key"
    )
    protect_metrics: bool = _doc(False, "ask for the admin key on /metrics, too")
    isolate_cache_by_key: bool = _doc(False, "requests share cached prefixes only with requests of the same key")
    max_body_bytes: int = _doc(32 << 20, "size of a request's body")
    max_json_values: int = _doc(1_000_000, "values in a request's JSON; a list or an object counts ten")
    max_in_flight_bytes: int | None = _doc(
        None, "size of all requests and programs that run or wait; default: twice the size of a body"
    )
    max_in_flight: int = _doc(2048, "requests that run or wait; one more gets 429")
    max_schema_bytes: int = _doc(1 << 20, "size of a JSON schema or grammar")
    cors_allow_origin: tuple[str, ...] = _doc((), "origins that browsers may call from; default: none")
    drain_s: float = _doc(30.0, "seconds that requests in flight have to finish after SIGTERM")
    health_patience_s: float = _doc(20.0, "seconds without progress after which /health goes red")
    max_engine_failures: int = _doc(5, "engine processes in a row that may end within a minute; then the server ends")
    log_prompts: bool = _doc(False, "write prompts to the log")
    log_format: Literal["text", "json"] = _doc("text", "json: every line of the log is a JSON object")
    ssl_certfile: str | None = _doc(None, "certificate (PEM, with its chain) of a server that speaks HTTPS")
    ssl_keyfile: str | None = _doc(None, "private key of the certificate; default: it is in the same file")
    ssl_ca_certs: str | None = _doc(
        None, "authorities (PEM) of client certificates, of which every client must have one"
    )
    ui: bool = _doc(True, "answer /ui, the page that shows a running server")
    otlp_endpoint: str | None = _doc(
        None, "OpenTelemetry collector (OTLP over HTTP, such as http://localhost:4318) that gets traces of requests"
    )
    compat_metrics: bool = _doc(False, "also export the names sglang:... and vllm:...")

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, limit: str) -> None:
            if not ok:
                raise ConfigError(f"{name} is {getattr(self, name)!r} but must be {limit}")

        check(0 <= self.port <= 65535, "port", "in [0, 65535]")
        check(1 <= self.dp <= MAX_REPLICAS, "dp", f"in [1, {MAX_REPLICAS}]")
        most = self.max_dp is None or self.dp <= self.max_dp <= MAX_REPLICAS
        check(most, "max_dp", f"in [dp, {MAX_REPLICAS}], where dp is {self.dp}")
        has_room = 0 <= self.prefill_replicas <= MAX_REPLICAS - (self.max_dp or self.dp)
        check(has_room, "prefill_replicas", f"in [0, {MAX_REPLICAS}], together with dp or max_dp")
        check(self.ttft_objective_s > 0, "ttft_objective_s", "positive")
        check(self.max_body_bytes >= 1024, "max_body_bytes", "at least 1024")
        check(self.max_json_values >= 1024, "max_json_values", "at least 1024")
        needs = "set only with ssl_certfile"
        check(self.ssl_keyfile is None or self.ssl_certfile is not None, "ssl_keyfile", needs)
        check(self.ssl_ca_certs is None or self.ssl_certfile is not None, "ssl_ca_certs", needs)
        least = self.max_body_bytes
        check(self.bytes_in_flight >= least, "max_in_flight_bytes", f"at least max_body_bytes ({least:,})")
        check(self.max_in_flight >= 1, "max_in_flight", "at least 1")
        check(self.max_engine_failures >= 1, "max_engine_failures", "at least 1")
        check(self.drain_s >= 0, "drain_s", "at least 0")
        check(self.health_patience_s > 0, "health_patience_s", "positive")

    @property
    def bytes_in_flight(self) -> int:
        """Size of all requests and programs that may be in flight together."""
        return 2 * self.max_body_bytes if self.max_in_flight_bytes is None else self.max_in_flight_bytes
