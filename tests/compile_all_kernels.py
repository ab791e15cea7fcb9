"""Every shipped configuration of the Triton kernels for sm_80, sm_90 and sm_100; `make test-compile` names it."""

from __future__ import annotations

import pytest

import compiled


@pytest.mark.parametrize(
    "case",
    compiled.cases(tuple(compiled.DTYPES), compiled.DIMS, ("sm_80", "sm_90", "sm_100")),
    ids=str,
)
def test_configuration(case: compiled.Case) -> None:
    compiled.check(case)
