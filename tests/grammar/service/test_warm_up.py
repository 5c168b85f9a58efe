from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("numba")

_CHECK = """
from ramet.grammar.machine import walker
from ramet.grammar.json_schema.frames import tables
from ramet.grammar.regular import partition, strings
from ramet.grammar.service.warm_up import load_loops
from numba.core.registry import CPUDispatcher

load_loops()
loops = [one for module in (walker, partition, tables, strings) for one in vars(module).values()]
assert len(loops) > 20
print([one.__name__ for one in loops if isinstance(one, CPUDispatcher) and not one.signatures])
"""
_INSIDE = ["step"]  # other loops alone call it, with whose code it is loaded


def test_every_loop_is_compiled_before_the_first_grammar_so_that_no_mask_waits_for_it() -> None:
    found = subprocess.run([sys.executable, "-c", _CHECK], capture_output=True, text=True, timeout=300, check=True)
    assert found.stdout.strip() in ("[]", str(_INSIDE))
