"""What the benchmarks run on: models by name, random pairs, and the arithmetic a run cannot do without."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from atp_fast.models import DEMO_MODEL, load_model
from atp_fast.pairs import PromptPairs

NEOX_160M = "gpt-neox-160m"
GPT2_124M = "gpt2-124m"
NEOX_SMALL = "gpt-neox-4l-256"

CONFIGS = {
    # Pythia-160M's shape
    NEOX_160M: GPTNeoXConfig(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        vocab_size=50304,
        rotary_pct=0.25,
        max_position_embeddings=2048,
    ),
    GPT2_124M: GPT2Config(),
    # small enough for 8,192 tokens
    NEOX_SMALL: GPTNeoXConfig(
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        vocab_size=8192,
        rotary_pct=0.25,
        max_position_embeddings=8192,
    ),
}


def build(name: str) -> PreTrainedModel:
    """A model with random weights from its config (the same in every process), or the demo model with its own."""
    if name == DEMO_MODEL:
        return load_model(name)[0]
    torch.manual_seed(0)
    config = CONFIGS[name]
    kind = GPT2LMHeadModel if isinstance(config, GPT2Config) else GPTNeoXForCausalLM
    return kind(config).eval()


def random_pairs(model: PreTrainedModel, pairs: int, positions: int, shared: int = 0) -> PromptPairs:
    """Pairs of random tokens whose first differing token is number `shared`, and two random answers each."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.vocab_size

    def tokens(*shape: int) -> torch.Tensor:
        return torch.randint(5, vocabulary, shape, generator=generator)

    clean, corrupted = tokens(pairs, positions), tokens(pairs, positions)
    corrupted = torch.where(corrupted == clean, 5 + (clean - 4) % (vocabulary - 5), corrupted)
    corrupted[:, :shared] = clean[:, :shared]
    answers = tokens(pairs)
    wrong = tokens(pairs)
    wrong = torch.where(wrong == answers, 5 + (answers - 4) % (vocabulary - 5), wrong)
    return PromptPairs(clean, corrupted, answers, wrong)


def layer_operations(model: PreTrainedModel, positions: int) -> tuple[float, float]:
    """Operations (multiply and add apart) of one layer's forward and of its vector-Jacobian product, one prompt.

    The forward multiplies by every weight and makes two products per causal pair of positions, q k and p v; the
    vector-Jacobian product multiplies by every weight again and makes four: g v, p g, s k and s q. Nothing is
    counted for recomputation, for logits or for the QK fix.
    """
    config = model.config
    layers = config.num_hidden_layers
    linear = [
        module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not model.get_output_embeddings()
    ]
    weights = sum(module.weight.numel() for module in linear) / layers
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
