"""`gen(..., draft=text)`: the value is the same, and the draft is where drafts are verified."""

from __future__ import annotations

from typing import Any

import pytest

from ramet import Engine, State, function, gen
from ramet.errors import InvalidRequest
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.speculation.speculation import Speculation, StepTimes
from ramet.runtime.testing.scripted_model import ScriptedEngine
from ramet.runtime.types import NO_OPTIONS


@function
def edit(s: State, draft: str) -> State:
    s += "An edited file: "
    s += gen("file", max_tokens=100, temperature=0, ignore_eos=True, logit_bias={65: 9, 66: 9, 67: 9}, draft=draft)
    return s


def test_a_draft_changes_no_value(tiny_model: LoadedModel) -> None:
    values = set()
    with Engine(tiny_model, num_kv_tokens=4096, context_length=512, speculative="auto") as engine:
        for draft in ("", "something else " * 2_000, "AABBCCABC" * 10):
            values.add(str(edit.run(draft=draft, backend=engine)["file"]))
    assert len(values) == 1


class FixedTimes(StepTimes):
    """Times of steps that no clock has measured."""

    def knows(self, num_tokens: int, kv_len: float) -> bool:
        return True

    def seconds(self, num_tokens: int, kv_len: float) -> float:
        return 1 + 0.05 * (num_tokens - 1)


def test_meta_and_explain_say_how_many_drafted_tokens_were_right(tiny_model: LoadedModel) -> None:
    with Engine(tiny_model, num_kv_tokens=4096, context_length=512, speculative="auto") as engine:
        engine._core.speculation = Speculation(FixedTimes())
        value = str(edit.run(draft="", backend=engine)["file"])
        for _ in range(3):
            state = edit.run(draft=value, backend=engine)
    usage = state.meta("file")["usage"]
    assert usage.drafted_tokens >= usage.accepted_tokens > 20
    assert state.usage.accepted_tokens == usage.accepted_tokens
    found = state.explain()
    assert f"{usage.accepted_tokens} of {usage.drafted_tokens} drafted ones were right" in str(found)
    assert found.to_dict()["measured"][0]["accepted"] == usage.accepted_tokens


def test_a_draft_reaches_the_engine() -> None:
    class Asked(ScriptedEngine):
        """Keeps the drafts of requests."""

        def __init__(self) -> None:
            super().__init__(["answer"])
            self.drafts: list[str] = []

        def submit(self, prompt: Any, sampling: Any = None, options: Any = NO_OPTIONS, **others: Any) -> Any:
            self.drafts.append(options.draft)
            return super().submit(prompt, sampling, options, **others)

    engine = Asked()
    with engine:
        edit.run(draft="what is expected", backend=engine)
    assert engine.drafts == ["what is expected"]


@pytest.mark.parametrize("draft", [7, None, "\ud800"])
def test_a_draft_that_is_no_text_is_refused_where_it_is_written(draft: Any) -> None:
    with pytest.raises(InvalidRequest, match="draft"):
        gen("x", draft=draft)
