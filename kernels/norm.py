"""Normalisation of rows, and its adjoint for many cotangents.

    n = (x - mean) rstd, rstd = 1 / sqrt(mean((x - mean)^2) + eps), mean = 0 unless CENTRED
    y = n (weight + offset) + bias;  with ROUNDED n is rounded to x's dtype first, as Llama's norm does
    grad_x[c] = rstd (h - mean(h) [CENTRED] - n mean(h n)) + before[c],  h = grad[c] (weight + offset)

x: (rows0, rows1, rows2, width) float32, bfloat16 or float16, any strides but neighbours along the width; weight, bias
(width,); mean, rstd (rows,) float32; grad (C, *x.shape). Everything between load and store is float32.
One program owns BLOCK_M whole rows; of the adjoint, of one cotangent. Bytes per element: those of x and y; of grad, x and grad_x.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from atp_fast.kernels.launch import Blocks, cdiv, check_dtype, power_of_2, run

MAX_WIDTH = 16384
_TILE = 2048


@triton.jit
def _offsets(rows, rows1, rows2, stride0, stride1, stride2):
    """Where rows of a tensor of three leading axes begin."""
    outer = rows // rows2
    return (outer // rows1) * stride0 + (outer % rows1) * stride1 + (rows % rows2) * stride2


@triton.jit(do_not_specialize=["rows1", "rows2", "rows"])
def _norm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    stride_x0,
    stride_x1,
    stride_x2,
    stride_y0,
    stride_y1,
    stride_y2,
    rows1,
    rows2,
    rows,
    eps,
    offset,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    CENTRED: tl.constexpr,
    ROUNDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    here, wide = row < rows, cols < HEAD_DIM
    inside = here[:, None] & wide[None, :]
    x_ptrs = (
        x_ptr
        + _offsets(row, rows1, rows2, stride_x0, stride_x1, stride_x2)[:, None]
        + cols[None, :]
    )
    narrow = tl.load(x_ptrs, mask=inside, other=0.0)
    x = narrow.to(tl.float32)
    if CENTRED:
        mean = tl.sum(x, 1) / HEAD_DIM
        x = tl.where(inside, x - mean[:, None], 0.0)
        tl.store(mean_ptr + row, mean, mask=here)
    rstd = 1 / tl.sqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)
    tl.store(rstd_ptr + row, rstd, mask=here)
    y = x * rstd[:, None]
    if ROUNDED:
        y = y.to(narrow.dtype).to(tl.float32)
    y = y * (tl.load(weight_ptr + cols, mask=wide, other=0.0).to(tl.float32) + offset)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=wide, other=0.0).to(tl.float32)[None, :]
    y_ptrs = (
        y_ptr
        + _offsets(row, rows1, rows2, stride_y0, stride_y1, stride_y2)[:, None]
        + cols[None, :]
    )
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows1", "rows2", "rows"])
def _norm_vjp_kernel(
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    grad_ptr,
    before_ptr,
    out_ptr,
    stride_x0,
    stride_x1,
    stride_x2,
    stride_gc,
    stride_g0,
    stride_g1,
    stride_g2,
    stride_oc,
    stride_o0,
    stride_o1,
    stride_o2,
    rows1,
    rows2,
    rows,
    offset,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(rows, BLOCK_M)
    c = pid // blocks
    row = (pid % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    here, wide = row < rows, cols < HEAD_DIM
    inside = here[:, None] & wide[None, :]
    x_ptrs = (
        x_ptr
        + _offsets(row, rows1, rows2, stride_x0, stride_x1, stride_x2)[:, None]
        + cols[None, :]
    )
    g_at = c * stride_gc + _offsets(row, rows1, rows2, stride_g0, stride_g1, stride_g2)
    o_at = c * stride_oc + _offsets(row, rows1, rows2, stride_o0, stride_o1, stride_o2)
    o_at = o_at[:, None] + cols[None, :]
    n = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row, mask=here, other=0.0)[:, None]
    if CENTRED:
        n -= tl.load(mean_ptr + row, mask=here, other=0.0)[:, None]
    n = tl.where(inside, n * rstd, 0.0)
    h = tl.load(grad_ptr + g_at[:, None] + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    h = h * (tl.load(weight_ptr + cols, mask=wide, other=0.0).to(tl.float32) + offset)[None, :]
    out = h - n * (tl.sum(h * n, 1) / HEAD_DIM)[:, None]
    if CENTRED:
        out -= (tl.sum(h, 1) / HEAD_DIM)[:, None]
    out = out * rstd
    if before_ptr is not None:
        out += tl.load(before_ptr + o_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + o_at, out.to(out_ptr.dtype.element_ty), mask=inside)


def default_blocks(width: int) -> Blocks:
    """Whole rows, as many as make a tile of 2048 elements: nothing for an autotuner to choose."""
    block = power_of_2(width)
    return Blocks(max(_TILE // block, 1), block, 1, 4 if block <= 4096 else 8, 1)


def _leading(x: Tensor, ahead: int = 0) -> list[int]:
    """Strides of the three axes before the last, zeros for those that are not there; `ahead` axes come before them."""
    steps = list(x.stride()[ahead:-1])
    return [0] * (3 - len(steps)) + steps


def _sizes(x: Tensor) -> dict[str, int]:
    sizes = [1] * (4 - x.ndim) + list(x.shape[:-1])
    return {"rows1": sizes[1], "rows2": sizes[2], "rows": sizes[0] * sizes[1] * sizes[2]}


def _check(x: Tensor) -> None:
    check_dtype("x", x)
    if x.shape[-1] > MAX_WIDTH:
        raise ValueError(
            f"x must be at most {MAX_WIDTH} wide for backend 'triton', got {x.shape[-1]}"
        )


def launch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    rounded: bool,
    offset: float,
    out: tuple[Tensor, Tensor | None, Tensor],
    *,
    blocks: Blocks | None = None,
) -> None:
    """Fills out: y, mean (None unless centred) and rstd. x has one to three leading axes."""
    _check(x)
    y, mean, rstd = out
    sizes = _sizes(x)
    if y.numel() == 0:
        return
    arguments: dict[str, Any] = {
        "x_ptr": x,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "y_ptr": y,
        "mean_ptr": mean,
        "rstd_ptr": rstd,
        **{f"stride_x{i}": step for i, step in enumerate(_leading(x))},
        **{f"stride_y{i}": step for i, step in enumerate(_leading(y))},
        **sizes,
        "eps": eps,
        "offset": offset,
        "HEAD_DIM": x.shape[-1],
        "V_DIM": x.shape[-1],
        "CENTRED": centred,
        "ROUNDED": rounded,
    }
    run(
        _norm_kernel,
        lambda b: cdiv(sizes["rows"], b.block_m),
        arguments,
        (blocks or default_blocks(x.shape[-1]),),
        x,
    )


def launch_norm_vjp(
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    grad: Tensor,
    offset: float,
    before: Tensor | None,
    out: Tensor,
    *,
    blocks: Blocks | None = None,
) -> None:
    """Fills out (C, *x.shape), which may be `before`, the gradients that are added; both lie alike in memory."""
    _check(x)
    sizes = _sizes(x)
    if out.numel() == 0:
        return
    arguments: dict[str, Any] = {
        "x_ptr": x,
        "weight_ptr": weight,
        "mean_ptr": mean,
        "rstd_ptr": rstd,
        "grad_ptr": grad,
        "before_ptr": before,
        "out_ptr": out,
        **{f"stride_x{i}": step for i, step in enumerate(_leading(x))},
        "stride_gc": grad.stride(0),
        **{f"stride_g{i}": step for i, step in enumerate(_leading(grad, 1))},
        "stride_oc": out.stride(0),
        **{f"stride_o{i}": step for i, step in enumerate(_leading(out, 1))},
        **sizes,
        "offset": offset,
        "HEAD_DIM": x.shape[-1],
        "V_DIM": x.shape[-1],
        "CENTRED": mean is not None,
    }
    run(
        _norm_vjp_kernel,
        lambda b: len(grad) * cdiv(sizes["rows"], b.block_m),
        arguments,
        (blocks or default_blocks(x.shape[-1]),),
        x,
    )
