"""AtP, QK fix, GradDrop and AtP* in one sweep over the layers from the top (docs/algorithms.md, section 4).

Going down, layer m carries the ordinary cotangent and one per dropped layer above it through the same layer with
the same clean activations, as one batched vector-Jacobian product; below it one more joins, the ordinary cotangent
having skipped the layer. The layer is cut at its attention: autograd takes the cotangents from the layer's output to
z, one op takes them through the attention with every QK-fixed effect, and autograd takes them from q, k, v to the input.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atp_fast import ops
from atp_fast.hf import Plug
from atp_fast.metrics import Metric
from atp_fast.nodes import NodeSpace
from atp_fast.pairs import PromptPairs
from atp_fast.runs import PairRuns, both_logits, run_for_values, run_pairs
from atp_fast.tape import LayerTape, Values

HEADED = ("q", "k", "v", "z")


@dataclass(frozen=True)
class Method:
    """Which of AtP*'s two repairs are made."""

    qk_fix: bool
    graddrop: bool


METHODS = {
    "atp": Method(qk_fix=False, graddrop=False),
    "atp+qk": Method(qk_fix=True, graddrop=False),
    "atp+graddrop": Method(qk_fix=False, graddrop=True),
    "atp*": Method(qk_fix=True, graddrop=True),
}


def check_method(method: str) -> Method:
    if method not in METHODS:
        raise ValueError(f"method must be among {', '.join(METHODS)}, got {method!r}")
    return METHODS[method]


def cotangent_weights(graddrop: bool, kind: str, layer: int, layers: int) -> list[float]:
    """Weights of the |effects| under the cotangents present at a layer: ordinary first, then one per dropped layer.

    In-block nodes: [(m-1) |I| + sum_{l>m} |I_l|] / (L-1) with m = layer + 1 (their own layer's drop gives 0).
    resid_pre lies in no block: [(m-1) |I| + sum_{l>=m} |I_l|] / L. One layer alone has nothing to drop: |I|.
    """
    if not graddrop or (layers == 1 and kind != "resid_pre"):
        return [1.0]
    if kind == "resid_pre":
        return [layer / layers] + [1 / layers] * (layers - layer)
    return [layer / (layers - 1)] + [1 / (layers - 1)] * (layers - 1 - layer)


def weight_tables(
    graddrop: bool, layers: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cotangent_weights of every layer, for nodes in blocks and for resid_pre, (layers, cotangents), zeros behind."""

    def table(kind: str) -> Tensor:
        rows = [cotangent_weights(graddrop, kind, layer, layers) for layer in range(layers)]
        whole = [row + [0.0] * (layers + 1 - len(row)) for row in rows]
        return torch.tensor(whole, device=device, dtype=dtype)

    return table("z"), table("resid_pre")


class Scores:
    """Sums over pairs of |effects| and signed effects of every node, in the columns of the user's own prompts."""

    def __init__(
        self, space: NodeSpace, pairs: int, device: torch.device, dtype: torch.dtype, keep: bool
    ):
        self.space, self.dtype = space, dtype

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        self.score = {kind: zeros(*space.shape(kind)) for kind in space.kinds}
        self.effect = {kind: zeros(*space.shape(kind)) for kind in space.kinds}
        self.per_pair = (
            {kind: zeros(pairs, *space.shape(kind)) for kind in space.kinds} if keep else None
        )

    def add(
        self,
        kind: str,
        layer: int,
        score: Tensor,
        effect: Tensor,
        kept: Tensor,
        rows: Tensor,
        columns: slice | Tensor,
    ) -> None:
        """Add one layer's scores and effects, (pairs, positions, width), of the pairs `rows`.

        columns: the user's columns of these positions, if they are the same for all pairs, or else the column of each
        pair's first one, (pairs,), after whose last column positions hold zeros;
        kept: what per_pair keeps, score or effect.
        """
        if isinstance(columns, Tensor):
            score, effect, kept = (self._moved(x, columns) for x in (score, effect, kept))
            columns = slice(None)
        self.score[kind][layer, columns] += score.sum(0)
        self.effect[kind][layer, columns] += effect.sum(0)
        if self.per_pair is not None:
            self.per_pair[kind][rows, layer, columns] = kept

    def _moved(self, x: Tensor, first: Tensor) -> Tensor:
        """x (pairs, positions, width) in the user's columns: gathered, since scattering has no fixed order on CUDA."""
        source = torch.arange(self.space.positions, device=x.device) - first[:, None]
        here = (source >= 0) & (source < x.shape[1])
        index = source.clamp(0, x.shape[1] - 1)[..., None].expand(-1, -1, x.shape[2])
        return x.gather(1, index).masked_fill(~here[..., None], 0)


def top_cotangent(plug: Plug, runs: PairRuns, metric: Metric) -> tuple[Tensor, Tensor, Tensor]:
    """The metric of each pair's clean and corrupted run, (pairs,) each, and the former's gradient by the last layer's output.

    The gradient has shape (pairs, positions, hidden).
    """
    last = runs.clean[-1].detach().requires_grad_()
    with torch.enable_grad():
        clean, corrupted = both_logits(plug, runs, last, metric)
        source = corrupted if metric.needs_source_logits else None
        value = metric(clean, runs.given, source)
        gradient = torch.autograd.grad(value.sum(), last)[0]
    return value.detach(), metric(corrupted, runs.given, source), gradient


def sweep(
    plug: Plug,
    pairs: PromptPairs,
    metric: Metric,
    method: Method,
    scores: Scores,
    *,
    rows: Tensor,
    taped_from: int | None = None,
    precision: str | None = None,
    chunk: int | None = None,
    advance: Callable[[], object] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Add the scores of a batch of pairs; returns the metric of the clean and of the corrupted runs, (pairs,) each.

    rows: the pairs' numbers among all pairs of the scores; taped_from, precision: as for `runs.run_pairs`;
    chunk: cotangents taken at once (all when None), halved when memory runs out; advance: called after every layer.
    """
    runs = run_pairs(plug, pairs, scores.space.kinds, taped_from=taped_from, precision=precision)
    clean_value, corrupted_value, cotangent = top_cotangent(plug, runs, metric)
    cotangents = cotangent[None]
    live = runs.differs()
    any_live, all_live = bool(live.any()), bool(live.all())
    weights = weight_tables(method.graddrop, len(plug.layers), plug.device, scores.dtype)
    columns: slice | Tensor = runs.start + pairs.starts.to(plug.device)
    if len(first := set(pairs.starts.tolist())) == 1:
        begin = runs.start + first.pop()
        columns = slice(begin, begin + runs.positions)
    for number in reversed(range(len(plug.layers))):
        if any_live:
            while True:
                try:
                    cotangents, found = _sweep_layer(
                        plug,
                        runs,
                        number,
                        method,
                        scores.space.kinds,
                        precision,
                        weights,
                        cotangents,
                        chunk,
                    )
                    break
                except torch.OutOfMemoryError:
                    taken = min(chunk or len(cotangents), len(cotangents))
                    if taken == 1:
                        raise
                    chunk = (taken + 1) // 2
                    warnings.warn(
                        f"out of memory in layer {number}: trying again with {chunk} cotangents at once",
                        stacklevel=2,
                    )
            for kind, (score, effect) in found.items():
                if not all_live:
                    score, effect = (torch.where(live[..., None], t, 0) for t in (score, effect))
                kept = score if method.graddrop else effect
                scores.add(kind, number, score, effect, kept, rows, columns)
        advance()
    return clean_value, corrupted_value


Found = dict[str, tuple[Tensor, Tensor]]
"""kind -> score and effect, (pairs, positions, width)"""


def _sweep_layer(
    plug: Plug,
    runs: PairRuns,
    number: int,
    method: Method,
    kinds: Sequence[str],
    precision: str | None,
    weights: tuple[Tensor, Tensor],
    cotangents: Tensor,
    chunk: int | None,
) -> tuple[Tensor, Found]:
    """Cotangents of the layer's input, and its effects; the layer's tape is gone on return."""
    layer = _Layer(plug, runs, number, method, kinds, precision, weights)
    return layer.sweep(cotangents, chunk), layer.found


class _Layer:
    """One layer's part of the sweep: effects of its nodes, and the cotangents of its input."""

    def __init__(
        self,
        plug: Plug,
        runs: PairRuns,
        number: int,
        method: Method,
        kinds: Sequence[str],
        precision: str | None,
        weights: tuple[Tensor, Tensor],
    ) -> None:
        self.number, self.method, self.kinds, self.weights = number, method, kinds, weights
        self.plug, self.start = plug, runs.start
        self.prefix = runs.prefixes[number]
        kept = runs.tapes.pop(number, None)
        if kept is None:
            x, arguments = runs.clean[number], runs.arguments[number]
            tape = LayerTape(plug, number, x, arguments, self.prefix, kinds, precision)
            kept = tape, run_for_values(plug, runs, number, runs.corrupted[number], kinds)[1]
        self.tape, self.corrupted = kept
        self.deltas: Values = {}
        self.found: Found = {}

    def sweep(self, cotangents: Tensor, chunk: int | None) -> Tensor:
        """Take all cotangents (C, pairs, positions, hidden) through the layer, `chunk` at a time.

        Returns those of its input; with GradDrop one more, as which the ordinary cotangent skips this dropped layer.
        """
        below = self.number > 0 or "resid_pre" in self.kinds
        count = len(cotangents)
        size = chunk or count
        inputs = (
            self.tape.x.new_empty((count + self.method.graddrop, *cotangents.shape[1:]))
            if below
            else None
        )
        for i in range(0, count, size):
            part = slice(i, min(i + size, count))
            self._through(cotangents[part], i, None if inputs is None else inputs[part])
        if inputs is None:
            return cotangents
        inputs[count:] = cotangents[:1]
        if "resid_pre" in self.kinds:
            self._first_order("resid_pre", inputs, 0)
        return inputs

    def _through(self, cotangents: Tensor, first: int, inputs: Tensor | None) -> None:
        """A chunk of cotangents, the first of which is number `first`; those of the layer's input go into `inputs`."""
        tape, run = self.tape, self.tape.run
        assert run.q is not None and run.k is not None and run.v is not None and run.z is not None
        inner = [kind for kind in ("neuron", "attn_out", "mlp_out") if kind in self.kinds]
        wanted = [run.z, *(tape.values[kind] for kind in inner)]
        grads = tape.from_output(cotangents, wanted if inputs is None else [*wanted, tape.x])
        grad_z = grads[0]
        for kind, grad in zip(inner, grads[1:], strict=False):
            self._first_order(kind, grad, first)
        if "z" in self.kinds:
            self._first_order("z", grad_z, first)
        if inputs is None and not {"q", "k", "v"} & set(self.kinds):
            return
        grad_q, grad_k, grad_v = self._through_attention(grad_z.to(run.q.dtype), first)
        if "v" in self.kinds:
            self._first_order("v", grad_v[..., self.start :, :], first)
        if inputs is not None:
            torch.add(tape.from_attention(grad_q, grad_k, grad_v), grads[-1], out=inputs)

    def _through_attention(self, grad_z: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        run, backend = self.tape.run, self.plug.backend
        assert run.q is not None and run.k is not None and run.v is not None
        assert run.stats is not None and run.options is not None
        q, k, v = run.q.detach(), run.k.detach(), run.v.detach()
        options = run.options._asdict()
        if not (self.method.qk_fix and {"q", "k"} & set(self.kinds)):
            grads = ops.attention_vjp(
                q, k, v, stats=run.stats, grad_z=grad_z, backend=backend, **options
            )
            if "q" in self.kinds:
                self._first_order("q", grads[0], first)
            if "k" in self.kinds:
                self._first_order("k", grads[1][..., self.start :, :], first)
            return grads
        k_corrupted = self.corrupted["k"]
        if self.prefix is not None:
            k_corrupted = torch.cat([self.prefix.k, k_corrupted], 2)
        found = ops.attention_vjp_effects(
            q,
            k,
            v,
            q_corrupted=self.corrupted["q"],
            k_corrupted=k_corrupted,
            stats=run.stats,
            grad_z=grad_z,
            backend=backend,
            **options,
        )
        if "q" in self.kinds:
            self._reduce("q", found.effect_q, first)
        if "k" in self.kinds:
            self._reduce("k", found.effect_k[:, :, self.start :], first)
        return found.grad_q, found.grad_k, found.grad_v

    def _delta(self, kind: str) -> Tensor:
        """Corrupted minus clean value, computed once for all chunks of cotangents."""
        if kind not in self.deltas:
            self.deltas[kind] = self.corrupted[kind] - self.tape.values[kind].detach()
        return self.deltas[kind]

    def _weights(self, kind: str, first: int, effects: Tensor, count: int) -> Tensor:
        row = self.weights[kind == "resid_pre"][self.number, first : first + count]
        return row.to(effects.device)

    def _first_order(self, kind: str, grad: Tensor, first: int) -> None:
        """Effects delta . grad of a kind under cotangents `first`..., grad (C, *shape of the kind's values)."""
        delta, backend = self._delta(kind), self.plug.backend
        grad = grad.to(delta.dtype)
        if kind == "neuron":  # each neuron is a node of its own
            delta, grad = delta[..., None], grad[..., None]
        if len(grad) == 1:
            self._reduce(
                kind, _rows_first(kind, ops.node_effects(delta, grad, backend=backend)), first
            )
            return
        weights = self._weights(kind, first, grad, len(grad))
        score = ops.node_effects(delta, grad, weights=weights, backend=backend)
        effect = ops.node_effects(delta, grad[:1], backend=backend) if first == 0 else None
        self._add(
            kind, _rows_first(kind, score), None if effect is None else _rows_first(kind, effect)[0]
        )

    def _reduce(self, kind: str, effects: Tensor, first: int) -> None:
        """Signed effects (C, pairs, positions, width) -> score; the one place where cotangents become a score."""
        weights = self._weights(kind, first, effects, len(effects))
        if len(effects) == 1:
            score = weights * effects[0].abs()
        else:
            score = torch.tensordot(weights, effects.abs(), dims=1)
        self._add(kind, score, effects[0] if first == 0 else None)

    def _add(self, kind: str, score: Tensor, effect: Tensor | None) -> None:
        if effect is not None:
            self.found[kind] = (score, effect)
        else:
            before, signed = self.found[kind]
            self.found[kind] = (before + score, signed)


def _rows_first(kind: str, effects: Tensor) -> Tensor:
    """(..., heads, positions) of a headed kind -> (..., positions, heads); writes get a width of one."""
    if kind in HEADED:
        return effects.transpose(-1, -2)
    return effects if kind == "neuron" else effects[..., None]
