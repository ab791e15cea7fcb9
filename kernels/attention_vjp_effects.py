"""attention_vjp, query_patch_effects and key_patch_effects of the same inputs: what the sweep calls.

The formulas are in those modules. What they share is done once: grad_z is read once for the three row products
(D, the top keys' part, the query effects), and D serves gradients and effects. The query fix costs one more
forward, whatever C is.

Gradients and key effects are summed by two kernels, not one, although both need dP. Their accumulators differ:
2 BLOCK_N head_dim floats per cotangent for the gradients, BLOCK_N for the effects. A joint kernel can hold one or
two cotangents before it spills and so recomputes w, some forty instructions per element, C / 2 times; apart, the
effects share w among up to 12 cotangents and pay one more product each. Nor is it v . (w^T g) - w^T D in bfloat16: that
saves the tile of dP, but the accumulators of four cotangents fill the registers (bench/README.md has the counts).
"""

from __future__ import annotations

from torch import Tensor

from atp_fast.kernels.attention import Outputs, launch_attention
from atp_fast.kernels.attention_vjp import launch_key_gradients, launch_query_gradients
from atp_fast.kernels.key_patch_effects import (
    launch_other_effects,
    launch_top_effects,
    launch_top_vectors,
)
from atp_fast.kernels.launch import Blocks, Scoring, sizes_of
from atp_fast.kernels.row_dots import launch_row_dots


def launch_attention_vjp_effects(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_corrupted: Tensor,
    k_corrupted: Tensor,
    stats: Outputs,
    grad_z: Tensor,
    scoring: Scoring,
    *,
    query_blocks: Blocks | None = None,
    key_blocks: Blocks | None = None,
    effect_blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad_q, grad_k, grad_v, effect_q, effect_k; stats from launch_attention of q, k, v."""
    moved = launch_attention(q_corrupted, k, v, scoring).z - stats.z
    top_vectors = launch_top_vectors(q, k, v, k_corrupted, stats, scoring)
    mean, top_part, effect_q, binary = launch_row_dots(
        grad_z, stats.z, top_vectors, moved, logsumexp=stats.logsumexp
    )
    rows = (grad_z, binary, mean, scoring)
    grad_q = launch_query_gradients(q, k, v, *rows, blocks=query_blocks)
    grad_k, grad_v = launch_key_gradients(q, k, v, *rows, blocks=key_blocks)
    others = launch_other_effects(
        q, k, v, k_corrupted, grad_z, stats.top_key, binary, mean, scoring, blocks=effect_blocks
    )
    effect_k = others + launch_top_effects(top_part, stats.top_key, sizes_of(q, k, v), scoring)
    return grad_q, grad_k, grad_v, effect_q.transpose(-1, -2), effect_k
