"""Models with quantised weights for tests, and the same models with those weights in floats.

Layers are the libraries' own where these are installed. A stand-in has the attributes, buffers and layout of a library's
layer, and a forward that multiplies by the numbers it was packed from, so that it knows nothing of how they are unpacked.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import FineGrainedFP8Config, PreTrainedModel
from transformers.integrations import finegrained_fp8
from transformers.integrations.mxfp4 import (
    FP4_VALUES,
    Mxfp4GptOssExperts,
    Mxfp4GptOssMLP,
    convert_moe_packed_tensors,
)

import zoo

Quantise = Callable[[nn.Linear], tuple[nn.Module, Tensor]]
"""A plain linear layer -> the quantised one, and its weight in float32."""
GROUP = 16


# ---- the libraries' own


def bitsandbytes4(linear: nn.Linear, kind: str = "nf4", nested: bool = False) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        compute_dtype=torch.float32,
        compress_statistics=nested,
        quant_type=kind,
    )
    layer.load_state_dict(linear.state_dict())
    layer = layer.to("cpu")
    return layer, bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def bitsandbytes8(linear: nn.Linear) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    has_bias = linear.bias is not None
    layer = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, has_bias, has_fp16_weights=False, threshold=6.0
    )
    layer.load_state_dict(linear.state_dict())
    layer = layer.to("cpu")
    return layer, bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)


def torchao8(linear: nn.Linear) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    holder = nn.Sequential(copy.deepcopy(linear))
    quantization.quantize_(holder, quantization.Int8WeightOnlyConfig())
    return holder[0], holder[0].weight.dequantize()


def quanto8(linear: nn.Linear) -> Any:
    quanto = pytest.importorskip("optimum.quanto")
    holder = nn.Sequential(copy.deepcopy(linear))
    quanto.quantize(holder, weights=quanto.qint8)
    quanto.freeze(holder)
    return holder[0], holder[0].weight.dequantize()


def hqq4(linear: nn.Linear) -> Any:
    hqq = pytest.importorskip("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=GROUP)
    plain = copy.deepcopy(linear)
    layer = hqq.HQQLinear(plain, config, compute_dtype=torch.float32, device="cpu")
    return layer, layer.dequantize()


def _fp8_config() -> Any:
    return FineGrainedFP8Config(weight_block_size=(GROUP, GROUP))


def _fp8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By transformers' own functions: fp8 numbers, their scales, and the product."""
    quantizer = SimpleNamespace(quantization_config=_fp8_config())
    found = finegrained_fp8.Fp8Quantize(quantizer)._quantize_one("weight", weight.detach())
    data, scale = found["weight"], found["weight_scale_inv"]
    wide = finegrained_fp8.Fp8Dequantize(quantizer)._dequantize_one(data, scale, torch.float32)
    return data, scale, wide


def fp8(linear: nn.Linear) -> Any:
    """transformers' own layer; its kernels need a GPU."""
    data, scale, weight = _fp8(linear.weight)
    layer = finegrained_fp8.FP8Linear(
        linear.in_features, linear.out_features, (GROUP, GROUP), has_bias=linear.bias is not None
    )
    layer.weight.data, layer.weight_scale_inv.data = data, scale
    if linear.bias is not None:
        layer.bias.data = linear.bias.detach().clone()
    return layer, weight


# ---- stand-ins


def _rounded(weight: Tensor, bits: int, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """weight (inputs, outputs) in `bits` bits: numbers, and zero points (1 or more) and scales per group and output."""
    groups, top = int(group.max()) + 1, 2**bits - 1
    index = group[:, None].expand_as(weight)
    ends = [
        torch.zeros(groups, weight.shape[1]).scatter_reduce(0, index, weight, how)
        for how in ("amin", "amax")
    ]
    scales = (ends[1] - ends[0]) / top
    zeros = (-ends[0] / scales).round().clamp(1, top)
    numbers = (weight / scales[group] + zeros[group]).round().clamp(0, top)
    return numbers.long(), zeros.long(), scales


def _stream(numbers: Tensor, bits: int) -> Tensor:
    """(count, n) numbers one behind the other, lowest bit first, in 32-bit words, (words, n)."""
    each = (numbers[:, None] >> torch.arange(bits)[:, None] & 1).flatten(0, 1)
    each = F.pad(each, (0, 0, 0, -len(each) % 32)).unflatten(0, (-1, 32))
    return (each << torch.arange(32)[:, None]).sum(1).to(torch.int32)


class _StandIn(nn.Module):
    """x @ weight, of a weight that is no parameter or buffer."""

    def __init__(self, linear: nn.Linear, weight: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        self.kept = [weight]

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        bias: Any = self.bias
        return F.linear(x, self.kept[0].to(x.dtype), None if bias is None else bias.to(x.dtype))


class GptqStandIn(_StandIn):
    """Of AutoGPTQ's and GPT-QModel's layers."""

    def __init__(self, linear: nn.Linear, bits: int, version: int, ordered: bool) -> None:
        group = torch.arange(linear.in_features) // GROUP
        if ordered:  # activation order: a group's inputs lie anywhere
            shuffle = torch.randperm(len(group), generator=torch.Generator().manual_seed(0))
            group = group[shuffle]
        numbers, zeros, scales = _rounded(linear.weight.detach().float().t(), bits, group)
        super().__init__(linear, ((numbers - zeros[group]) * scales[group]).t())
        self.bits, self.version = bits, version
        self.register_buffer("qweight", _stream(numbers, bits))
        held = zeros - 1 if version == 1 else zeros
        self.register_buffer("qzeros", _stream(held.t(), bits).t())
        self.register_buffer("scales", scales)
        self.register_buffer("g_idx", group.to(torch.int32))

    def qzero_format(self) -> int:
        return self.version


class AwqStandIn(_StandIn):
    """Of AutoAWQ's GEMM layer."""

    def __init__(self, linear: nn.Linear) -> None:
        group = torch.arange(linear.in_features) // GROUP
        numbers, zeros, scales = _rounded(linear.weight.detach().float().t(), 4, group)
        super().__init__(linear, ((numbers - zeros[group]) * scales[group]).t())
        self.w_bit, self.group_size = 4, GROUP
        for name, value in (("qweight", numbers), ("qzeros", zeros)):
            words = torch.zeros(len(value), self.out_features // 8, dtype=torch.int64)
            for place, number in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                words |= value[:, number::8] << 4 * place
            self.register_buffer(name, words.to(torch.int32))
        self.register_buffer("scales", scales)


def gptq(linear: nn.Linear, bits: int = 4, version: int = 1, ordered: bool = True) -> Any:
    layer = GptqStandIn(linear, bits, version, ordered)
    return layer, layer.kept[0]


def awq(linear: nn.Linear) -> Any:
    layer = AwqStandIn(linear)
    return layer, layer.kept[0]


class _Flipped:
    """A layout of triton_kernels that stores its last axis backwards."""

    @staticmethod
    def unswizzle_data(data: Tensor) -> Tensor:
        return data.flip(-1)


def _triton_tensor(data: Tensor) -> Any:
    storage = SimpleNamespace(data=_Flipped.unswizzle_data(data), layout=_Flipped)
    return SimpleNamespace(storage=storage)


def _mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (..., 32 * n) -> (..., n, 16) bytes of two numbers each and (..., n) exponents."""
    blocks = weight.unflatten(-1, (-1, 32))
    power = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30).log2().floor() - 2
    values = torch.tensor(FP4_VALUES)
    numbers = (blocks / power.exp2())[..., None].sub(values).abs().argmin(-1)
    return (numbers[..., ::2] | numbers[..., 1::2] << 4).to(torch.uint8), (power[..., 0] + 127).to(
        torch.uint8
    )


# ---- models

LINEARS: dict[str, Quantise] = {
    "bitsandbytes-nf4": bitsandbytes4,
    "bitsandbytes-fp4-nested": functools.partial(bitsandbytes4, kind="fp4", nested=True),
    "bitsandbytes-int8": bitsandbytes8,
    "torchao-int8": torchao8,
    "quanto-int8": quanto8,
    "hqq-int4": hqq4,
    "fp8": fp8,
    "gptq-standin": gptq,
    "awq-standin": awq,
}
EXPERTS = ("fp8-experts", "mxfp4-standin-experts")
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A tiny model with weights quantised as `name` of LINEARS or EXPERTS says, and the same model with them in floats."""
    if name == "fp8-experts":
        return _fp8_mixture(dtype)
    if name == "mxfp4-standin-experts":
        return _mxfp4_mixture(dtype)
    biases = {"attention_bias": True, "mlp_bias": True}
    return quantise(zoo.build("llama", dtype, **SIZES, **biases), LINEARS[name])


def quantise(
    plain: PreTrainedModel, how: Quantise, skip: tuple[str, ...] = ()
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Both models of one, all of whose linear layers are quantised but those whose path ends in one of `skip`."""
    model = copy.deepcopy(plain)
    for path, linear in plain.named_modules():
        if type(linear) is nn.Linear and not path.endswith(skip or ("nowhere",)):
            layer, weight = how(linear)
            model.set_submodule(path, layer.requires_grad_(False).eval())
            linear.weight.data = weight.detach().to(linear.weight.dtype)
    return model, plain


def _fp8_mixture(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    plain = zoo.build("mixtral", dtype, **SIZES)
    model = copy.deepcopy(plain)
    skip = ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(3))]
    finegrained_fp8.replace_with_fp8_linear(model, skip, _fp8_config())
    for path, layer in model.named_modules():
        source = plain.get_submodule(path)
        for name, old in list(layer.named_parameters(recurse=False)):
            if not old.is_meta or name.endswith("scale_inv"):
                continue
            data, scale, weight = _fp8(getattr(source, name))
            setattr(layer, name, nn.Parameter(data, requires_grad=False))
            setattr(layer, f"{name}_scale_inv", nn.Parameter(scale, requires_grad=False))
            getattr(source, name).data = weight.to(dtype)
    return model.eval(), plain


def _mxfp4_mixture(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    plain = zoo.build("gpt_oss", dtype, **SIZES)
    model = copy.deepcopy(plain)
    for layer, source in zip(model.model.layers, plain.model.layers, strict=True):
        experts: Any = Mxfp4GptOssExperts(model.config)
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(source.mlp.experts, name)
            bias = getattr(source.mlp.experts, f"{name}_bias")
            blocks, exponents = _mxfp4(weight.detach().float().transpose(1, 2))
            weight.data = convert_moe_packed_tensors(blocks, exponents, dtype=torch.float32).to(
                dtype
            )
            getattr(experts, f"{name}_bias").data = bias.detach().float()
            delattr(experts, name)
            setattr(experts, name, _triton_tensor(blocks.flatten(2).transpose(1, 2)))
            scale = _triton_tensor(exponents.transpose(1, 2))
            setattr(experts, f"{name}_precision_config", SimpleNamespace(weight_scale=scale))
        layer.mlp = Mxfp4GptOssMLP(layer.mlp.router, experts).eval()
    return model, plain
