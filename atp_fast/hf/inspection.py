"""What a model is made of: whether it can be served, and which modules' inputs and outputs are nodes."""

from __future__ import annotations

import contextlib
import itertools
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
from atp_fast.hf.formats import format_of
from atp_fast.hf.norms import FoundNorm
from atp_fast.hf.placement import fetchers
from atp_fast.hf.scores import Scores
from atp_fast.hf.switching import modules_of

_POSITIONS = (
    "rotary"  # modules that give tables of positions, through which no gradient flows in any model
)
_MIXTURE_NAMES = ("expert", "moe", "router")
_ROUNDINGS = 8  # of the numbers that a sum is made of


@dataclass
class Layer:
    """One decoder layer and the modules whose inputs or outputs are nodes."""

    module: nn.Module
    outputs: int = 0  # so many that it returns in a tuple; 0: hidden states alone
    skip: float = 1.0  # what its input is multiplied with on its way past the layer's writes
    attention: nn.Module | None = None  # None: the layer mixes positions in another way
    down: nn.Module | None = None  # its input is the neurons
    attn_write: nn.Module | None = None
    mlp_write: nn.Module | None = None
    activations: Sequence[nn.Module] = ()
    norms: Sequence[FoundNorm] = ()
    rotations: Sequence[ModuleType] = ()
    together: bool = (
        False  # clean and corrupted prompts may share a tape (attribution.tape.check_walk)
    )


@dataclass
class Inspection:
    """The shape of a model that is served; `refused` says per node kind why it cannot be had.

    Where layers differ, heads, dimensions and neurons are the largest, and `counts` has the nodes per position layer by layer,
    by kind.
    """

    model: str
    layers: int
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    v_dim: int = 0
    hidden: int = 0
    neurons: int = 0
    context: int | None = None
    windows: tuple[int | None, ...] = ()
    counts: dict[str, tuple[int, ...]] = field(default_factory=dict)
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
            what = f"{names[module]} ({type(module).__name__}"
            if not torch.is_grad_enabled():
                raise NotImplementedError(
                    f"runs {what}) without gradients: an indexer that selects each query's keys?"
                )
            raise NotImplementedError(f"no gradient flows through {what}; quantised weights?){why}")
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
        try:
            out = layer.module(x, *args, **kwargs)
        except (IndexError, KeyError, TypeError) as error:  # its eager run had none
            inside = entered[-1] if entered else layer.module
            raise NotImplementedError(
                f"{names[inside]} ({type(inside).__name__}) raises {type(error).__name__} where attention is taken over"
            ) from error
    return first_tensor(out), calls


def find_down_projection(
    layer: Layer,
    calls: list[Call],
    attention: nn.Module | None,
    x: Tensor,
    mixtures: Sequence[Mixture],
) -> int:
    """Note the module whose input is the layer's neurons, and return how many there are: 0 in a layer without an MLP.

    It is the last linear map outside attention that ends in the residual stream's width, or the experts of a mixture (see
    hf/experts.py; shared experts beside them are no nodes). Raises NotImplementedError for experts that do not go through
    transformers' experts interface, once for all of the layer's input x, and for an MLP with more than one such map.
    """
    hidden = x.shape[-1]
    if len(mixtures) == 1 and mixtures[0].tokens == x[..., 0].numel():
        return mixtures[0].neurons
    inside = set() if attention is None else set(attention.modules())
    linear = [
        call
        for call in calls
        if call.module not in inside and _is_linear(call.module) and call.output.shape[-1] == hidden
    ]
    last = linear[-1] if linear else None
    kind = "no MLP" if last is None else _kind_of_part(layer.module, last.module, calls)
    if kind != "MLP" and (mixture := _mixture_in(layer.module)) is not None:
        raise NotImplementedError(f"is a mixture of experts ({type(mixture).__name__})")
    if kind == "more":
        raise NotImplementedError("has an MLP with more than one down projection")
    if last is None or kind == "no MLP":
        return 0
    layer.down = last.module
    return last.input.shape[-1]


def _kind_of_part(layer: nn.Module, down: nn.Module, calls: list[Call]) -> str:
    """What the part of a layer with its last linear map is: an "MLP", all of which goes through that map; "more", of which
    some does not; "no MLP", a state-space layer, say, whose output projection that is; "unknown" where it cannot be tried.
    """
    part = next(child for child in layer.children() if down in set(child.modules()))
    call = next((call for call in calls if call.module is part), None)
    by_position = None if call is None else _is_by_position(call)
    if call is None or by_position is None:
        return "unknown"
    if not by_position:
        return "no MLP"
    without = down.register_forward_hook(lambda module, args, output: output * 0)
    try:
        with torch.no_grad():
            rest = first_tensor(part(call.input))
    finally:
        without.remove()
    rows = rest.reshape(-1, rest.shape[-1])
    return "MLP" if _alike(rows, rows[:1].expand_as(rows), call.output) else "more"


def _is_by_position(call: Call) -> bool | None:
    """Whether a module gives backwards what it is given backwards, as an MLP does; None where it takes more than that."""
    try:
        with torch.no_grad():
            backwards = first_tensor(call.module(call.input.flip(-2))).flip(-2)
    except (TypeError, RuntimeError):  # as no mixer of positions does
        return None
    return _alike(backwards, call.output, call.output)


def _alike(found: Tensor, right: Tensor, scale: Tensor) -> bool:
    return torch.allclose(found, right, rtol=1e-2, atol=1e-2 * float(scale.abs().max()))


def find_writes(
    layer: Layer, calls: list[Call], attention: nn.Module | None, x: Tensor, out: Tensor, mlp: bool
) -> dict[str, str]:
    """Note the modules whose outputs, each times a number, the layer adds to its input x to make its output; returns why a
    kind of write cannot be had, by kind.

    out = skip * x + the sum of number * write, but for a constant. There are two writes, or one in a layer that is only a
    mixer or only an MLP (mlp: it has neurons), or three. Of the layer's own parts (of all its modules, where none of them do)
    those are taken that add up best, with all numbers 1 if there are such. Raises NotImplementedError where none add up to
    rounding.
    """
    own = {*layer.module.children(), attention}
    every = set(layer.module.modules())
    for count, parts in ((2, own), (1, own), (3, own), (2, every), (1, every)):
        if count == 1 and attention is not None and mlp:
            continue
        given = [c for c in calls if c.module in parts and c.output.numel() == x.numel()]
        for free in ("nothing", "numbers", "skip and numbers"):
            best, chosen = float(_ROUNDINGS), None
            for some in itertools.combinations(given, count):
                error, skip = _adds_up([c.output.reshape(x.shape) for c in some], x, out, free)
                # in order: a dropout after a write, which changes nothing, is not taken for it
                if error < best:
                    best, chosen, layer.skip = error / 2, some, skip
            if chosen is not None:
                return _name_writes(layer, chosen, attention, mlp)
    raise NotImplementedError(
        f"does not add an attention write and an MLP write to its input{hooked(layer.module)}"
    )


def _adds_up(writes: Sequence[Tensor], x: Tensor, out: Tensor, free: str) -> tuple[float, float]:
    """How far, in roundings, out is from skip * x + numbers * writes + a constant, and the skip.

    free: what of these is not 1 but fits best. Infinitely far where one of the writes then counts for nothing.
    """
    terms = torch.stack([x, *writes, out]).double()
    unit = torch.finfo(out.dtype).eps * terms.abs().sum(0)
    unit = (unit + unit[:, :1]).clamp(min=torch.finfo(out.dtype).tiny)
    rows = ((terms - terms[:, :, :1]) / unit).flatten(1)
    given, rest = rows[:-1], rows[-1]
    if free == "nothing":
        return float((rest - given.sum(0)).abs().max()), 1.0
    if free == "numbers":
        given, rest = given[1:], rest - given[0]
    inverse = torch.linalg.pinv(given @ given.T, hermitian=True)
    numbers = torch.zeros_like(given[:, 0])
    for _ in range(3):  # what the squared numbers lose in digits comes back
        step = inverse @ (given @ rest)
        numbers, rest = numbers + step, rest - step @ given
    least = float((numbers[:, None] * given).abs().amax(1).min())
    error = float(rest.abs().max()) if least > _ROUNDINGS else float("inf")
    return error, 1.0 if free == "numbers" else float(numbers[0])


def _name_writes(
    layer: Layer, found: Sequence[Call], attention: nn.Module | None, mlp: bool
) -> dict[str, str]:
    """See find_writes."""
    modules = [call.module for call in found]
    if len(found) == 2:
        layer.attn_write, layer.mlp_write = modules
        return {}
    if len(found) == 1:
        layer.attn_write, layer.mlp_write = (None, *modules) if mlp else (*modules, None)
        return {}
    mixers = [call.module for call in found if _is_by_position(call) is False]
    mixers += [module for module in modules if module is attention and module not in mixers]
    others = [module for module in modules if module not in mixers]
    refused = {}
    if attention in mixers or len(mixers) == 1:
        layer.attn_write = attention if attention in mixers else mixers[0]
    else:
        refused["attn_out"] = f"adds {len(mixers)} writes of mixers"
    if len(others) == 1:
        layer.mlp_write = others[0]
    else:
        refused["mlp_out"] = f"adds {len(others)} writes of MLPs"
    return refused


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
    if all(p.is_meta for p in parameters) and not fetchers(model):
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
    if any(module.training for module in modules_of(model)):
        raise ValueError(
            "model must be in evaluation mode (dropout would make every effect noise): call model.eval()"
        )


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    plain = isinstance(module, (nn.Linear, Conv1D)) or (
        isinstance(weight, Tensor) and weight.ndim == 2
    )
    return plain or format_of(module) is not None


def _mixture_in(layer: nn.Module) -> nn.Module | None:
    """A part of a layer that is named for experts, beyond what the names of all its parts begin with."""
    names = {module: type(module).__name__ for module in layer.modules()}
    own = [n for m, n in names.items() if type(m).__module__ == type(layer).__module__]
    differ = (i for i, letters in enumerate(zip(*own, strict=False)) if len(set(letters)) > 1)
    start = next(differ, min(map(len, own)))
    for module, name in names.items():
        rest = name[start:] if name in own else name
        if any(part in rest.lower() for part in _MIXTURE_NAMES) and any(
            True for _ in module.parameters()
        ):
            return module
    return None


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
