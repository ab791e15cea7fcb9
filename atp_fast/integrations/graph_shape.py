"""The graph that EAP-IG, MIB and auto-circuit share: its nodes and edges, and a run's scores in their order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from atp_fast.engine import Engine
from atp_fast.hf import LayerRun, Plug
from atp_fast.results import Attribution
from atp_fast.results.scores import By

NODES = ("z", "mlp_out", "resid_pre")
"""The node kinds that the graph's nodes are: give them to `Engine.attribute`."""

_RISES = {"logit_diff": True, "prob_diff": True, "nll": False, "kl": False}


@dataclass(frozen=True)
class GraphShape:
    """A graph's cfg: layers, query heads per layer, width of the residual stream, and whether a layer's MLP reads the
    residual stream before the layer's attention has written to it.

    Sources (nodes that write): input, then for each layer its heads a{l}.h{h} and its MLP m{l}. Destinations (where
    nodes read): for each layer its heads' q, then k, then v inputs a{l}.h{h}<q> and m{l}, then logits.
    Raises ValueError for numbers below one.
    """

    n_layers: int
    n_heads: int
    d_model: int
    parallel_attn_mlp: bool

    def __post_init__(self) -> None:
        for name in ("n_layers", "n_heads", "d_model"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number above 0, got {value!r}")

    @classmethod
    def of(cls, engine: Engine) -> GraphShape:
        """The shape of an engine's model. Raises NotImplementedError where its layers do not add two writes."""
        found = engine.plug.inspection
        return cls(found.layers, found.heads, found.hidden, _parallel(engine.plug))

    @classmethod
    def from_cfg(cls, cfg: Mapping[str, Any], name: str = "cfg") -> GraphShape:
        """From a graph's or a file's cfg, which may hold more. Raises ValueError, naming it, for what it lacks."""
        wanted = [field.name for field in fields(cls)]
        missing = [key for key in wanted if key not in cfg]
        if missing:
            raise ValueError(f"{name} must have {', '.join(wanted)}, got no {missing[0]}")
        layers, heads, width, parallel = (cfg[key] for key in wanted)
        return cls(layers, heads, width, bool(parallel))

    @property
    def cfg(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def sources(self) -> list[str]:
        names = ["input"]
        for layer in range(self.n_layers):
            names += [*(f"a{layer}.h{head}" for head in range(self.n_heads)), f"m{layer}"]
        return names

    @property
    def destinations(self) -> list[str]:
        names = []
        for layer in range(self.n_layers):
            heads = [f"a{layer}.h{head}" for head in range(self.n_heads)]
            names += [*(f"{name}<{letter}>" for letter in "qkv" for name in heads), f"m{layer}"]
        return [*names, "logits"]

    def edges(self) -> Iterator[tuple[str, int, int]]:
        """Every edge's name, such as a0.h1->a1.h2<q>, with the numbers of its source and its destination."""
        sources = self.sources
        for column, destination in enumerate(self.destinations):
            for row in range(self.before(destination)):
                yield f"{sources[row]}->{destination}", row, column

    def before(self, destination: str) -> int:
        """How many sources, from the first on, a destination reads."""
        if destination == "logits":
            return len(self.sources)
        layer = int(destination[1:].partition(".")[0])
        behind_heads = destination[0] == "m" and not self.parallel_attn_mlp
        return 1 + layer * (self.n_heads + 1) + (self.n_heads if behind_heads else 0)


def source_scores(
    found: Attribution,
    shape: GraphShape,
    scores: By = "effect",
    higher_is_better: bool | None = None,
) -> Tensor:
    """A noising run's scores of `NODES` as (positions, sources), on the CPU; means over all pairs.

    A head's z stands for its output through W_O (the map is linear, so the effects are the same numbers), layer 0's
    resid_pre for the input. A pair without a position counts as 0 there, so that a sum over positions is the mean over pairs
    of each pair's own sum.
    scores: "effect", as the effect on a loss: positive where patching makes the model worse at the task, so that the node
    supports it; "contribution", the mean of |effects| (with GradDrop where the method has it), never negative;
    higher_is_better: whether the metric rises as the model gets better; known for the named metrics when None.
    Raises ValueError for a denoising run, missing kinds, another number of layers or heads, a metric of unknown sense.
    """
    if found.direction != "noising":
        raise ValueError(f"found must be a noising run, as EAP-IG's are, got {found.direction}")
    missing = [kind for kind in NODES if kind not in found.space.kinds]
    if missing:
        raise ValueError(f"found must score {', '.join(NODES)} nodes, got no {', '.join(missing)}")
    for name, wanted, got in (
        ("layers", shape.n_layers, found.space.layers),
        ("heads a layer", shape.n_heads, found.space.widths["z"]),
    ):
        if wanted != got:
            raise ValueError(f"found must have {wanted} {name}, as shape has, got {got}")
    if scores not in ("contribution", "effect"):
        raise ValueError(f"scores must be 'contribution' or 'effect', got {scores!r}")
    tables = found.contribution if scores == "contribution" else found.effect
    share = found.counts / len(found.clean_value)
    heads, mlps, inputs = (tables[kind].cpu() * share[:, None] for kind in NODES)
    layers = torch.cat([heads, mlps], 2).transpose(0, 1).flatten(1)
    table = torch.cat([inputs[0], layers], 1)
    return table if scores == "contribution" else table * loss_sign(found.metric, higher_is_better)


def loss_sign(metric: str, higher_is_better: bool | None = None) -> int:
    """What an effect on a metric is multiplied with to be one on a loss.

    Raises ValueError for a metric that is none of the named ones, without higher_is_better.
    """
    if higher_is_better is None:
        if metric not in _RISES:
            raise ValueError(
                f"higher_is_better must be given for metric {metric!r}, known are {', '.join(_RISES)}"
            )
        higher_is_better = _RISES[metric]
    return -1 if higher_is_better else 1


def _parallel(plug: Plug) -> bool:
    """Whether layer 0's MLP writes the same when its attention writes something else."""
    plug.space(1, ("attn_out", "mlp_out"))
    writes: list[Tensor] = []

    def moved(kind: str, value: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(value.shape, generator=generator).to(value)
        return plain(kind, value + noise * (1 + value.abs().max()) if kind == "attn_out" else value)

    def plain(kind: str, value: Tensor) -> Tensor:
        if kind == "mlp_out":
            writes.append(value)
        return value

    with plug.plugged(), torch.no_grad():
        x, arguments = plug.enter(torch.full((1, 2), plug.plain_token, device=plug.device))
        for visit in (plain, moved):
            run = LayerRun(plug.backend, visit, kinds=("attn_out", "mlp_out"))
            plug.run_layer(0, x, arguments[0], run)
    return torch.equal(*writes)
