"""First-order effects of nodes, streamed.

    I[c, r] = sum_d delta[r, d] grad[c, r, d];  with weights: sum_c weights[c] |I[c, r]|, else I itself

delta: (..., head_dim), grad: (C, ..., head_dim), float32, bfloat16 or float16, any strides; products and sums
float32, the result float32 and contiguous: (...) with weights, (C, ...) without. head_dim is 1 for neurons and
may be d_model for coarse nodes.

Leading axes that lie evenly in memory are joined, so that a contiguous neuron tensor is one long row of single
elements. One program owns BLOCK_M entries of the last of the joined axes (the axes before it are decoded once per
program, not per element) and streams every cotangent past them. Each gradient is read once; delta once where
head_dim fits a tile, else once per cotangent, from cache. Bytes per element of grad: its size, and 4 / head_dim
for a signed result.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from atp_fast.kernels.launch import Blocks, cdiv, check_dtype, power_of_2, run
from atp_fast.kernels.tiles import load_rows

_MAX_BLOCK_D = 1024
_TILE = 4096


@triton.jit(do_not_specialize=["rows0", "rows1", "rows2", "cotangents"])
def _node_effects_kernel(
    delta_ptr,
    grad_ptr,
    weights_ptr,
    out_ptr,
    stride_x0,
    stride_x1,
    stride_x2,
    stride_xd,
    stride_gc,
    stride_g0,
    stride_g1,
    stride_g2,
    stride_gd,
    rows0,
    rows1,
    rows2,
    cotangents,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    # products and sums of sizes outgrow int32 before the sizes do
    rows2 = tl.cast(rows2, tl.int64)
    blocks = tl.cdiv(rows2, BLOCK_M)
    outer = pid // blocks
    offs_m = (pid % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = offs_m < rows2
    delta_ptr += (outer // rows1) * stride_x0 + (outer % rows1) * stride_x1
    grad_ptr += (outer // rows1) * stride_g0 + (outer % rows1) * stride_g1
    out_ptr += outer * rows2

    if HEAD_DIM <= BLOCK_N:
        # [BLOCK_M, BLOCK_N]
        x = load_rows(delta_ptr, offs_m, rows2, stride_x2, stride_xd, HEAD_DIM, BLOCK_N)
        x = x.to(tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for c in range(0, cotangents):
        if HEAD_DIM <= BLOCK_N:
            g = load_rows(grad_ptr, offs_m, rows2, stride_g2, stride_gd, HEAD_DIM, BLOCK_N)
            effect = tl.sum(x * g.to(tl.float32), 1)
        else:
            products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for d in range(0, HEAD_DIM, BLOCK_N):
                offs_d = d + tl.arange(0, BLOCK_N).to(tl.int64)
                m = offs_m[:, None]
                mask = inside[:, None] & (offs_d < HEAD_DIM)[None, :]
                x_ptrs = delta_ptr + m * stride_x2 + offs_d[None, :] * stride_xd
                g_ptrs = grad_ptr + m * stride_g2 + offs_d[None, :] * stride_gd
                far_x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
                far_g = tl.load(g_ptrs, mask=mask, other=0.0).to(tl.float32)
                products += far_x * far_g
            effect = tl.sum(products, 1)
        if weights_ptr is not None:
            total += tl.load(weights_ptr + c) * tl.abs(effect)
        else:
            tl.store(out_ptr + offs_m, effect, mask=inside)
            out_ptr += rows2 * rows1 * rows0
        grad_ptr += stride_gc
    if weights_ptr is not None:
        tl.store(out_ptr + offs_m, total, mask=inside)


def joined_axes(delta: Tensor, grad: Tensor) -> list[tuple[int, int, int]]:
    """(size, delta's stride, grad's stride) of the leading axes, neighbours joined where memory allows it."""
    axes: list[tuple[int, int, int]] = []
    for axis, size in enumerate(delta.shape[:-1]):
        if size == 1:
            continue
        here = (size, delta.stride(axis), grad.stride(axis + 1))
        if axes and axes[-1][1:] == (size * here[1], size * here[2]):
            axes[-1] = (axes[-1][0] * size, *here[1:])
        else:
            axes.append(here)
    return axes


def default_blocks(head_dim: int) -> Blocks:
    """A tile of 4096 elements, whole vectors up to 1024 wide: nothing for an autotuner to choose."""
    block_d = min(power_of_2(head_dim), _MAX_BLOCK_D)
    return Blocks(_TILE // block_d, block_d, 1, 4, 1)


def launch_node_effects(
    delta: Tensor, grad: Tensor, weights: Tensor | None, *, blocks: Blocks | None = None
) -> Tensor:
    """Effects in float32: the weighted sum of magnitudes over cotangents, (...), or signed, (C, ...)."""
    check_dtype("delta", delta)
    leading, head_dim = tuple(delta.shape[:-1]), delta.shape[-1]
    shape = leading if weights is not None else (grad.shape[0], *leading)
    out = torch.empty(shape, dtype=torch.float32, device=delta.device)
    if out.numel() == 0:
        return out
    axes = joined_axes(delta, grad)
    if len(axes) > 3:
        delta, grad = delta.contiguous(), grad.contiguous()
        axes = joined_axes(delta, grad)
    axes = [(1, 0, 0)] * (3 - len(axes)) + axes
    arguments: dict[str, Any] = {
        "delta_ptr": delta,
        "grad_ptr": grad,
        "weights_ptr": None if weights is None else weights.to(torch.float32).contiguous(),
        "out_ptr": out,
        **{f"stride_x{i}": axis[1] for i, axis in enumerate(axes)},
        "stride_xd": delta.stride(-1),
        "stride_gc": grad.stride(0),
        **{f"stride_g{i}": axis[2] for i, axis in enumerate(axes)},
        "stride_gd": grad.stride(-1),
        **{f"rows{i}": axis[0] for i, axis in enumerate(axes)},
        "cotangents": grad.shape[0],
        "HEAD_DIM": head_dim,
        "V_DIM": head_dim,
    }
    outer = axes[0][0] * axes[1][0]
    run(
        _node_effects_kernel,
        lambda b: outer * cdiv(axes[2][0], b.block_m),
        arguments,
        (blocks or default_blocks(head_dim),),
        delta,
    )
    return out
