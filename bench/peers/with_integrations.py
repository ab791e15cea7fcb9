"""atp_fast under TransformerLens's own names: the calls of with_transformer_lens with one import changed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import Case, Scores
from with_transformer_lens import bridged

from atp_fast import __version__
from atp_fast.integrations import transformer_lens as fast


def version() -> str:
    """What the rows say of the library."""
    return f"atp_fast {__version__}"


def tool(case: Case) -> Callable[[], Scores]:
    """attribution_patch of one pair: z, mlp_out and the embeddings."""
    model, prompts = bridged(case), case.prompts

    def call() -> Scores:
        found = fast.attribution_patch(model, prompts.clean, prompts.corrupted, case.metric)
        z = torch.zeros(case.layers, case.heads)
        for node, score in found.node_scores.items():
            if node.kind == "attn_head_out":
                z[node.layer, node.head] += score
        return {"z": z}

    return call


def patch_heads(case: Case) -> Callable[[], Scores]:
    """get_act_patch_attn_head_out_all_pos, the cache of the clean run included."""
    model = bridged(case)

    def call() -> Scores:
        with torch.no_grad():
            _, clean = model.run_with_cache(case.prompts.clean)
            found = fast.get_act_patch_attn_head_out_all_pos(
                model, case.prompts.corrupted, clean, case.metric
            )
        return {"z": found}

    return call


WAYS = {"atp, tool's names": tool, "patch heads, library's names": patch_heads}
