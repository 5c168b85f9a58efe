"""`ramet chat` and `ramet bench`, in this process and over HTTP; `ramet completion` and `ramet doctor --json`."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ramet.cli.chat import Chat, figures
from ramet.cli.chat_models import LocalModel, Reply
from ramet.cli.main import main
from ramet.errors import InvalidRequest
from ramet.lang.graph.sampling import Sampling

TINY = ["tiny-random", "--device", "cpu", "--num-kv-tokens", "2048"]
FEW = ["--max-tokens", "6", "--temperature", "0"]


@pytest.fixture(scope="module")
def model() -> Iterator[LocalModel]:
    with contextlib.closing(LocalModel("tiny-random", {"device": "cpu", "num_kv_tokens": 4096})) as model:
        yield model


def chat_of(model: LocalModel, **fields: Any) -> tuple[Chat, io.StringIO]:
    notes = io.StringIO()
    sampling = Sampling(max_tokens=6, temperature=0.0, top_p=1.0)
    return Chat(model, sampling, Console(file=notes, width=200), **fields), notes


def test_what_is_piped_in_is_one_message_and_only_the_answer_is_on_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello,\nyou\n"))
    assert main(["chat", *TINY, *FEW]) == 0
    first = capsys.readouterr()
    assert "prompt tokens" in first.err
    assert "prompt tokens" not in first.out
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello,\nyou\n"))
    assert main(["chat", *TINY, *FEW, "--quiet"]) == 0
    second = capsys.readouterr()
    assert second.out == first.out
    assert "tokens" not in second.err


def test_an_empty_pipe_and_a_server_that_is_not_there_are_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["chat", *TINY]) == 1
    assert "there is no message" in capsys.readouterr().err
    assert main(["chat", "--url", "http://127.0.0.1:9"]) == 1
    assert "no server answers" in capsys.readouterr().err
    assert main(["chat", "--url", "http://127.0.0.1:9", "--num-kv-tokens", "5"]) == 1
    assert "--num-kv-tokens is the server's affair" in capsys.readouterr().err


def test_a_second_turn_computes_only_what_is_new(model: LocalModel, capsys: pytest.CaptureFixture[str]) -> None:
    chat, notes = chat_of(model)
    first = chat.ask("A question that nobody asked")
    second = chat.ask("And?")
    assert first.prompt_tokens is not None
    assert second.cached_tokens is not None
    assert second.cached_tokens >= first.prompt_tokens - 1
    assert "cached)" in notes.getvalue()
    assert capsys.readouterr().out == f"{first.text}\n{second.text}\n"
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2


def test_commands_change_the_conversation(model: LocalModel, tmp_path: Path) -> None:
    chat, notes = chat_of(model, system="Be brief.")
    file = tmp_path / "talk.json"
    chat.converse(iter(["Hi", "", f"/save {file}", "/undo", "/set max_tokens 3", "/help", "/system"]))
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    assert chat.sampling.max_tokens == 3
    for shown in ("saved 3 messages", "max_tokens 3", "/retry", "Be brief."):
        assert shown in notes.getvalue()
    chat.converse(iter([f"/load {file}", "/retry", "/quit", "never asked"]))
    assert [m["content"] for m in json.loads(file.read_text())][:2] == [m["content"] for m in chat.messages[:2]]
    assert len(chat.messages) == 3
    chat.command("/system Another")
    assert chat.messages == [{"role": "system", "content": "Another"}]
    chat.command("/reset")
    assert len(chat.messages) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/fly", "no command /fly"),
        ("/undo", "nothing to take back"),
        ("/set top_k 3", "no setting 'top_k'"),
        ("/set seed x", "a number, not 'x'"),
        ("/load /nonexistent/file", "cannot read"),
        ("/save /nonexistent/file", "cannot write"),
    ],
)
def test_a_wrong_command_is_an_error_and_the_conversation_goes_on(model: LocalModel, line: str, message: str) -> None:
    chat, notes = chat_of(model)
    with pytest.raises(InvalidRequest, match=message):
        chat.command(line)
    chat.converse(iter([line]))
    assert "error:" in notes.getvalue()


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(model: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, notes = chat_of(model)

    class Stopped(io.StringIO):
        def write(self, text: str) -> int:
            monkeypatch.setattr("sys.stdout", sys.__stdout__)
            raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdout", Stopped())
    reply = chat.ask("Hi")
    assert reply.finish_reason == "stopped"
    assert "stopped" in notes.getvalue()
    assert chat.messages[-1]["role"] == "assistant"
    monkeypatch.undo()
    assert chat.ask("Go on").finish_reason in ("length", "stop")


def test_figures_say_what_is_known() -> None:
    assert figures(Reply()) == ""
    reply = Reply(
        finish_reason="length", prompt_tokens=10, cached_tokens=0, completion_tokens=11, first_s=0.5, total_s=1.5
    )
    assert (
        figures(reply)
        == "10 prompt tokens (0 cached) · first after 500 ms · 11 tokens at 10 a second · cut at max_tokens"
    )


def test_bench_prints_a_table_and_a_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    load = ["--requests", "6", "--concurrency", "3", "--shared-words", "20", "--own-words", "5", "--output-tokens", "4"]
    assert main(["bench", *TINY, *load]) == 0
    out = capsys.readouterr().out
    assert "first token, ms" in out
    found = json.loads(out.splitlines()[-1])
    assert found["output_tokens"] == 24
    assert found["hit_rate"] > 0.3
    assert found["first_token_ms"]["p50"] <= found["request_ms"]["max"]
    assert main(["bench", *TINY, *load, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["prompt_tokens"] == found["prompt_tokens"]
    assert main(["bench", *TINY, "--requests", "0"]) == 1


def test_bench_prints_the_two_tables_with_hit_rates(capsys: pytest.CaptureFixture[str]) -> None:
    load = ["--requests", "2", "--concurrency", "2", "--shared-words", "8", "--own-words", "2", "--output-tokens", "2"]
    assert main(["bench", *TINY, "--table", *load]) == 0
    out = capsys.readouterr().out
    assert out.index("tiny-random: clients") < out.index("tiny-random: workloads, 2 at a time")
    rows = json.loads(out.splitlines()[-1])
    assert [name for name in rows if "at a time" in name] == [
        f"{kind}, {count} at a time" for kind in ("unique", "80 % shared") for count in (1, 10, 50, 100)
    ]
    assert [row["requests"] for row in rows.values()] == [2, 10, 50, 100, 2, 10, 50, 100, 2, 2, 8, 6]
    assert rows["80 % shared, 100 at a time"]["hit_rate"] > 0.4 > rows["unique, 100 at a time"]["hit_rate"]
    assert rows["conversations of 4 turns"]["hit_rate"] > 0.4


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_all_commands_and_flags(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("serve", "chat", "doctor", "chunked-prefill-size", "log-level"):
        assert word in script
    assert "model-path" not in script  # hidden


def completed(*words: str) -> list[str]:
    """What bash offers for the last word."""
    with contextlib.redirect_stdout(io.StringIO()) as script:
        main(["completion", "bash"])
    line = (
        f'{script.getvalue()}\nCOMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_ramet; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", line, "bash", *words], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_commands_flags_and_values() -> None:
    assert completed("ramet", "do") == ["doctor"]
    assert "--chunked-prefill-size" in completed("ramet", "serve", "--chunk")
    assert completed("ramet", "serve", "--log-level", "d") == ["debug"]
    assert completed("ramet", "keys", "a") == ["add"]
    assert completed("ramet", "completion", "z") == ["zsh"]


def test_doctor_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "--json", "--port", "0"])
    findings = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert {"ramet", "python", "torch", "triton", "server", "cpu", "memory", "port", "cache", "smollm2-135m"} <= set(
        findings
    )
    assert findings["port"]["status"] == "note"
    assert status == int(any(finding["status"] == "problem" for finding in findings.values()))


def test_doctor_sees_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        main(["doctor", "--port", str(port)])
    out = capsys.readouterr().out
    assert f"{port}: Address already in use" in out
    assert "choose another with --port" in out
