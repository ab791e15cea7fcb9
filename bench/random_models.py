"""Models with random weights and random prompts, the same in every process; needs torch and transformers only."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

NEOX_160M = "gpt-neox-160m"
GPT2_124M = "gpt2-124m"
NEOX_SMALL = "gpt-neox-4l-256"
LLAMA_1B = "llama-1.2b"
LLAMA_90M = "llama-90m"
GPT2_TINY = "gpt2-tiny"
NEOX_TINY = "gpt-neox-tiny"

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
    # Llama-3.2-1B's shape, in bfloat16: for a GPU
    LLAMA_1B: LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        intermediate_size=8192,
        vocab_size=128256,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        dtype="bfloat16",
    ),
    # 360 MB of layers in float32, to be fetched from disk
    LLAMA_90M: LlamaConfig(
        hidden_size=1024,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        intermediate_size=2816,
        vocab_size=8192,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    ),
    # to try a benchmark's script out
    GPT2_TINY: GPT2Config(
        n_layer=2, n_head=4, n_embd=64, vocab_size=97, bos_token_id=None, eos_token_id=None
    ),
    NEOX_TINY: GPTNeoXConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        vocab_size=97,
        rotary_pct=0.25,
        max_position_embeddings=2048,
    ),
}


_KINDS = {
    GPT2Config: GPT2LMHeadModel,
    GPTNeoXConfig: GPTNeoXForCausalLM,
    LlamaConfig: LlamaForCausalLM,
}


def build_random(name: str, device: str = "cpu") -> PreTrainedModel:
    """A model in evaluation mode, with weights drawn from seed 0 on its device."""
    torch.manual_seed(0)
    config = CONFIGS[name]
    with torch.device(device):
        model: PreTrainedModel = _KINDS[type(config)](config)
    return model.to(config.dtype or torch.float32).eval()


class Prompts(NamedTuple):
    """Pairs of prompts (pairs, positions) and two answers each, (pairs,)."""

    clean: Tensor
    corrupted: Tensor
    answers: Tensor
    wrong_answers: Tensor


def random_prompts(vocabulary: int, pairs: int, positions: int, shared: int = 0) -> Prompts:
    """Pairs that share their first `shared` tokens and differ in every later one."""
    generator = torch.Generator().manual_seed(1)
    first = 5  # low ids are often special

    def tokens(*shape: int) -> Tensor:
        return torch.randint(first, vocabulary, shape, generator=generator)

    def other_than(x: Tensor, taken: Tensor) -> Tensor:
        return torch.where(x == taken, first + (x - first + 1) % (vocabulary - first), x)

    clean = tokens(pairs, positions)
    corrupted = other_than(tokens(pairs, positions), clean)
    corrupted[:, :shared] = clean[:, :shared]
    answers = tokens(pairs)
    return Prompts(clean, corrupted, answers, other_than(tokens(pairs), answers))
