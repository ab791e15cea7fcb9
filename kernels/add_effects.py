"""First-order effects of nodes, added in place to the scores of all pairs.

    I[c, b, i, w] = sum_d (corrupted - clean)[b, i, w, d] grad[c, b, i, w, d], or grad itself
    score[j, w]  += sum_b sum_c weights[c] |I|,  effect[j, w] += sum_b I of the first c,  j = i + first[b], live[b, i] only

grad: (C, batch, positions, width, dim), values (batch, positions, width, dim), float32, bfloat16 or float16, any strides;
differences, products and sums float32; score, effect: (columns, width) float32 with contiguous rows, per_pair (pairs,
columns, width) the same. width is the number of heads or of neurons, dim head_dim, 1 for neurons and effects, d_model for writes.

One program owns BLOCK_M of one column's nodes and goes over the pairs and their cotangents in order: no atomics. Pairs go in groups,
whose sums are added in order; their number depends on pairs, cotangents and the tile alone. Where programs are few, each sums one
group into a table of its own, all of them 8 MB at most, and a second kernel adds the tables to score and effect in that order: the
bits are the same as one program's, on every device and for any number of columns, which replayed sweeps need. rows must not
repeat. Gradients of several cotangents are copied ahead to shared memory; each of them and, where dim fits a tile, each value is
read once. Bytes per element of grad: its size, and twice that by C.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from atp_fast.kernels.launch import Blocks, cdiv, check_dtype, power_of_2, run, strides, too_few
from atp_fast.kernels.tiles import load_rows

_MAX_BLOCK_D = 1024
_TILE = 2048
_STEPS_OF_A_GROUP = 32
_MOST_GROUPS = 64
_NODES = 8192
_BYTES_OF_TABLES = 2**23


@triton.jit(
    do_not_specialize=["batch", "positions", "cotangents", "groups"],
    # read a number at a time, from anywhere in their tables
    do_not_specialize_on_alignment=["weights_ptr", "live_ptr", "first_ptr", "rows_ptr"],
)
def _add_effects_kernel(
    grad_ptr,
    clean_ptr,
    corrupted_ptr,
    weights_ptr,
    live_ptr,
    first_ptr,
    score_ptr,
    effect_ptr,
    pair_ptr,
    rows_ptr,
    stride_gc,
    stride_gb,
    stride_gi,
    stride_gw,
    stride_gd,
    stride_xb,
    stride_xi,
    stride_xw,
    stride_xd,
    stride_yb,
    stride_yi,
    stride_yw,
    stride_yd,
    stride_sp,
    stride_sj,
    stride_pb,
    stride_pj,
    batch,
    positions,
    cotangents,
    groups,
    width,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PAIR_SIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(width, BLOCK_M)
    column = pid // blocks
    offs_m = (pid % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = offs_m < width
    score = tl.zeros([BLOCK_M], tl.float32)
    effect = tl.zeros([BLOCK_M], tl.float32)
    part = tl.program_id(1)
    pairs = tl.cdiv(batch, groups)
    own = groups // tl.num_programs(1) * pairs
    # pairs of a group that are still to come
    left = pairs
    group_score = tl.zeros([BLOCK_M], tl.float32)
    group_effect = tl.zeros([BLOCK_M], tl.float32)
    for b in range(part * own, tl.minimum((part + 1) * own, batch)):
        b = tl.cast(b, tl.int64)
        i = column
        if first_ptr is not None:
            i -= tl.load(first_ptr + b)
        counts = (i >= 0) & (i < positions)
        if live_ptr is not None:
            counts &= tl.load(live_ptr + b * positions + i, mask=counts, other=0) != 0
        limit = tl.where(counts, width, 0)
        g_ptr = grad_ptr + b * stride_gb + i * stride_gi
        if clean_ptr is not None:
            x_ptr = clean_ptr + b * stride_xb + i * stride_xi
            y_ptr = corrupted_ptr + b * stride_yb + i * stride_yi
        if clean_ptr is not None and HEAD_DIM <= BLOCK_N:
            # [BLOCK_M, BLOCK_N]
            y = load_rows(y_ptr, offs_m, limit, stride_yw, stride_yd, HEAD_DIM, BLOCK_N)
            x = load_rows(x_ptr, offs_m, limit, stride_xw, stride_xd, HEAD_DIM, BLOCK_N)
            delta = y.to(tl.float32) - x.to(tl.float32)
        pair_score = tl.zeros([BLOCK_M], tl.float32)
        pair_effect = tl.zeros([BLOCK_M], tl.float32)
        for c in tl.range(0, cotangents, num_stages=STAGES):
            if HEAD_DIM <= BLOCK_N:
                g = load_rows(g_ptr, offs_m, limit, stride_gw, stride_gd, HEAD_DIM, BLOCK_N)
                g = g.to(tl.float32)
                if clean_ptr is not None:
                    g = g * delta
                found = tl.sum(g, 1)
            else:
                products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                for d in range(0, HEAD_DIM, BLOCK_N):
                    d = tl.cast(d, tl.int64)
                    g = load_rows(g_ptr + d * stride_gd, offs_m, limit, stride_gw, stride_gd, HEAD_DIM - d, BLOCK_N)  # fmt: skip
                    y = load_rows(y_ptr + d * stride_yd, offs_m, limit, stride_yw, stride_yd, HEAD_DIM - d, BLOCK_N)  # fmt: skip
                    x = load_rows(x_ptr + d * stride_xd, offs_m, limit, stride_xw, stride_xd, HEAD_DIM - d, BLOCK_N)  # fmt: skip
                    products += g.to(tl.float32) * (y.to(tl.float32) - x.to(tl.float32))
                found = tl.sum(products, 1)
            pair_score += tl.load(weights_ptr + c) * tl.abs(found)
            pair_effect = tl.where(c == 0, found, pair_effect)
            g_ptr += stride_gc
        group_score += pair_score
        group_effect += pair_effect
        left -= 1
        last = left == 0
        left = tl.where(last, pairs, left)
        score = tl.where(last, score + group_score, score)
        effect = tl.where(last, effect + group_effect, effect)
        group_score = tl.where(last, 0.0, group_score)
        group_effect = tl.where(last, 0.0, group_effect)
        if pair_ptr is not None:
            p_ptrs = pair_ptr + tl.load(rows_ptr + b) * stride_pb + column * stride_pj + offs_m
            kept = pair_effect if PAIR_SIGNED else pair_score
            tl.store(p_ptrs, tl.load(p_ptrs, mask=inside, other=0.0) + kept, mask=inside)
    # of the last group, if it is a smaller one
    score += group_score
    effect += group_effect
    # a group's table holds nothing yet
    before = inside & (tl.num_programs(1) == 1)
    offs_s = part.to(tl.int64) * stride_sp + column * stride_sj + offs_m
    tl.store(score_ptr + offs_s, tl.load(score_ptr + offs_s, mask=before, other=0.0) + score, mask=inside)  # fmt: skip
    if effect_ptr is not None:
        tl.store(effect_ptr + offs_s, tl.load(effect_ptr + offs_s, mask=before, other=0.0) + effect, mask=inside)  # fmt: skip


@triton.jit
def _sum_of_parts(part_ptr, offs_m, parts, entries, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_M] entries of the tables, summed over the parts in their order, BLOCK_N of them on their way at once."""
    total = tl.zeros([BLOCK_M], tl.float32)
    ptrs = part_ptr + offs_m
    for start in range(0, parts, BLOCK_N):
        loaded = ()
        for n in tl.static_range(BLOCK_N):
            inside = (offs_m < entries) & (start + n < parts)
            loaded = loaded + (tl.load(ptrs, mask=inside, other=0.0),)
            ptrs += entries
        for n in tl.static_range(BLOCK_N):
            total += loaded[n]
    return total


@triton.jit(do_not_specialize=["stride_sj", "parts", "entries", "width"])
def _add_parts_kernel(
    score_part_ptr,
    effect_part_ptr,
    score_ptr,
    effect_ptr,
    stride_sj,
    parts,
    entries,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = offs_m < entries
    offs_s = offs_m // width * stride_sj + offs_m % width
    score = _sum_of_parts(score_part_ptr, offs_m, parts, entries, BLOCK_M, BLOCK_N)
    tl.store(score_ptr + offs_s, tl.load(score_ptr + offs_s, mask=inside, other=0.0) + score, mask=inside)  # fmt: skip
    if effect_ptr is not None:
        effect = _sum_of_parts(effect_part_ptr, offs_m, parts, entries, BLOCK_M, BLOCK_N)
        tl.store(effect_ptr + offs_s, tl.load(effect_ptr + offs_s, mask=inside, other=0.0) + effect, mask=inside)  # fmt: skip


def default_blocks(width: int, dim: int, cotangents: int) -> Blocks:
    """A tile of 2048 elements at most, whole vectors up to 1024 wide: nothing for an autotuner to choose.

    From four cotangents on, the next three of a pair are on their way while one is summed.
    """
    block_d = min(power_of_2(dim), _MAX_BLOCK_D)
    block_w = min(power_of_2(width), _TILE // block_d)
    tile = block_w * block_d
    warps = 8 if tile > 1024 else 4 if tile > 512 else 1
    return Blocks(block_w, block_d, 1, warps, 4 if cotangents >= 4 else 1)


# entries and parts at once
PART_BLOCKS = Blocks(128, 8, 1, 4, 1)


def pair_groups(pairs: int, cotangents: int, block_m: int) -> int:
    """How many groups the pairs go in: 64 or, of wide tiles, so many that their tables stay small; each of at least 32
    cotangents of pairs, or a table costs more than it saves."""
    most = min(pairs, pairs * cotangents // _STEPS_OF_A_GROUP, _MOST_GROUPS, _NODES // block_m)
    return cdiv(pairs, cdiv(pairs, max(most, 1)))


def launch_add_parts(
    parts: Tensor, score: Tensor, effect: Tensor | None, *, blocks: Blocks = PART_BLOCKS
) -> None:
    """Adds the sums of parts[0] over its first axis to score, and those of parts[1] to effect."""
    entries, width = score.numel(), score.shape[1]
    arguments: dict[str, Any] = {
        "score_part_ptr": parts[0],
        "effect_part_ptr": None if effect is None else parts[1],
        "score_ptr": score,
        "effect_ptr": effect,
        "stride_sj": score.stride(0),
        "parts": parts.shape[1],
        "entries": entries,
        "width": width,
    }
    run(_add_parts_kernel, lambda b: cdiv(entries, b.block_m), arguments, (blocks,), score)


def launch_add_effects(
    grad: Tensor,
    weights: Tensor,
    score: Tensor,
    effect: Tensor | None,
    clean: Tensor | None,
    corrupted: Tensor | None,
    live: Tensor | None,
    first: Tensor | None,
    per_pair: Tensor | None,
    rows: Tensor | None,
    pair_signed: bool,
    *,
    blocks: Blocks | None = None,
    split: bool | None = None,
) -> None:
    """Adds to score, effect and per_pair. What is written is read before: no launch may be repeated.

    split: whether every group of pairs has programs of its own, by default where these are few and the tables fit.
    """
    check_dtype("grad", grad)
    cotangents, batch, positions, width, dim = grad.shape
    columns = score.shape[0]
    if score.numel() == 0 or cotangents == 0 or batch == 0:
        return
    nothing = dict.fromkeys(("b", "i", "w", "d"), 0)

    def value_strides(name: str, x: Tensor | None) -> dict[str, int]:
        if x is not None:
            return strides(name, x, "biwd")
        return {f"stride_{name}{axis}": step for axis, step in nothing.items()}

    arguments: dict[str, Any] = {
        "grad_ptr": grad,
        "clean_ptr": clean,
        "corrupted_ptr": corrupted,
        "weights_ptr": weights,
        "live_ptr": None if live is None else live.contiguous().view(torch.uint8),
        "first_ptr": first,
        "score_ptr": score,
        "effect_ptr": effect,
        "pair_ptr": per_pair,
        "rows_ptr": rows,
        "stride_sp": 0,
        **strides("g", grad, "cbiwd"),
        **value_strides("x", clean),
        **value_strides("y", corrupted),
        "stride_sj": score.stride(0),
        "stride_pb": 0 if per_pair is None else per_pair.stride(0),
        "stride_pj": 0 if per_pair is None else per_pair.stride(1),
        "batch": batch,
        "positions": positions,
        "cotangents": cotangents,
        "width": width,
        "HEAD_DIM": dim,
        "V_DIM": dim,
        "PAIR_SIGNED": pair_signed,
    }
    chosen = blocks or default_blocks(width, dim, cotangents)

    def programs(b: Blocks) -> int:
        return columns * cdiv(width, b.block_m)

    groups = pair_groups(batch, cotangents, chosen.block_m)
    arguments["groups"] = groups
    shape = (1 if effect is None else 2, groups, columns, width)
    if split is None:
        split = too_few(programs(chosen), grad) and 4 * math.prod(shape) <= _BYTES_OF_TABLES
    if groups == 1 or not split:
        run(_add_effects_kernel, programs, arguments, (chosen,), grad)
        return
    tables = torch.empty(shape, dtype=torch.float32, device=grad.device)
    arguments["score_ptr"], arguments["effect_ptr"] = (
        tables[0],
        None if effect is None else tables[1],
    )
    arguments["stride_sp"], arguments["stride_sj"] = tables.stride(1), width
    run(_add_effects_kernel, programs, arguments, (chosen,), grad, groups)
    launch_add_parts(tables, score, effect)
