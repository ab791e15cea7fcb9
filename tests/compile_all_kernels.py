"""Every shipped configuration of the Triton kernels for sm_80, sm_90 and sm_100; `make test-compile` names it."""

from __future__ import annotations

import pytest

import compiled


@pytest.mark.parametrize(
    "case",
    compiled.shipped(),
    ids=str,
)
def test_configuration(case: compiled.Case) -> None:
    compiled.check(case)
