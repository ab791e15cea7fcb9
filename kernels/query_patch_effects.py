"""Effects of patching each query alone, its softmax recomputed exactly (AtP* QK fix).

    I_Q(i) = sum_j (p'_ij - p_ij) g_i . v_j = g_i . (z'_i - z_i),   z' = attention(q_corrupted, k, v)

The right-hand side needs no tiles per cotangent: one more attention forward (attention.py; both z float32, by the
same kernel with the same blocks, so that an unchanged query gives exactly 0), and one read of grad_z
(row_dots.py). grad_z: (C, batch, heads, queries, v_dim); result (C, batch, queries, heads) float32.
"""

from __future__ import annotations

from torch import Tensor

from atp_fast.kernels.attention import launch_attention
from atp_fast.kernels.launch import Blocks, Scoring
from atp_fast.kernels.row_dots import launch_row_dots


def launch_query_patch_effects(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_corrupted: Tensor,
    grad_z: Tensor,
    scoring: Scoring,
    *,
    blocks: Blocks | None = None,
) -> Tensor:
    """Signed effects, (C, batch, queries, heads), a transposed view."""
    z = launch_attention(q, k, v, scoring, blocks=blocks).z
    patched = launch_attention(q_corrupted, k, v, scoring, blocks=blocks).z
    return launch_row_dots(grad_z, patched - z)[0].transpose(-1, -2)
