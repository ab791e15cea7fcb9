"""Rotation of queries or keys by position (RoPE), and its adjoint.

    y1 = x1 cos1 - x2 sin1,  y2 = x2 cos2 + x1 sin2, x1 and x2 the halves of the first 2 HALF elements, the rest unchanged
    adjoint: y1 = x1 cos1 + x2 sin2,  y2 = x2 cos2 - x1 sin1

x: (outer, batch, heads, positions, head_dim) float32, bfloat16 or float16, any strides; cos, sin (batch, positions, 2 HALF) of
the same dtype, any strides; y like x in memory of its own. ROUNDED: each product is rounded to x's dtype, as the models'
own code does; the adjoint's are not. One program owns BLOCK_M (head, position) rows of one (outer, batch): cos and sin are read
once per head. Bytes per element: those of x, y, and cos and sin, which stay in the cache.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from atp_fast.kernels.launch import Blocks, cdiv, check_dtype, power_of_2, run, strides

_TILE = 2048


@triton.jit(do_not_specialize=["batch", "positions", "heads"])
def _rotate_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    stride_xo,
    stride_xb,
    stride_xh,
    stride_xm,
    stride_xd,
    stride_cb,
    stride_cm,
    stride_cd,
    stride_sb,
    stride_sm,
    stride_sd,
    stride_yo,
    stride_yb,
    stride_yh,
    stride_ym,
    stride_yd,
    batch,
    heads,
    positions,
    HALF: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    ADJOINT: tl.constexpr,
    ROUNDED: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(heads * positions, BLOCK_M)
    outer = pid // blocks
    b = outer % batch
    row = (pid % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    # heads side by side: neighbours in memory
    h, m = row % heads, row // heads
    here = m < positions
    d = tl.arange(0, BLOCK_N)
    inside = here[:, None] & (d < HALF)[None, :]
    x_ptr += (outer // batch) * stride_xo + b * stride_xb
    y_ptr += (outer // batch) * stride_yo + b * stride_yb
    x_rows = x_ptr + (h * stride_xh + m * stride_xm)[:, None]
    y_rows = y_ptr + (h * stride_yh + m * stride_ym)[:, None]
    c_ptrs = cos_ptr + b * stride_cb + m[:, None] * stride_cm + d[None, :] * stride_cd
    s_ptrs = sin_ptr + b * stride_sb + m[:, None] * stride_sm + d[None, :] * stride_sd
    x1 = tl.load(x_rows + d[None, :] * stride_xd, mask=inside, other=0.0)
    x2 = tl.load(x_rows + (HALF + d)[None, :] * stride_xd, mask=inside, other=0.0)
    c1 = tl.load(c_ptrs, mask=inside, other=0.0)
    c2 = tl.load(c_ptrs + HALF * stride_cd, mask=inside, other=0.0)
    s1 = tl.load(s_ptrs, mask=inside, other=0.0)
    s2 = tl.load(s_ptrs + HALF * stride_sd, mask=inside, other=0.0)
    kind = x1.dtype
    x1, x2 = x1.to(tl.float32), x2.to(tl.float32)
    c1, c2, s1, s2 = c1.to(tl.float32), c2.to(tl.float32), s1.to(tl.float32), s2.to(tl.float32)
    if ADJOINT:
        y1 = x1 * c1 + x2 * s2
        y2 = x2 * c2 - x1 * s1
    elif ROUNDED:
        y1 = (x1 * c1).to(kind).to(tl.float32) - (x2 * s1).to(kind).to(tl.float32)
        y2 = (x2 * c2).to(kind).to(tl.float32) + (x1 * s2).to(kind).to(tl.float32)
    else:
        y1 = x1 * c1 - x2 * s1
        y2 = x2 * c2 + x1 * s2
    tl.store(y_rows + d[None, :] * stride_yd, y1.to(kind), mask=inside)
    tl.store(y_rows + (HALF + d)[None, :] * stride_yd, y2.to(kind), mask=inside)
    if 2 * HALF < HEAD_DIM:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)
        beside = here[:, None] & (rest < HEAD_DIM)[None, :]
        x = tl.load(x_rows + rest[None, :] * stride_xd, mask=beside, other=0.0)
        tl.store(y_rows + rest[None, :] * stride_yd, x, mask=beside)


def default_blocks(half: int, rest: int = 0) -> Blocks:
    """A tile of 2048 elements of either half, and of the rest at most as many: nothing for an autotuner to choose."""
    block, beside = (power_of_2(columns) for columns in (half, rest))
    return Blocks(max(_TILE // max(block, beside), 1), block, 1, 4, 1)


def launch_rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    adjoint: bool,
    out: Tensor,
    *,
    blocks: Blocks | None = None,
) -> None:
    """Fills out, (outer, batch, heads, positions, head_dim) as x."""
    check_dtype("x", x)
    if out.numel() == 0:
        return
    outer, batch, heads, positions, head_dim = x.shape
    half = cos.shape[-1] // 2
    rest = head_dim - 2 * half
    arguments: dict[str, Any] = {
        "x_ptr": x,
        "cos_ptr": cos,
        "sin_ptr": sin,
        "y_ptr": out,
        **strides("x", x, "obhmd"),
        **strides("c", cos, "bmd"),
        **strides("s", sin, "bmd"),
        **strides("y", out, "obhmd"),
        "batch": batch,
        "heads": heads,
        "positions": positions,
        "HALF": half,
        "HEAD_DIM": head_dim,
        "V_DIM": head_dim,
        "ADJOINT": adjoint,
        "ROUNDED": x.element_size() == 2,
        "BLOCK_REST": power_of_2(rest),
    }
    run(
        _rotate_kernel,
        lambda b: outer * batch * cdiv(heads * positions, b.block_m),
        arguments,
        (blocks or default_blocks(half, rest),),
        x,
    )
