"""Quantised weights: made into floats one matrix at a time, while a layer multiplies by it, and freed.

What is served is the dequantised model: a quantised module runs as the linear map of its dequantised weight, forward and
for gradients, and activations stay in the model's dtype where the module's own code rounds them too. formats.FORMATS has
a row per format; each module's own code is run once and compared (`Comparison`). A module of no row is refused.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from atp_fast.hf.attention import NAME, LayerRun, running
from atp_fast.hf.experts import Experts, run_experts, running_layer
from atp_fast.hf.formats import (
    FORMATS,
    PACKED,
    features,
    format_of,
    has_own_dequantize,
    maker_of,
    scaled,
)
from atp_fast.hf.linears import made
from atp_fast.hf.switching import Function, switched
from atp_fast.ops.linear import Make

_AGREES = 0.05  # of the largest output: what rounding of activations to 8 bits stays below, and a wrong layout does not


class Quantised(NamedTuple):
    """A module that holds quantised weights, its path in the model, and the name of the function that is exchanged."""

    path: str
    module: nn.Module
    format: str
    function: str


# ---- experts


def _is_fp8_experts(module: Any) -> bool:
    """Whether these are transformers' fused experts in fp8, or in fp4 in pairs."""
    down = getattr(module, "down_proj", None)
    packed = isinstance(down, Tensor) and down.ndim == 3 and down.dtype in PACKED
    return packed and hasattr(module, "down_proj_scale_inv") and hasattr(module, "linear")


def _fp8_expert(module: Any, name: str, number: int) -> Make:
    weight, scale = getattr(module, name), getattr(module, f"{name}_scale_inv")
    return _fp8_part(module, weight.data[number], scale.data[number])


def _fp8_part(module: Any, weight: Tensor, scale: Tensor) -> Make:
    pairs = weight.dtype == torch.int8
    return functools.partial(scaled, weight, scale, None if pairs else module.block_size, pairs)


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
        return scaled(data[number].contiguous(), powers[number], None, True, dtype)

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
        elif (name := format_of(module)) is not None:
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
    if features(module) is not None:
        own += module.named_buffers(recurse=False)
    for name, value in own:
        if value.ndim > 1 and value.dtype in PACKED:
            return f"{name}: {value.dtype}"
        if has_own_dequantize(value):
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
                ours = made(x, maker_of(module), getattr(module, "bias", None), backend)
                outputs = ours.shape[-1]
            if comparison is not None:
                comparison.largest = max(comparison.largest, x.shape[-1] * outputs)
                comparison.of(place, lambda y: own(y, *args, **kwargs), x, ours)
            return ours

        return forward

    with switched([(place.module, place.function) for place in places], replace):
        yield
