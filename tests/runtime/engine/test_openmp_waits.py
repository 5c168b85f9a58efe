"""Threads that wait for others sleep soon, unless the user says otherwise."""

from __future__ import annotations

import pytest

from ramet.runtime.engine.openmp_waits import SPIN_COUNT, limit_spinning


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": str(SPIN_COUNT)}),
        ({"HOME": "/"}, {"HOME": "/", "GOMP_SPINCOUNT": str(SPIN_COUNT)}),
        ({"GOMP_SPINCOUNT": "30000"}, {"GOMP_SPINCOUNT": "30000"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_spinning_is_limited_unless_the_user_has_decided(given: dict[str, str], expected: dict[str, str]) -> None:
    limit_spinning(given)
    assert given == expected
