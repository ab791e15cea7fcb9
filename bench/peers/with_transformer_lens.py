"""TransformerLens: its Attribution_Patching_Demo notebook's way, its attribution_patch tool, and its patching module.

The notebook caches every hook of a forward and a backward run on both prompts; the clean run's backward is left out
here, since attribution does not need it.
"""

from __future__ import annotations

import importlib.metadata
import logging
import warnings
from collections.abc import Callable

import torch
from common import Case, Scores
from torch import Tensor
from transformer_lens import ActivationCache, patching
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformer_lens.tools.analysis.attribution_patching import (
    EdgeAttributionConfig,
    attribution_patch,
)

logging.getLogger("transformer_lens").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="add_hook: skipped")

# the backward cache knows q, k, v and z by the names of the modules they belong to
OWN_NAMES = {"q": "q.hook_out", "k": "k.hook_out", "v": "v.hook_out", "z": "o.hook_in"}


def version() -> str:
    """What the rows say of the library."""
    return f"transformer-lens {importlib.metadata.version('transformer-lens')}"


def bridged(case: Case) -> TransformerBridge:
    """The model wrapped; the bridge computes attention eagerly, as it does for its users."""
    case.model.set_attn_implementation("eager")
    name = type(case.model).__name__
    bridge = build_bridge_from_module(case.model, name, hf_config=case.model.config)
    bridge.eval()
    return bridge


def _forward_and_backward(
    model: TransformerBridge, case: Case, wanted: Callable[[str], bool]
) -> tuple[ActivationCache, ActivationCache]:
    """The notebook's get_cache_fwd_and_bwd on the corrupted prompts."""
    model.reset_hooks()
    values: dict[str, Tensor] = {}
    grads: dict[str, Tensor] = {}
    model.add_hook(wanted, lambda value, hook: values.__setitem__(hook.name, value.detach()), "fwd")
    model.add_hook(wanted, lambda grad, hook: grads.__setitem__(hook.name, grad.detach()), "bwd")
    case.metric(model(case.prompts.corrupted)).backward()
    model.reset_hooks()
    model.zero_grad(set_to_none=True)
    return ActivationCache(values, model), ActivationCache(grads, model)


def _of(cache: ActivationCache, layer: int, kind: str) -> Tensor:
    found = cache.cache_dict.get(f"blocks.{layer}.attn.hook_{kind}")
    return cache.cache_dict[f"blocks.{layer}.attn.{OWN_NAMES[kind]}"] if found is None else found


def _attribution(
    case: Case, wanted: Callable[[str], bool], everything: bool
) -> Callable[[], Scores]:
    model = bridged(case)

    def call() -> Scores:
        names = None if everything else wanted
        _, clean = model.run_with_cache(case.prompts.clean, names_filter=names)
        values, grads = _forward_and_backward(model, case, wanted)
        layers: list[Scores] = []
        for layer in range(case.layers):
            scores = {}
            for kind in "qkvz":
                change = _of(clean, layer, kind) - _of(values, layer, kind)
                effect = change * _of(grads, layer, kind)
                effect = effect.reshape(*effect.shape[:2], case.heads, case.head_dim)
                scores[kind] = effect.sum((0, 1, 3))
            layers.append(scores)
        return case.stacked(layers)

    return call


def demo(case: Case) -> Callable[[], Scores]:
    """The notebook's filter: every hook but the split q, k, v inputs."""
    return _attribution(case, lambda name: "_input" not in name, everything=True)


def demo_filtered(case: Case) -> Callable[[], Scores]:
    """The notebook's way, caching q, k, v and z alone."""
    ends = tuple(f"attn.hook_{kind}" for kind in "qkvz")
    return _attribution(case, lambda name: name.endswith(ends), everything=False)


def tool(case: Case) -> Callable[[], Scores]:
    """attribution_patch: z, mlp_out and the embeddings (it has no q, k, v), one pair at a time."""
    model = bridged(case)
    prompts = case.prompts
    runs = 0

    def metric(logits: Tensor) -> Tensor:
        nonlocal runs
        pair = runs // 2 % len(prompts.clean)  # it is not told the pair: two runs of each, in turn
        runs += 1
        return logits[0, -1, prompts.answers[pair]] - logits[0, -1, prompts.wrong_answers[pair]]

    def call() -> Scores:
        config = EdgeAttributionConfig(granularity="node")
        found = attribution_patch(model, prompts.clean, prompts.corrupted, metric, config)
        z = torch.zeros(case.layers, case.heads)
        for node, score in found.node_scores.items():
            if node.kind == "attn_head_out":
                z[node.layer, node.head] += score
        return {"z": z}

    return call


def patch_heads(case: Case) -> Callable[[], Scores]:
    """patching.get_act_patch_attn_head_out_all_pos."""
    model = bridged(case)

    def call() -> Scores:
        with torch.no_grad():
            _, clean = model.run_with_cache(case.prompts.clean)
            found = patching.get_act_patch_attn_head_out_all_pos(
                model, case.prompts.corrupted, clean, case.metric
            )
        return {"z": found}

    return call


WAYS = {
    "atp, demo": demo,
    "atp, demo with q k v z cached alone": demo_filtered,
    "atp, tool (z, mlp_out and embeddings alone)": tool,
    "patch heads": patch_heads,
}
