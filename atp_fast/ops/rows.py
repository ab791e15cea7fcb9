"""The ops that go over rows: first-order effects and their sums, normalisation, rotation by position.

Checked here and carried out by one backend, as those of the attention are in atp_fast.ops, which is where they are called.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atp_fast.ops.backends import backend_for, load
from atp_fast.ops.reference import DTYPES, Norm, accumulation_dtype


def node_effects(
    delta: Tensor, grad: Tensor, *, weights: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """First-order effects I = sum over the last axis of delta * grad, reduced over cotangents.

    delta: corrupted minus clean value, (..., head_dim); grad: (C, ..., head_dim), same dtype;
    weights: (C,) gives sum over C of weight * |I|, shape (...); None gives the signed I, (C, ...).
    Accumulated and returned in float32 (float64 for float64).
    """
    if not isinstance(delta, Tensor) or not isinstance(grad, Tensor):
        raise TypeError("delta and grad must be tensors")
    if delta.dtype not in DTYPES:
        raise ValueError(f"delta must be float64, float32, bfloat16 or float16, got {delta.dtype}")
    if delta.ndim < 1 or grad.ndim != delta.ndim + 1 or grad.shape[1:] != delta.shape:
        raise ValueError(
            f"grad must be (cotangents, *delta.shape), got {tuple(grad.shape)} for {tuple(delta.shape)}"
        )
    if grad.dtype != delta.dtype or grad.device != delta.device:
        raise ValueError(
            f"grad must be {delta.dtype} on {delta.device} as delta is, got {grad.dtype} on {grad.device}"
        )
    if weights is not None and tuple(weights.shape) != (grad.shape[0],):
        raise ValueError(f"weights must have shape ({grad.shape[0]},), got {tuple(weights.shape)}")
    effects: Tensor = load(backend_for(delta, backend)).node_effects(delta, grad, weights)
    return effects


def add_effects(
    grad: Tensor,
    *,
    weights: Tensor,
    score: Tensor,
    effect: Tensor | None = None,
    clean: Tensor | None = None,
    corrupted: Tensor | None = None,
    live: Tensor | None = None,
    first: Tensor | None = None,
    per_pair: Tensor | None = None,
    rows: Tensor | None = None,
    pair_signed: bool = False,
    backend: str = "auto",
) -> None:
    """Add the effects of a batch of pairs to the scores of all pairs, in place.

    I = sum over dim of (corrupted - clean) * grad. score (columns, width) gets the sum over pairs and cotangents of
    weight * |I|, effect, of the same shape and strides, the sum over pairs of the first cotangent's I, and pair b's row
    rows[b] of per_pair (pairs, columns, width), which no other pair has, what b adds to score, or to effect where pair_signed.
    grad: (C, batch, positions, width, dim); clean, corrupted: (batch, positions, width, dim), same dtype, or None where
    grad (dim 1) holds the effects; weights: (C,); live: (batch, positions) bool, where effects count, None for everywhere;
    first: (batch,) int64, the column of each pair's first position (columns outside the scores are left out), None for
    0. weights, score, effect and per_pair are float32 (float64 for float64), their last axis contiguous.
    Raises TypeError or ValueError naming the argument that does not fit.
    """
    if not isinstance(grad, Tensor) or not isinstance(score, Tensor):
        raise TypeError("grad and score must be tensors")
    if grad.dtype not in DTYPES:
        raise ValueError(f"grad must be float64, float32, bfloat16 or float16, got {grad.dtype}")
    if grad.ndim != 5:
        raise ValueError(
            f"grad must be (cotangents, batch, positions, width, dim), got shape {tuple(grad.shape)}"
        )
    cotangents, batch, positions, width, dim = grad.shape
    if (clean is None) != (corrupted is None):
        raise ValueError("clean and corrupted must be given together")
    if clean is None and dim != 1:
        raise ValueError(f"grad must have dim 1 where it holds the effects, got {dim}")
    columns = score.shape[0] if score.ndim else 0
    if first is None and columns != positions:
        raise ValueError(
            f"score must have a column for each of {positions} positions, got {columns}"
        )
    if pair_signed and per_pair is not None and effect is None:
        raise ValueError("effect must be given where per_pair is signed")
    if (per_pair is None) != (rows is None):
        raise ValueError("per_pair and rows must be given together")
    sums = accumulation_dtype(grad)
    pairs, device = 0 if per_pair is None else per_pair.shape[0], grad.device
    for name, x, shape, dtype in (
        ("clean", clean, grad.shape[1:], grad.dtype),
        ("corrupted", corrupted, grad.shape[1:], grad.dtype),
        ("weights", weights, (cotangents,), sums),
        ("score", score, (columns, width), sums),
        ("effect", effect, (columns, width), sums),
        ("per_pair", per_pair, (pairs, columns, width), sums),
        ("live", live, (batch, positions), torch.bool),
        ("first", first, (batch,), torch.int64),
        ("rows", rows, (batch,), torch.int64),
    ):
        if x is None:
            continue
        if x.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
        if x.dtype != dtype or x.device != device:
            raise ValueError(f"{name} must be {dtype} on {device}, got {x.dtype} on {x.device}")
    for name, x in (("score", score), ("effect", effect), ("per_pair", per_pair)):
        if x is not None and x.numel() and x.stride(-1) != 1:
            raise ValueError(f"{name} must have a contiguous last axis")
    if effect is not None and effect.stride() != score.stride():
        raise ValueError(
            f"effect must have score's strides {score.stride()}, got {effect.stride()}"
        )
    load(backend_for(grad, backend)).add_effects(
        grad,
        weights.contiguous(),
        score,
        effect,
        clean,
        corrupted,
        live,
        None if first is None else first.contiguous(),
        per_pair,
        None if rows is None else rows.contiguous(),
        pair_signed,
    )


def _check_like(
    name: str, x: Tensor | None, like: Tensor, shape: tuple[int, ...], whose: str = "x"
) -> None:
    if x is None:
        return
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
    if x.dtype != like.dtype or x.device != like.device:
        raise ValueError(
            f"{name} must be {like.dtype} on {like.device} as {whose} is, got {x.dtype} on {x.device}"
        )


def _check_rows(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if not 2 <= x.ndim <= 4:
        raise ValueError(f"{name} must have two to four axes, got shape {tuple(x.shape)}")


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    how: Norm,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor]:
    """LayerNorm (arXiv 1607.06450) or RMSNorm (arXiv 1910.07467): y = (x - mean) rstd (weight + offset) + bias.

    x: (..., width), two to four axes; weight, bias: (width,), the same dtype; how: eps, whether rows are centred (mean is
    0 where not), whether (x - mean) rstd is rounded to x's dtype, and the offset. rstd = 1 / sqrt(mean((x - mean)^2) + eps).
    Returns y, mean (None unless centred) and rstd, (...) in the accumulation dtype.
    """
    _check_rows("x", x)
    _check_like("weight", weight, x, x.shape[-1:])
    _check_like("bias", bias, x, x.shape[-1:])
    module = load(backend_for(x, backend))
    found: tuple[Tensor, Tensor | None, Tensor] = module.norm(x, weight, bias, how)
    return found


def norm_vjp(
    x: Tensor,
    weight: Tensor,
    *,
    mean: Tensor | None,
    rstd: Tensor,
    grad: Tensor,
    how: Norm,
    before: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Vector-Jacobian products of `norm` by x for C cotangents, added to `before`.

    mean, rstd: from `norm`; grad, before: (C, *x.shape). Returns the same shape, in x's dtype.
    """
    _check_rows("x", x)
    _check_like("weight", weight, x, x.shape[-1:])
    _check_like("grad", grad, x, (*grad.shape[:1], *x.shape))
    _check_like("before", before, x, tuple(grad.shape))
    if (mean is None) == how.centred:
        raise ValueError(
            f"mean must be given where rows are centred only, got centred {how.centred}"
        )
    module = load(backend_for(x, backend))
    found: Tensor = module.norm_vjp(x, weight, mean, rstd, grad, how, before)
    return found


ACTIVATIONS = ("silu", "gelu_tanh")


def gate_vjp(
    gate: Tensor,
    up: Tensor,
    grad: Tensor,
    *,
    activation: str = "silu",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Vector-Jacobian products of gated units, y = activation(gate) * up (arXiv 2002.05202), by gate and by up for C cotangents.

    gate, up: (..., width), two to four axes, the same dtype; grad: (C, *gate.shape); activation: "silu" or "gelu_tanh".
    Returns two of grad's shape, in gate's dtype, computed in the accumulation dtype.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be among {', '.join(ACTIVATIONS)}, got {activation!r}")
    _check_rows("gate", gate)
    _check_like("up", up, gate, gate.shape, "gate")
    _check_like("grad", grad, gate, (*grad.shape[:1], *gate.shape), "gate")
    module = load(backend_for(gate, backend))
    found: tuple[Tensor, Tensor] = module.gate_vjp(gate, up, grad, activation)
    return found


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, *, adjoint: bool = False, backend: str = "auto"
) -> Tensor:
    """Queries or keys rotated by position (RoPE, arXiv 2104.09864), halves paired as the models do; or the adjoint.

    y = x cos + rotate_half(x) sin over the first `rotated` elements, the rest unchanged. x: (batch, heads, positions,
    head_dim), or with an axis of cotangents ahead; cos, sin: (batch, positions, rotated), rotated even, the same dtype.
    Returns x's shape; heads lie side by side in memory.
    """
    if x.ndim not in (4, 5):
        raise ValueError(f"x must have four or five axes, got shape {tuple(x.shape)}")
    whole = x if x.ndim == 5 else x[None]
    _, batch, _, positions, head_dim = whole.shape
    if cos.shape[-1] % 2 or cos.shape[-1] > head_dim:
        raise ValueError(f"cos must have an even width up to {head_dim}, got {cos.shape[-1]}")
    _check_like("cos", cos, x, (batch, positions, cos.shape[-1]))
    _check_like("sin", sin, x, tuple(cos.shape))
    found: Tensor = load(backend_for(x, backend)).rotate(whole, cos, sin, adjoint)
    return found if x.ndim == 5 else found[0]
