"""AtP, QK fix, GradDrop and AtP* in one sweep over the layers from the top (docs/algorithms.md, section 4).

Going down, layer m carries the ordinary cotangent and one per dropped layer above it through the same layer with
the same clean activations, as one batched vector-Jacobian product; below it one more joins, the ordinary cotangent
having skipped the layer. The layer is cut at its attention: autograd takes the cotangents from the layer's output to
z, one op takes them through the attention with every QK-fixed effect, and autograd takes them from q, k, v to the input.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from atp_fast import ops
from atp_fast.attribution.memory import SweepPlan
from atp_fast.attribution.runs import PairRuns, both_logits, corrupted_values, run_pairs
from atp_fast.attribution.scores import Found, Place, Scores
from atp_fast.attribution.tape import LayerTape, Values
from atp_fast.hf import Plug
from atp_fast.metrics import Metric, check_rows
from atp_fast.nodes import ATTENTION_KINDS
from atp_fast.prompts.pairs import PromptPairs


def sweep(
    plug: Plug,
    pairs: PromptPairs,
    metric: Metric,
    plan: SweepPlan,
    scores: Scores,
    *,
    rows: Tensor,
    advance: Callable[[], object] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Add the scores of a batch of pairs; returns the metric of the clean and of the corrupted runs, (pairs,) each.

    rows: the pairs' numbers among all pairs of the scores; advance: called after every layer.
    The plan's cotangents per chunk are halved when memory runs out.
    """
    kinds = scores.space.kinds
    runs = run_pairs(plug, pairs, kinds, plan=plan)
    clean_value, corrupted_value, cotangent = top_cotangent(plug, runs, metric)
    cotangents = cotangent[None]
    live = runs.differs()
    any_live, all_live = bool(live.any()), bool(live.all())
    starts = runs.start + pairs.starts.to(plug.device)
    spans = runs.spans()
    if spans is None:
        place = Place.of(rows, starts, runs.positions, None if all_live else live)
    else:
        place = Place(rows, slice(None), None)
    chunk = plan.chunk
    for number in reversed(range(len(plug.layers))):
        if any_live:
            while True:
                try:
                    # the layer's tape is gone when this returns
                    cotangents, found = _Layer(plug, runs, plan, scores, number, spans).sweep(
                        cotangents, chunk
                    )
                    break
                except torch.OutOfMemoryError:
                    taken = min(chunk, len(cotangents))
                    if taken == 1:
                        raise
                    chunk = (taken + 1) // 2
                    warnings.warn(
                        f"out of memory in layer {number}: trying again with {chunk} cotangents at once",
                        stacklevel=2,
                    )
            scores.add(number, found, place)
        advance()
    return clean_value, corrupted_value


def top_cotangent(plug: Plug, runs: PairRuns, metric: Metric) -> tuple[Tensor, Tensor, Tensor]:
    """The metric of each pair's clean and corrupted run, (pairs,) each, and the former's gradient by the last layer's output.

    The gradient has shape (pairs, positions, hidden).
    """
    last = runs.clean[-1].detach().requires_grad_()
    with torch.enable_grad():
        clean, corrupted = both_logits(plug, runs, last, metric)
        source = corrupted if metric.needs_source_logits else None
        value = metric(clean, runs.given, source)
        if not value.requires_grad:
            raise ValueError(
                f"metric {metric.name!r} must be differentiable in the logits, got values without a graph "
                "(a detach, item, numpy, argmax or no_grad in it?)"
            )
        check_rows(metric, value, clean)
        gradient = torch.autograd.grad(value.sum(), last)[0]
    return value.detach(), metric(corrupted, runs.given, source), gradient


class _Layer:
    """One layer's part of the sweep: effects of its nodes, and the cotangents of its input."""

    def __init__(
        self,
        plug: Plug,
        runs: PairRuns,
        plan: SweepPlan,
        scores: Scores,
        number: int,
        spans: Tensor | None,
    ) -> None:
        """spans: which positions each span sums, as PairRuns.spans gives them."""
        self.plug, self.scores, self.number, self.spans = plug, scores, number, spans
        self.kinds, self.method = scores.space.kinds, scores.method
        self.start, self.prefix = runs.start, runs.prefixes[number]
        kept = runs.tapes.pop(number, None)
        if kept is None:
            x, arguments = runs.clean[number], runs.arguments[number]
            tape = LayerTape(plug, number, x, arguments, self.prefix, self.kinds, plan.precision)
            kept = tape, corrupted_values(plug, runs, number, self.kinds)[1]
        self.tape, self.corrupted = kept
        self.deltas: Values = {}
        self.found: Found = {}

    def sweep(self, cotangents: Tensor, chunk: int) -> tuple[Tensor, Found]:
        """Take all cotangents (C, pairs, positions, hidden) through the layer, `chunk` at a time.

        Returns those of its input, and the layer's effects. With GradDrop there is one more, as which the ordinary
        cotangent skips this dropped layer.
        """
        below = self.number > 0 or "resid_pre" in self.kinds
        count = len(cotangents)
        inputs = (
            self.tape.x.new_empty((count + self.method.graddrop, *cotangents.shape[1:]))
            if below
            else None
        )
        for i in range(0, count, chunk):
            part = slice(i, min(i + chunk, count))
            self._through(cotangents[part], i, None if inputs is None else inputs[part])
        if inputs is None:
            return cotangents, self.found
        inputs[count:] = cotangents[:1]
        if "resid_pre" in self.kinds:
            self._first_order("resid_pre", inputs, 0)
        return inputs, self.found

    def _through(self, cotangents: Tensor, first: int, inputs: Tensor | None) -> None:
        """A chunk of cotangents, the first of which is number `first`; those of the layer's input go into `inputs`."""
        tape, run = self.tape, self.tape.run
        inner = [kind for kind in ("neuron", "attn_out", "mlp_out") if kind in self.kinds]
        ends = [] if inputs is None else [tape.x]
        if run.q is None or run.z is None:  # a layer without attention
            wanted = [*(tape.values[kind] for kind in inner), *ends]
            grads = tape.from_output(cotangents, wanted) if wanted else []
            for kind, grad in zip(inner, grads, strict=False):
                self._first_order(kind, grad, first)
            if inputs is not None:
                inputs.copy_(grads[-1])
            return
        wanted = [run.z, *(tape.values[kind] for kind in inner), *ends]
        grad_z, *grads = tape.from_output(cotangents, wanted)
        for kind, grad in zip(inner, grads, strict=False):
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

    def _first_order(self, kind: str, grad: Tensor, first: int) -> None:
        """Effects delta . grad of a kind under cotangents `first`..., grad (C, *shape of the kind's values)."""
        delta, backend = self._delta(kind), self.plug.backend
        grad = grad.to(delta.dtype)
        if kind == "neuron":  # each neuron is a node of its own
            delta, grad = delta[..., None], grad[..., None]
        if len(grad) == 1 or self.spans is not None:
            self._reduce(
                kind, _rows_first(kind, ops.node_effects(delta, grad, backend=backend)), first
            )
            return
        weights = self.scores.weights(kind, self.number, first, len(grad))
        score = ops.node_effects(delta, grad, weights=weights, backend=backend)
        effect = ops.node_effects(delta, grad[:1], backend=backend) if first == 0 else None
        self._add(
            kind, _rows_first(kind, score), None if effect is None else _rows_first(kind, effect)[0]
        )

    def _reduce(self, kind: str, effects: Tensor, first: int) -> None:
        """Signed effects (C, pairs, positions, width) -> score; the one place where cotangents become a score."""
        if self.spans is not None:
            live = self.spans.any(1)[..., None]
            effects = self.spans.to(effects.dtype) @ torch.where(live, effects, 0)
        weights = self.scores.weights(kind, self.number, first, len(effects))
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
    if kind in ATTENTION_KINDS:
        return effects.transpose(-1, -2)
    return effects if kind == "neuron" else effects[..., None]
