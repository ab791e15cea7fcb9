"""The task every library is given: a model, pairs of prompts, a metric, and where q, k, v and z are in the model.

The corrupted prompts are run, with clean values patched in, as TransformerLens's demo does. Scores are summed over
positions and averaged over pairs, (layers, heads) per kind: what all libraries' ways can be brought to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from random_models import Prompts, build_random, random_prompts
from torch import Tensor, nn
from transformers import PreTrainedModel

Scores = dict[str, Tensor]


@dataclass
class Case:
    """One model and one set of prompts."""

    model: PreTrainedModel
    prompts: Prompts
    layers: int
    heads: int
    head_dim: int
    order: Literal["gpt2", "gpt_neox"]

    @classmethod
    def make(cls, model_name: str, positions: int, pairs: int) -> Case:
        model = build_random(model_name)
        config = model.config
        return cls(
            model=model,
            prompts=random_prompts(config.vocab_size, pairs, positions),
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            order=config.model_type,
        )

    def metric(self, logits: Tensor) -> Tensor:
        """Mean over pairs of the logit difference at the last position; logits (pairs, positions, vocabulary)."""
        last = logits[:, -1]
        rows = torch.arange(len(last))
        right, wrong = last[rows, self.prompts.answers], last[rows, self.prompts.wrong_answers]
        return (right - wrong).mean()

    def attention_parts(
        self, layer: int, model: nn.Module | None = None
    ) -> tuple[nn.Module, nn.Module]:
        """The joint projection whose output is q, k, v, and the projection whose input is z.

        model: the model in the form a library wraps it, with the same attribute names.
        """
        model = self.model if model is None else model
        if self.order == "gpt2":
            attention = model.transformer.h[layer].attn
            return attention.c_attn, attention.c_proj
        attention = model.gpt_neox.layers[layer].attention
        return attention.query_key_value, attention.dense

    def by_head(self, kind: str, x: Tensor) -> Scores:
        """(pairs, positions, width) effects of "qkv" or "z" values -> per kind (heads,)."""
        if kind == "z":
            return {"z": x.unflatten(-1, (self.heads, self.head_dim)).sum((0, 1, 3))}
        shape = (3, self.heads) if self.order == "gpt2" else (self.heads, 3)
        parts = x.unflatten(-1, (*shape, self.head_dim)).sum((0, 1, 4))
        parts = parts if self.order == "gpt2" else parts.T
        return dict(zip("qkv", parts, strict=True))

    def stacked(self, layers: list[Scores]) -> Scores:
        """One dict per layer -> kind: (layers, heads)."""
        return {kind: torch.stack([scores[kind] for scores in layers]) for kind in layers[0]}
