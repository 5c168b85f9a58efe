"""The `ramet` command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ramet.cli.main import main


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


@pytest.mark.parametrize(
    ("image", "driver", "is_mounted", "notes"),
    [
        (None, None, False, []),
        ("cpu", None, True, []),
        ("cpu", "NVIDIA 580.1", True, ["note: image: there is an NVIDIA driver, which this image does not use"]),
        (
            "cuda",
            None,
            False,
            ["note: image: the container sees no GPU: docker run --gpus all", "docker run -v ramet-mo"],
        ),
        ("cuda", "NVIDIA 580.1", True, []),
    ],
)
def test_doctor_knows_the_images_and_how_their_containers_are_started(
    image: str | None,
    driver: str | None,
    is_mounted: bool,
    notes: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("ramet.cli.doctor._driver", lambda: driver)
    monkeypatch.setattr("os.path.ismount", lambda path: is_mounted)
    monkeypatch.delenv("RAMET_IMAGE", raising=False)
    if image is not None:
        monkeypatch.setenv("RAMET_IMAGE", image)
    main(["doctor"])
    said = capsys.readouterr().out
    assert (f"{image}, of deploy/Dockerfile" in said) == (image is not None)
    found = [line for line in said.splitlines() if line.startswith(("note: image", "note: volume"))]
    assert len(found) == len(notes)
    assert all(note in line for note, line in zip(notes, found, strict=True))


def test_warm_compiles_tells_how_long_it_took_and_starts_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["warm", "tiny-random"]) == 0
    assert capsys.readouterr().out.startswith("warm after ")
    assert main(["warm", "no-such-model"]) == 1


@pytest.mark.parametrize("arguments", [[], ["fly"], ["pull", "a", "b"]])
def test_wrong_arguments_exit_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: ramet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "--prt", "1"], "ramet serve: error: unrecognized arguments: --prt; did you mean --port?"),
        (["serve", "--port", "many"], "ramet serve: error: argument --port: invalid int value: 'many'"),
        (["pull", "a", "b"], "ramet pull: error: unrecognized arguments: b\n"),
    ],
)
def test_what_is_wrong_with_arguments_is_said_without_dozens_of_flags(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert f"`ramet {arguments[0]} --help`" in error
    assert error.count("\n") < 8


def test_a_reader_that_leaves_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "ramet.cli", "pull", str(tmp_path)],
        stdout=writing,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


def test_urls_and_drawings_that_cannot_be_are_errors_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", "--url", "localhost:30000"]) == 1
    assert capsys.readouterr().err == "error: --url is 'localhost:30000', but must be an http:// address\n"
    program = tmp_path / "program.py"
    program.write_text("from ramet import function, gen\n\n@function\ndef f(s):\n    s += 'a' + gen('b')\n")
    missing = tmp_path / "missing" / "x.svg"
    assert main(["explain", str(program), "--draw", str(missing)]) == 1
    captured = capsys.readouterr()
    assert captured.err == f"error: cannot write {missing}: No such file or directory\n"
    assert captured.out == ""


@pytest.mark.model
def test_pull_of_the_default_model_prints_its_path(smollm2_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull"]) == 0
    assert capsys.readouterr().out.strip() == str(smollm2_path)


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_engines_that_are_started_apart_are_refused_with_what_starts_them_together(
    mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "tiny-random", "--disaggregation-mode", mode]) == 1
    assert "--prefill-replicas P --decode-replicas D" in capsys.readouterr().err
