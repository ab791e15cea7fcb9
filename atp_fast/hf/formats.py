"""Formats of quantised linear layers: what makes a module's weight, (outputs, inputs), of the numbers that it holds."""

from __future__ import annotations

import copy
import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from atp_fast.ops.linear import Make

_FLOAT8 = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
)
PACKED = (torch.uint8, torch.int8, torch.int16, torch.int32, *_FLOAT8)
# the numbers that 4 bits of MXFP4 and FP4 (e2m1) stand for
_FP4 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)
# the places in a 32-bit word of AWQ's eight consecutive numbers
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


class Format(NamedTuple):
    """A way to hold a weight. read: what makes the floats of such a module, None for a module of another format."""

    name: str
    read: Callable[[Any], Make | None]


def _own(module: nn.Module, name: str) -> Any:
    """A parameter or buffer of the module's own; an adapter around a layer hands out the layer's."""
    value = module._parameters.get(name)
    return module._buffers.get(name) if value is None else value


def _bitsandbytes4(module: Any) -> Make | None:
    weight = _own(module, "weight")
    if type(weight).__name__ != "Params4bit":
        return None
    state = weight.quant_state or getattr(module, "quant_state", None)
    return None if state is None else functools.partial(_from_bitsandbytes4, weight.data, state)


def _from_bitsandbytes4(data: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    functional: Any = importlib.import_module("bitsandbytes.functional")
    if getattr(state, "packing_format_for_cpu", False):  # its own code has run on this CPU
        state = copy.copy(state)
        scales, state.original_nested = state.absmax.T.reshape(-1).float(), False
        data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
        state.absmax, state.nested = scales, False
    weight: Tensor = functional.dequantize_4bit(data, state)
    return weight.to(dtype)


def _bitsandbytes8(module: Any) -> Make | None:
    weight = _own(module, "weight")
    if type(weight).__name__ != "Int8Params" or weight.dtype != torch.int8:
        return None
    scale = module.state.SCB if weight.SCB is None else weight.SCB
    return functools.partial(_from_bitsandbytes8, weight.data, scale)


def _from_bitsandbytes8(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return scaled(data, scale / 127, None, False, dtype)


def _float8(module: Any) -> Make | None:
    """fp8, or fp4 in pairs, with one scale, one per row or one per block."""
    weight, scale = _own(module, "weight"), _own(module, "weight_scale_inv")
    scale = _own(module, "weight_scale") if scale is None else scale
    if weight is None or scale is None:
        return None
    rows = getattr(module, "out_features", None)
    if hasattr(module, "n_groups") or weight.ndim != 2 or weight.shape[0] != rows:
        return None
    pairs = weight.dtype == torch.int8 and 2 * weight.shape[1] == module.in_features
    if weight.dtype not in _FLOAT8 and not pairs:
        return None
    block = None if pairs else getattr(module, "block_size", None)
    return functools.partial(scaled, weight.data, scale.data, block, pairs)


def scaled(
    data: Tensor,
    scale: Tensor,
    block: Sequence[int] | None,
    pairs: bool,
    dtype: torch.dtype,
) -> Tensor:
    """data (rows, columns), or fp4 in pairs, times its scales.

    scale: one; one per row, (rows,), (rows, 1) or (1, rows); or one per block of `block` rows and columns, of those that
    the grid divides the weight into by default. In uint8, scales are powers of two.
    """
    weight = _fp4(data) if pairs else data.to(torch.float32)
    rows, columns = weight.shape
    scale = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
    if scale.numel() == 1:
        return weight.mul_(scale.reshape(())).to(dtype)
    if scale.numel() == rows and (scale.ndim < 2 or min(scale.shape) == 1) and block is None:
        return weight.mul_(scale.reshape(-1, 1)).to(dtype)
    high, wide = (rows // scale.shape[0], columns // scale.shape[1]) if block is None else block
    scale = scale.repeat_interleave(wide, 1)[:, :columns]
    full = rows // high
    weight[: full * high].view(full, high, columns).mul_(scale[:full, None])
    if full * high < rows:
        weight[full * high :].mul_(scale[full])
    return weight.to(dtype)


def _fp4(data: Tensor) -> Tensor:
    """(..., columns / 2) bytes of two numbers, the low four bits first -> (..., columns) float32."""
    values = torch.tensor(_FP4, dtype=torch.float32, device=data.device)
    data = data.view(torch.uint8)
    weight = torch.empty((*data.shape[:-1], data.shape[-1], 2), device=data.device)
    weight[..., 0], weight[..., 1] = values[(data & 15).int()], values[(data >> 4).int()]
    return weight.flatten(-2)


def features(module: Any) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer."""
    for first, second in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        inputs, outputs = getattr(module, first, None), getattr(module, second, None)
        if isinstance(inputs, int) and isinstance(outputs, int):
            return inputs, outputs
    return None


def _words(module: Any) -> tuple[int, Tensor, Tensor, Tensor] | None:
    """Bits, qweight, qzeros and scales (groups, outputs) of GPTQ's and AWQ's layers."""
    bits = getattr(module, "bits", None) or getattr(module, "w_bit", None)
    parts = [_own(module, name) for name in ("qweight", "qzeros", "scales")]
    if not isinstance(bits, int) or any(p is None or p.ndim != 2 for p in parts):
        return None
    words, zeros, scales = parts
    if words.dtype != torch.int32 or zeros.dtype != torch.int32:
        return None
    return bits, words, zeros, scales


def _gptq(module: Any) -> Make | None:
    """Words of consecutive inputs, (inputs * bits / 32, outputs); g_idx: each input's group."""
    found, sizes = _words(module), features(module)
    if found is None or sizes is None:
        return None
    bits, words, zeros, scales = found
    inputs, outputs = sizes
    if tuple(words.shape) != (-(-inputs * bits // 32), outputs):
        return None
    group = _own(module, "g_idx")
    if group is None:
        return None
    # the first version of the format holds zero points less one
    version = module.qzero_format() if hasattr(module, "qzero_format") else 1
    return functools.partial(_from_gptq, bits, words, zeros, scales, group, int(version == 1))


def _from_gptq(
    bits: int,
    words: Tensor,
    zeros: Tensor,
    scales: Tensor,
    group: Tensor,
    less: int,
    dtype: torch.dtype,
) -> Tensor:
    wide = _wide(dtype)
    group = group.long()
    weight = _unpacked(words, bits, len(group), wide)
    zero = _unpacked(zeros.t(), bits, scales.shape[1], wide).t().add_(less)
    # a zero point of 2 ** bits - 1, less one, wrapped
    zero = torch.where(zero > 2**bits - 1 + less, zero - 2**bits, zero)
    return weight.sub_(zero[group]).mul_(scales.to(wide)[group]).to(dtype).t()


def _unpacked(words: Tensor, bits: int, count: int, dtype: torch.dtype) -> Tensor:
    """(words, n) int32, a stream of numbers of `bits` bits, the lowest first -> (count, n)."""
    found = torch.empty((count, words.shape[1]), dtype=dtype, device=words.device)
    period = 32 // math.gcd(bits, 32)  # numbers until one starts with a word again
    step = period * bits // 32
    for i in range(min(period, count)):
        word, shift = divmod(i * bits, 32)
        rows = found[i::period]
        part = words[word::step][: len(rows)] >> shift
        if shift + bits > 32:  # the rest is in the next word
            part = part & (2 ** (32 - shift) - 1) | words[word + 1 :: step][: len(rows)] << (
                32 - shift
            )
        rows.copy_(part & (2**bits - 1))
    return found


def _awq(module: Any) -> Make | None:
    """Words of eight outputs in AWQ's order, (inputs, outputs / 8)."""
    found, sizes = _words(module), features(module)
    if found is None or sizes is None:
        return None
    bits, words, zeros, scales = found
    inputs, outputs = sizes
    if bits != 4 or tuple(words.shape) != (inputs, outputs // 8) or inputs % len(scales):
        return None
    return functools.partial(_from_awq, words, zeros, scales)


def _from_awq(words: Tensor, zeros: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    wide = _wide(dtype)
    weight, zero = _eights(words, wide), _eights(zeros, wide)
    groups = weight.view(len(scales), -1, weight.shape[1])
    groups.sub_(zero[:, None]).mul_(scales.to(wide)[:, None])
    return weight.to(dtype).t()


def _eights(words: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows, words) of eight numbers each -> (rows, 8 * words)."""
    found = torch.empty((*words.shape, 8), dtype=dtype, device=words.device)
    for i, place in enumerate(_AWQ_PLACES):
        found[..., i].copy_(words >> 4 * place & 15)
    return found.flatten(1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.itemsize >= 4 else torch.float32


def _by_itself(module: Any) -> Make | None:
    """A layer, or its weight, that has a function `dequantize` of its own: HQQ's layers; torchao's and quanto's tensors."""
    weight = _own(module, "weight")
    if has_own_dequantize(weight) and weight.ndim == 2:
        return functools.partial(_dequantized, weight.detach())
    if features(module) is not None and callable(getattr(module, "dequantize", None)):
        return functools.partial(_dequantized, module)
    return None


def _dequantized(holder: Any, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        weight: Tensor = holder.dequantize()
    return weight.detach().to(dtype)


def has_own_dequantize(weight: Any) -> bool:
    return isinstance(weight, Tensor) and type(weight).dequantize is not Tensor.dequantize


FORMATS = (
    Format("bitsandbytes 4 bit", _bitsandbytes4),
    Format("bitsandbytes 8 bit", _bitsandbytes8),
    Format("fp8", _float8),
    Format("GPTQ", _gptq),
    Format("AWQ", _awq),
    Format("with a dequantize of its own", _by_itself),
)


def format_of(module: nn.Module) -> str | None:
    """The name of a linear layer's format, None of a layer that is not quantised."""
    return next((name for name, read in FORMATS if read(module) is not None), None)


def maker_of(module: nn.Module) -> Make:
    """What makes the weight that a quantised linear layer holds now."""
    return next(make for _, read in FORMATS if (make := read(module)) is not None)
