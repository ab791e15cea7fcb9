"""What the plug refuses, each with the class and the reason, and what it must not refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    PreTrainedModel,
)

import zoo
from atp_fast import Engine, PromptPairs
from atp_fast.attribution.literal import literal_attribution
from atp_fast.hf.attention import _HARMLESS, LayerRun, _attention, _mask, running
from atp_fast.metrics import resolve
from atp_fast.nodes import Node
from naive_attribution import naive_attribution
from naive_patching import naive_effects

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
    assert default == (8**-0.5, None, None, None, None)


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
    "chunks wider by one": (lambda q, k: (k <= q) & (k // 9 == q // 9), 8),
    "chunks narrower by one": (lambda q, k: (k <= q) & (k // 7 == q // 7), 8),
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
    """By the layer that attends by one: bart makes one that nobody uses."""
    mask = asked(*FOREIGN[name])
    with pytest.raises(NotImplementedError, match="Identity has .* no causal mask or causal slid"):
        attend(attention_mask=mask)


@pytest.mark.parametrize(
    "error", [IndexError("row 7"), RuntimeError("row 7")], ids=["index", "run"]
)
def test_a_mask_that_depends_on_the_input(error: Exception) -> None:
    def rule(q: Tensor, k: Tensor) -> Tensor:
        raise error

    with pytest.raises(NotImplementedError, match="depends on the model's input"):
        attend(attention_mask=asked(rule))


def test_a_model_with_a_padding_mask_of_its_own() -> None:
    mask = torch.ones(1, 5)
    assert int(asked(lambda q, k: k <= q, attention_mask=mask)) == 0
    mask[0, 3] = 0
    with pytest.raises(NotImplementedError, match="made an attention mask with some"):
        asked(lambda q, k: k <= q, attention_mask=mask)


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


def with_attentions(model: PreTrainedModel, layer: int, calls: int) -> None:
    """The layer computes its attention so many times; without it, it averages positions so far."""
    attention = model.model.layers[layer].self_attn
    own = attention.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        x: Tensor = kwargs["hidden_states"]
        steps = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        out: Any = (x.cumsum(1) / steps, None)
        for _ in range(calls):
            out = own(*args, **kwargs)
        return out

    attention.forward = forward


def test_a_layer_with_two_attentions() -> None:
    model = zoo.build("llama", dtype=torch.float32)
    with_attentions(model, 1, 2)
    reason = "LlamaForCausalLM is not served: layer 1 computes attention 2 times"
    with pytest.raises(NotImplementedError, match=reason):
        Engine(model)


@pytest.mark.parametrize("without", [0, 1, 2])
def test_a_layer_without_attention(without: int) -> None:
    """Autograd takes the cotangents through it; it has neurons and writes, and no queries, keys, values or outputs."""
    model = zoo.build("llama", wide_norms=True)
    with_attentions(model, without, 0)
    engine = Engine(model, "reference")
    assert not engine.plug.moves  # what it mixes may be a state
    kinds = ["q", "k", "v", "z", "neuron", "resid_pre"]
    pairs = zoo.random_pairs(model, 2, 7, shared_prefix=3)
    found = engine.attribute(pairs, "nll", nodes=kinds, progress=False)
    wanted = naive_attribution(model, pairs, resolve("nll", pairs), kinds)
    for ours, right in zip((found.contribution, found.effect), wanted, strict=True):
        for kind in kinds:
            assert (ours[kind] - right[kind]).abs().max() <= 1e-9 * right[kind].abs().max()
            assert bool(ours[kind][without].any()) == (kind in ("neuron", "resid_pre"))
    nodes = [Node("neuron", without, 4, 3), Node("k", 1 if without == 2 else 2, 5, 1)]
    effects = engine.patch(pairs, nodes, "nll", progress=False).effect
    right, _ = naive_effects(model, pairs, [[node] for node in nodes], resolve("nll", pairs))
    assert (effects - right).abs().max() <= 1e-9 * right.abs().max()
    reason = f"layer {without} has no nodes 'z', got Node"
    with pytest.raises(ValueError, match=reason):
        engine.patch(pairs, [Node("z", without, 4, 0)])


def test_a_model_without_attention() -> None:
    model = zoo.build("llama", dtype=torch.float32)
    for layer in range(3):
        with_attentions(model, layer, 0)
    reason = "LlamaForCausalLM is not served: no layer computes attention through transformers'"
    with pytest.raises(NotImplementedError, match=reason):
        Engine(model)


def test_positions_that_a_model_counts_otherwise() -> None:
    """Its prefixes are not run alone: told to start at 3, this one starts at 3 + 2, as roberta does."""
    model = zoo.build("llama", wide_norms=True)
    pairs = zoo.random_pairs(model, 2, 7, shared_prefix=3)
    wanted = Engine(model, "reference").attribute(pairs, nodes=["q"], progress=False).effect["q"]
    own = model.model.forward

    def forward(*args: Any, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        if position_ids is not None:
            position_ids = position_ids + 2
        return own(*args, position_ids=position_ids, **kwargs)

    model.model.forward = forward
    engine = Engine(model, "reference")
    assert not engine.plug.moves
    found = engine.attribute(pairs, nodes=["q"], progress=False).effect["q"]
    assert (found - wanted).abs().max() <= 1e-9 * wanted.abs().max()


def test_a_layer_that_is_given_the_prompt() -> None:
    """The clean run's arguments would be the corrupted run's too."""
    model = zoo.build("llama", dtype=torch.float32)
    base, own = model.model, model.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        ids = kwargs["input_ids"]
        return own(*args, **kwargs, seen_before=base.embed_tokens(ids))

    base.forward = forward
    for layer in base.layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: (
                args,
                {k: v for k, v in kwargs.items() if k != "seen_before"},
            ),
            with_kwargs=True,
        )
    with pytest.raises(
        NotImplementedError, match="layer 0 is given more of the prompt than its hidden"
    ):
        Engine(model)


def test_what_is_the_models_own_error_is_no_refusal_of_ours() -> None:
    """Python's message is the cause, and no part of what we say."""
    model = zoo.build("llama", dtype=torch.float32)
    layer, own = model.model.layers[1], model.model.layers[1].forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        first, _second = x.chunk(1, 1) if x.requires_grad else (x, x)
        return own(first, *args, **kwargs)

    layer.forward = forward
    reason = (
        "^LlamaForCausalLM is not served: its layers do not run one after the other .*ValueError.$"
    )
    with pytest.raises(NotImplementedError, match=reason) as caught:
        Engine(model)
    assert "not enough values to unpack" in str(caught.value.__cause__)
    model.forward = lambda **kwargs: int("no number")
    with pytest.raises(
        ValueError, match=r"^model must run on token ids alone, Llama.* raises ValueError on"
    ):
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


class BadBackward(torch.autograd.Function):
    """The identity, through which a gradient comes back as NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * torch.nan


def detached(model: PreTrainedModel) -> None:
    """Every module inside lets gradients through, the layer as a whole does not."""
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, out: out.detach())


def bad_gradients(model: PreTrainedModel) -> None:
    model.model.layers[0].register_forward_hook(lambda module, args, out: BadBackward.apply(out))


def infinite_logits(model: PreTrainedModel) -> None:
    model.lm_head.weight.data[5] = torch.inf


def second_list(model: PreTrainedModel) -> None:
    model.model.others = nn.ModuleList([nn.Identity() for _ in range(3)]).eval()


def skipped_layer(model: PreTrainedModel) -> None:
    """The base model runs its last layers only."""
    base = model.model
    own = base.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        layers = base.layers
        base.layers = nn.ModuleList(list(layers)[1:])
        try:
            return own(*args, **kwargs)
        finally:
            base.layers = layers

    base.forward = forward


def training(model: PreTrainedModel) -> None:
    model.model.layers[2].mlp.train()


# what is done to a model, and what is then said of it after its class
CHANGED: dict[str, tuple[Callable[[PreTrainedModel], None], type[Exception], str]] = {
    "detached": (detached, NotImplementedError, "no gradient flows through its layers"),
    "gradients": (bad_gradients, ValueError, "gradients that are not finite in layer 0"),
    "logits": (infinite_logits, ValueError, "logits that are not finite on the tokens"),
    "two lists": (second_list, NotImplementedError, "it has 2 lists of 3 layers, not one"),
    "skipped": (skipped_layer, NotImplementedError, "does not call its layers one after the other"),
    "training": (training, ValueError, "must be in evaluation mode"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_changed_models(name: str) -> None:
    change, error, reason = CHANGED[name]
    model = zoo.build("llama", dtype=torch.float32)
    Engine(model)
    change(model)
    who = "LlamaForCausalLM is not served: " if error is NotImplementedError else "model "
    with pytest.raises(error, match=f"^{who}.*{reason}"):
        Engine(model)


@pytest.mark.parametrize(
    ("head", "error"),
    [
        (LlamaModel, NotImplementedError),
        (LlamaForSequenceClassification, NotImplementedError),
        (LlamaForTokenClassification, NotImplementedError),
        (nn.Linear, TypeError),
    ],
    ids=lambda x: x.__name__,
)
def test_other_heads_than_a_language_model_s(head: type[nn.Module], error: type[Exception]) -> None:
    config = zoo.build("llama", dtype=torch.float32).config
    model = head(2, 2) if head is nn.Linear else head(config)
    reason = {TypeError: "got Linear"}.get(error, f"{head.__name__} is not served: it is no causal")
    with pytest.raises(error, match=reason):
        Engine(model.eval())


def test_the_text_half_of_a_model_with_images() -> None:
    """Its heads are named in text_config only; on text it gives the numbers of the text model."""
    text = zoo.build("gemma3", dtype=torch.float32)
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"intermediate_size": 16, "image_size": 16, "patch_size": 8}
    whole = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text.config.to_dict(),
            vision_config=vision,
            mm_tokens_per_image=4,
            image_token_index=47,
            boi_token_index=46,
            eoi_token_index=45,
        )
    ).eval()
    assert not hasattr(whole.config, "num_attention_heads")
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.lm_head.load_state_dict(text.lm_head.state_dict())
    pairs = zoo.random_pairs(text, 2, 6)
    pairs = PromptPairs(pairs.clean_ids % 40 + 1, pairs.corrupted_ids % 40 + 1, pairs.answer_ids)
    found, wanted = (
        Engine(model).attribute(pairs, "nll", nodes=["k", "neuron"], progress=False).contribution
        for model in (whole, text)
    )
    for kind, right in wanted.items():
        assert right.abs().max() > 0
        assert (found[kind] - right).abs().max() <= 1e-5 * right.abs().max()


def no_neurons(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp = nn.Tanh().eval()


def test_a_kind_of_node_that_a_model_lacks() -> None:
    """What the kind is refused for is named; all other kinds are served."""
    model, reason = zoo.build("llama", dtype=torch.float32), "layer 1 has no down projection"
    no_neurons(model)
    engine, pairs = Engine(model), zoo.random_pairs(model, 2, 6)
    assert engine.plug.inspection.refused == {"neuron": reason}
    with pytest.raises(NotImplementedError, match=f"'neuron' of LlamaForCausalLM .*: {reason}"):
        engine.attribute(pairs, nodes=["z", "neuron"])
    assert set(engine.attribute(pairs, nodes=["z", "mlp_out"]).effect) == {"z", "mlp_out"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("share", [0.2, 5.0])
def test_how_far_a_model_may_differ_from_eager(dtype: torch.dtype, share: float) -> None:
    """By what a dtype rounds to: 1e-4, 1e-2 and 5e-2 of the largest; `share` of it is added."""
    model = zoo.build("llama", dtype=dtype)
    rounding = {torch.float32: 1e-4, torch.float16: 1e-2}.get(dtype, 5e-2)
    change = plugged_only(model, lambda out: out * (1 + share * rounding))
    model.model.layers[2].register_forward_hook(change)
    if share < 1:
        Engine(model)
        return
    with pytest.raises(NotImplementedError, match="its layer 2's output differ"):
        Engine(model)


@pytest.mark.parametrize("pad", [0, 3, 10, 4])
def test_padding_is_never_run(pad: int) -> None:
    """A padding token's embedding, which nobody trained, may be anything."""
    model = zoo.build("llama", dtype=torch.float32, pad_token_id=pad)
    model.model.embed_tokens.weight.data[pad] = torch.nan
    engine = Engine(model)
    clean, corrupted = torch.arange(20, 26).repeat(2, 1), torch.arange(30, 36).repeat(2, 1)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    pairs = PromptPairs(
        clean.where(mask, pad), corrupted.where(mask, pad), clean[:, 0], attention_mask=mask
    )
    found = engine.attribute(pairs, "nll", nodes=["z"], progress=False).effect["z"]
    assert found.isfinite().all() and found.abs().max() > 0


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
    parameters, moves = ROTATIONS[name]
    model = zoo.build("llama", wide_norms=True, rope_parameters=parameters)
    engine = Engine(model, "reference")
    assert engine.plug.moves == moves
    pairs = zoo.random_pairs(model, 2, 12, shared_prefix=6)
    wanted = literal_attribution(model, pairs, "nll", nodes=["q", "z"])[1]
    found = engine.attribute(pairs, "nll", nodes=["q", "z"], progress=False).effect
    for kind, right in wanted.items():
        assert (found[kind] - right).abs().max() <= 1e-9 * right.abs().max()


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic"])
@pytest.mark.parametrize("where", ["sliding_attention", "full_attention"])
def test_rotations_of_each_kind_of_layer(kind: str, where: str) -> None:
    """Gemma 3 has rotations for windows and others for whole prompts; one that depends on the length is enough."""
    plain = {"rope_type": "default", "rope_theta": 100.0}
    parameters: dict[str, dict[str, Any]] = {"sliding_attention": plain, "full_attention": plain}
    parameters[where] = ROTATIONS[kind][0]
    model = zoo.build("gemma3", dtype=torch.float32, rope_parameters=parameters)
    assert Engine(model, "reference").plug.moves == (kind != "dynamic")


def test_a_model_that_takes_no_positions() -> None:
    """Its prefixes cannot be run alone, for what follows them would stand at position 0; numbers stay."""
    model = zoo.build("llama", wide_norms=True)
    pairs = zoo.random_pairs(model, 2, 8, shared_prefix=4)
    wanted = Engine(model, "reference").attribute(pairs, nodes=["q"], progress=False).effect["q"]
    own, base = model.forward, model.model.forward

    def forward(input_ids: Tensor, use_cache: bool = False) -> Any:
        return own(input_ids=input_ids, use_cache=use_cache)

    def base_forward(input_ids: Tensor, use_cache: bool = False, **kwargs: Any) -> Any:
        assert "position_ids" not in kwargs or kwargs["position_ids"] is None
        return base(input_ids=input_ids, use_cache=use_cache, **kwargs)

    model.forward, model.model.forward = forward, base_forward
    engine = Engine(model, "reference")
    assert not engine.plug.moves
    found = engine.attribute(pairs, nodes=["q"], progress=False).effect["q"]
    assert (found - wanted).abs().max() <= 1e-9 * wanted.abs().max()


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
    layer.register_forward_hook(lambda module, args, out: out + 0.1 * args[0].detach() ** 2)
    engine, pairs = Engine(model), zoo.random_pairs(model, 2, 6)
    reason = "layer 1 does not add an attention write and an MLP write to its input"
    with pytest.raises(NotImplementedError, match=rf"'atp\*' is not served on Llama.*: {reason}"):
        engine.attribute(pairs)
    with pytest.raises(NotImplementedError, match=f"nodes 'mlp_out' of Llama.*: {reason}"):
        engine.attribute(pairs, method="atp", nodes=["mlp_out"])
    assert (
        float(engine.attribute(pairs, method="atp+qk", progress=False).effect["z"].abs().max()) > 0
    )


def test_a_constant_added_to_the_writes_changes_nothing() -> None:
    """As the biases that gpt_neox_japanese adds outside its projections."""
    model = zoo.build("llama", wide_norms=True)
    pairs = zoo.random_pairs(model, 2, 6)
    constant = torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model.model.layers[1].register_forward_hook(lambda module, args, out: out + constant)
    kinds = ["z", "attn_out", "mlp_out"]
    found = Engine(model).attribute(pairs, "nll", nodes=kinds, progress=False).contribution
    wanted = naive_attribution(model, pairs, resolve("nll", pairs), kinds)[0]
    for kind, right in wanted.items():
        assert right.abs().max() > 0
        assert (found[kind] - right).abs().max() <= 1e-9 * right.abs().max()


def test_pairs_of_another_kind_are_named() -> None:
    engine = Engine(zoo.build("gpt2"))
    with pytest.raises(TypeError, match="pairs must be PromptPairs, got list"):
        engine.patch([PromptPairs], [])  # type: ignore[arg-type]
