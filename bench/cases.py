"""What the engine's benchmarks run on, and the arithmetic a run cannot do without."""

from __future__ import annotations

import os
from pathlib import Path

from random_models import build_random, random_prompts
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from atp_fast.hf.placement import Fetcher
from atp_fast.models import DEMO_MODEL, load_model
from atp_fast.prompts.pairs import PromptPairs


def build(name: str, device: str = "cpu") -> PreTrainedModel:
    """A model with random weights, or the demo model with its own."""
    if name == DEMO_MODEL:
        model: PreTrainedModel = load_model(name)[0].to(device)
        return model
    return build_random(name, device)


def random_pairs(
    model: PreTrainedModel, pairs: int, positions: int, shared: int = 0
) -> PromptPairs:
    """Random prompts that share their first `shared` tokens and differ in every later one."""
    return PromptPairs(*random_prompts(model.config.vocab_size, pairs, positions, shared))


def layer_operations(model: PreTrainedModel, positions: int) -> tuple[float, float]:
    """Operations (multiply and add apart) of one layer's forward and of its vector-Jacobian product, one prompt.

    The forward multiplies by every weight and makes two products per causal pair of positions, q k and p v; the
    vector-Jacobian product multiplies by every weight again and makes four: g v, p g, s k and s q. Nothing is
    counted for recomputation, for logits or for the QK fix.
    """
    config = model.config
    linear = [
        module
        for module in model.modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not model.get_output_embeddings()
    ]
    weights = sum(module.weight.numel() for module in linear) / config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    causal_pairs = positions * (positions + 1) / 2
    per_product = 2 * causal_pairs * config.num_attention_heads * head_dim
    dense = 2 * weights * positions
    return dense + 2 * per_product, dense + 4 * per_product


def operations(model: PreTrainedModel, positions: int, graddrop: bool) -> float:
    """Operations of two forwards and of the layers' vector-Jacobian products, for one pair.

    Without GradDrop every layer takes one cotangent, with it (L + 1) / 2 on average.
    """
    layers = model.config.num_hidden_layers
    forward, vjp = layer_operations(model, positions)
    return layers * (2 * forward + vjp * ((layers + 1) / 2 if graddrop else 1))


def count_reads(folder: Path) -> list[int]:
    """Bytes of each fetch of weights that lie in a folder, from now on; what was read leaves the page cache."""
    read: list[int] = []
    own = Fetcher.fetch

    def fetch(self: Fetcher) -> dict[str, Tensor]:
        values = own(self)
        for name, value in values.items():
            read.append(value.nbytes)
            with (folder / f"{self.hook.weights_map.prefix}{name}.dat").open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return values

    Fetcher.fetch = fetch  # type: ignore[method-assign]
    return read
