"""Layers on several devices: each works where it lies, what goes between them moves, results are on the model's device."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import zoo
from atp_fast import Engine, PromptPairs
from atp_fast.integrations.eap import neuron_importances
from atp_fast.nodes import KINDS
from far import FAR, FarDevice, FarTensor, follow, send
from test_spans import UNEQUAL, pairs_of


def own_metric(logits: Tensor, pairs: PromptPairs) -> Tensor:
    """Of the user's own: it has weights of its own on the model's device."""
    assert not isinstance(logits, FarTensor)
    scale = torch.linspace(0.5, 1.5, logits.shape[1], device=logits.device)
    return (logits.log_softmax(-1)[..., 7] * scale).sum(1)


def spread(family: str, far: tuple[int, ...]) -> PreTrainedModel:
    """A model with some layers on another device."""
    model = zoo.build(family, wide_norms=True)
    layers = Engine(model).plug.layers
    for number, layer in enumerate(layers):
        if number in far:
            send(layer.module)
        follow(layer.module, lambda far_=number in far: FAR if far_ else torch.device("cpu"))
    norm = model.get_decoder().get_submodule("norm" if family == "llama" else "ln_f")
    follow(norm, lambda: torch.device("cpu"))
    return model


@pytest.mark.parametrize(
    ("family", "far", "pairs", "metric", "method"),
    [
        ("llama", (1,), "left", "nll", "atp*"),
        ("llama", (0, 2), "all left", own_metric, "atp"),
        ("gpt2", (2,), "spans", "kl", "atp*"),
        ("gpt2", (0, 1), "right", "logit_diff", "atp+graddrop"),
    ],
)
def test_layers_on_two_devices(
    family: str, far: tuple[int, ...], pairs: str, metric: Any, method: str
) -> None:
    """No operation gets tensors of both; the numbers are those of one device."""
    model = zoo.build(family, wide_norms=True)
    given = pairs_of(UNEQUAL) if pairs == "spans" else zoo.mixed_pairs(model, pairs)
    options: dict[str, Any] = {"nodes": KINDS, "method": method, "per_pair": True}
    engine = Engine(model, "reference")
    wanted = engine.attribute(given, metric, progress=False, **options)
    nodes = list(wanted.top(40))
    exact = engine.patch(given, nodes, metric, progress=False)
    with FarDevice() as device:
        engine = Engine(spread(family, far), "reference")
        found = engine.attribute(given, metric, progress=False, **options)
        patched = engine.patch(given, nodes, metric, progress=False)
    assert device.moves["cpu", str(FAR)] and device.moves[str(FAR), "cpu"]
    for ours, right in (
        (found.contribution, wanted.contribution),
        (found.effect, wanted.effect),
        (found.per_pair, wanted.per_pair),
    ):
        assert ours is not None and right is not None
        for kind in KINDS:
            assert not isinstance(ours[kind], FarTensor)
            assert float(right[kind].abs().max()) > 0
            assert (ours[kind] - right[kind]).abs().max() <= 1e-12 * right[kind].abs().max(), kind
    assert (patched.effect - exact.effect).abs().max() <= 1e-12 * exact.effect.abs().max()
    assert float(exact.effect.abs().max()) > 0


@pytest.mark.parametrize("far", [(1,), (0, 2)])
def test_dictionaries_are_tried_where_they_work(far: tuple[int, ...]) -> None:
    """Behind a layer on one device is before the next one on the other: a dictionary is given all its values there."""
    seats = ((0, "resid_post"), (1, "resid_pre"), (1, "z"), (1, "resid_post"), (2, "resid_post"))
    model = zoo.build("llama", wide_norms=True)
    pairs = zoo.mixed_pairs(model, "left")
    devices: dict[str, list[torch.device]] = {}

    def add_all(engine: Engine) -> list[str]:
        kinds: list[str] = []
        for layer, site in seats:
            name = f"{site}{layer}"

            def encode(x: Tensor, name: str = name) -> Tensor:
                devices.setdefault(name, []).append(x.device)
                return x.relu()

            kinds += engine.add_dictionary(layer, site, encode, torch.tanh, name=name)
        return kinds

    engine = Engine(model, "reference")
    kinds = add_all(engine)
    wanted = engine.attribute(pairs, nodes=kinds, progress=False)
    nodes = [node for kind in kinds for node in wanted.top(2, kinds=[kind])]
    exact = engine.patch(pairs, nodes, progress=False)
    devices.clear()
    with FarDevice():
        engine = Engine(spread("llama", far), "reference")
        add_all(engine)
        found = engine.attribute(pairs, nodes=kinds, progress=False)
        patched = engine.patch(pairs, nodes, progress=False)
    for name, used in devices.items():
        assert len(set(used)) == 1, name
    assert FAR in devices["resid_post1" if 2 in far else "resid_pre1"]
    for kind, right in wanted.contribution.items():
        assert float(right.abs().max()) > 0
        assert (found.contribution[kind] - right).abs().max() <= 1e-12 * right.abs().max(), kind
    assert (patched.effect - exact.effect).abs().max() <= 1e-12 * exact.effect.abs().max()


@pytest.mark.parametrize("pairs", ["left", "all left"])
def test_importances_of_layers_on_two_devices(pairs: str) -> None:
    model = zoo.build("llama", wide_norms=True)
    given = zoo.mixed_pairs(model, pairs)
    wanted = neuron_importances(Engine(model, "reference"), given, "logit_diff").neurons
    with FarDevice():
        engine = Engine(spread("llama", (1,)), "reference")
        found = neuron_importances(engine, given, "logit_diff").neurons
    assert wanted is not None and found is not None
    assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()


class Garbled(FarDevice):
    """A device from which other values come back."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = super().__torch_dispatch__(function, types, args, kwargs)
        if function._schema.name == "aten::_to_copy" and isinstance(found, FarTensor):
            found.near.add_(1)
        return found


@pytest.mark.parametrize(
    ("place", "mode", "message"),
    [
        ("meta", nullcontext, "layer 1 lies on meta, which cannot exchange tensors with cpu: .*meta tensor"),
        ("split", nullcontext, "layer 1 lies on cpu and meta, a layer must lie on one device"),
        ("far", Garbled, r"layer 1 lies on lazy:1, .* cpu: what is sent does not come back"),
    ],
)  # fmt: skip
def test_layers_that_cannot_be_reached_are_refused(place: str, mode: Any, message: str) -> None:
    """Before anything runs, naming the layer."""
    model = zoo.build("llama")
    layer = model.model.layers[1]
    if place == "far":
        send(layer)
    else:
        (layer if place == "meta" else layer.mlp).to("meta")
    runs = []
    model.model.embed_tokens.register_forward_pre_hook(lambda *call: runs.append(call))
    with mode(), pytest.raises(NotImplementedError, match=f"LlamaForCausalLM is not served: {message}"):  # fmt: skip
        Engine(model)
    assert not runs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["atp", "atp*"])
def test_a_device_map_over_gpus_host_and_disk(method: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = zoo.build("llama", wide_norms=True)
    given = zoo.mixed_pairs(model, "left")
    engine = Engine(model, "reference")
    wanted = engine.attribute(given, own_metric, method, KINDS, progress=False)
    nodes = list(wanted.top(40))
    exact = engine.patch(given, nodes, own_metric, progress=False)
    last = torch.cuda.device_count() - 1
    ends = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), 0)
    layers = {"model.layers.0": last, "model.layers.1": "cpu", "model.layers.2": "disk"}
    accelerate.dispatch_model(model, ends | layers, main_device=0, offload_dir=tmp_path)
    engine = Engine(model, "reference")
    found = engine.attribute(given, own_metric, method, KINDS, progress=False)
    for kind in KINDS:
        right = wanted.contribution[kind]
        assert (found.contribution[kind].cpu() - right).abs().max() <= 1e-9 * right.abs().max()
    patched = engine.patch(given, nodes, own_metric, progress=False).effect.cpu()
    assert (patched - exact.effect).abs().max() <= 1e-9 * exact.effect.abs().max()
