"""Dictionaries: at a place of one layer, the value there as features and what they leave over (sparse autoencoders).

x = decode(f) + error,   f = encode(x)
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from atp_fast.nodes import ERROR, FEATURES

SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out", "z", "neuron")
"""Where a dictionary can stand: before and behind a layer, its writes, its heads' outputs side by side, its neurons."""

Map = Callable[[Tensor], Tensor]

# TransformerLens's names of these places, which sae-lens uses
_HOOKS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "attn.hook_z": "z",
    "mlp.hook_post": "neuron",
}


@dataclass(frozen=True, eq=False)
class Dictionary:
    """A dictionary at one place.

    encode: values (rows, width) -> features (rows, features); decode: back; features: how many;
    stateful: decode undoes a scaling that it knows from the values encoded last.
    """

    name: str
    layer: int
    site: str
    encode: Map
    decode: Map
    features: int = 0
    stateful: bool = False

    @property
    def kinds(self) -> tuple[str, str]:
        """The node kinds of its features and of its error term."""
        return self.name + FEATURES, self.name + ERROR

    @property
    def seat(self) -> tuple[int, str]:
        """Layer and node kind of the value: what is behind a layer comes before the next one, which the last lacks."""
        return (
            (self.layer + 1, "resid_pre") if self.site == "resid_post" else (self.layer, self.site)
        )

    def decoded(self, features: Tensor, x: Tensor) -> Tensor:
        """Values (rows, width) of features, under the scaling of the values x where there is one."""
        if self.stateful:
            self.encode(x)
        return self.decode(features)

    def learnt(self, x: Tensor, tolerance: float) -> Dictionary:
        """This dictionary with what is learnt from values x (rows, width) of the model.

        tolerance: relative rounding. Raises TypeError, ValueError or NotImplementedError naming encode or decode, the
        rule and what came.
        """
        given = f"{tuple(x.shape)} {x.dtype} on {x.device}"
        before = x.clone()
        features = _called("encode", self.encode, x, given)
        if not torch.equal(x, before):
            raise ValueError(
                "encode must leave the values that it is given as they are, got others in their place"
            )
        if features.ndim != 2 or len(features) != len(x) or not features.shape[1]:
            raise ValueError(
                f"encode must give one row of features for each of {len(x)} values, got {tuple(features.shape)} for {given}"
            )
        with torch.enable_grad():
            leaf = features.detach().requires_grad_()
            values = _called("decode", self.decode, leaf, f"features {tuple(features.shape)}")
            if values.shape != x.shape:
                raise ValueError(
                    f"decode must give values of shape {tuple(x.shape)}, got {tuple(values.shape)} "
                    f"(a transcoder, which reads another place than it writes, is no dictionary)"
                )
            if not values.requires_grad:
                raise ValueError(
                    "decode must be differentiable in the features, got values without a graph (a detach or no_grad in it?)"
                )
            (slope,) = torch.autograd.grad(values.sum(), leaf, allow_unused=True)
        if slope is None:
            raise ValueError("decode must depend on the features, got values that do not")
        values = values.detach()
        for name, found in (("encode", features), ("decode", values)):
            if found.device != x.device:
                raise ValueError(f"{name} must stay on {x.device}, got {found.device}")
            if not bool(torch.isfinite(found).all()):
                raise ValueError(f"{name} must give finite numbers, got NaN or infinity")

        def differs(found: Tensor, wanted: Tensor) -> bool:
            scale = torch.linalg.vector_norm(wanted)
            return not bool(torch.linalg.vector_norm(found - wanted) <= tolerance * scale)

        rows = [x[i : i + 1] for i in range(len(x))]
        alone = [_called("encode", self.encode, row, "one row of values") for row in rows]
        if differs(torch.cat(alone), features):
            raise NotImplementedError(
                "encode must treat every position by itself, got features that depend on the others in the batch (BatchTopK, "
                "or a model of sequences?): no pair would have effects of its own"
            )
        stateful = self._is_stateful(x, features, values, differs)
        held = replace(self, features=features.shape[1], stateful=stateful)
        parts = [held.decoded(features[i : i + 1], row) for i, row in enumerate(rows)]
        if differs(torch.cat(parts), values):
            raise NotImplementedError(
                "decode must treat every position by itself, got values that depend on the others in the batch"
            )
        return held

    def _is_stateful(
        self, x: Tensor, features: Tensor, values: Tensor, differs: Callable[[Tensor, Tensor], bool]
    ) -> bool:
        """Whether decode gives other values when others were encoded before."""
        self.encode(2 * x.flip(0) + 1)
        return differs(self.decode(features), values)


def side_by_side(kind: str, value: Tensor) -> Tensor:
    """The value of a place as (..., positions, width): z has its heads ahead of the positions."""
    return value.transpose(-3, -2).flatten(-2) if kind == "z" else value


def _called(name: str, function: Map, x: Tensor, given: str) -> Tensor:
    try:
        found = function(x)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"{name} must take {given}, got {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(found, Tensor) or not found.is_floating_point():
        what = found.dtype if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(f"{name} must give a tensor of floating-point numbers, got {what}")
    return found


def read_dictionary(
    layer: int, site: str, encode: Any, decode: Map | None, name: str | None, head_dim: int
) -> Dictionary:
    """A dictionary from its two functions, or from an object that has them, such as one of sae-lens.

    head_dim: of z, whose heads such an object may want apart. Raises TypeError or ValueError for what is neither, for one
    that was made for another place, and NotImplementedError for a transcoder.
    """
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise TypeError(f"layer must be an int, got {layer!r}")
    if site not in SITES:
        raise ValueError(f"site must be among {', '.join(SITES)}, got {site!r}")
    name = site if name is None else name
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"name must be made of letters, digits, _ and -, got {name!r}")
    if decode is None:
        if not all(callable(getattr(encode, part, None)) for part in ("encode", "decode")):
            raise TypeError(
                f"encode must come with decode, or be an object that has both, got {type(encode).__name__} alone"
            )
        encode, decode = _methods(encode, layer, site, head_dim)
    for part, function in (("encode", encode), ("decode", decode)):
        if not callable(function):
            raise TypeError(f"{part} must be callable, got {type(function).__name__}")
    return Dictionary(name, layer, site, encode, decode)


def _methods(dictionary: Any, layer: int, site: str, head_dim: int) -> tuple[Map, Map]:
    config = getattr(dictionary, "cfg", None)
    places = [config, getattr(config, "metadata", None)]
    hook, out = (_first(places, key) for key in ("hook_name", "hook_name_out"))
    if (out is not None and out != hook) or hasattr(config, "d_out"):
        raise NotImplementedError(
            f"transcoders are not served: {type(dictionary).__name__} reads {hook} and writes {out}; a dictionary reads and "
            "writes one place"
        )
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook or "")
    if match is not None and (int(match[1]), _HOOKS.get(match[2])) != (layer, site):
        raise ValueError(
            f"layer and site must be those that the dictionary was made for, {hook}, got layer {layer} and {site!r}"
        )
    encode, decode = dictionary.encode, dictionary.decode
    if getattr(dictionary, "hook_z_reshaping_mode", False):
        return lambda x: encode(x.unflatten(-1, (-1, head_dim))), lambda f: decode(f).flatten(-2)
    return encode, decode


def _first(places: list[Any], key: str) -> str | None:
    found = (getattr(place, key, None) for place in places)
    return next((value for value in found if isinstance(value, str)), None)
