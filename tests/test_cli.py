"""The `ramet` command."""

from __future__ import annotations

from pathlib import Path

import pytest

from ramet.cli import main


def test_pull_prints_the_path_of_a_local_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main(["pull", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}\n"


def test_pull_of_an_unknown_model_fails_with_the_catalogue_and_no_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["pull", "no-such-model"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: no model 'no-such-model'")
    assert "smollm2-135m" in captured.err
    assert "Traceback" not in captured.err


def test_doctor_names_device_versions_memory_and_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAMET_CACHE_DIR", str(tmp_path))
    damaged = tmp_path / "models" / "gemma3-270m" / "gemma-3-270m-q4_k_m.gguf"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"half")
    main(["doctor"])
    lines = {line[:14].strip(): line[14:] for line in capsys.readouterr().out.splitlines()}
    assert {"ramet", "python", "torch", "triton", "cpu", "memory", "cache"} <= lines.keys()
    assert "device" in lines or "cuda:0" in lines
    assert str(tmp_path) in lines["cache"]
    assert "ramet pull smollm2-135m" in lines["smollm2-135m"]
    assert "repairs" in lines["gemma3-270m"]


@pytest.mark.parametrize("arguments", [[], ["fly"], ["pull", "a", "b"]])
def test_wrong_arguments_exit_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: ramet" in capsys.readouterr().err


@pytest.mark.model
def test_pull_of_the_default_model_prints_its_path(smollm2_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull"]) == 0
    assert capsys.readouterr().out.strip() == str(smollm2_path)
