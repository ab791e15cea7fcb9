"""Where node values stand among a model's own modules: the path of a module, and whether it is its input or output."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from atp_fast.hf.attention import LayerRun
from atp_fast.hf.inspection import first_tensor
from atp_fast.hf.plug import Plug
from atp_fast.nodes import KINDS

_TOKENS = 5


class Place(NamedTuple):
    """path: the module's name in the model; side: "input" or "output"."""

    path: str
    side: str


class _Seen(NamedTuple):
    module: nn.Module
    input: Tensor | None
    output: Tensor | None


def node_places(plug: Plug) -> dict[tuple[str, int], Place]:
    """(kind, layer) -> where its values stand, for every kind that the model has, learnt from one run of a few tokens.
    What stands in no module's input or output, such as z where it is gated by hand, is left out.

    Queries, keys and values stand in the output of the last module before the rotation by position: a projection, a
    fused one that several kinds share, or the norm behind it. z is the input of the projection behind the attention.
    """
    names = {id(module): path for path, module in plug.model.named_modules()}
    ids = torch.arange(_TOKENS, device=plug.device)[None] % plug.vocabulary
    places: dict[tuple[str, int], Place] = {}
    kinds = [kind for kind in KINDS if _has(plug, kind)]
    with plug.plugged(), torch.no_grad():
        x, arguments = plug.enter(ids)
        for number, layer in enumerate(plug.layers):
            seen: list[_Seen] = []
            run = LayerRun(plug.backend)
            with contextlib.ExitStack() as hooks:
                for module in layer.module.modules():
                    hooks.callback(module.register_forward_hook(_note(seen)).remove)
                x = plug.run_layer(number, x, arguments[number], run)
            attention = layer.attention
            found: dict[str, tuple[nn.Module, str] | None] = {
                "neuron": None if layer.down is None else (layer.down, "input"),
                "attn_out": None if layer.attn_write is None else (layer.attn_write, "output"),
                "mlp_out": None if layer.mlp_write is None else (layer.mlp_write, "output"),
                "resid_pre": (layer.module, "input"),
            }
            if attention is not None:
                found |= _in_attention(attention, run, seen)
            for kind in kinds:
                if (place := found.get(kind)) is not None:
                    places[kind, number] = Place(names[id(place[0])], place[1])
    return places


def _in_attention(
    attention: nn.Module, run: LayerRun, seen: list[_Seen]
) -> dict[str, tuple[nn.Module, str] | None]:
    assert run.q is not None and run.k is not None and run.v is not None and run.z is not None
    dim = run.q.shape[-1] - run.biased
    inner = {id(module) for module in attention.modules()}
    inside = [s for s in seen if id(s.module) in inner and s.module is not attention]
    return {
        "q": _by_heads(inside, run.q[..., :dim]),
        "k": _by_heads(inside, run.k[..., :dim]),
        "v": _by_heads(inside, run.v),
        "z": _by_input(inside, run.z),
    }


def _has(plug: Plug, kind: str) -> bool:
    try:
        plug.space(1, (kind,))
    except NotImplementedError:
        return False
    return True


def _note(seen: list[_Seen]) -> Any:
    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        given = args[0] if args and isinstance(args[0], Tensor) else None
        out = output if isinstance(output, Tensor) else None
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            out = first_tensor(output)
        seen.append(_Seen(module, given, out))

    return note


def _by_input(seen: list[_Seen], z: Tensor) -> tuple[nn.Module, str] | None:
    """The module whose input is z, (1, heads, positions, dim), heads side by side."""
    flat = z.transpose(1, 2).reshape(-1)
    for module, given, _ in seen:
        if (
            given is not None
            and given.numel() == flat.numel()
            and torch.equal(given.reshape(-1), flat)
        ):
            return module, "input"
    return None


def _by_heads(seen: list[_Seen], value: Tensor) -> tuple[nn.Module, str] | None:
    """The last module in whose output, at each position, every head's vector stands, whatever its rotation: lengths are
    compared."""
    lengths = value[0].transpose(0, 1).double().norm(dim=-1)  # (positions, heads)
    dim, found = value.shape[-1], None
    for module, _, output in seen:
        if output is None or output.shape[-1] % dim or output.numel() % (_TOKENS * dim):
            continue
        rows = output[0]
        if rows.ndim == 3 and rows.shape[1] == _TOKENS and rows.shape[0] != _TOKENS:
            rows = rows.transpose(0, 1)  # heads ahead of positions
        if rows.shape[0] != _TOKENS:
            continue
        own = rows.reshape(_TOKENS, -1, dim).double().norm(dim=-1)
        gap = (own[:, None, :] - lengths[:, :, None]).abs().amin(2)
        if bool((gap <= 1e-3 * lengths.clamp(min=1e-6)).all()):
            found = module, "output"
    return found
