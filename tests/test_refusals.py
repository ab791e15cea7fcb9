"""What the plug refuses, each with the class and the reason, and what it must not refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import zoo
from atp_fast import Engine, PromptPairs
from atp_fast.hf.attention import _HARMLESS, LayerRun, _attention, _mask, running

Change = Callable[[dict[str, Any]], dict[str, Any]]


@contextmanager
def in_a_layer() -> Iterator[LayerRun]:
    run = LayerRun(backend="reference")
    token = running.set(run)
    try:
        yield run
    finally:
        running.reset(token)


def attend(**arguments: Any) -> LayerRun:
    """One attention call as transformers makes it."""
    x = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    given = {"attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.int64), **arguments}
    with in_a_layer() as run:
        _attention(nn.Identity(), x, x, x, **given)
    return run


@pytest.mark.parametrize("name", ["position_bias", "indices", "sinks", "cache", "anything_else"])
def test_unknown_attention_arguments(name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"Identity calls attention with '{name}'"):
        attend(**{name: torch.zeros(1)})
    attend(**{name: None})  # not used


def test_harmless_attention_arguments() -> None:
    assert attend(**dict.fromkeys(_HARMLESS, 1)).calls == 1


@pytest.mark.parametrize(
    "mask",
    [
        None,
        torch.zeros(1, 1, 5, 5, dtype=torch.int64),
        torch.zeros(1, 1, 1, 1),
        torch.zeros(1, 1, 1, 1, dtype=torch.bool),
        torch.zeros(1, 1, 5, 5),
    ],
    ids=["none", "whole", "float", "bool", "float whole"],
)
def test_foreign_masks(mask: Tensor | None) -> None:
    with pytest.raises(NotImplementedError, match="Identity does not use the mask"):
        attend(attention_mask=mask)


@pytest.mark.parametrize("window", [0, 1, 3])
def test_options_of_an_attention_call(window: int) -> None:
    mask = torch.full((1, 1, 1, 1), window, dtype=torch.int64)
    options = attend(attention_mask=mask, scaling=0.25, softcap=7.0, s_aux=torch.ones(2)).options
    assert options is not None
    assert options[:3] == (0.25, window or None, 7.0)
    assert options.sinks is not None and options.sinks.tolist() == [1, 1]
    default = attend().options
    assert default is not None
    assert default == (8**-0.5, None, None, None)


def test_outside_a_layer() -> None:
    x = torch.zeros(1, 1, 2, 8)
    with pytest.raises(RuntimeError, match="inside atp_fast.Engine only"):
        _attention(nn.Identity(), x, x, x, torch.zeros(1, 1, 1, 1, dtype=torch.int64))


Rule = Callable[[Tensor, Tensor], Tensor]


def asked(rule: Rule, local_size: int | None = None, **options: Any) -> Tensor:
    return _mask(mask_function=lambda b, h, q, k: rule(q, k), local_size=local_size, **options)


@pytest.mark.parametrize("width", [None, 1, 2, 7, 32, 4096])
def test_causal_windows_are_served(width: int | None) -> None:
    found = asked(lambda q, k: (k <= q) & (k > q - (width or 10**9)), width)
    assert found.shape == (1, 1, 1, 1)
    assert int(found) == (width or 0)


FOREIGN: dict[str, tuple[Rule, int | None]] = {
    "bidirectional": (lambda q, k: k >= 0, None),
    "one ahead": (lambda q, k: k <= q + 1, None),
    "strictly causal": (lambda q, k: k < q, None),
    "without the first key": (lambda q, k: (k <= q) & (k > 0), None),
    "chunks": (lambda q, k: (k <= q) & (k // 32 == q // 32), None),
    "chunks of the window": (lambda q, k: (k <= q) & (k // 8 == q // 8), 8),
    "a window nobody named": (lambda q, k: (k <= q) & (k > q - 64), None),
    "wider by one": (lambda q, k: (k <= q) & (k > q - 9), 8),
    "narrower by one": (lambda q, k: (k <= q) & (k > q - 7), 8),
    "no window where one is named": (lambda q, k: k <= q, 8),
    "sinks and a window": (lambda q, k: (k <= q) & ((k > q - 8) | (k < 1)), 8),
    "a window in the future too": (lambda q, k: (k - q).abs() < 8, 8),
    "every second key": (lambda q, k: (k <= q) & ((q - k) % 2 == 0), None),
    "a prefix that all see": (lambda q, k: (k <= q) | (k < 2), None),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_masks_are_refused(name: str) -> None:
    with pytest.raises(NotImplementedError, match="no causal mask or causal sliding window"):
        asked(*FOREIGN[name])


@pytest.mark.parametrize(
    "error", [IndexError("row 7"), RuntimeError("row 7")], ids=["index", "run"]
)
def test_a_mask_that_depends_on_the_input(error: Exception) -> None:
    def rule(q: Tensor, k: Tensor) -> Tensor:
        raise error

    with pytest.raises(NotImplementedError, match=r"depends on its input \(row 7\)"):
        asked(rule)


def test_a_model_with_a_padding_mask_of_its_own() -> None:
    with pytest.raises(NotImplementedError, match="the model made one"):
        asked(lambda q, k: k <= q, attention_mask=torch.ones(1, 5))


# ---- whole models


def plugged_only(model: PreTrainedModel, change: Callable[[Any], Any]) -> Callable[..., Any]:
    """A forward hook that changes a module's output while the attention is ours, so that it differs from eager's."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return change(output) if model.config._attn_implementation == "atp_fast" else output

    return hook


def first_scaled(output: Any) -> Any:
    return (1.01 * output[0], *output[1:]) if isinstance(output, tuple) else 1.01 * output


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("layer", [0, 2])
def test_layers_that_differ_from_eager(family: str, layer: int) -> None:
    model = zoo.build(family, dtype=torch.float32)
    layers = model.model.layers if family == "llama" else model.transformer.h
    layers[layer].register_forward_hook(plugged_only(model, first_scaled))
    reason = f"{type(model).__name__} is not served: taken apart, its layer {layer}'s output differ"
    with pytest.raises(NotImplementedError, match=reason):
        Engine(model)


def test_layers_are_compared_on_one_input() -> None:
    """An error that later layers hide is found where it is made."""
    model = zoo.build("llama", dtype=torch.float32)
    model.model.layers[1].register_forward_hook(plugged_only(model, first_scaled))
    model.model.layers[2].register_forward_hook(
        plugged_only(
            model, lambda out: (out[0] / 1.01, *out[1:]) if isinstance(out, tuple) else out / 1.01
        )
    )
    with pytest.raises(NotImplementedError, match="its layer 1's output differ"):
        Engine(model)


def test_logits_that_differ_from_the_model_s_own() -> None:
    """Layers equal eager ones, but the model's whole forward does more than call them."""
    model = zoo.build("gpt2", dtype=torch.float32)
    own, layers = model.forward, model.transformer.h

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        if model.transformer.h is layers:  # not stepped over
            out.logits = 1.01 * out.logits
        return out

    model.forward = forward
    with pytest.raises(NotImplementedError, match="its logits differ from its own by 9.9e-03"):
        Engine(model)


@pytest.mark.parametrize(
    ("calls", "reason"),
    [(0, "layer 1 computes its own softmax or none"), (2, "layer 1 computes attention 2 times")],
)
def test_layers_with_none_or_two_attentions(calls: int, reason: str) -> None:
    model = zoo.build("llama", dtype=torch.float32)
    attention = model.model.layers[1].self_attn
    own = attention.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out: Any = (0 * kwargs["hidden_states"], None)
        for _ in range(calls):
            out = own(*args, **kwargs)
        return out

    attention.forward = forward
    with pytest.raises(NotImplementedError, match=f"LlamaForCausalLM is not served: {reason}"):
        Engine(model)


def given_to_attention(model: PreTrainedModel, layer: int, change: Change) -> None:
    """Change the keyword arguments of a layer's attention module, which hands them on to the attention function."""
    model.model.layers[layer].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: (args, change(kwargs)), with_kwargs=True
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda k: {**k, "position_bias": torch.zeros(1)}, "calls attention with 'position_bias'"),
        (lambda k: {**k, "attention_mask": None}, "does not use the mask"),
        (lambda k: {**k, "attention_mask": torch.zeros(1, 1, 8, 8)}, "does not use the mask"),
    ],
    ids=["bias", "no mask", "own mask"],
)
def test_a_model_that_hands_its_attention_something_else(change: Change, reason: str) -> None:
    model = zoo.build("llama", dtype=torch.float32)
    given_to_attention(model, 2, change)
    with pytest.raises(
        NotImplementedError,
        match=f"LlamaForCausalLM is not served: layer 2: LlamaAttention {reason}",
    ):
        Engine(model)


def test_heads_of_different_shapes() -> None:
    model = zoo.build("llama", dtype=torch.float32)
    other = zoo.build("llama", dtype=torch.float32, num_key_value_heads=4)
    model.model.layers[1] = other.model.layers[1]
    with pytest.raises(NotImplementedError, match="its layers have heads of different shapes"):
        Engine(model)


# ---- served, but with care

ROTATIONS: dict[str, tuple[dict[str, Any], bool]] = {
    "default": ({"rope_type": "default", "rope_theta": 100.0}, True),
    "linear": ({"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}, True),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}, False),
    "longrope": (
        {
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "factor": 4.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [2.0, 3.0, 4.0, 5.0],
            "original_max_position_embeddings": 8,
        },
        False,
    ),
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_prefixes_are_run_alone_only_where_rotations_do_not_depend_on_the_length(name: str) -> None:
    """With longrope a prompt of 12 tokens turns otherwise than its first 6 alone."""
    from atp_fast.attribution.literal import literal_attribution

    parameters, moves = ROTATIONS[name]
    model = zoo.build("llama", wide_norms=True, rope_parameters=parameters)
    engine = Engine(model, "reference")
    assert engine.plug.moves == moves
    pairs = zoo.random_pairs(model, 2, 12, shared_prefix=6)
    wanted = literal_attribution(model, pairs, "nll", nodes=["q", "z"])[1]
    found = engine.attribute(pairs, "nll", nodes=["q", "z"], progress=False).effect
    for kind, right in wanted.items():
        assert (found[kind] - right).abs().max() <= 1e-9 * right.abs().max()


GRANITE = {**zoo.FAMILIES["llama"], "embedding_multiplier": 3.0, "attention_multiplier": 0.3}


def granite(multiplier: float) -> PreTrainedModel:
    settings = {**GRANITE, "logits_scaling": 2.0, "residual_multiplier": multiplier}
    zoo.FAMILIES["granite"] = settings
    try:
        return zoo.build("granite", wide_norms=True)
    finally:
        del zoo.FAMILIES["granite"]


@pytest.mark.parametrize("method", ["atp*", "atp+graddrop"])
def test_residual_multipliers(method: str) -> None:
    """A model that scales its writes by 0.4 is one whose writing weights are 0.4 times as large."""
    scaled, plain = granite(0.4), granite(1.0)
    with torch.no_grad():
        for layer in plain.model.layers:
            layer.self_attn.o_proj.weight *= 0.4
            layer.mlp.down_proj.weight *= 0.4
    pairs = zoo.random_pairs(scaled, 3, 7, ragged=True)
    kinds = ["q", "k", "v", "z", "neuron", "attn_out", "mlp_out", "resid_pre"]
    found, wanted = (
        Engine(model).attribute(pairs, "nll", method, kinds, progress=False)
        for model in (scaled, plain)
    )
    for kind in kinds:
        right = wanted.contribution[kind]
        assert right.abs().max() > 0
        assert (found.contribution[kind] - right).abs().max() <= 1e-9 * right.abs().max(), kind


def test_a_write_with_something_added_has_no_graddrop() -> None:
    """A layer whose output is not its input and two writes: AtP is served, what needs the writes is refused."""
    model = zoo.build("llama", dtype=torch.float32)
    layer = model.model.layers[1]
    layer.register_forward_hook(lambda module, args, out: out + 0.1 * args[0].detach() * 0 + 0.25)
    engine, pairs = Engine(model), zoo.random_pairs(model, 2, 6)
    reason = "layer 1 does not add an attention write and an MLP write to its input"
    with pytest.raises(NotImplementedError, match=rf"'atp\*' is not served on Llama.*: {reason}"):
        engine.attribute(pairs)
    with pytest.raises(NotImplementedError, match=f"nodes 'mlp_out' of Llama.*: {reason}"):
        engine.attribute(pairs, method="atp", nodes=["mlp_out"])
    assert (
        float(engine.attribute(pairs, method="atp+qk", progress=False).effect["z"].abs().max()) > 0
    )


def test_pairs_of_another_kind_are_named() -> None:
    engine = Engine(zoo.build("gpt2"))
    with pytest.raises(TypeError, match="pairs must be PromptPairs, got list"):
        engine.patch([PromptPairs], [])  # type: ignore[arg-type]
