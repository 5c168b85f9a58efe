"""Every layer once, in about two seconds: a program on a real engine with a fork, a regex, a choice and the cache."""

from __future__ import annotations

import re

from ramet import Engine, State, function, gen, select
from ramet.runtime.models.catalog import TINY_MODEL


@function(temperature=0)
def tiny(s: State, word: str) -> None:
    with s.user():
        s += f"Say {word}."
    with s.assistant():
        left, right = branches = s.fork(2)
        left += gen("free", max_tokens=4, ignore_eos=True)
        right += gen("number", int, regex="[1-9][0-9]")
        branches.join()
        s += select("best", ["yes", "no"])


def test_every_layer_once() -> None:
    with Engine(TINY_MODEL, num_kv_tokens=2048) as engine:
        cold, warm = tiny.run(word="tea", backend=engine), tiny.run(word="tea", backend=engine)
        for state in (cold, warm):
            (number,) = [n for n in state["number"] if n is not None]
            assert re.fullmatch("[1-9][0-9]", str(number))
            assert state["best"] in ("yes", "no")
            assert "Say tea." in state.text()
        assert warm.text() == cold.text()
        assert warm.usage.computed_tokens < cold.usage.computed_tokens
        engine.check_integrity()
