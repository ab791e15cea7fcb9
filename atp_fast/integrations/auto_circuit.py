"""auto-circuit 1.0: scores as its PruneScores, which are made, and can be saved, without the library."""

from __future__ import annotations

from torch import Tensor

from atp_fast.integrations.graph_shape import GraphShape, source_scores
from atp_fast.results import Attribution
from atp_fast.results.scores import By

PruneScores = dict[str, Tensor]
"""Module name of a destination -> scores of the edges into it, ([positions], [heads], sources before it)."""


def prune_scores(
    found: Attribution,
    shape: GraphShape,
    *,
    by_position: bool = False,
    separate_qkv: bool = True,
    scores: By = "effect",
    higher_is_better: bool | None = None,
) -> PruneScores:
    """PruneScores of `patchable_model(..., factorized=True)`: every edge has the score of the node that it leaves.

    found must be a noising run that scored z, mlp_out and resid_pre (graph_shape.NODES).
    by_position: scores of each position, for a model with `seq_len=found.space.positions`, or their sums over positions,
    for one without; separate_qkv: as the model was built, each head's q, k and v read on their own or together. Grouped
    heads are query heads here, so the wrapped model must have `ungroup_grouped_query_attention`.
    scores, higher_is_better: as in graph_shape.source_scores, which also says what raises.
    """
    table = source_scores(found, shape, scores, higher_is_better)
    if not by_position:
        table = table.sum(0)
    result: PruneScores = {}
    for layer in range(shape.n_layers):
        into_heads = table[..., : shape.before(f"a{layer}.h0<q>")]
        heads = into_heads[..., None, :].expand(*into_heads.shape[:-1], shape.n_heads, -1)
        names = ("hook_q_input", "hook_k_input", "hook_v_input")
        for name in names if separate_qkv else ("hook_attn_in",):
            result[f"blocks.{layer}.{name}"] = heads.clone()
        result[f"blocks.{layer}.hook_mlp_in"] = table[..., : shape.before(f"m{layer}")].clone()
    result[f"blocks.{shape.n_layers - 1}.hook_resid_post"] = table.clone()
    return result
