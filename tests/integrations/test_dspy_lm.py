"""DSPy's modules on Ramet's backends. Skipped where DSPy is not installed."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from ramet import MockBackend
from ramet.integrations.dspy_lm import as_dspy_lm

dspy = pytest.importorskip("dspy", minversion="3.4")

ANSWER = "[[ ## answer ## ]]\n4\n\n[[ ## completed ## ]]"


def test_a_module_reads_what_the_backend_writes_and_counts_its_tokens() -> None:
    lm = as_dspy_lm(MockBackend({"2 + 2": ANSWER}), cache=False)
    with dspy.context(lm=lm):
        assert dspy.Predict("question -> answer: int")(question="2 + 2?").answer == 4
    (call,) = lm.history
    assert call["usage"]["completion_tokens"] > 0
    assert "2 + 2?" in call["messages"][-1]["content"]


def test_an_async_module_and_many_threads_use_one_backend() -> None:
    lm = as_dspy_lm(MockBackend({"question": ANSWER}), cache=False)
    found: list[int] = []

    def ask(number: int) -> None:
        with dspy.context(lm=lm):
            found.append(dspy.Predict("question -> answer: int")(question=str(number)).answer)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [4] * 8

    async def ask_here() -> Any:
        with dspy.context(lm=lm):
            return await dspy.Predict("question -> answer: int").acall(question="9")

    assert asyncio.run(ask_here()).answer == 4


def test_the_json_adapters_schema_constrains_the_answer() -> None:
    backend = MockBackend(["anything"])  # what fits the schema is written in its place
    lm = as_dspy_lm(backend, cache=False)
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        found = dspy.Predict("question -> answer: int, is_sure: bool")(question="2 + 2?")
    assert isinstance(found.answer, int)
    assert isinstance(found.is_sure, bool)


def test_settings_reach_the_generation_and_others_are_refused_by_name() -> None:
    from dspy import lm15

    lm = as_dspy_lm(MockBackend({"go": "a b c d"}), cache=False)

    def ask(**config: Any) -> Any:
        message = lm15.Message.user("go")
        return lm(lm15.Request(model="ramet", messages=(message,), config=lm15.Config(**config)))

    assert ask(max_tokens=2).finish_reason == "length"
    assert ask(stop=("c",)).message.parts[0].text == "a b "
    with pytest.raises(Exception, match="service_tier"):
        ask(service_tier="fast")
    with pytest.raises(Exception, match="temperature"):
        ask(temperature=-1.0)


def test_a_failure_of_the_backend_is_raised_and_the_next_call_is_answered() -> None:
    lm = as_dspy_lm(
        MockBackend({"question": ANSWER}, failures={"bad": ValueError("no luck")}), cache=False, num_retries=0
    )
    with dspy.context(lm=lm):
        with pytest.raises(Exception, match="no luck"):
            dspy.Predict("question -> answer: int")(question="bad")
        assert dspy.Predict("question -> answer: int")(question="good").answer == 4
