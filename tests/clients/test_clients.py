"""Clients that nobody here wrote, each on its tour of a server: what they can do is the table in docs/clients.md.

A tour is a script in tours/, whose head names the client's packages by range. `python tests/clients/test_clients.py`
writes the table anew.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

Scripted = Any  # of conftest.py, which importlib mode cannot import by name

TOURS = Path(__file__).parent / "tours"
TOUR_S = 280  # the slowest client reads its own files for half a minute
DOCUMENT = Path(__file__).parents[2] / "docs" / "clients.md"
# What tours visit: the columns of the table.
FEATURES = {
    "text": "answers",
    "stream": "piece by piece",
    "tools": "tool calls and their results",
    "tools_streamed": "tool calls piece by piece",
    "typed": "answers read by a type or schema",
    "conversation": "earlier turns come from the cache",
    "reasoning": "reasoning apart",
    "logprobs": "log-probabilities",
    "errors": "errors of the client's own classes",
}
OTHERS = {  # features of a few clients, which the table names
    "count": "tokens of a prompt counted",
    "stored": "fetched again",
    "background": "in the background",
    "cancel": "cancelled",
    "responses": "through the Responses API, too",
    "select": "choices compared",
    "branches": "branches",
    "batch": "batches",
    "server": "server information, cache flushed",
    "score": "log-likelihoods of answers",
    "rolling": "of whole texts",
    "task": "a task of a file by its command line",
    "benchmark": "as the backends sglang, sglang-oai and vllm",
}


@dataclass(frozen=True, eq=False)
class Tour:
    """`is_slow`: its packages are not among the development tools, so they are fetched first."""

    script: str
    client: str
    is_slow: bool = True

    @property
    def source(self) -> str:
        return (TOURS / self.script).read_text(encoding="utf-8")

    @property
    def features(self) -> list[str]:
        """In the order of the script."""
        if self.script.endswith(".mjs"):
            (named,) = re.findall(r"^await run\(\{ (.*) \}\);$", self.source, re.MULTILINE)
            return [name.strip() for name in named.split(",")]
        return re.findall(r"^def (\w+)\(url\):$", self.source, re.MULTILINE)

    @functools.cached_property
    def head(self) -> dict[str, Any]:
        """The metadata at the script's head: its packages, and `tool.ramet`.

        `npm`: the package of an agent. `beside_torch`: the packages are put on top of this environment, which has torch
        already, and without the client's own requirements, which want a GPU.
        """
        lines = self.source.split("# /// script\n")[1].split("# ///\n")[0].splitlines()
        return tomllib.loads("\n".join(line.removeprefix("#").strip() for line in lines))

    @property
    def packages(self) -> str:
        """The client's packages and their ranges."""
        if self.script.endswith(".mjs"):
            wanted = json.loads((TOURS / "package.json").read_text(encoding="utf-8"))["dependencies"]
            imported = [name for name in wanted if f'from "{name}"' in self.source and name != "zod"]
            return ", ".join(f"{name} {wanted[name]}" for name in imported)
        npm: str | None = self.head.get("tool", {}).get("ramet", {}).get("npm")
        return npm or ", ".join(name for name in self.head["dependencies"] if re.search("[<>]", name))

    def command(self, url: str) -> list[str]:
        """How the tour is run: with this Python if it has the client, else with one that uv makes.

        Skips where the machine lacks what runs the client (node, npm, uv): the suite must pass there, too. `make test`
        installs the npm clients where npm is, and uv with the development requirements.
        """
        path = str(TOURS / self.script)
        if self.script.endswith(".mjs"):
            if shutil.which("node") is None:
                pytest.skip("node is not installed")
            if not (TOURS / "node_modules").is_dir():
                pytest.skip("the npm clients are not installed: `make test` does that where npm is")
            return ["node", path, url]
        own, needed = self.head.get("tool", {}).get("ramet", {}), self.head["dependencies"]
        if "npm" in own and shutil.which("npx") is None:
            pytest.skip("npm is not installed")
        names = [re.split(r"[\[<>=]", name)[0].replace("-", "_") for name in needed]
        if all(importlib.util.find_spec(name) for name in names):
            return [sys.executable, path, url]
        beside = Path(sys.executable).with_name("uv")
        uv = str(beside) if beside.exists() else shutil.which("uv")
        if uv is None:
            pytest.skip("uv is not installed")
        if "beside_torch" not in own:
            return [uv, "run", "--quiet", "--script", path, url]
        layers = [part for name in needed for part in ("--with", name)]
        config = ["--no-project", "--active", "--config-file", str(TOURS / "uv.toml")]
        return [uv, "run", "--quiet", *config, *layers, "python", path, url]

    @functools.cached_property
    def _made(self) -> dict[str, dict[str, str | None]]:
        return {}

    def made(self, url: str) -> dict[str, str | None]:
        """Make the tour, once. Returns feature -> what went wrong there, or None."""
        if url not in self._made:
            here = {**os.environ, "VIRTUAL_ENV": sys.prefix}  # on top of which uv puts packages
            done = subprocess.run(
                self.command(url), env=here, capture_output=True, text=True, timeout=TOUR_S, check=False
            )
            lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
            if not lines and "Failed to fetch" in done.stderr:  # no network; a version that is not there says otherwise
                pytest.skip("the client's packages cannot be fetched")
            assert lines, done.stderr[-4000:]
            self._made[url] = {line["name"]: line["error"] for line in lines}
        return self._made[url]


CLIENTS = (
    Tour("openai_chat_tour.py", "OpenAI's Python client, chats", is_slow=False),
    Tour("openai_responses_tour.py", "OpenAI's Python client, responses", is_slow=False),
    Tour("openai_tour.mjs", "OpenAI's npm client, chats and responses", is_slow=False),
    Tour("anthropic_tour.py", "Anthropic's Python client", is_slow=False),
    Tour("agents_tour.py", "Agents SDK, its default model"),
    Tour("langchain_tour.py", "LangChain and LangGraph"),
    Tour("litellm_tour.py", "litellm, chats and messages"),
    Tour("instructor_tour.py", "instructor"),
    Tour("pydantic_ai_tour.py", "pydantic-ai, its three models"),
    Tour("ai_sdk_tour.mjs", "AI SDK, its four models", is_slow=False),
    Tour("smolagents_tour.py", "smolagents"),
    Tour("dspy_tour.py", "DSPy"),
    Tour("sglang_tour.py", "SGLang's frontend"),
    Tour("sglang_bench_tour.py", "SGLang's benchmark"),
    Tour("lm_eval_tour.py", "lm-eval"),
    Tour("codex_tour.py", "Codex CLI"),
    Tour("claude_code_tour.py", "Claude Code"),
)
VISITS = [
    pytest.param(
        tour, name, id=f"{tour.script.split('_tour')[0]}-{name}", marks=[pytest.mark.slow] if tour.is_slow else []
    )
    for tour in CLIENTS
    for name in tour.features
]
AGENTS = [tour for tour in CLIENTS if tour.script in ("codex_tour.py", "claude_code_tour.py")]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("tour", "feature"), VISITS)
def test_client(scripted: Scripted, tour: Tour, feature: str) -> None:
    found = tour.made(scripted.url)
    assert found[feature] is None, found[feature]


@pytest.mark.slow  # installs the agent
@pytest.mark.timeout(300)
@pytest.mark.parametrize("tour", AGENTS, ids=lambda tour: tour.client)
def test_the_second_request_of_a_coding_agent_is_nearly_all_cached(scripted: Scripted, tour: Tour) -> None:
    before = len(scripted.engine.usages)
    tour.made(scripted.url)
    own = scripted.engine.usages[before:] or scripted.engine.usages
    large = [usage for usage in own if usage.prompt_tokens > 20_000]
    first, last = large[-2:]  # of the tour's last visit, a tool call and the answer to its result
    assert last.prompt_tokens > first.prompt_tokens
    assert last.cached_tokens >= 0.95 * last.prompt_tokens


def test_every_tour_is_a_client_here_and_visits_what_the_table_knows() -> None:
    assert {tour.script for tour in CLIENTS} == {path.name for path in TOURS.iterdir() if "_tour." in path.name}
    known = {*FEATURES, *OTHERS}
    for tour in CLIENTS:
        assert tour.features, tour
        assert set(tour.features) <= known, tour


def table() -> str:
    rows = [["client", "packages", *FEATURES.values(), "besides"], ["---"] * (len(FEATURES) + 3)]
    for tour in CLIENTS:
        besides = "; ".join(OTHERS[name] for name in tour.features if name in OTHERS)
        rows.append(
            [tour.client, f"`{tour.packages}`", *("✓" if n in tour.features else "" for n in FEATURES), besides]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def written(document: str) -> str:
    """The document with its table made anew."""
    start = document.index("| client |")
    return document[:start] + table() + document[document.index("\n\n", start) :]


def test_the_table_in_the_documents_is_that_of_the_tours() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    assert document == written(document), f"run python {Path(__file__).name}"


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
