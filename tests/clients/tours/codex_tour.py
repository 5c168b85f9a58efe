# /// script
# requires-python = ">=3.11"
# dependencies = []
# [tool.ramet]
# npm = "@openai/codex@>=0.30 <1"
# ///
"""The Codex CLI, which speaks the Responses API."""

import tempfile
from pathlib import Path

from tour import agent, call, run, says

CONFIG = """
model = "default"
model_provider = "here"
[model_providers.here]
name = "here"
base_url = "{url}/v1"
wire_api = "responses"
request_max_retries = 0
stream_max_retries = 0
"""


def said(url, *answers):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, ".codex").mkdir()
        Path(folder, ".codex", "config.toml").write_text(CONFIG.format(url=url))
        return agent(__file__, ["exec", "--skip-git-repo-check", says(*answers)], folder)


def text(url):
    assert "Hello there" in said(url, "Hello there")


def tools(url):
    assert "There is one file." in said(url, call("exec_command", cmd="ls"), "There is one file.")


run()
