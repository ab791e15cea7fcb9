"""A tiny random model of every causal language model type that transformers registers: shared sizes, and exceptions."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))

# given to a config that has such a setting; the first name of several that mean the same is transformers' own
SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "sliding_window": 4,
    "is_decoder": True,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    # linear attention and state spaces
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "mamba_chunk_size": 16,
    "use_mamba_kernels": False,
}
_TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER: dict[str, Any] = {
    "d_model": 32,
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 40,
    "encoder_ffn_dim": 40,
    "pad_token_id": 1,
}
_MAMBA: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 16}
_ONE_OF_THREE = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_ROTATION: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}

# what else a type needs, or instead of SIZES
_OTHERS: dict[str, dict[str, Any]] = {
    # latent attention has keys of every head
    "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 dots3_note_text glm4_moe_lite glm_moe_dsa hy_v4 minicpm3 youtu": {
        "num_key_value_heads": 4
    },
    # positions are counted from the padding
    "camembert data2vec-text roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl": {
        "pad_token_id": 1
    },
    "xmod": {"pad_token_id": 1, "default_language": "en_XX", "languages": ["en_XX"]},
    "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart trocr": _DECODER,
    "whisper": {**_DECODER, "max_target_positions": 64},
    "prophetnet": {
        "num_encoder_layers": 3,
        "num_decoder_layers": 3,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
        "pad_token_id": 1,
    },
    "cwm modernbert-decoder emu3_text_model mllama_text_model": _TOKENS,
    "gptj codegen": {"rotary_dim": 4},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1], [["global"], 1]],
        "window_size": 4,
        "num_heads": 4,
    },
    "qwen3_next qwen3_5_text qwen3_5_moe_text": _ONE_OF_THREE,
    "qwen4_exp_text": {
        **_ONE_OF_THREE,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "kimi_linear bailing_hybrid": {**_ONE_OF_THREE, "num_key_value_heads": 4},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {**_MAMBA, **_ONE_OF_THREE},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "nemotron_h": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
    },
    "falcon_h1": {**_MAMBA, "mamba_d_head": 8, "mamba_d_ssm": 32},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
    },
    "cohere_compass_text": {
        "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROTATION)
    },
    "ctrl": {"dff": 40},
    "dbrx": {
        "d_model": 32,
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {
            "ffn_hidden_size": 40,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "hidden_size": 32,
        },
    },
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 48,
    },
    "gemma4_text gemma4_unified_text": {
        "hidden_size_per_layer_input": 0,
        "global_head_dim": 16,
        "pad_token_id": 0,
    },
    "llama4_text": {"attention_chunk_size": 4, "floor_scale": 3, "no_rope_layers": [1, 0, 1]},
    "lfm2_moe": {"layer_types": ["full_attention"] * 3, "num_dense_layers": 1},
    "dots1": {"n_shared_experts": 1},
    "qwen2_moe": {"use_sliding_window": False},
    "reformer": {
        "axial_pos_embds_dim": (16, 16),
        "axial_pos_shape": (8, 8),
        "attention_head_size": 8,
    },
    "xlnet": {"d_head": 8},
    "zaya": {"num_experts_per_tok": 1},
}
EXCEPTIONS = {name: settings for names, settings in _OTHERS.items() for name in names.split()}
# what transformers itself does not build from a small config (or not without timm)
NOT_BUILT = (
    "dots3_note",
    "gemma3n",
    "gemma4_assistant",
    "gemma4_unified_assistant",
    "musicgen",
    "musicgen_melody",
    "zamba",
)
# sizes of SIZES that a config has but does not take
LEFT_OUT: dict[str, tuple[str, ...]] = {
    "falcon": ("head_dim", "num_key_value_heads"),
    "prophetnet": ("num_hidden_layers", "num_attention_heads"),
    "xlnet": ("max_position_embeddings",),
    "xlstm": ("qk_head_dim", "v_head_dim", "head_dim"),
}


def _shared_sizes(config: Any) -> dict[str, Any]:
    settings = {
        name: size
        for name, size in SIZES.items()
        if _has(config, name) and name not in LEFT_OUT.get(config.model_type, ())
    }
    for name in getattr(config, "sub_configs", {}):
        if (part := getattr(config, name, None)) is not None:
            settings[name] = _shared_sizes(part)
            if name not in ("text_config", "decoder") and "num_hidden_layers" in settings[name]:
                settings[name]["num_hidden_layers"] = 2
    return settings | EXCEPTIONS.get(config.model_type, {})


def _has(config: Any, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:  # set per layer
        return True


def tiny_config(model_type: str, **settings: Any) -> Any:
    sizes = _shared_sizes(AutoConfig.for_model(model_type))
    return AutoConfig.for_model(model_type, **{**sizes, **settings})


def build(model_type: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """The tiny model of a type, float64, in eval mode; every parameter has noise of its own. settings: of its config."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(model_type, **settings))
    model = model.to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise * 0.2)
    model = model.eval()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the default has no float64
    return model
