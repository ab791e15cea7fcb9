"""Quantised weights: made into floats one matrix at a time, while a layer multiplies by it, and freed.

What is served is the dequantised model: a quantised module runs as the linear map of its dequantised weight, forward and
for gradients, and activations stay in the model's dtype where the module's own code rounds them too. `FORMATS` has a row
per format; each module's own code is run once and compared (`Comparison`). A module of no row is refused.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from atp_fast.hf.attention import NAME, LayerRun, running
from atp_fast.hf.experts import Experts, run_experts, running_layer
from atp_fast.hf.linears import made
from atp_fast.hf.switching import Function, switched
from atp_fast.ops.linear import Make

_AGREES = 0.05  # of the largest output: what rounding of activations to 8 bits stays below, and a wrong layout does not
_FLOAT8 = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
)
_PACKED = (torch.uint8, torch.int8, torch.int16, torch.int32, *_FLOAT8)
# the numbers that 4 bits of MXFP4 and FP4 (e2m1) stand for
_FP4 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)
# the places in a 32-bit word of AWQ's eight consecutive numbers
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


class Format(NamedTuple):
    """A way to hold a weight. read: what makes the floats of such a module, None for a module of another format."""

    name: str
    read: Callable[[Any], Make | None]


class Quantised(NamedTuple):
    """A module that holds quantised weights, its path in the model, and the name of the function that is exchanged."""

    path: str
    module: nn.Module
    format: str
    function: str


# ---- linear layers: what makes a module's weight (outputs, inputs)


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
    return _scaled(data, scale / 127, None, False, dtype)


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
    return functools.partial(_scaled, weight.data, scale.data, block, pairs)


def _scaled(
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


def _features(module: Any) -> tuple[int, int] | None:
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
    found, features = _words(module), _features(module)
    if found is None or features is None:
        return None
    bits, words, zeros, scales = found
    inputs, outputs = features
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
    found, features = _words(module), _features(module)
    if found is None or features is None:
        return None
    bits, words, zeros, scales = found
    inputs, outputs = features
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
    if _has_own_dequantize(weight) and weight.ndim == 2:
        return functools.partial(_dequantized, weight.detach())
    if _features(module) is not None and callable(getattr(module, "dequantize", None)):
        return functools.partial(_dequantized, module)
    return None


def _dequantized(holder: Any, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        weight: Tensor = holder.dequantize()
    return weight.detach().to(dtype)


def _has_own_dequantize(weight: Any) -> bool:
    return isinstance(weight, Tensor) and type(weight).dequantize is not Tensor.dequantize


FORMATS = (
    Format("bitsandbytes 4 bit", _bitsandbytes4),
    Format("bitsandbytes 8 bit", _bitsandbytes8),
    Format("fp8", _float8),
    Format("GPTQ", _gptq),
    Format("AWQ", _awq),
    Format("with a dequantize of its own", _by_itself),
)


# ---- experts


def _is_fp8_experts(module: Any) -> bool:
    """Whether these are transformers' fused experts in fp8, or in fp4 in pairs."""
    down = getattr(module, "down_proj", None)
    packed = isinstance(down, Tensor) and down.ndim == 3 and down.dtype in _PACKED
    return packed and hasattr(module, "down_proj_scale_inv") and hasattr(module, "linear")


def _fp8_expert(module: Any, name: str, number: int) -> Make:
    weight, scale = getattr(module, name), getattr(module, f"{name}_scale_inv")
    return _fp8_part(module, weight.data[number], scale.data[number])


def _fp8_part(module: Any, weight: Tensor, scale: Tensor) -> Make:
    pairs = weight.dtype == torch.int8
    return functools.partial(_scaled, weight, scale, None if pairs else module.block_size, pairs)


def _run_fp8(module: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """transformers' experts function for those in fp8."""
    experts = Experts.of(module)._replace(make=functools.partial(_fp8_expert, module))
    return run_experts(experts, running_layer(), x, chosen, weights)


_finegrained: Any = importlib.import_module("transformers.integrations.finegrained_fp8")
_finegrained.ALL_FP8_EXPERTS_FUNCTIONS.register(NAME, _run_fp8)


def _is_mxfp4_block(module: Any) -> bool:
    """Whether this is transformers' router with MXFP4 experts, whose weights are tensors of triton_kernels."""
    experts = getattr(module, "experts", None)
    return type(experts).__name__ == "Mxfp4GptOssExperts" and all(
        hasattr(getattr(experts, f"{name}_precision_config"), "weight_scale")
        for name in ("gate_up_proj", "down_proj")
    )


class _Unswizzled:
    """MXFP4 weights in rows, (experts, outputs, inputs / 2), and their exponents, of the projection that was last asked for."""

    def __init__(self) -> None:
        self._weight: Any = None
        self._rows: tuple[Tensor, Tensor]

    def of(self, weight: Any, scale: Any) -> tuple[Tensor, Tensor]:
        if self._weight is not weight:
            data, powers = (
                t.storage.layout.unswizzle_data(t.storage.data) for t in (weight, scale)
            )
            self._weight, self._rows = weight, (data.transpose(1, 2), powers.transpose(1, 2))
        return self._rows


def _mxfp4_expert(module: Any, kept: _Unswizzled, name: str, number: int) -> Make:
    weight = getattr(module, name)
    scale = getattr(module, f"{name}_precision_config").weight_scale

    def make(dtype: torch.dtype) -> Tensor:
        data, powers = kept.of(weight, scale)
        return _scaled(data[number].contiguous(), powers[number], None, True, dtype)

    return make


def _run_mxfp4(kept: _Unswizzled, block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the block computes of hidden states (..., hidden), and its router's logits."""
    gpt_oss: Any = importlib.import_module("transformers.models.gpt_oss.modeling_gpt_oss")
    rows, module = x.flatten(0, -2), block.experts
    logits, weights, chosen = block.router(rows)
    experts = Experts(
        module,
        module.num_experts,
        up="gate_up_proj",
        gate=functools.partial(gpt_oss.GptOssExperts._apply_gate, module),
        has_bias=True,
        make=functools.partial(_mxfp4_expert, module, kept),
    )
    run = running.get() or LayerRun()  # none while the model runs as a whole
    return run_experts(experts, run, rows, chosen, weights).view(x.shape), logits


# ---- a model's


def is_quantised_linear(module: nn.Module) -> bool:
    return _format(module) is not None


def _format(module: nn.Module) -> str | None:
    return next((name for name, read in FORMATS if read(module) is not None), None)


def _maker(module: nn.Module) -> Make:
    return next(make for _, read in FORMATS if (make := read(module)) is not None)


def find_quantised(model: nn.Module) -> list[Quantised]:
    """The model's modules with quantised weights that gradients pass; embeddings of tokens run as they are.

    Raises NotImplementedError, naming the module, for weights that no row of FORMATS makes floats of.
    """
    found: list[Quantised] = []
    inside: set[nn.Module] = {model.get_input_embeddings()}  # type: ignore[operator]
    for path, module in model.named_modules():
        if module in inside or isinstance(module, nn.Embedding):
            continue
        if _is_mxfp4_block(module):
            inside.update(module.experts.modules())
            found.append(Quantised(path, module, "MXFP4", _forward_of(module)))
        elif _is_fp8_experts(module):
            found.append(Quantised(path, module, "fp8", "linear"))
        elif (name := _format(module)) is not None:
            found.append(Quantised(path, module, name, _forward_of(module)))
        elif (what := _packed(module)) is not None:
            names = ", ".join(f.name for f in FORMATS)
            raise NotImplementedError(
                f"{path} must hold its weights in floats or in a format that can be dequantised ({names}, MXFP4 experts), got "
                f"{type(module).__name__} with quantised weights ({what})"
            )
    return found


def _forward_of(module: nn.Module) -> str:
    # accelerate fetches the weights, then calls _old_forward; a forward put in place by another is compared with ours
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


def _packed(module: nn.Module) -> str | None:
    """Which of a module's own tensors is no float that could be multiplied by."""
    own: list[tuple[str, Tensor]] = list(module.named_parameters(recurse=False))
    if _features(module) is not None:
        own += module.named_buffers(recurse=False)
    for name, value in own:
        if value.ndim > 1 and value.dtype in _PACKED:
            return f"{name}: {value.dtype}"
        if _has_own_dequantize(value):
            return f"{name}: {type(value).__name__}"
    return None


class Comparison:
    """Quantised modules' own code beside their dequantised weights; `largest`: numbers of the largest weight among them."""

    def __init__(self) -> None:
        self.largest = 0
        self._differ: dict[str, str] = {}

    def of(self, place: Quantised, theirs: Callable[[Tensor], Any], x: Tensor, ours: Any) -> None:
        """Run a module's own code on x, and note whether it gives what ours gave."""
        module = place.module
        before = [(p, p.data) for p in module.parameters(recurse=False)]
        try:
            # bitsandbytes repacks its weights for the CPU where no gradient is asked for
            own = theirs(x.detach().requires_grad_())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # transformers' own formats need kernels of devices; others are known by names of buffers, which must be checked
            if not type(module).__module__.startswith("transformers."):
                self._differ[place.path] = f"their own code fails ({type(error).__name__}: {error})"
            return
        finally:
            for parameter, data in before:  # bitsandbytes casts biases
                parameter.data = data
        ours, own = (value[0] if isinstance(value, tuple) else value for value in (ours, own))
        gap = float((ours - own).abs().max() / own.abs().max().clamp(min=1e-30))
        if not gap <= _AGREES:
            self._differ[place.path] = f"their own code differs by {gap:.1e} of the largest"

    def check(self, places: Sequence[Quantised]) -> None:
        """Raises NotImplementedError for the first module whose own code gives other numbers."""
        for place in places:
            if (why := self._differ.get(place.path)) is not None:
                raise NotImplementedError(
                    f"{place.path} must compute what its dequantised weights do ({type(place.module).__name__}, "
                    f"{place.format}), but {why}"
                )


@contextlib.contextmanager
def dequantised(
    places: Sequence[Quantised], backend: str, comparison: Comparison | None = None
) -> Iterator[None]:
    """Inside, these modules run by their dequantised weights; their own code is back at the end."""
    formats = {place.module: place for place in places}
    kept = _Unswizzled()

    def replace(module: Any, own: Function) -> Function:
        place = formats[module]

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if place.format == "MXFP4":
                ours: Any = _run_mxfp4(kept, module, x)
                outputs = module.experts.gate_up_proj_bias.shape[1]
            elif place.function == "linear":
                ours = made(x, _fp8_part(module, *args), None, backend)
                outputs = ours.shape[-1]
            else:
                ours = made(x, _maker(module), getattr(module, "bias", None), backend)
                outputs = ours.shape[-1]
            if comparison is not None:
                comparison.largest = max(comparison.largest, x.shape[-1] * outputs)
                comparison.of(place, lambda y: own(y, *args, **kwargs), x, ours)
            return ours

        return forward

    with switched([(place.module, place.function) for place in places], replace):
        yield
