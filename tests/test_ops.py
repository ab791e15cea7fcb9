"""The op boundary: what it refuses and how it says so, and which backend runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from atp_fast import ops
from atp_fast.ops import backends


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def arguments(**changes: Any) -> dict[str, Any]:
    """A good call of attention_vjp_effects, with some arguments exchanged."""
    row, z = (2, 4, 5), (2, 4, 5, 6)
    stats = ops.AttentionStats(
        tensor(*z), tensor(*row), tensor(*row, dtype=torch.int64), tensor(*row), tensor(*z)
    )
    good: dict[str, Any] = {
        "q": tensor(2, 4, 5, 8),
        "k": tensor(2, 2, 7, 8),
        "v": tensor(2, 2, 7, 6),
        "q_corrupted": tensor(2, 4, 5, 8),
        "k_corrupted": tensor(2, 2, 7, 8),
        "stats": stats,
        "grad_z": tensor(3, 2, 4, 5, 6),
    }
    return good | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, "q must be a tensor, got list"),
        ({"q": tensor(4, 5, 8)}, ValueError, r"q must be \(batch, heads, positions, head_dim\), got shape \(4, 5, 8\)"),
        ({"q": tensor(2, 4, 5, 8, dtype=torch.int32)}, ValueError, "q must be float64, .*, got torch.int32"),
        ({"q": tensor(2, 3, 5, 8)}, ValueError, "q's heads must be a multiple of k's, got 3 and 2"),
        ({"q": tensor(2, 4, 9, 8)}, ValueError, "q must not have more positions than k, got 9 and 7"),
        ({"k": tensor(2, 2, 7, 9)}, ValueError, r"k must have shape \(2, 2, 7, 8\), got \(2, 2, 7, 9\)"),
        ({"k": tensor(2, 2, 7, 8, dtype=torch.float64)}, ValueError, "k must be torch.float32 as q is, got torch.float64"),
        ({"v": tensor(2, 2, 6, 6)}, ValueError, r"v must have shape \(2, 2, 7, 6\), got \(2, 2, 6, 6\)"),
        ({"q_corrupted": tensor(2, 4, 4, 8)}, ValueError, r"q_corrupted must have shape \(2, 4, 5, 8\)"),
        ({"k_corrupted": tensor(2, 2, 7, 7)}, ValueError, r"k_corrupted must have shape \(2, 2, 7, 8\)"),
        ({"grad_z": tensor(2, 4, 5, 6)}, ValueError, r"grad_z must be \(cotangents, batch, .*got shape \(2, 4, 5, 6\)"),
        ({"grad_z": tensor(3, 2, 4, 5, 7)}, ValueError, r"grad_z must have shape \(3, 2, 4, 5, 6\), got \(3, 2, 4, 5, 7\)"),
        ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive, got 0.0"),
        ({"sinks": tensor(3)}, ValueError, r"sinks must have shape \(4,\), got \(3,\)"),
        ({"key_mask": tensor(2, 7)}, ValueError, "key_mask must be bool, True on real keys, got torch.float32"),
        ({"key_mask": tensor(2, 5, dtype=torch.bool)}, ValueError, r"key_mask must have shape \(2, 7\), got \(2, 5\)"),
        ({"backend": "cuda"}, ValueError, "backend must be among auto, reference, cpp, triton, got 'cuda'"),
        ({"q": tensor(2, 4, 5, 8).to("meta")}, ValueError, "k must be on meta as q is, got cpu"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)  # fmt: skip
def test_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.attention_vjp_effects(**arguments(**changes))


def test_statistics_that_do_not_fit() -> None:
    stats = arguments()["stats"]._replace(loo_z=tensor(2, 4, 5, 7))
    with pytest.raises(
        ValueError, match=r"stats.loo_z must have shape \(2, 4, 5, 6\), got \(2, 4, 5, 7\)"
    ):
        ops.attention_vjp_effects(**arguments(stats=stats))


@pytest.mark.parametrize(
    ("delta", "grad", "weights", "error", "message"),
    [
        (1.0, tensor(2, 3), None, TypeError, "delta and grad must be tensors"),
        (tensor(3, dtype=torch.int64), tensor(2, 3), None, ValueError, "delta must be float64, .*, got torch.int64"),
        (tensor(3), tensor(2, 4), None, ValueError, r"grad must be \(cotangents, \*delta.shape\), got \(2, 4\) for \(3,\)"),
        (tensor(), tensor(2), None, ValueError, r"grad must be \(cotangents, \*delta.shape\)"),
        (tensor(3), tensor(2, 3, dtype=torch.float64), None, ValueError, "grad must be torch.float32 on cpu as delta is"),
        (tensor(3), tensor(2, 3), tensor(3), ValueError, r"weights must have shape \(2,\), got \(3,\)"),
    ],
)  # fmt: skip
def test_node_effects_refuses(
    delta: Any, grad: Any, weights: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ops.node_effects(delta, grad, weights=weights)


def test_an_explicit_backend_does_not_fall_back() -> None:
    meta = torch.empty(1, 1, 1, 1, device="meta")
    with pytest.raises(ValueError, match="backend 'cpp' needs CPU tensors, got meta"):
        ops.attention(meta, meta, meta, backend="cpp")


def test_auto_takes_the_compiled_backend() -> None:
    assert ops.backend_for(tensor(1)) == "cpp"
    assert ops.backend_for(tensor(1), "reference") == "reference"
    assert ops.backend_for(torch.empty(1, device="meta")) == "reference"
    assert ops.availability()["cpp"] == "available"


def test_a_failed_import_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._MODULES, "cpp", "atp_fast.ops.not_there")
    monkeypatch.delitem(backends._loaded, "cpp", raising=False)
    monkeypatch.setattr(backends, "_failures", {})
    assert ops.backend_for(tensor(1)) == "reference"
    for _ in range(2):
        with pytest.raises(ImportError, match="backend 'cpp' is not available: .*not_there"):
            ops.backend_for(tensor(1), "cpp")
