"""nnsight: attribution patching and activation patching as its documentation shows them."""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable
from typing import Any

import nnsight
import torch
from common import Case, Scores
from nnsight import NNsight

warnings.filterwarnings("ignore")


def version() -> str:
    """What the rows say of the library."""
    return f"nnsight {importlib.metadata.version('nnsight')}"


def _wrapped(case: Case) -> tuple[Any, list[Any], list[Any]]:
    """The model, and per layer the envoys of the joint q, k, v projection and of the output projection."""
    model = NNsight(case.model)
    parts = [case.attention_parts(layer, model) for layer in range(case.layers)]
    return model, [joint for joint, _ in parts], [out for _, out in parts]


def attribution(case: Case) -> Callable[[], Scores]:
    """Two traces; gradients read inside `with value.backward()`, from the last layer to the first."""
    model, joint, out = _wrapped(case)
    layers = case.layers
    clean, corrupted = case.prompts.clean, case.prompts.corrupted
    metric = case.metric

    def call() -> Scores:
        clean_qkv, clean_z = [None] * layers, [None] * layers
        qkv, z, grad_qkv, grad_z = ([None] * layers for _ in range(4))
        with torch.no_grad(), model.trace(clean):
            for layer in range(layers):
                clean_qkv[layer] = joint[layer].output.save()
                clean_z[layer] = out[layer].input.save()
        with model.trace(corrupted):
            for layer in range(layers):
                qkv[layer] = joint[layer].output.save()
                z[layer] = out[layer].input.save()
            value = metric(model.output.logits)
            with value.backward():
                for layer in range(layers - 1, -1, -1):
                    grad_z[layer] = z[layer].grad.save()
                    grad_qkv[layer] = qkv[layer].grad.save()
        found: list[Scores] = []
        for layer in range(layers):
            of_qkv = ((clean_qkv[layer] - qkv[layer]) * grad_qkv[layer]).detach()
            of_z = ((clean_z[layer] - z[layer]) * grad_z[layer]).detach()
            found.append(case.by_head("qkv", of_qkv) | case.by_head("z", of_z))
        case.model.zero_grad(set_to_none=True)
        return case.stacked(found)

    return call


def patch_heads(case: Case) -> Callable[[], Scores]:
    """One trace per head."""
    model, _, out = _wrapped(case)
    layers, heads, size = case.layers, case.heads, case.head_dim
    clean, corrupted, metric = case.prompts.clean, case.prompts.corrupted, case.metric

    def call() -> Scores:
        values = torch.zeros(layers, heads)
        with torch.no_grad():
            clean_z = [None] * layers
            with model.trace(clean):
                for layer in range(layers):
                    clean_z[layer] = out[layer].input.save()
            for layer in range(layers):
                for head in range(heads):
                    start, end = head * size, (head + 1) * size
                    with model.trace(corrupted):
                        out[layer].input[:, :, start:end] = clean_z[layer][:, :, start:end]
                        value = metric(model.output.logits).save()
                    values[layer, head] = value
        return {"z": values}

    return call


def patch_heads_invokes(case: Case) -> Callable[[], Scores]:
    """One trace per layer, its heads as invokes of one batch."""
    model = nnsight.LanguageModel(case.model, tokenizer=_tokenizer())
    _, out = zip(*(case.attention_parts(layer, model) for layer in range(case.layers)), strict=True)
    layers, heads, size = case.layers, case.heads, case.head_dim
    clean, corrupted, metric = case.prompts.clean, case.prompts.corrupted, case.metric

    def call() -> Scores:
        values = torch.zeros(layers, heads)
        with torch.no_grad():
            clean_z = [None] * layers
            with model.trace(clean):
                for layer in range(layers):
                    clean_z[layer] = out[layer].input.save()
            for layer in range(layers):
                with model.trace() as tracer:
                    found = nnsight.save([])
                    for head in range(heads):
                        start, end = head * size, (head + 1) * size
                        with tracer.invoke(corrupted):
                            out[layer].input[:, :, start:end] = clean_z[layer][:, :, start:end]
                            found.append(metric(model.output.logits))
                values[layer] = torch.stack(list(found))
        return {"z": values}

    return call


def _tokenizer() -> Any:
    """A tokenizer that is never used: batching invokes asks for one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    )


WAYS = {
    "atp": attribution,
    "patch heads": patch_heads,
    "patch heads, invokes": patch_heads_invokes,
}
