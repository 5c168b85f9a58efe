# /// script
# requires-python = ">=3.11"
# dependencies = []
# [tool.ramet]
# npm = "@anthropic-ai/claude-code@>=1 <3"
# ///
"""Claude Code, which speaks Anthropic's Messages API."""

import json
import tempfile

from tour import agent, call, run, says

QUIET = {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_TELEMETRY": "1", "ANTHROPIC_API_KEY": "none"}


def said(url, options, *answers):
    with tempfile.TemporaryDirectory() as folder:
        command = ["-p", says(*answers), "--allowedTools", "Bash", *options]
        return agent(__file__, command, folder, ANTHROPIC_BASE_URL=url, **QUIET)


def text(url):
    assert "Hello there" in said(url, [], "Hello there")


def stream(url):
    lines = said(url, ["--output-format", "stream-json", "--verbose"], "Hello there").splitlines()
    kinds = [json.loads(line)["type"] for line in lines]
    assert kinds[-1] == "result"
    assert "assistant" in kinds


def tools(url):
    listing = call("Bash", command="ls", description="List files")
    assert "There is one file." in said(url, [], listing, "There is one file.")


run()
