"""EAP-IG and MIB: scores as their graphs and importances files, read and written without either library.

A graph's nodes are what writes to the residual stream: the input, every head's output through W_O, every MLP's output.
Its neurons are the entries of those writes. Scores are noising ones of a loss, summed over positions.
"""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atp_fast.attribution.question import Question
from atp_fast.attribution.runs import PairRuns, corrupted_values, run_pairs, taped
from atp_fast.attribution.sweep import top_cotangent
from atp_fast.engine import Engine
from atp_fast.files import write_text, written_whole
from atp_fast.hf import Plug
from atp_fast.hf.modules import node_places
from atp_fast.integrations.graph_shape import NODES as NODES
from atp_fast.integrations.graph_shape import GraphShape as GraphShape
from atp_fast.integrations.graph_shape import loss_sign, source_scores
from atp_fast.metrics import MetricLike, resolve
from atp_fast.ops.reference import accumulation_dtype
from atp_fast.prompts.pairs import PromptPairs
from atp_fast.results import Attribution
from atp_fast.results.scores import By, check_shape

_PAIRS_AT_ONCE = 16


@dataclass(eq=False)
class Importances:
    """The scores of a graph, or of a file of MIB's.

    nodes: (sources,); neurons: (sources, d_model); edges: (sources, destinations), each float32 on the CPU or None.
    NaN is EAP-IG's "not scored": it keeps such a node in every circuit.
    Raises ValueError where a table does not fit the shape or there is none.
    """

    shape: GraphShape
    nodes: Tensor | None = None
    neurons: Tensor | None = None
    edges: Tensor | None = None

    def __post_init__(self) -> None:
        sources = len(self.shape.sources)
        shapes = {
            "nodes": (sources,),
            "neurons": (sources, self.shape.d_model),
            "edges": (sources, len(self.shape.destinations)),
        }
        for name, shape in shapes.items():
            table = getattr(self, name)
            if table is not None:
                check_shape(name, table, shape)
                setattr(self, name, table.detach().float().cpu())
        if all(getattr(self, name) is None for name in shapes):
            raise ValueError(f"importances must have one of {', '.join(shapes)}, got none")

    def by_name(self) -> dict[str, float]:
        """Node name -> score, such as a0.h3 -> 0.2. Raises ValueError without node scores."""
        if self.nodes is None:
            raise ValueError("importances must have node scores, these have none")
        return dict(zip(self.shape.sources, self.nodes.tolist(), strict=True))

    # ---- EAP-IG's Graph

    def to_graph(self, graph: Any = None) -> Any:
        """Put the scores into an `eap.graph.Graph`, a new one when None, and return it.

        Raises ValueError for a graph of another shape or one built without the slots for these scores, ImportError when
        there is no graph and EAP-IG is not installed.
        """
        tables = {
            "nodes_scores": (self.nodes, "node_scores=True"),
            "neurons_scores": (self.neurons, "neuron_level=True"),
            "scores": (self.edges, ""),
        }
        if graph is None:
            options = {
                "node_scores": self.nodes is not None,
                "neuron_level": self.neurons is not None,
            }
            graph = _eap_graph().Graph.from_model(self.shape.cfg, **options)
        own = GraphShape.from_cfg(graph.cfg, "graph.cfg").cfg
        other = [f"{key} {value}" for key, value in self.shape.cfg.items() if own[key] != value]
        if other:
            theirs = [f"{key} {own[key]}" for key in own if own[key] != self.shape.cfg[key]]
            raise ValueError(f"graph must have {', '.join(other)}, got {', '.join(theirs)}")
        for name, (table, option) in tables.items():
            if table is None:
                continue
            slot = getattr(graph, name)
            if slot is None:
                raise ValueError(f"graph must be built with {option} for these scores")
            slot[:] = table.to(slot)
        return graph

    # ---- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .json or .pt file that EAP-IG's `Graph.from_json` and `from_pt`, and so MIB's evaluation, read.

        Nothing is marked as in the circuit: evaluations choose by score. Edges without scores get 0, as EAP-IG's own have.
        Raises ValueError for another suffix and for neurons in JSON (EAP-IG reads them back wrongly: every head of a layer
        gets the last one's), OSError naming the path.
        """
        suffix = Path(path).suffix
        if suffix not in (".json", ".pt"):
            raise ValueError(f"path must end in .json or .pt, got {str(path)!r}")
        if suffix == ".json":
            if self.neurons is not None:
                raise ValueError("neuron scores must go into a .pt file, got .json")
            write_text(path, json.dumps(self._record()) + "\n")
            return
        with written_whole(path) as temporary:
            torch.save(self._tensors(), temporary)

    def _record(self) -> dict[str, Any]:
        nodes: dict[str, dict[str, Any]] = {
            name: {"in_graph": False} for name in self.shape.sources
        }
        if self.nodes is not None:
            for name, score in self.by_name().items():
                nodes[name]["score"] = score
        nodes["logits"] = {"in_graph": True}
        scores = None if self.edges is None else self.edges.tolist()
        edges = {
            name: {"score": 0.0 if scores is None else scores[row][column], "in_graph": False}
            for name, row, column in self.shape.edges()
        }
        return {"cfg": self.shape.cfg, "nodes": nodes, "edges": edges}

    def _tensors(self) -> dict[str, Any]:
        shape = self.shape
        size = len(shape.sources), len(shape.destinations)
        record: dict[str, Any] = {
            "cfg": shape.cfg,
            "src_nodes": shape.sources,
            "dst_nodes": shape.destinations,
            "edges_scores": torch.zeros(size) if self.edges is None else self.edges,
            "edges_in_graph": torch.zeros(size, dtype=torch.bool),
            "nodes_in_graph": torch.zeros(size[0], dtype=torch.bool),
        }
        if self.nodes is not None:
            record["nodes_scores"] = self.nodes
        if self.neurons is not None:
            record["neurons_in_graph"] = torch.zeros(self.neurons.shape, dtype=torch.bool)
            record["neurons_scores"] = self.neurons
        return record

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Importances:
        """Read a .json or .pt file of ours, EAP-IG's or MIB's. Raises ValueError naming path and what does not fit."""
        suffix = Path(path).suffix
        if suffix not in (".json", ".pt"):
            raise ValueError(f"path must end in .json or .pt, got {str(path)!r}")
        try:
            if suffix == ".json":
                return cls._from_record(json.loads(Path(path).read_text(encoding="utf-8")))
            return cls._from_tensors(torch.load(path, map_location="cpu", weights_only=True))
        except OSError:
            raise
        except Exception as error:  # torch.load has many ways to say that a file is none of its own
            said = repr(error) if isinstance(error, KeyError) else str(error).partition("\n")[0]
            raise ValueError(f"{path} must be an importances file of EAP-IG's: {said}") from error

    @classmethod
    def _from_record(cls, record: dict[str, Any]) -> Importances:
        shape = GraphShape.from_cfg(record["cfg"])
        given = record["nodes"]
        _check_names("nodes", [name for name in given if name != "logits"], shape.sources)
        scored = any("score" in given[name] for name in shape.sources if name in given)
        nodes = [given.get(name, {}).get("score", torch.nan) for name in shape.sources]
        places = {name: place for name, *place in shape.edges()}
        _check_names("edges", record["edges"], places)
        edges = torch.zeros(len(shape.sources), len(shape.destinations))
        if record["edges"]:
            rows, columns = zip(*(places[name] for name in record["edges"]), strict=True)
            edges[rows, columns] = torch.tensor(
                [float(edge.get("score", 0.0)) for edge in record["edges"].values()]
            )
        neurons = None
        if any("neurons_scores" in entry for entry in given.values()):
            neurons = torch.stack(
                [_row(shape, name, given.get(name, {})) for name in shape.sources]
            )
        return cls(
            shape,
            torch.tensor(nodes) if scored else None,
            neurons,
            edges if bool(edges.any()) or not (scored or neurons is not None) else None,
        )

    @classmethod
    def _from_tensors(cls, record: dict[str, Any]) -> Importances:
        shape = GraphShape.from_cfg(record["cfg"])
        for name, own in (("src_nodes", shape.sources), ("dst_nodes", shape.destinations)):
            if list(record[name]) != own:
                raise ValueError(f"{name} must be those of its cfg, got others")
        nodes, neurons = record.get("nodes_scores"), record.get("neurons_scores")
        edges = record["edges_scores"]
        none = nodes is None and neurons is None
        return cls(shape, nodes, neurons, edges if none or bool(edges.any()) else None)


def _row(shape: GraphShape, name: str, entry: dict[str, Any]) -> Tensor:
    """A node's neurons; EAP-IG's JSON holds all heads of the layer under each of them."""
    if "neurons_scores" not in entry:
        return torch.full((shape.d_model,), torch.nan)
    found = torch.tensor(entry["neurons_scores"])
    return found[int(name.partition(".h")[2])] if found.ndim == 2 else found


def _check_names(what: str, given: Any, known: Any) -> None:
    known = set(known)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(f"{what} must be those of its cfg, got {unknown[0]!r}")


def _eap_graph() -> Any:
    try:
        return importlib.import_module("eap.graph")
    except ImportError as error:
        raise ImportError(
            f"a new graph needs EAP-IG, which is not on PyPI: install github.com/hannamw/EAP-IG, or give a graph ({error})"
        ) from error


# ---- scores


def node_importances(
    found: Attribution,
    shape: GraphShape,
    *,
    scores: By = "effect",
    higher_is_better: bool | None = None,
) -> Importances:
    """Node scores of a noising run that scored z, mlp_out and resid_pre (`NODES`).

    Of each pair's effects the sum over positions, then the mean over pairs; positive where patching makes the model worse at
    the task. The options, and what raises, are those of graph_shape.source_scores.
    """
    by_position = source_scores(found, shape, scores, higher_is_better)
    return Importances(shape, nodes=by_position.sum(0))


def neuron_importances(
    engine: Engine,
    pairs: PromptPairs,
    metric: MetricLike = Question.metric,
    *,
    higher_is_better: bool | None = None,
) -> Importances:
    """Neuron scores by plain AtP: corrupted minus clean write, times the clean run's gradient, entry by entry.

    Of each pair the sum over positions, then the mean over pairs. A neuron is one of the d_model entries of a node's write;
    the entries of a node add up to its score under method "atp". QK fix and GradDrop are about whole vectors, which have no
    entries. Signs and higher_is_better as in node_importances. Raises what Engine.attribute raises for pairs, metric and
    model, NotImplementedError for a model whose heads do not go through one projection.
    """
    measure, plug = resolve(metric, pairs), engine.plug
    engine.check_pairs(pairs)
    sign = loss_sign(measure.name, higher_is_better)
    shape = GraphShape.of(engine)
    plug.space(1, NODES)
    places = node_places(plug)
    projections = []
    for layer in range(shape.n_layers):
        path, side = places["z", layer]
        if side != "input":
            raise NotImplementedError(
                f"neurons of {plug.name} are not served: its heads' outputs go through no projection in layer {layer}"
            )
        projections.append(plug.model.get_submodule(path))
    neurons = torch.zeros(
        (len(shape.sources), shape.d_model),
        dtype=accumulation_dtype(torch.empty(0, dtype=engine.plug.dtype)),
        device=plug.device,
    )
    size = len(pairs) if measure.all_pairs_at_once else _PAIRS_AT_ONCE
    with plug.plugged():
        for rows in torch.split(torch.arange(len(pairs)), size):
            runs = run_pairs(plug, pairs[rows], NODES)
            cotangent = top_cotangent(plug, runs, measure)[2]
            for number in reversed(range(shape.n_layers)):
                first = 1 + number * (shape.n_heads + 1)
                cotangent = plug.moved(cotangent, number)
                scores, cotangent = _layer(plug, runs, number, projections[number], cotangent)
                neurons[first : first + shape.n_heads + 1] += scores.to(plug.device)
            moved = corrupted_values(plug, runs, 0, ())[1]["resid_pre"] - runs.clean[0]
            neurons[0] += _products(runs, moved, cotangent).to(plug.device)
    return Importances(shape, neurons=sign * neurons / len(pairs))


def _layer(
    plug: Plug, runs: PairRuns, number: int, projection: torch.nn.Module, cotangent: Tensor
) -> tuple[Tensor, Tensor]:
    """One layer's scores, (heads + 1, d_model), heads first, and the cotangent (pairs, positions, hidden) of its input."""
    writes: list[Tensor] = []
    hook = projection.register_forward_hook(lambda *call: writes.append(call[2]))
    kinds = ("z", "mlp_out")
    try:
        tape = taped(plug, runs, number, kinds)
    finally:
        hook.remove()
    run, values = tape.run, tape.values
    assert run.q is not None and run.k is not None and run.v is not None and run.z is not None
    assert run.stats is not None and run.options is not None
    corrupted = corrupted_values(plug, runs, number, kinds)[1]
    wanted = [run.z, writes[0], values["mlp_out"], tape.x]
    grad_z, grad_write, grad_mlp, skip = tape.from_output(cotangent[None], wanted)
    grad_q, grad_k, grad_v = run.options.attention_vjp(
        run.q.detach(),
        run.k.detach(),
        run.v.detach(),
        stats=run.stats,
        grad_z=grad_z.to(run.q.dtype),
        backend=plug.backend,
    )

    heads, dim = run.z.shape[1], run.z.shape[3]
    live, wide = runs.live.to(tape.x.device), accumulation_dtype(tape.x)
    delta = (corrupted["z"] - run.z.detach()) * live[:, None, :, None]
    grad = grad_write[0].reshape(*live.shape, -1)
    moments = torch.einsum("bhte,btd->hed", delta.to(wide), grad.to(wide))
    with torch.no_grad():  # the projection's matrix, whatever module holds it
        one = torch.eye(heads * dim, dtype=run.z.dtype, device=run.z.device)
        matrix = projection(one) - projection(torch.zeros_like(one))
    by_head = (moments * matrix.view(heads, dim, -1)).sum(1)
    by_mlp = _products(runs, corrupted["mlp_out"] - values["mlp_out"].detach(), grad_mlp[0])
    own = slice(runs.start, None)  # not a shared prefix's
    by_kind = {"q": grad_q, "k": grad_k[..., own, :], "v": grad_v[..., own, :]}
    below = tape.from_attention(by_kind, skip)[0]  # last: skip may be grad_mlp, and is added to
    return torch.cat([by_head, by_mlp[None]]), below


def _products(runs: PairRuns, moved: Tensor, grad: Tensor) -> Tensor:
    """Sums over live positions of moved * grad, both (pairs, positions, hidden), entry by entry."""
    products = moved * runs.live.to(moved.device)[..., None] * grad
    return products.sum((0, 1), dtype=accumulation_dtype(moved))
