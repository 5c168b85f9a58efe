"""`ramet chat`: talk with a model, in this process or on a server.

In a terminal this is a conversation. Input from a pipe is one message, or one message a line with --turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from ramet.cli.chat_models import ChatModel, Reply, open_model
from ramet.cli.flags import add_flags, given_values
from ramet.errors import InvalidRequest, RametError
from ramet.lang.graph.sampling import Sampling

HELP = """\
/system TEXT   say who the model is (begins anew); without TEXT: show it
/reset         forget the conversation
/undo          take the last question and answer back
/retry         ask the last question again
/set NAME X    max_tokens, temperature, top_p or seed; without arguments: show them
/save FILE     write the conversation as JSON
/load FILE     go on with a saved one
/help          this list
/quit          end (Ctrl-D as well); Ctrl-C stops an answer
A line that ends with \\ goes on in the next one."""


def add_chat(parser: argparse.ArgumentParser) -> None:
    from ramet.runtime.engine.config import EngineConfig

    parser.description = (
        "Talk with a model. In a terminal: a conversation (/help lists its commands). Through a pipe: one message, and "
        "only the answer on stdout."
    )
    parser.add_argument("model", nargs="?", help="a catalogue name, a directory, a .gguf file or a hub id")
    parser.add_argument("--url", help="talk to this server instead, such as http://127.0.0.1:30000")
    parser.add_argument("--api-key", help="the server's key [$RAMET_API_KEY]")
    parser.add_argument("--system", help="who the model is")
    parser.add_argument("--max-tokens", type=int, metavar="N", default=1024, help="longest answer [1024]")
    parser.add_argument("--temperature", type=float, metavar="X", default=0.7, help="0: always the likeliest [0.7]")
    parser.add_argument("--top-p", type=float, metavar="X", default=0.95, help="[0.95]")
    parser.add_argument("--sampling-seed", type=int, metavar="N", help="the same answers every time")
    parser.add_argument("--turns", action="store_true", help="every line of a pipe is a message of its own")
    parser.add_argument("--quiet", action="store_true", help="no figures about tokens and speed")
    add_flags(parser, EngineConfig, "engine (without --url)")


def run_chat(arguments: argparse.Namespace) -> int:
    """Converse until the input ends."""
    from ramet.runtime.engine.config import EngineConfig

    sampling = Sampling(
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.sampling_seed,
    )
    key = arguments.api_key or os.environ.get("RAMET_API_KEY", "").split(",")[0] or None
    notes = Console(stderr=True, highlight=False, soft_wrap=True)
    is_terminal = sys.stdin.isatty()
    with notes.status("loading the model") if is_terminal else contextlib.nullcontext() as status:
        on_stage = None if status is None else status.update
        model = open_model(arguments.model, arguments.url, key, given_values(arguments, EngineConfig), on_stage)
    with contextlib.closing(model):
        chat = Chat(model, sampling, notes, system=arguments.system, quiet=arguments.quiet)
        if is_terminal:
            notes.print(f"[bold]{model.name}[/]  [dim]/help for commands, Ctrl-D to end[/]")
            chat.converse(_typed_lines())
        elif arguments.turns:
            chat.converse(line.rstrip("\n") for line in sys.stdin)
        else:
            chat.ask(sys.stdin.read().strip())
    return 0


class Chat:
    """A conversation and its commands. Owner: the command's thread."""

    def __init__(
        self, model: ChatModel, sampling: Sampling, notes: Console, *, system: str | None = None, quiet: bool = False
    ) -> None:
        self.model = model
        self.sampling = sampling
        self.messages: list[dict[str, Any]] = []  # Any: JSON
        self._notes = notes
        self._quiet = quiet
        self._system = system
        self._is_over = False
        self._reset()

    def converse(self, lines: Iterator[str]) -> None:
        """Read messages and commands until the input ends."""
        for line in lines:
            if not line.strip():
                continue
            try:
                if line.startswith("/"):
                    self.command(line)
                else:
                    self.ask(line)
            except RametError as error:
                self._notes.print(f"[bold red]error:[/] {error}")
            if self._is_over:
                return

    def ask(self, text: str) -> Reply:
        """Send a message and print the answer as it comes. Ctrl-C ends it and keeps its text so far."""
        if not text:
            raise InvalidRequest("there is no message: write one, or pipe it in")
        self.messages.append({"role": "user", "content": text})
        reply = Reply()
        try:
            with contextlib.closing(self.model.chat(self.messages, self.sampling, reply)) as pieces:
                self._print(pieces)
        except KeyboardInterrupt:
            reply.finish_reason = "stopped"
        except RametError:
            self.messages.pop()
            raise
        sys.stdout.write("\n")
        sys.stdout.flush()
        self.messages.append({"role": "assistant", "content": reply.text})
        if not self._quiet:
            self._notes.print(f"[dim]{figures(reply)}[/]")
        return reply

    def command(self, line: str) -> None:
        """Do what a line such as `/reset` says. Raises InvalidRequest."""
        name, _, rest = line[1:].partition(" ")
        known: dict[str, Callable[[str], None]] = {
            "help": lambda _: self._notes.print(HELP, markup=False),
            "reset": lambda _: self._reset(),
            "system": self._say_system,
            "undo": lambda _: self._take_back(),
            "retry": lambda _: self._retry(),
            "set": self._set,
            "save": self._save,
            "load": self._load,
            "quit": self._quit,
            "exit": self._quit,
        }
        if name not in known:
            raise InvalidRequest(f"there is no command /{name}; /help lists them")
        known[name](rest.strip())

    def _print(self, pieces: Iterator[tuple[str, str]]) -> None:
        is_thinking = False
        for reasoning, text in pieces:
            if reasoning:
                is_thinking = True
                self._notes.print(reasoning, style="dim italic", end="", markup=False)
            if text:
                if is_thinking:
                    self._notes.print("\n")
                    is_thinking = False
                sys.stdout.write(text)
                sys.stdout.flush()

    def _reset(self) -> None:
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def _quit(self, _: str) -> None:
        self._is_over = True

    def _say_system(self, text: str) -> None:
        if text:
            self._system = text
            self._reset()
        else:
            self._notes.print(self._system or "no system message", markup=False)

    def _take_back(self) -> None:
        self._undo()

    def _undo(self) -> str:
        if len(self.messages) < 2 or self.messages[-1]["role"] != "assistant":
            raise InvalidRequest("there is nothing to take back")
        self.messages.pop()
        return str(self.messages.pop()["content"])

    def _retry(self) -> None:
        self.ask(self._undo())

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if name:
            kinds = {"max_tokens": int, "temperature": float, "top_p": float, "seed": int}
            if name not in kinds:
                raise InvalidRequest(f"there is no setting {name!r}; there are {', '.join(kinds)}")
            try:
                self.sampling = msgspec.structs.replace(self.sampling, **{name: kinds[name](value)})
            except ValueError:
                raise InvalidRequest(f"{name} is a number, not {value!r}") from None
        shown = ", ".join(f"{key} {value}" for key, value in self.sampling.said().items())
        self._notes.print(shown)

    def _save(self, file: str) -> None:
        try:
            Path(file or "chat.json").write_text(json.dumps(self.messages, ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            raise InvalidRequest(f"cannot write {file}: {error.strerror}") from None
        self._notes.print(f"saved {len(self.messages)} messages in {file or 'chat.json'}")

    def _load(self, file: str) -> None:
        try:
            found = json.loads(Path(file or "chat.json").read_text())
        except (OSError, ValueError) as error:
            raise InvalidRequest(f"cannot read {file or 'chat.json'}: {error}") from None
        if not isinstance(found, list) or not all(isinstance(m, dict) and "role" in m for m in found):
            raise InvalidRequest(f"{file} holds no list of messages")
        self.messages = found
        first = found[0] if found else {}
        self._system = first.get("content") if first.get("role") == "system" else None
        self._notes.print(f"loaded {len(found)} messages")


def figures(reply: Reply) -> str:
    """Give the number of tokens, how many were cached, and the speed, in one line."""
    parts = []
    if reply.prompt_tokens is not None:
        cached = "" if reply.cached_tokens is None else f" ({reply.cached_tokens:,} cached)"
        parts.append(f"{reply.prompt_tokens:,} prompt tokens{cached}")
    if reply.first_s is not None:
        parts.append(f"first after {1000 * reply.first_s:.0f} ms")
    if reply.completion_tokens is not None:
        after_s = reply.total_s - (reply.first_s or 0.0)
        speed = f" at {(reply.completion_tokens - 1) / after_s:.0f} a second" if after_s > 0.01 else ""
        parts.append(f"{reply.completion_tokens:,} tokens{speed}")
    if reply.finish_reason not in (None, "stop"):
        parts.append({"length": "cut at max_tokens"}.get(reply.finish_reason or "", reply.finish_reason or ""))
    return " · ".join(parts)


def _typed_lines() -> Iterator[str]:
    """Yield the lines typed at the prompt; with history and editing where readline is installed."""
    with contextlib.suppress(ImportError):
        import readline

        readline.parse_and_bind("tab: complete")
    while True:
        try:
            line = input("> ")
            while line.endswith("\\"):
                line = line[:-1] + "\n" + input(". ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        yield line
