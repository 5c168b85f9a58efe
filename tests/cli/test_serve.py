"""`ramet serve`: flags from the configuration dataclasses, keys from the environment, refusals before loading."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from typing import Literal

import pytest

from ramet.cli.flags import ALIASES, OFF_ALIASES, add_flags, given_values
from ramet.cli.main import main
from ramet.cli.serve import add_serve
from ramet.runtime.engine.config import EngineConfig
from ramet.runtime.server.config import ServerConfig


@dataclass(frozen=True)
class Example:
    a_text: str = field(default="x", metadata={"help": "a text of 100 %"})
    a_number: int | None = field(default=None, metadata={"help": "a number; None: as large as possible"})
    a_share: float = field(default=0.5, metadata={"help": "a share"})
    some_keys: tuple[str, ...] = field(default=(), metadata={"help": "keys"})
    a_mode: Literal["fast", "slow"] = field(default="fast", metadata={"help": "a mode"})
    overlap: bool = field(default=True, metadata={"help": "overlap"})
    a_switch: bool = field(default=False, metadata={"help": "switch"})


def parse(*arguments: str, config: type = Example) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    add_flags(parser, config, "example")
    return given_values(parser.parse_args(arguments), config)


def test_only_what_was_given_comes_back() -> None:
    assert parse() == {}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--a-text", "y"], {"a_text": "y"}),
        (["--a-number", "7"], {"a_number": 7}),
        (["--a-share", "0.25"], {"a_share": 0.25}),
        (["--some-keys", "one", "--some-keys", "two"], {"some_keys": ("one", "two")}),
        (["--a-mode", "slow"], {"a_mode": "slow"}),
        (["--no-overlap"], {"overlap": False}),
        (["--disable-overlap-schedule"], {"overlap": False}),
        (["--overlap"], {"overlap": True}),
        (["--a-switch"], {"a_switch": True}),
    ],
)
def test_every_kind_of_field_has_its_flag(arguments: list[str], expected: dict[str, object]) -> None:
    assert parse(*arguments) == expected
    Example(**expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", [["--a-number", "x"], ["--a-mode", "other"], ["--no-such", "1"]])
def test_impossible_values_exit_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*arguments)
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize("config", [ServerConfig, EngineConfig])
def test_every_field_of_a_configuration_is_a_flag_with_help(config: type) -> None:
    parser = argparse.ArgumentParser()
    add_serve(parser)
    shown = parser.format_help()
    flags = {name for action in parser._actions for name in action.option_strings}
    for known in fields(config):
        assert "--" + known.name.replace("_", "-") in flags
        assert known.metadata["help"]
    assert "None:" not in shown
    assert "<class" not in shown


def test_names_of_sglang_mean_the_same_here() -> None:
    known = {known.name for config in (EngineConfig, ServerConfig) for known in fields(config)}
    assert {*ALIASES, *OFF_ALIASES} <= known
    arguments = ["--max-total-tokens", "4096", "--random-seed", "3", "--disable-radix-cache", "--disable-cuda-graph"]
    given = parse(*arguments, config=EngineConfig)
    assert given == {"num_kv_tokens": 4096, "seed": 3, "radix_cache": False, "cuda_graph": False}


def test_keys_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[ServerConfig] = []
    monkeypatch.setattr("ramet.runtime.server.app.serve", lambda model, engine, config, **more: found.append(config))
    monkeypatch.setattr("logging.basicConfig", lambda **more: None)
    monkeypatch.setenv("RAMET_API_KEY", "one, two,")
    monkeypatch.setenv("RAMET_ADMIN_API_KEY", "admin")
    assert main(["serve", "tiny-random"]) == 0
    assert main(["serve", "tiny-random", "--api-key", "three"]) == 0
    assert [config.api_key for config in found] == [("one", "two"), ("three",)]
    assert [config.admin_api_key for config in found] == ["admin", "admin"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model"], "no model 'no-such-model'"),
        (["tiny-random", "--model-path", "other"], "named twice"),
        (["tiny-random", "--page-size", "7"], "page_size is 7"),
        (["tiny-random", "--port", "70000"], "port is 70000"),
        (["tiny-random", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
        (["tiny-random", "--context-length", "100000"], "context_length is 100,000"),  # only the engine knows
    ],
)
def test_what_cannot_be_served_is_an_error_with_its_reason(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logging.basicConfig", lambda **more: None)
    assert main(["serve", *arguments[:1], "--port", "0", "--device", "cpu", *arguments[1:]]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
