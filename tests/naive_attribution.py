"""AtP* by its definitions, from whole forward passes of the plain model with hooks: nothing is shared with hf/, the sweep or
the literal code, and the model computes its attention itself.

Each pair is run alone. A gradient is that of a zero added to a node. The QK fix puts the corrupted queries (all at once: a
row of attention reads its own) or one corrupted key in and looks at z; GradDrop runs the model once per dropped layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atp_fast.metrics import Metric
from atp_fast.prompts.pairs import PromptPairs
from naive_patching import Key, _Hooked, _note

_HEADED = ("q", "k", "v", "z")


def naive_attribution(
    model: PreTrainedModel,
    pairs: PromptPairs,
    metric: Metric,
    kinds: Sequence[str],
    graddrop: bool = True,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(contribution, effect), kind -> (layers, positions, nodes), of pairs of one length without padding.

    AtP*, or AtP with the QK fix where graddrop is False.
    """
    contribution: dict[str, Tensor] = {}
    effect: dict[str, Tensor] = {}
    hooked = _Hooked(model)
    with hooked.running():
        for row in range(len(pairs)):
            signed, dropped = _of_pair(hooked, pairs[torch.tensor([row])], metric, kinds, graddrop)
            for kind in kinds:
                score = signed[kind].abs()
                if graddrop:
                    layers = len(hooked.layers)
                    score = sum(d[kind].abs() for d in dropped) / (layers - (kind != "resid_pre"))
                contribution[kind] = contribution.get(kind, 0) + score / len(pairs)
                effect[kind] = effect.get(kind, 0) + signed[kind] / len(pairs)
    return contribution, effect


def _of_pair(
    hooked: _Hooked, pair: PromptPairs, metric: Metric, kinds: Sequence[str], graddrop: bool
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    layers = len(hooked.layers)
    corrupted: dict[Key, Tensor] = {}
    clean: dict[Key, Tensor] = {}
    with torch.no_grad():
        hooked.run(pair.corrupted_ids, lambda kind, layer, x: _note(corrupted, kind, layer, x))
        hooked.run(pair.clean_ids, lambda kind, layer, x: _note(clean, kind, layer, x))
        moved = {
            (kind, layer): _z_changes(hooked, pair.clean_ids, kind, layer, clean, corrupted)
            for kind in ("q", "k")
            for layer in range(layers)
            if kind in kinds and (kind, layer) in clean
        }

    def effects(dropped: int | None) -> dict[str, Tensor]:
        leaves: dict[Key, Tensor] = {}

        def change(kind: str, layer: int, x: Tensor) -> Tensor:
            leaf = leaves[kind, layer] = torch.zeros_like(x, requires_grad=True)
            return x + leaf

        logits = hooked.run(pair.clean_ids, change, dropped)
        value = metric(logits[:, -1:], pair, None).sum()
        keys = list(leaves)
        grads = torch.autograd.grad(
            value, [leaves[key] for key in keys], materialize_grads=True, allow_unused=True
        )
        grad = dict(zip(keys, grads, strict=True))
        found = {}
        for kind in kinds:
            of_layers = []
            for layer in range(layers):
                if (kind, layer) not in clean:  # no attention there
                    of_layers.append(None)
                    continue
                if kind in ("q", "k"):
                    of_layers.append(
                        _fixed(
                            kind, moved[kind, layer], grad["z", layer], clean["k", layer].shape[1]
                        )
                    )
                    continue
                delta = (corrupted[kind, layer] - clean[kind, layer])[0]
                product = delta * grad[kind, layer][0]
                if kind in _HEADED:
                    of_layers.append(product.sum(-1).T)
                else:
                    of_layers.append(product if kind == "neuron" else product.sum(-1, keepdim=True))
            width = max(x.shape[1] for x in of_layers if x is not None)
            found[kind] = torch.zeros(layers, pair.clean_ids.shape[1], width, dtype=value.dtype)
            for row, x in zip(found[kind], of_layers, strict=True):
                if x is not None:
                    row[:, : x.shape[1]] = x
        return found

    return effects(None), [effects(layer) for layer in range(layers)] if graddrop else []


def _z_changes(
    hooked: _Hooked,
    ids: Tensor,
    kind: str,
    layer: int,
    clean: dict[Key, Tensor],
    corrupted: dict[Key, Tensor],
) -> Tensor:
    """How z of the layer changes, (1, heads, positions, dim) for all queries, (keys, heads, positions, dim) for each key."""
    seen: dict[Key, Tensor] = {}
    positions = ids.shape[1]

    def change(name: str, number: int, x: Tensor) -> Tensor:
        if (name, number) == (kind, layer):
            x = x.clone()
            if kind == "q":
                x[:] = corrupted[kind, layer]
            else:
                at = torch.arange(positions)
                x[at, :, at] = corrupted[kind, layer][0].transpose(0, 1)
        return _note(seen, name, number, x)

    hooked.run(ids if kind == "q" else ids.expand(positions, -1), change)
    return seen["z", layer] - clean["z", layer]


def _fixed(kind: str, moved: Tensor, grad_z: Tensor, kv_heads: int) -> Tensor:
    """Effects (positions, heads) of a layer's queries or keys."""
    by_row = (moved * grad_z).sum(-1)  # (1 or keys, heads, positions)
    if kind == "q":
        return by_row[0].T
    return by_row.sum(-1).unflatten(1, (kv_heads, -1)).sum(-1)
