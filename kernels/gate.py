"""Adjoint of gated units, y = activation(gate) * up (SwiGLU, GeGLU; arXiv 2002.05202), for many cotangents.

    grad_gate = grad up activation'(gate),  grad_up = grad activation(gate)

gate, up: (rows, width) float32, bfloat16 or float16, their last axis contiguous; grad, grad_gate, grad_up: (C, rows, width)
contiguous, of the same dtype. One program owns a tile of rows and columns for all C: what multiplies grad is computed once. Bytes
per element of grad: its own and two outputs'.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from atp_fast.kernels.launch import Blocks, cdiv, check_dtype, power_of_2, run
from atp_fast.kernels.tiles import sigmoid

_TILE = 2048


@triton.jit
def _silu(x):
    """x sigmoid(x), and its slope."""
    s = sigmoid(x)
    return x * s, s * (1.0 + x * (1.0 - s))


@triton.jit
def _gelu_tanh(x):
    """x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), and its slope; (1 + tanh(u)) / 2 is sigmoid(2 u)."""
    s = sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x * s, s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)


@triton.jit(do_not_specialize=["rows", "cotangents"])
def _gate_vjp_kernel(
    gate_ptr,
    up_ptr,
    grad_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    stride_gate,
    stride_up,
    rows,
    cotangents,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(HEAD_DIM, BLOCK_N)
    row = pid // blocks * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    col = pid % blocks * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inside = (row < rows) & (col < HEAD_DIM)
    gate = tl.load(gate_ptr + row * stride_gate + col, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + col, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        value, slope = _gelu_tanh(gate)
    else:
        value, slope = _silu(gate)
    slope *= up
    at = row * HEAD_DIM + col
    step = tl.cast(rows, tl.int64) * HEAD_DIM
    kind = grad_gate_ptr.dtype.element_ty
    for c in tl.range(cotangents, num_stages=STAGES):
        here = at + c * step
        grad = tl.load(grad_ptr + here, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_gate_ptr + here, (grad * slope).to(kind), mask=inside)
        tl.store(grad_up_ptr + here, (grad * value).to(kind), mask=inside)


def default_blocks(width: int) -> Blocks:
    """Tiles of 2048 elements: nothing for an autotuner to choose. The next cotangent is on its way while one is multiplied."""
    block = min(power_of_2(width), 1024)
    return Blocks(_TILE // block, block, 1, 4, 2)


def launch_gate_vjp(
    gate: Tensor,
    up: Tensor,
    grad: Tensor,
    gelu: bool,
    out: tuple[Tensor, Tensor],
    *,
    blocks: Blocks | None = None,
) -> None:
    """Fills out, the gradients by gate and by up; gelu: its tanh form, else silu."""
    check_dtype("gate", gate)
    if grad.numel() == 0:
        return
    rows, width = gate.shape
    arguments: dict[str, Any] = {
        "gate_ptr": gate,
        "up_ptr": up,
        "grad_ptr": grad,
        "grad_gate_ptr": out[0],
        "grad_up_ptr": out[1],
        "stride_gate": gate.stride(0),
        "stride_up": up.stride(0),
        "rows": rows,
        "cotangents": grad.shape[0],
        "HEAD_DIM": width,
        "V_DIM": width,
        "GELU": gelu,
    }
    run(
        _gate_vjp_kernel,
        lambda b: cdiv(rows, b.block_m) * cdiv(width, b.block_n),
        arguments,
        (blocks or default_blocks(width),),
        grad,
    )
