"""The engine around the numbers: what it refuses and says, and that it leaves the model as it found it."""

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
from atp_fast.hf.attention import running
from atp_fast.nodes import Node
from atp_fast.patching import MissedBound

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    """Everything about a model, and about torch, that a call must not change."""
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        logits = model(ids).logits
    configs = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
    found: dict[str, Any] = {
        "logits": logits,
        "weights": {name: x.clone() for name, x in model.state_dict().items()},
        "flags": {name: x.requires_grad for name, x in model.named_parameters()},
        "gradients": {name: x.grad for name, x in model.named_parameters()},
        "devices": {name: (x.device, x.dtype) for name, x in model.named_parameters()},
        "hooks": [[list(getattr(m, name)) for name in HOOKS] for m in model.modules()],
        "training": [m.training for m in model.modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "forward": [m.__dict__.get("forward") for m in model.modules()],
        "classes": [type(m) for m in model.modules()],
        "attention": [c._attn_implementation for c in configs],
        "experts": [c._experts_implementation for c in configs],
        "config": [c.to_dict() for c in configs],
        "running": running.get(),
        "grad_enabled": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "random": torch.get_rng_state(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    return found


def assert_unchanged(before: dict[str, Any], model: PreTrainedModel) -> None:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        return bool(a == b)

    after = snapshot(model)
    assert [key for key in before if not same(before[key], after[key])] == []


@contextmanager
def interrupted(
    module: nn.Module, call: int, error: type[BaseException] = KeyboardInterrupt
) -> Iterator[list[int]]:
    """Ctrl-C, or an exception, while the module runs for the call-th time; yields the list of calls so far."""
    calls: list[int] = []

    def hook(*_: Any) -> None:
        calls.append(1)
        if len(calls) == call:
            raise error

    handle = module.register_forward_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


VERBS: dict[str, Callable[[Engine, PromptPairs], Any]] = {
    "attribute": lambda engine, pairs: engine.attribute(
        pairs, progress=False, nodes=["q", "k", "z"]
    ),
    "patch": lambda engine, pairs: engine.patch(pairs, [Node("z", 1, 4, 2)], progress=False),
}
MORE_VERBS: dict[str, Callable[[Engine, PromptPairs], Any]] = {
    "patch_subsets": lambda engine, pairs: engine.patch_subsets(
        pairs, [[Node("k", 0, 3, 1), Node("mlp_out", 2, 5)], []], progress=False
    ),
    "bound_missed": lambda engine, pairs: engine.bound_missed(
        pairs, nodes=["attn_out"], forwards=20, probability=0.5, progress=False
    ),
}


def numbers(result: Any) -> Tensor:
    """What a verb found, as one tensor."""
    if isinstance(result, MissedBound):
        return torch.from_numpy(result.difference)
    effect = result.effect
    return torch.cat([x.flatten() for x in effect.values()]) if isinstance(effect, dict) else effect


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_model_is_left_as_it_was(family: str, verb: str) -> None:
    """Whichever attention it had: sdpa where the family has it, for one of the two verbs."""
    model = zoo.build(family, dtype=torch.float32)
    sdpa = model._supports_sdpa and verb == "attribute"
    model.set_attn_implementation("sdpa" if sdpa else "eager")
    pairs = zoo.random_pairs(model, 2, 6, ragged=True)
    parameters = list(model.parameters())
    parameters[1].requires_grad_(False)
    parameters[2].grad = torch.ones_like(parameters[2])
    before = snapshot(model)
    engine = Engine(model)
    assert_unchanged(before, model)
    VERBS[verb](engine, pairs)
    assert_unchanged(before, model)


MODULES: dict[str, Callable[[PreTrainedModel], nn.Module]] = {
    "embedding": lambda model: model.transformer.wte,
    "position embedding": lambda model: model.transformer.wpe,
    "attention": lambda model: model.transformer.h[1].attn,
    "linear": lambda model: model.transformer.h[2].mlp.c_proj,
    "activation": lambda model: model.transformer.h[0].mlp.act,
    "final norm": lambda model: model.transformer.ln_f,
    "head": lambda model: model.lm_head,
}


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError], ids=lambda e: e.__name__)
@pytest.mark.parametrize("where", MODULES)
@pytest.mark.parametrize("verb", [*VERBS, *MORE_VERBS])
def test_stopped_at_any_moment_the_model_is_as_it_was(
    verb: str, where: str, error: type[BaseException]
) -> None:
    """Out of every call of a module, one after another, until none is left; and then the engine works as before."""
    model = zoo.build("gpt2", dtype=torch.float32)
    pairs = zoo.random_pairs(model, 2, 6, shared_prefix=1)
    model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    before, engine = snapshot(model), Engine(model)
    call_verb = {**VERBS, **MORE_VERBS}[verb]
    wanted = numbers(call_verb(engine, pairs))
    call, finished = 0, False
    while not finished:
        call += 1
        with interrupted(MODULES[where](model), call, error) as calls:
            try:
                found = call_verb(engine, pairs)
                finished = True
            except error:
                assert len(calls) == call
        assert_unchanged(before, model)
    assert call > 1
    assert torch.equal(numbers(found), wanted)


def test_ctrl_c_while_the_engine_is_made() -> None:
    model = zoo.build("gemma2", dtype=torch.float32)
    before = snapshot(model)
    call, finished = 0, False
    while not finished:
        call += 1
        with interrupted(model.model.layers[1].mlp, call):
            try:
                Engine(model)
                finished = True
            except KeyboardInterrupt:
                pass
        assert_unchanged(before, model)
    assert call > 1


@pytest.mark.parametrize("verb", VERBS)
def test_an_error_in_the_metric_leaves_the_model_as_it_was(verb: str) -> None:
    model = zoo.build("llama")
    pairs = zoo.random_pairs(model, 2, 6)
    before, engine = snapshot(model), Engine(model)

    def metric(logits: Tensor, pairs: PromptPairs) -> Tensor:
        raise ZeroDivisionError("in the metric")

    with pytest.raises(ZeroDivisionError, match="in the metric"):
        if verb == "attribute":
            engine.attribute(pairs, metric, progress=False)
        else:
            engine.patch(pairs, [Node("z", 1, 4, 2)], metric, progress=False)
    assert_unchanged(before, model)


def test_the_callers_own_hooks_stay_and_count() -> None:
    """A hook of the caller's changes what the model computes; the engine keeps it, in place and in effect."""
    model = zoo.build("gpt2")
    pairs = zoo.random_pairs(model, 2, 6)
    plain = Engine(model).attribute(pairs, progress=False)
    model.transformer.h[1].mlp.register_forward_hook(lambda module, args, output: 2 * output)
    before = snapshot(model)
    hooked = Engine(model).attribute(pairs, progress=False)
    assert_unchanged(before, model)
    assert not torch.allclose(plain.effect["z"], hooked.effect["z"])
    with torch.no_grad():
        logits = model(pairs.clean_ids).logits[torch.arange(2), -1]
    difference = logits.gather(1, pairs.answer_ids[:, None])
    assert pairs.wrong_answer_ids is not None
    difference -= logits.gather(1, pairs.wrong_answer_ids[:, None])
    assert torch.allclose(hooked.clean_value, difference[:, 0])


def test_the_callers_grad_mode_does_not_matter() -> None:
    model = zoo.build("gpt2")
    pairs = zoo.random_pairs(model, 2, 6)
    wanted = Engine(model).attribute(pairs, progress=False).effect["z"]
    with torch.no_grad():
        found = Engine(model).attribute(pairs, progress=False).effect["z"]
        assert not torch.is_grad_enabled()
    assert torch.equal(wanted, found)
    assert not found.requires_grad


def test_two_engines_on_one_model_do_not_meet() -> None:
    model = zoo.build("gpt2")
    pairs = zoo.random_pairs(model, 2, 6)
    first, second = Engine(model), Engine(model)
    wanted = first.attribute(pairs, progress=False).effect["q"]
    second.attribute(pairs, method="atp", progress=False)
    assert torch.equal(first.attribute(pairs, progress=False).effect["q"], wanted)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("xlm", "XLMWithLMHeadModel is not served: it has 4 lists of 2 layers"),
        ("mamba", r"MambaForCausalLM is not served: .*state-space"),
        ("t5", "T5ForConditionalGeneration is not served: .*encoder-decoder"),
        ("bert", "BertForMaskedLM is not served: .*no causal language model"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused(family: str, reason: str) -> None:
    model = zoo.build_refused(family)
    with pytest.raises(NotImplementedError, match=reason):
        Engine(model)


def test_things_that_are_no_models() -> None:
    for thing in ("gpt2", nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=f"PreTrainedModel, got {type(thing).__name__}"):
            Engine(thing)  # type: ignore[arg-type]


def test_training_mode_is_refused() -> None:
    model = zoo.build("gpt2")
    engine, pairs = Engine(model), zoo.random_pairs(model, 2, 6)
    model.transformer.h[1].attn.attn_dropout.train()
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        engine.attribute(pairs)
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        Engine(model)
    assert model.transformer.h[1].attn.attn_dropout.training


def test_neurons_of_experts_outside_the_interface_are_refused() -> None:
    model = zoo.build_other_experts()
    pairs = zoo.random_pairs(model, 2, 6)
    with pytest.raises(NotImplementedError, match=r"'neuron' of .* mixture of experts"):
        Engine(model).attribute(pairs)


class NoGradient(nn.Module):
    """A linear layer as a quantised kernel without a backward pass has it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = float(linear.weight.detach().abs().max()) / 127
        rounded = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(rounded, requires_grad=False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale).T


@pytest.mark.parametrize(
    "which",
    ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"],
)
def test_quantised_weights_without_gradients_are_refused(which: str) -> None:
    model = zoo.build("llama", dtype=torch.float32)
    block, name = which.split(".")
    for layer in model.model.layers:
        parent = getattr(layer, block)
        setattr(parent, name, NoGradient(getattr(parent, name)).eval())
    pairs = zoo.random_pairs(model, 2, 6)
    with pytest.raises(NotImplementedError, match="LlamaForCausalLM is not served: .*quantised"):
        Engine(model).attribute(pairs, nodes=["z", "mlp_out"], progress=False)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_weights_that_are_not_finite_name_the_layer(layer: int) -> None:
    model = zoo.build("llama")
    pairs = zoo.random_pairs(model, 2, 6)
    engine = Engine(model)
    model.model.layers[layer].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=rf"not finite .*layer {layer}"):
        engine.attribute(pairs, progress=False)


def test_a_new_engine_names_the_layer_that_is_not_finite() -> None:
    model = zoo.build("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite .*layer 1"):
        Engine(model)


def test_logits_that_are_not_finite_are_named() -> None:
    model = zoo.build("llama")
    pairs = zoo.random_pairs(model, 2, 6)
    engine = Engine(model)
    model.lm_head.weight.data[5, 0] = torch.inf
    with pytest.raises(ValueError, match="logits"):
        engine.attribute(pairs, progress=False)


def test_embeddings_that_are_not_finite_on_one_prompt() -> None:
    """Only the corrupted prompt of one pair meets the bad row."""
    model = zoo.build("llama")
    pairs = zoo.random_pairs(model, 2, 6)
    bad = next(i for i in range(1, 48) if i not in {*pairs.clean_ids.flatten().tolist()})
    corrupted = pairs.corrupted_ids.clone()
    corrupted[1, 3] = bad
    engine = Engine(model)
    model.model.embed_tokens.weight.data[bad] = torch.inf
    pairs = PromptPairs(pairs.clean_ids, corrupted, pairs.answer_ids, pairs.wrong_answer_ids)
    with pytest.raises(ValueError, match=r"not finite .*layer 0"):
        engine.attribute(pairs, progress=False)


def test_bad_arguments() -> None:
    model = zoo.build("gpt2", dtype=torch.float32)
    engine, pairs = Engine(model), zoo.random_pairs(model, 2, 6)
    before = snapshot(model)
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (
            ValueError,
            r"method must be among atp, .*'AtP'",
            lambda: engine.attribute(pairs, method="AtP"),
        ),
        (ValueError, r"nodes must be among q, .*'Q'", lambda: engine.attribute(pairs, nodes=["Q"])),
        (TypeError, r"nodes must be a sequence", lambda: engine.attribute(pairs, nodes="q")),
        (ValueError, r"nodes must name at least one", lambda: engine.attribute(pairs, nodes=[])),
        (ValueError, r"direction must be .*'up'", lambda: engine.attribute(pairs, direction="up")),
        (
            ValueError,
            r"metric must be among nll, .*'loss'",
            lambda: engine.attribute(pairs, "loss"),
        ),
        (
            ValueError,
            r"metric must return shape \(2,\), got \(\)",
            lambda: engine.attribute(pairs, lambda x: x.sum()),
        ),
        (
            ValueError,
            r"metric .* must be finite",
            lambda: engine.attribute(pairs, lambda x: x.sum((1, 2)) / 0),
        ),
        (TypeError, r"pairs must be PromptPairs, got str", lambda: engine.attribute("When Mary")),
        (
            ValueError,
            r"precision must be None or 'bf16', got 'fp8'",
            lambda: Engine(model, precision="fp8"),
        ),
        (
            ValueError,
            r"memory_budget must be bytes, a size .*got 'much'",
            lambda: Engine(model, memory_budget="much"),
        ),
        (
            ValueError,
            r"memory_budget must be positive, got 0",
            lambda: Engine(model, memory_budget=0),
        ),
        (ValueError, r"backend must be among auto, .*'cuda'", lambda: Engine(model, "cuda")),
        (
            ValueError,
            r"context of 32 tokens, got a prompt of 33",
            lambda: engine.attribute(zoo.random_pairs(model, 1, 33)),
        ),
        (
            ValueError,
            r"token ids below the model's 48, got 95",
            lambda: engine.attribute(
                PromptPairs(
                    torch.full((1, 4), 95),
                    torch.ones(1, 4, dtype=torch.long),
                    torch.ones(1, dtype=torch.long),
                ),
                "nll",
            ),
        ),
        (
            ValueError,
            r"needs wrong_answer_ids",
            lambda: engine.attribute(
                PromptPairs(pairs.clean_ids, pairs.corrupted_ids, pairs.answer_ids)
            ),
        ),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    assert_unchanged(before, model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="triton would be served")
def test_an_explicit_backend_never_falls_back() -> None:
    with pytest.raises(ValueError, match="backend 'triton' needs CUDA tensors, got cpu"):
        Engine(zoo.build("gpt2"), backend="triton")


def test_the_prompt_may_fill_the_context() -> None:
    model = zoo.build("opt", dtype=torch.float32)
    found = Engine(model).attribute(zoo.random_pairs(model, 1, 32), nodes=["z"], progress=False)
    assert found.effect["z"].shape == (3, 32, 4)


def test_what_a_result_says_of_itself() -> None:
    model = zoo.build("qwen3", dtype=torch.float32)
    pairs = zoo.random_pairs(model, 3, 7, ragged=True, padding_side="left")
    found = Engine(model, "reference").attribute(
        pairs, "nll", "atp+qk", ["k", "q", "mlp_out"], "denoising", progress=False
    )
    assert list(found.effect) == list(found.contribution) == ["q", "k", "mlp_out"]
    assert {kind: tuple(x.shape) for kind, x in found.effect.items()} == {
        "q": (3, 7, 4),
        "k": (3, 7, 2),
        "mlp_out": (3, 7, 1),
    }
    assert found.per_pair is None
    assert found.counts.tolist() == [1, 2, 3, 3, 3, 3, 3]
    said = (found.method, found.metric, found.direction, found.backend)
    assert said == ("atp+qk", "nll", "denoising", "reference")
    assert found.metadata["pairs_digest"] == pairs.digest()
    assert found.metadata["model_class"] == "Qwen3ForCausalLM"
    assert all(isinstance(value, str) for value in found.metadata.values())
