"""No library: torch hooks on the transformers model, as a careful user would write them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from common import Case, Scores
from torch import Tensor, nn


def version() -> str:
    """What the rows say of the library."""
    return f"transformers {transformers.__version__}"


def _run(case: Case, ids: Tensor, grad: bool) -> tuple[dict[tuple[str, int], Tensor], Tensor]:
    """q, k, v (joint) and z of every layer, and the logits."""
    found: dict[tuple[str, int], Tensor] = {}
    handles = []

    def keep_output(layer: int) -> Callable[..., None]:
        return lambda module, args, output: found.__setitem__(("qkv", layer), output)

    def keep_input(layer: int) -> Callable[..., None]:
        return lambda module, args: found.__setitem__(("z", layer), args[0])

    for layer in range(case.layers):
        joint, out = case.attention_parts(layer)
        handles.append(joint.register_forward_hook(keep_output(layer)))
        handles.append(out.register_forward_pre_hook(keep_input(layer)))
    try:
        with torch.set_grad_enabled(grad):
            return found, case.model(ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def attribution(case: Case) -> Callable[[], Scores]:
    """Two forwards, one torch.autograd.grad by the recorded values."""

    def call() -> Scores:
        clean, _ = _run(case, case.prompts.clean, grad=False)
        corrupted, logits = _run(case, case.prompts.corrupted, grad=True)
        grads = torch.autograd.grad(case.metric(logits), list(corrupted.values()))
        layers: list[Scores] = [{} for _ in range(case.layers)]
        for (place, value), grad in zip(corrupted.items(), grads, strict=True):
            kind, layer = place
            layers[layer] |= case.by_head(kind, (clean[place] - value.detach()) * grad)
        return case.stacked(layers)

    return call


def patch_heads(case: Case) -> Callable[[], Scores]:
    """One forward per head, its z replaced at all positions."""
    size = case.head_dim

    def call() -> Scores:
        clean, _ = _run(case, case.prompts.clean, grad=False)
        values = torch.zeros(case.layers, case.heads)
        for layer in range(case.layers):
            source = clean["z", layer]
            for head in range(case.heads):
                part = slice(head * size, (head + 1) * size)

                def replace(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                    z = args[0].clone()
                    z[..., part] = source[..., part]  # noqa: B023 (removed before the next head)
                    return (z, *args[1:])

                handle = case.attention_parts(layer)[1].register_forward_pre_hook(replace)
                with torch.no_grad():
                    logits = case.model(case.prompts.corrupted, use_cache=False).logits
                handle.remove()
                values[layer, head] = case.metric(logits)
        return {"z": values}

    return call


WAYS = {"atp": attribution, "patch heads": patch_heads}
