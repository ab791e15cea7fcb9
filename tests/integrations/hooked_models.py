"""Plain models and token ids for libraries on TransformerLens 2 and 3, which want their own models and texts."""

from __future__ import annotations

import pytest
import torch


def hooked(model, **options):
    """A plain transformers model as a HookedTransformer with a hook for every node; its weights as they are."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained import weight_conversions

    config, kind = model.config, model.config.model_type
    heads = config.num_attention_heads
    shape = dict(
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_heads=heads,
        d_head=config.hidden_size // heads,
        d_vocab=config.vocab_size,
        n_ctx=config.max_position_embeddings,
        dtype=model.dtype,
        device="cpu",
        use_attn_result=True,
        use_hook_mlp_in=True,
    )
    if kind == "gpt2":
        shape |= dict(
            d_mlp=config.n_inner,
            act_fn="gelu_new",
            eps=config.layer_norm_epsilon,
            normalization_type="LN",
        )
        convert = weight_conversions.convert_gpt2_weights
    elif kind == "gpt_neox":
        shape |= dict(
            d_mlp=config.intermediate_size,
            act_fn=config.hidden_act,
            eps=config.layer_norm_eps,
            normalization_type="LN",
            parallel_attn_mlp=config.use_parallel_residual,
            positional_embedding_type="rotary",
            rotary_dim=int(config.rope_parameters["partial_rotary_factor"] * shape["d_head"]),
            rotary_adjacent_pairs=False,
        )
        convert = weight_conversions.convert_neox_weights
    else:
        shape |= dict(
            d_mlp=config.intermediate_size,
            act_fn=config.hidden_act,
            eps=config.rms_norm_eps,
            normalization_type="RMS",
            final_rms=True,
            gated_mlp=True,
            positional_embedding_type="rotary",
            rotary_dim=shape["d_head"],
            rotary_adjacent_pairs=False,
            n_key_value_heads=config.num_key_value_heads,
            ungroup_grouped_query_attention=True,
        )
        convert = weight_conversions.convert_llama_weights
    cfg = HookedTransformerConfig(**shape | options)
    found = HookedTransformer(cfg)
    found.load_state_dict(convert(model, cfg), strict=False)
    found.to(model.dtype)
    ids = torch.arange(1, 8)[None]
    with torch.no_grad():
        gap = (found(ids) - model(ids).logits).abs().max()
    assert gap <= 1e-4, f"the two models differ by {gap}"
    return found.eval()


def eap_on_token_ids(monkeypatch):
    """EAP-IG's graph module; its node attribution, which asks for CUDA, on the CPU, and token ids taken for texts."""
    graph = pytest.importorskip("eap.graph")
    from eap import attribute_node, evaluate

    class OnCpu:
        def __getattr__(self, name):
            return getattr(torch, name)

        def zeros(self, *args, device=None, **kwargs):
            return torch.zeros(*args, **kwargs)

    def tokens(model, rows, max_length=None):
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.zeros(mask.shape, dtype=torch.long)
        ids[mask] = torch.tensor([token for row in rows for token in row])
        return ids, mask.long(), lengths, mask.shape[1]

    monkeypatch.setattr(attribute_node, "torch", OnCpu())
    for module in (attribute_node, evaluate):
        monkeypatch.setattr(module, "tokenize_plus", tokens)
    return graph


def batches(pairs):
    """EAP-IG's data: one batch of prompts, corrupted prompts and labels."""
    real = pairs.attention_mask
    prompts = (
        [ids[row, real[row]].tolist() for row in range(len(pairs))]
        for ids in (pairs.clean_ids, pairs.corrupted_ids)
    )
    labels = torch.stack([pairs.answer_ids, pairs.wrong_answer_ids], 1)
    return [(*prompts, labels)]


def logit_diff_of(logits, clean_logits, input_length, labels, mean=True, loss=False):
    """In EAP-IG's form, with its options."""
    rows = torch.arange(len(logits))
    last = logits[rows, input_length - 1].gather(1, labels)
    found = last[:, 0] - last[:, 1]
    found = -found if loss else found
    return found.mean() if mean else found
