"""What a model is made of: whether it can be served, and which modules' inputs and outputs are nodes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from atp_fast.hf.attention import LayerRun, Mixture
from atp_fast.hf.norms import FoundNorm
from atp_fast.hf.scores import Scores

_POSITIONS = (
    "rotary"  # modules that give tables of positions, through which no gradient flows in any model
)
_MIXTURE_NAMES = ("expert", "moe", "router")


@dataclass
class Layer:
    """One decoder layer and the modules whose inputs or outputs are nodes."""

    module: nn.Module
    outputs: int = 0  # so many that it returns in a tuple; 0: hidden states alone
    attention: nn.Module | None = None  # None: the layer mixes positions in another way
    down: nn.Module | None = None  # its input is the neurons
    attn_write: nn.Module | None = None
    mlp_write: nn.Module | None = None
    activations: Sequence[nn.Module] = ()
    norms: Sequence[FoundNorm] = ()
    rotations: Sequence[ModuleType] = ()


@dataclass
class Inspection:
    """Whether atp_fast serves a model, and its shape; `refused` says per node kind why it cannot be had."""

    served: bool
    reason: str | None = None
    model: str = ""
    layers: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    v_dim: int = 0
    hidden: int = 0
    neurons: int = 0
    tape_bytes: int = 0  # what autograd keeps of one layer, per position
    context: int | None = None
    windows: tuple[int | None, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)


class Call(NamedTuple):
    """A submodule's call inside a layer: its first input and first output."""

    module: nn.Module
    input: Tensor
    output: Tensor


def first_tensor(out: Any) -> Tensor:
    """The hidden states a layer returns, alone or first of a tuple or list."""
    hidden = out[0] if isinstance(out, (tuple, list)) else out
    assert isinstance(hidden, Tensor)
    return hidden


def trace(
    layer: Layer, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any], run: LayerRun
) -> tuple[Tensor, list[Call]]:
    """Run a layer under autograd; its output, and its submodules' calls in the order they finish.

    The module that computes attention is `run.attention_module`.

    Raises NotImplementedError naming the submodule through which no gradient flows (quantised weights, say).
    """
    names = {module: name for name, module in layer.module.named_modules()}
    why = hooked(layer.module)
    calls: list[Call] = []
    entered: list[nn.Module] = []

    def enter(module: nn.Module, given: tuple[Any, ...]) -> None:
        entered.append(module)

    def attended(kind: str, value: Tensor) -> Tensor:
        run.attention_module = run.attention_module or entered[-1]
        return value

    def note(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        entered.pop()
        result = output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(result, Tensor) or isinstance(result, Scores):
            return
        if not result.is_floating_point():
            return
        tensors = [t for t in (*given, *named.values()) if isinstance(t, Tensor)]
        cut = any(t.requires_grad for t in tensors) and not result.requires_grad
        if cut and _POSITIONS not in type(module).__name__.lower():
            raise NotImplementedError(
                f"no gradient flows through {names[module]} ({type(module).__name__}; quantised weights?){why}"
            )
        if tensors:
            # a copy: some layers add to it in place
            calls.append(Call(module, tensors[0].detach(), result.detach().clone()))

    with contextlib.ExitStack() as hooks, torch.enable_grad():
        for module in names:
            if module is not layer.module:
                hooks.callback(module.register_forward_pre_hook(enter).remove)
                hook = module.register_forward_hook(note, with_kwargs=True)
                hooks.callback(hook.remove)
        run.visit = attended
        out = layer.module(x, *args, **kwargs)
    return first_tensor(out), calls


def find_down_projection(
    layer: Layer,
    calls: list[Call],
    attention: nn.Module | None,
    x: Tensor,
    mixtures: Sequence[Mixture],
) -> int:
    """Note the module whose input is the layer's neurons, and return how many there are.

    It is the last linear map outside attention that ends in the residual stream's width, or the experts of a mixture (see
    hf/experts.py; shared experts beside them are no nodes). Raises NotImplementedError where there is no such map, and for
    experts that do not go through transformers' experts interface, once for all of the layer's input x.
    """
    hidden = x.shape[-1]
    mixture = [m for m in layer.module.modules() if _is_mixture(m)]
    if len(mixtures) == 1 and mixtures[0].tokens == x[..., 0].numel():
        return mixtures[0].neurons
    if mixture:
        raise NotImplementedError(f"is a mixture of experts ({type(mixture[0]).__name__})")
    inside = set() if attention is None else set(attention.modules())
    linear = [
        call
        for call in calls
        if call.module not in inside and _is_linear(call.module) and call.output.shape[-1] == hidden
    ]
    if not linear or not _by_position(layer.module, linear[-1].module, calls):
        raise NotImplementedError("has no down projection")
    layer.down = linear[-1].module
    return linear[-1].input.shape[-1]


def _by_position(layer: nn.Module, down: nn.Module, calls: list[Call]) -> bool:
    """Whether the part of a layer with its last linear map is an MLP: what goes in backwards comes out backwards.

    The output projection of a state-space layer is no down projection.
    """
    part = next(child for child in layer.children() if down in set(child.modules()))
    call = next((call for call in calls if call.module is part), None)
    if call is None:
        return True
    try:
        with torch.no_grad():
            backwards = first_tensor(part(call.input.flip(-2))).flip(-2)
    except (
        TypeError,
        RuntimeError,
    ):  # it wants more than hidden states, as no mixer of positions does
        return True
    return torch.allclose(
        backwards, call.output, rtol=1e-2, atol=1e-2 * float(call.output.abs().max())
    )


def find_writes(
    layer: Layer,
    calls: list[Call],
    attention: nn.Module | None,
    x: Tensor,
    out: Tensor,
    scale: float,
) -> None:
    """Note the two modules whose outputs, times `scale`, the layer adds to its input x to make its output, but for a constant.

    Of all pairs of the layer's own parts (of all its modules, where no pair of parts does) the one that adds up best is
    taken; in order, so that a dropout after a write, which changes nothing, is not taken for it. Raises
    NotImplementedError where none adds up to rounding.
    """
    added = out.double() - x.double()
    own = {*layer.module.children(), attention}
    for parts in (own, set(layer.module.modules())):
        writes = [
            (call.module, scale * call.output.double().reshape(x.shape))
            for call in calls
            if call.module in parts and call.output.numel() == x.numel()
        ]
        best = 8 * torch.finfo(out.dtype).eps * float(out.abs().max())
        for i, (first, a) in enumerate(writes):
            for second, b in writes[i + 1 :]:
                more = a + b - added
                error = float((more - more[:, :1]).abs().max())
                if error < best:
                    best = error
                    layer.attn_write, layer.mlp_write = first, second
        if layer.attn_write is not None:
            return
    raise NotImplementedError(
        f"does not add an attention write and an MLP write to its input{hooked(layer.module)}"
    )


def hooked(module: nn.Module) -> str:
    """In brackets, which of its modules have forward hooks that may be why; nothing where none has."""
    names = [
        name or type(inner).__name__
        for name, inner in module.named_modules()
        if inner._forward_hooks or inner._forward_pre_hooks
    ]
    return f" (forward hooks on {', '.join(names[:3])}: do they change it?)" if names else ""


def check_model(model: nn.Module) -> PreTrainedModel:
    model = _unwrapped(model)
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {name}")
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"{name} is not served: it is an encoder-decoder, not a decoder-only model"
        )
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise NotImplementedError(
            f"{name} is not served: it is no causal language model (an encoder, or a model without its head)"
        )
    if _no_heads(config):
        raise NotImplementedError(
            f"{name} is not served: it has no attention heads (a state-space or recurrent model)"
        )
    parameters = list(model.parameters())
    if all(p.is_meta for p in parameters):
        raise ValueError(
            f"model must hold its weights, those of this {name} are on the meta device"
        )
    if any(p.is_inference() for p in parameters):
        raise ValueError(
            "model must be made outside torch.inference_mode: no gradient can be taken through such weights"
        )
    return model


def _no_heads(config: Any) -> bool:
    try:
        heads = getattr(config, "num_attention_heads", None)
    except Exception:  # transformers' own: each layer has a number of its own
        return False
    return heads is None and not hasattr(config, "text_config")


def _unwrapped(model: Any) -> nn.Module:
    """The model that torch.compile or peft has wrapped; peft's adapters stay in it."""
    model = getattr(model, "_orig_mod", model)
    if not hasattr(model, "get_base_model"):
        return cast(nn.Module, model)
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        raise NotImplementedError(
            f"{type(model).__name__} is not served: it puts learnt vectors, which are no tokens, ahead of the prompt"
        )
    return cast(nn.Module, model.get_base_model())


def check_eval(model: nn.Module) -> None:
    if any(module.training for module in model.modules()):
        raise ValueError(
            "model must be in evaluation mode (dropout would make every effect noise): call model.eval()"
        )


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(module, (nn.Linear, Conv1D)) or (
        isinstance(weight, Tensor) and weight.ndim == 2
    )


def _is_mixture(module: nn.Module) -> bool:
    named = any(part in type(module).__name__.lower() for part in _MIXTURE_NAMES)
    return named and any(True for _ in module.parameters())


class FiniteCheck:
    """Largest magnitudes of activations, noted where they are and looked at together: one wait for the device."""

    def __init__(self) -> None:
        self.places: list[str] = []
        self.largest: list[Tensor] = []

    def note(self, x: Tensor, where: str) -> None:
        if x.numel():
            self.places.append(where)
            self.largest.append(torch.linalg.vector_norm(x.detach(), torch.inf))

    def first_bad(self) -> str | None:
        """The first place where a noted tensor held NaN or infinity, None if none did."""
        if not self.largest:
            return None
        first = self.largest[0]
        finite = torch.stack([x.to(first.device) for x in self.largest]).isfinite().tolist()
        return None if all(finite) else self.places[finite.index(False)]

    def check(self) -> None:
        """ValueError that names the first place where a noted tensor held NaN or infinity."""
        where = self.first_bad()
        if where is not None:
            raise ValueError(
                f"model gives activations that are not finite (NaN or infinity) in {where}"
            )


def check_finite(x: Tensor, where: str) -> None:
    found = FiniteCheck()
    found.note(x, where)
    found.check()
