"""Spelled-out activations run as torch's fused ones: the same values, and the model's own code afterwards."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2CLS

import zoo
from atp_fast.engine import Engine
from atp_fast.hf.activations import find_activations, fused
from atp_fast.hf.attention import LayerRun, running


@pytest.fixture(autouse=True)
def running_layer() -> Iterator[None]:
    token = running.set(LayerRun())
    yield
    running.reset(token)


SPELLED_OUT = ["gelu_new", "gelu_accurate"]


def layer_with(name: str) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), ACT2CLS[name]())


@pytest.mark.parametrize("name", SPELLED_OUT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_slopes_are_the_own_ones(name: str, dtype: torch.dtype) -> None:
    layer = layer_with(name)
    x = torch.linspace(-12, 12, 4001, dtype=dtype, requires_grad=True)
    own = layer[1](x)
    own_slope = torch.autograd.grad(own.sum(), x)[0]
    with fused(find_activations(layer)):
        found = layer[1](x)
    slope = torch.autograd.grad(found.sum(), x)[0]
    assert "Gelu" in type(found.grad_fn).__name__
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, own, rtol=0, atol=12 * 8 * eps)
    torch.testing.assert_close(slope, own_slope, rtol=0, atol=12 * 8 * eps)
    assert "forward" not in vars(layer[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_rounded_where_the_model_rounds(dtype: torch.dtype) -> None:
    layer = layer_with("gelu_new")
    x = torch.linspace(-6, 6, 1001).to(dtype)
    with fused(find_activations(layer)):
        assert torch.equal(layer[1](x), layer[1].__class__().forward(x))


def test_what_another_has_switched_stays() -> None:
    layer = layer_with("gelu_new")

    def theirs(x: Tensor) -> Tensor:
        return x + 1

    layer[1].forward = theirs
    with fused(find_activations(layer)):
        assert layer[1](torch.zeros(2)).tolist() == [1, 1]
    assert layer[1].forward is theirs


def test_nothing_is_fused_where_no_layer_runs() -> None:
    """As where the model's own eager layers are compared with."""
    layer = layer_with("gelu_new")
    x = torch.linspace(-6, 6, 11, requires_grad=True)
    token = running.set(None)
    with fused(find_activations(layer)):
        assert "Gelu" not in type(layer[1](x).grad_fn).__name__
    running.reset(token)


def test_own_code_is_back_after_an_error() -> None:
    layer = layer_with("gelu_new")
    with pytest.raises(RuntimeError, match="stop"), fused(find_activations(layer)):
        assert "forward" in vars(layer[1])
        raise RuntimeError("stop")
    assert "forward" not in vars(layer[1])


def test_the_engine_leaves_the_model_its_own() -> None:
    model = zoo.build("gpt2")
    engine = Engine(model, "reference")
    assert all(len(layer.activations) == 1 for layer in engine.plug.layers)
    engine.attribute(zoo.random_pairs(model, 1, 5), progress=False)
    assert not any("forward" in vars(module) for module in model.modules())
