"""nnsight 0.8 (and nnterp on it): wrapped models in, scores by module path out, inside a trace and outside."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from atp_fast.engine import Engine
from atp_fast.extras import require_version
from atp_fast.hf.modules import node_places
from atp_fast.prompts.pairs import PromptPairs
from atp_fast.results import Attribution

require_version("nnsight", "0.8", "0.9", "nnsight")

from nnsight.intervention import source  # noqa: E402


@contextlib.contextmanager
def unwrapped(model: Any) -> Iterator[nn.Module]:
    """The wrapped HuggingFace model, its forwards free of nnsight's interventions until the block ends.

    Weights that are not there yet are loaded (`dispatch`). So calls inside a trace run beside it and change nothing in
    it. Raises TypeError for what nnsight does not wrap, NotImplementedError for a model with edits, which would be passed
    over, and for one that runs elsewhere: served by vLLM, or with weights that cannot be loaded here (remote ones of NDIF).
    """
    name = type(model).__name__
    if any(base.__module__.startswith("nnsight.modeling.vllm") for base in type(model).__mro__):
        raise NotImplementedError(f"{name} runs inside vLLM: give a TransformersModel")
    module = _module(model)
    if module is None:
        raise TypeError(f"model must be wrapped by nnsight, got {name}")
    if any(p.is_meta for p in module.parameters()) and not getattr(model, "dispatched", True):
        try:
            model.dispatch()
        except Exception as error:
            raise NotImplementedError(
                f"{name} has no weights here and they cannot be loaded ({error}): remote models are not served"
            ) from error
        module = _module(model)
        assert module is not None
    if all(p.is_meta for p in module.parameters()):
        raise NotImplementedError(
            f"{name} has no weights here: remote models are not served, load the model with dispatch=True"
        )
    if getattr(model, "_edits", None):
        raise NotImplementedError(
            f"model must have no edits, this {name} has {len(model._edits)} (model.edit): take them away with clear_edits()"
        )
    undo = []
    try:
        for inner in module.modules():
            forward = inner.__dict__.get("forward")
            if isinstance(forward, source.Controller):
                undo.append((inner, forward))
                if _is_the_class_s(inner, forward.state.original):
                    del inner.__dict__["forward"]
                else:  # it had a forward of its own, or accelerate's hooks
                    inner.__dict__["forward"] = functools.partial(_body, inner, forward.state)
        yield module
    finally:
        for inner, forward in undo:
            inner.__dict__["forward"] = forward


def _module(model: Any) -> nn.Module | None:
    for name in ("_module", "_model"):
        found = model.__dict__.get(name) if hasattr(model, "__dict__") else None
        if isinstance(found, nn.Module) and not isinstance(model, nn.Module):
            return found
    return None


def _is_the_class_s(module: nn.Module, forward: Any) -> bool:
    return forward is type(module).forward and "_hf_hook" not in module.__dict__


def _body(module: nn.Module, state: Any, *args: Any, **kwargs: Any) -> Any:
    """What nnsight runs between its interventions."""
    return source.run_body(state, module, args, kwargs)


@contextlib.contextmanager
def engine(model: Any, **options: Any) -> Iterator[Engine]:
    """An engine on the wrapped model, for all of the engine's verbs; options: those of Engine.

    Raises what `unwrapped` and Engine raise.
    """
    with unwrapped(model) as module:
        yield Engine(module, **options)


def attribute(model: Any, pairs: PromptPairs, **options: Any) -> Attribution:
    """`Engine.attribute` on a wrapped model, inside a trace or outside; options: those of that method."""
    with engine(model) as found:
        return found.attribute(pairs, **options)


def by_module(
    found: Attribution, model: Any, scores: str = "effect"
) -> dict[str, dict[str, Tensor]]:
    """Scores by module path: `{"model.layers.3.self_attn.o_proj": {"z": (positions, heads)}, ...}`.

    scores: "effect" (signed), "contribution", or "per_pair" with a pairs axis ahead. The inner mapping has the kinds
    whose values stand in that module: q, k and v in a projection's output (together in a fused one, such as GPT-2's
    c_attn), or that of the norm behind it; z and attn_out in the input and output of the attention's last projection, neuron
    and mlp_out in those of the MLP's; resid_pre in the layer's input. Writes have no head axis. Nodes of dictionaries are left
    out.
    Raises ValueError for other scores or per_pair numbers that were not kept, NotImplementedError for a kind whose values
    stand in no module's input or output.
    """
    if scores not in ("effect", "contribution", "per_pair"):
        raise ValueError(f"scores must be effect, contribution or per_pair, got {scores!r}")
    tables = getattr(found, scores)
    if tables is None:
        raise ValueError("scores must have been kept (per_pair=True of attribute), these were not")
    with engine(model) as own:
        places = node_places(own.plug)
    paths: dict[str, dict[str, Tensor]] = {}
    for layer in range(found.space.layers):
        for kind, table in tables.items():
            count = 0 if kind in found.space.only else found.space.in_layers(kind)[layer]
            if not count:
                continue
            x = table.select(-3, layer)[..., :count]
            wide = kind in ("q", "k", "v", "z", "neuron")
            if (kind, layer) not in places:
                raise NotImplementedError(
                    f"{kind} of layer {layer} stands in no module's input or output: found.{scores}[{kind!r}] has its scores"
                )
            paths.setdefault(places[kind, layer].path, {})[kind] = x if wide else x[..., 0]
    return paths
