"""Models whose heads and neurons transformers has split over processes (tensor parallelism), run on plain local weights.

transformers holds such weights as DTensors and wraps the forward of every module that its plan names. Inside
`Parallel.plain` these modules hold this process's part alone and compute it by code of ours, which sums over the processes as
the plan's rule asks: once where a part of a layer ends, and once for all cotangents where it began.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atp_fast.hf.attention import running
from atp_fast.hf.linears import mapped
from atp_fast.ops.collectives import Group, entered, joined, left, parted

_WRAPPER = "tp_forward"  # transformers' name for the forward that it puts in place
_SIZES = ("pp_size", "dp_replicate_size", "fsdp_size")  # DistributedConfig's other ways to split
_EMBEDDINGS = ("embedding_rowwise", "embedding_colwise")
_Forward = Callable[..., Any]


class Rule(NamedTuple):
    """A module that the plan names, or whose parameter it names."""

    name: str
    module: nn.Module
    style: str


@dataclass(frozen=True)
class Parallel:
    """How a model is split: over whom, and by which rules its modules work together."""

    group: Group
    rules: tuple[Rule, ...]

    @contextlib.contextmanager
    def plain(self, backend: str) -> Iterator[None]:
        """Inside, the modules hold plain tensors and run by functions of ours; all is restored at the end."""
        before: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for _, module, style in self.rules:
                if style in _EMBEDDINGS:  # on token ids, without a graph: transformers' own
                    continue
                parameters: dict[str, Any] = module._parameters
                for name, value in parameters.items():
                    if _is_split(value):
                        before.append((parameters, name, value))
                        parameters[name] = held_tensor(value).detach()
                own = vars(module)
                if "forward" in own:
                    before.append((own, "forward", own.pop("forward")))
                    if style in _FORWARDS:
                        forward = _FORWARDS[style]
                        own["forward"] = functools.partial(forward, self.group, module, backend)
            yield
        finally:
            for place, name, value in reversed(before):
                place[name] = value

    def style(self, module: nn.Module | None) -> str | None:
        """The rule by which a module is split."""
        return next((rule.style for rule in self.rules if rule.module is module), None)

    def splits_heads(self, attention: nn.Module) -> bool:
        """Whether each process computes some of an attention's heads; else each computes all."""
        return any(self.style(module) == "colwise" for module in attention.modules())


def find_parallel(model: PreTrainedModel) -> Parallel | None:
    """How transformers has split the model over processes; None where it has not.

    Raises NotImplementedError, naming the module, its rule and what came, for a plan that splits what we cannot split.
    """
    split: dict[str, Any] = {name: p for name, p in model.named_parameters() if _is_split(p)}
    config = getattr(model.config, "distributed_config", None)
    others = {name: getattr(config, name, 1) or 1 for name in (*_SIZES, "ep_size")}
    wrong = [f"{name}={size}" for name, size in others.items() if size > 1]
    what = f"{type(model).__name__} is not served: "
    if wrong:
        raise NotImplementedError(
            f"{what}only tensor parallelism is (DistributedConfig(tp_size=...)), it was loaded with {', '.join(wrong)}"
        )
    if not split:
        return None
    if (getattr(model, "_tp_size", None) or 1) < 2:
        raise NotImplementedError(
            f"{what}{next(iter(split))} is a DTensor, but not of transformers' tensor parallelism"
        )
    meshes = {p.device_mesh for p in split.values()}
    group = Group(meshes.pop().get_group(), next(iter(split.values())).device)
    rules = _rules(model)
    named = {id(rule.module) for rule in rules}
    for name in split:
        if id(model.get_submodule(name.rpartition(".")[0])) not in named:
            raise NotImplementedError(f"{what}{name} is split by no rule of its plan")
    for rule in rules:
        if (reason := _refusal(model, rule, group.size)) is not None:
            raise NotImplementedError(
                f"{what}its tensor-parallel plan splits what cannot be split here: {rule.name} by rule "
                f"{rule.style!r} over {group.size} processes: {reason}"
            )
    return Parallel(group, tuple(rules))


def _rules(model: PreTrainedModel) -> list[Rule]:
    """The plan's rules for this model's modules; where it names a module's parameter alone, that rule."""
    plan: dict[str, str] = model._expand_parallel_plan(model.tp_plan)
    modules = dict(model.named_modules())
    found = {name: Rule(name, modules[name], plan[name]) for name in plan if name in modules}
    for name, style in plan.items():
        owner = name.rpartition(".")[0]
        if name not in modules and owner not in found:
            found[owner] = Rule(owner, modules[owner], style)
    return list(found.values())


def _refusal(model: PreTrainedModel, rule: Rule, size: int) -> str | None:
    """Why a rule cannot be followed exactly, or None."""
    name, style = rule.name, rule.style
    module: Any = rule.module
    wrapper = vars(module).get("forward")
    if wrapper is not None and getattr(wrapper, "__name__", "") != _WRAPPER:
        return "another forward has been put in place of transformers' own"
    if style not in _SERVED:
        return f"served are {', '.join(sorted(_SERVED))}"
    if style in _EMBEDDINGS:
        inside = module is not model.get_input_embeddings()
        return "only the embedding of the tokens may be" if inside else None
    if style in _LINEAR and type(module) is not nn.Linear:
        return f"it is no torch.nn.Linear but {type(module).__name__}"
    for inner, p in module._parameters.items():
        whole = not _is_split(p) or p.placements[-1].is_replicate()
        if not whole and held_tensor(p).numel() * size != p.numel():
            return f"its {inner} of shape {tuple(p.shape)} does not divide"
    parent = model.get_submodule(name.rpartition(".")[0])
    dim = getattr(parent, "head_dim", getattr(parent, "head_size", None))
    if style == "colwise" and isinstance(dim, int):
        config = model.config.get_text_config(decoder=True)
        for counted in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(config, counted, None)
            if isinstance(heads, int) and heads % size:
                return f"a head is not split, and {counted} is {heads}"
        heads, rest = divmod(module.out_features, dim)
        if not rest and heads % size:
            return f"a head is not split, and it has {heads} of {dim}"
    return None


def _is_split(parameter: Any) -> bool:
    return hasattr(parameter, "device_mesh")  # a DTensor


def held_tensor(parameter: Any) -> Tensor:
    """What this process holds of a parameter, which may be split over several."""
    found: Tensor = parameter.to_local() if _is_split(parameter) else parameter
    return found


def _once_entered(x: Tensor, group: Group) -> Tensor:
    """`entered`, once for all modules that are given the same tensor one after the other: one sum of their gradients."""
    run = running.get()
    if run is None:
        return entered(x, group)
    if run.entered is None or run.entered[0] is not x:
        run.entered = x, entered(x, group)
    return run.entered[1]


def _leaving(x: Tensor, group: Group) -> Tensor:
    run = running.get()
    if run is not None:
        run.entered = None
    return left(x, group)


def _column(group: Group, module: Any, backend: str, x: Tensor) -> Tensor:
    return mapped(_once_entered(x, group), module.weight, module.bias, backend)


def _whole_column(group: Group, module: Any, backend: str, x: Tensor) -> Tensor:
    return joined(_column(group, module, backend, x), group)


def _row(group: Group, module: Any, backend: str, x: Tensor) -> Tensor:
    y = _leaving(mapped(x, module.weight, None, backend), group)
    return y if module.bias is None else y + module.bias


def _whole_row(group: Group, module: Any, backend: str, x: Tensor) -> Tensor:
    return _row(group, module, backend, parted(x, group))


def _experts(
    group: Group, module: Any, backend: str, x: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    forward = type(module).forward
    return _leaving(forward(module, entered(x, group), chosen, entered(weights, group)), group)


def _latent(group: Group, module: Any, backend: str, x: Tensor) -> Tensor:
    """A product that all compute alike; its last columns go into each one's heads as they are (multi-head latent attention)."""
    y = mapped(x, module.weight, module.bias, backend)
    rotated = module.config.qk_rope_head_dim
    inner, rope = torch.split(y, [y.shape[-1] - rotated, rotated], -1)
    return torch.cat([inner, entered(rope, group)], -1)


_FORWARDS: dict[str, _Forward] = {
    "colwise": _column,
    "colwise_gather_output": _whole_column,
    "colwise_rep": _whole_column,
    "rowwise": _row,
    "rowwise_split_input": _whole_row,
    "rowwise_rep": _whole_row,
    "moe_tp_experts": _experts,
    "mla_kv_a_proj": _latent,
}
_LINEAR = frozenset(_FORWARDS) - {"moe_tp_experts"}
# the others compute each process's part, or the same in all, without a word between them
_SERVED = frozenset(
    (*_FORWARDS, *_EMBEDDINGS, "replicated_with_grad_allreduce", "replicate", "local_params")
)
