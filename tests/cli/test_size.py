"""`ramet size` as it is typed, and the table that it makes for the documents."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ramet.cli.main import main

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "benchmarks" / "model_configs"
ORDER = (
    "Llama-2-7b",
    "Llama-3.1-8B",
    "Llama-2-13b",
    "Qwen2.5-32B",
    "Llama-3.3-70B",
    "Llama-3.1-405B",
    "Mixtral-8x7B",
    "Qwen3-235B-A22B",
)


def path(name: str) -> str:
    return str(CONFIGS / f"{name}.json")


def test_a_model_that_fits_is_shown_with_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["size", path("Llama-3.3-70B"), "--gpus", "8"]) == 0
    shown = capsys.readouterr().out
    assert "70.55 billion weights" in shown
    assert "fits on 2 x h100: ramet serve Llama-3.3-70B --tp 2" in shown
    assert "4 replicas" in shown


def test_one_that_does_not_fit_is_shown_with_what_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["size", path("Llama-3.3-70B"), "--gpu", "l4", "--tp", "1"]) == 1
    shown = capsys.readouterr().out
    assert "does not fit on 1 x l4" in shown
    assert "fits: 8 x l4, --tp 8" in shown


def test_json_has_every_number(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "Some-Model"
    folder.mkdir()
    (folder / "config.json").write_text((CONFIGS / "Llama-3.1-8B.json").read_text())
    assert main(["size", str(folder), str(folder / "config.json"), "--json", "--context-length", "16384"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == second
    assert (first["model"], first["tp"], first["flags"]) == ("Some-Model", 1, ["--context-length 16384"])
    assert first["kv_tokens"] > first["longest_context"] == 16_384
    assert main(["size", path("Llama-3.1-405B"), "--json", "--gpu", "l4"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["fits"] is False
    assert record["nearest"]


def test_what_this_version_cannot_do_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["size", path("Mixtral-8x7B"), "--quantization", "int4"]) == 0
    shown = capsys.readouterr().out
    assert "only transformers runs experts (--model-impl transformers): what follows is arithmetic" in shown
    assert "int4 weights on a GPU are not supported yet" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h9"], "gpu is 'h9' but must be one of l4, rtx4090"),
        (["--quantization", "fp7"], "must be one of none, fp8, int8, int4"),
        (["--tp", "3"], "--tp may be 1, 2, 4, 8"),
        (["--tp", "0"], r"tp is 0 but must be in \[1, 1024\]"),
        (["--tp", "4", "--gpus", "2"], "tp is 4 but there are 2 GPUs"),
        (["--context-length", "1"], "context_length is 1"),
        (["--context-length", "999999"], "trained for 131,072"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["size", path("Llama-3.1-8B"), *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "config.json"),
        ("[1]", "config.json"),
        ('{"architectures": 7}', "not iterable"),
        ('{"architectures": ["Llam"]}', "Llam"),
    ],
)
def test_broken_files_are_refused(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    assert main(["size", str(file)]) == 1
    shown = capsys.readouterr().err
    assert "error:" in shown
    assert message in shown
    assert "Traceback" not in shown
    assert main(["size", str(tmp_path / "nothing")]) == 1
    assert "no model" in capsys.readouterr().err


def test_the_table_of_the_documents_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["size", "--markdown", *map(path, ORDER)]) == 0
    table = capsys.readouterr().out
    assert table in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
