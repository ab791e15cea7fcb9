"""Tiny random models of every family that is tested, the refused ones, and random prompt pairs for them.

Every parameter gets noise of its own (biases, norm weights, sinks too), so that nothing is accidentally zero or
the identity, and the weights are large enough that attention is far from uniform.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from atp_fast.prompts.pairs import PromptPairs

VOCAB = 48
WINDOW = 4

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_LLAMA: dict[str, Any] = {**_COMMON, "intermediate_size": 40, "num_key_value_heads": 2}
_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]

_GEMMA: dict[str, Any] = {
    **_LLAMA,
    "head_dim": 8,
    "query_pre_attn_scalar": 12,
    "sliding_window": WINDOW,
    "layer_types": _WINDOWS,
}
_EXPERTS: dict[str, Any] = {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}

# model type -> config
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {**_COMMON, "n_inner": 40},
    "gpt_neox": {**_COMMON, "intermediate_size": 40},
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": WINDOW},
    "qwen2": {
        **_LLAMA,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": _WINDOWS,
    },
    "qwen3": {**_LLAMA, "head_dim": 10},
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 3.0},
    "gemma3": _GEMMA,
    "phi": {**_LLAMA, "qk_layernorm": True},
    "opt": {**_COMMON, "ffn_dim": 40, "word_embed_proj_dim": 32},
    "olmo2": _LLAMA,
    "gpt_oss": {**_EXPERTS, "head_dim": 8, "sliding_window": WINDOW, "layer_types": _WINDOWS},
    "mixtral": _EXPERTS,
}
MOE = ("gpt_oss", "mixtral")
# RMSNorm computes in float32 whatever the model's dtype
FLOAT32_NORMS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "olmo2",
    "gpt_oss",
    "mixtral",
)

_REFUSED: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
REFUSED: dict[str, dict[str, Any]] = {
    "xlm": {**_REFUSED, "num_attention_heads": 4},
    "mamba": {**_REFUSED, "state_size": 4},
    "t5": {**_REFUSED, "d_kv": 8, "d_ff": 40, "num_heads": 4, "decoder_start_token_id": 0},
    "bert": {**_REFUSED, "num_attention_heads": 4, "intermediate_size": 40},
}


def _model(model_type: str, settings: dict[str, Any]) -> PreTrainedModel:
    # quiet: transformers warns of special tokens outside these tiny vocabularies
    logging.getLogger("transformers").setLevel(logging.ERROR)
    head = {"t5": AutoModelForSeq2SeqLM, "bert": AutoModelForMaskedLM}.get(
        model_type, AutoModelForCausalLM
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = head.from_config(AutoConfig.for_model(model_type, **settings))
    return model.eval()


def _randomise(model: PreTrainedModel, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    model = model.to(torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise * (0.3 if parameter.ndim > 1 else 0.2))
    return model.to(dtype)


class WideNorm(nn.Module):
    """RMSNorm in the dtype of its input, where transformers' own goes through float32."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        weight: Tensor = own.weight.detach()
        self.eps = getattr(own, "eps", None) or own.variance_epsilon
        self.weight = nn.Parameter(weight + 1 if type(own).__name__.startswith("Gemma") else weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def build(
    family: str,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    wide_norms: bool = False,
    **overrides: Any,
) -> PreTrainedModel:
    """A tiny eval-mode model of FAMILIES, 3 layers unless num_hidden_layers says otherwise.

    wide_norms: RMSNorms become WideNorms, so that nothing is rounded to float32 on the way (except mixtral's
    routing weights). overrides go to the config.
    """
    settings = {**FAMILIES[family], **overrides}
    if "layer_types" in settings:
        layers = settings["num_hidden_layers"]
        settings["layer_types"] = (_WINDOWS * layers)[:layers]
    model_type = "gemma3_text" if family == "gemma3" else family
    model = _randomise(_model(model_type, settings), dtype, seed)
    for parent in list(model.modules()) if wide_norms else ():
        for name, child in parent.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, WideNorm(child).eval())
    if family in MOE and dtype == torch.float64:
        model.set_experts_implementation("eager")  # the default grouped_mm has no float64
    return model


def build_refused(family: str) -> PreTrainedModel:
    """A tiny eval-mode model of REFUSED, float32."""
    return _model(family, REFUSED[family])


def build_other_experts() -> PreTrainedModel:
    """A mixture whose experts do not go through transformers' experts interface, float32."""
    experts = {"ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2}
    attention = {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}
    settings = {"vocab_size": VOCAB, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 32}
    return _model("dbrx", {**settings, "ffn_config": experts, "attn_config": attention})


def build_linear() -> PreTrainedModel:
    """Two layers of OPT made linear and one number wide, float64: every effect can be worked out by hand.

    Token n embeds to n. Norms and activations are the identity, queries and keys are zero, so attention is the mean
    of the values so far. Layer 0: v = 2x, attn_out = z, neurons (x, 2x), mlp_out = 3 n0 - n1; layer 1: v = x,
    attn_out = -z, neurons (x, x), mlp_out = 2 n0 - n1. Logits of tokens 6 and 7: 3 and 1 times the last x.
    """
    settings = {**_COMMON, "vocab_size": 8, "hidden_size": 1, "num_attention_heads": 1}
    settings |= {"num_hidden_layers": 2, "ffn_dim": 2, "activation_function": "linear"}
    settings |= {"word_embed_proj_dim": 1, "tie_word_embeddings": False}
    model = _model("opt", settings).to(torch.float64)
    decoder = model.get_decoder()
    decoder.final_layer_norm = nn.Identity()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        decoder.embed_tokens.weight[:, 0] = torch.arange(8)
        model.lm_head.weight[6], model.lm_head.weight[7] = 3, 1
        weights = ((2, 1, (1, 2), (3, -1)), (1, -1, (1, 1), (2, -1)))
        for layer, (value, out, up, down) in zip(decoder.layers, weights, strict=True):
            layer.self_attn_layer_norm = nn.Identity()
            layer.final_layer_norm = nn.Identity()
            layer.self_attn.v_proj.weight.fill_(value)
            layer.self_attn.out_proj.weight.fill_(out)
            layer.fc1.weight[:, 0] = torch.tensor(up)
            layer.fc2.weight[0] = torch.tensor(down)
    return model.eval()


def random_pairs(
    model: PreTrainedModel,
    n: int,
    length: int,
    seed: int = 0,
    ragged: bool = False,
    padding_side: str = "right",
    shared_prefix: int = 0,
) -> PromptPairs:
    """n pairs of random tokens, `length` at most; ragged ones are 0, 1, 2, ... tokens shorter, at least 2 long.

    The first shared_prefix tokens of a pair are equal, the one after them differs for certain. The same seed
    gives the same tokens for either padding side.
    """
    vocab = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(1, vocab, shape, generator=generator)

    clean, corrupted, answers = draw(n, length), draw(n, length), draw(n)
    corrupted[:, :shared_prefix] = clean[:, :shared_prefix]
    same = corrupted == clean
    same[:, :shared_prefix] = False
    corrupted[same] = clean[same] % (vocab - 1) + 1
    wrong = answers % (vocab - 1) + 1
    lengths = (length - torch.arange(n) * ragged).clamp(min=2)
    mask = torch.arange(length) < lengths[:, None]
    clean, corrupted = clean * mask, corrupted * mask
    if padding_side == "left":
        shift = (torch.arange(length) - (length - lengths)[:, None]) % length
        clean, corrupted, mask = (x.gather(1, shift) for x in (clean, corrupted, mask))
    return PromptPairs(clean, corrupted, answers, wrong, attention_mask=mask)


def mixed_pairs(model: PreTrainedModel, padding: str) -> PromptPairs:
    """Seven pairs that all share their first two tokens (as with BOS), split at different places in no order, and have
    different lengths.

    padding: "right", "left", or "all left": three columns of padding ahead of every pair, and ragged ends behind.
    """
    splits, lengths = (4, 2, 7, 3, 2, 8, 5), (9, 9, 8, 7, 9, 9, 6)
    parts = [
        random_pairs(model, 1, n, seed=i, shared_prefix=s)
        for i, (n, s) in enumerate(zip(lengths, splits, strict=True))
    ]
    width = max(lengths) + 3 * (padding == "all left")
    shape = (len(parts), width)
    clean, corrupted = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.bool)
    for row, (part, length) in enumerate(zip(parts, lengths, strict=True)):
        start = {"right": 0, "left": width - length, "all left": 3}[padding]
        real = slice(start, start + length)
        clean[row, real], corrupted[row, real] = part.clean_ids[0], part.corrupted_ids[0]
        for ids in (clean, corrupted):
            ids[row, start : start + 2] = torch.tensor([5, 9])
        mask[row, real] = True
    answers, wrong = (
        torch.cat([getattr(p, name) for p in parts]) for name in ("answer_ids", "wrong_answer_ids")
    )
    return PromptPairs(clean, corrupted, answers, wrong, attention_mask=mask)
