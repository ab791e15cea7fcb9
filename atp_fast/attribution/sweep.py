"""AtP, QK fix, GradDrop and AtP* in one sweep over the layers from the top (docs/algorithms.md, section 4).

Going down, layer m carries the ordinary cotangent and one per dropped layer above it through the same layer with
the same clean activations, as one batched vector-Jacobian product; below it one more joins, the ordinary cotangent
having skipped the layer. The layer is cut at its attention: autograd takes the cotangents from the layer's output to
z, one op takes them through the attention with every QK-fixed effect, and autograd takes them from q, k, v to the input.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from atp_fast import ops
from atp_fast.attribution.batch import Batch, enter_pairs, sweep_extent
from atp_fast.attribution.features import FeatureEffects
from atp_fast.attribution.memory import SweepPlan, SweepSize
from atp_fast.attribution.question import Method
from atp_fast.attribution.runs import (
    PairRuns,
    both_logits,
    check_outputs,
    corrupted_values,
    run_batch,
    taped,
)
from atp_fast.attribution.scores import Place, Scores
from atp_fast.hf import Plug
from atp_fast.metrics import Metric, check_rows
from atp_fast.nodes import ATTENTION_KINDS
from atp_fast.prompts.pairs import PromptPairs

_NOTHING = nullcontext()


class SweepState(NamedTuple):
    """A batch's sweep behind its forwards: what every layer's part needs.

    place: where its effects belong among the scores; spans: which positions each span sums, as Batch has them.
    """

    plug: Plug
    runs: PairRuns
    plan: SweepPlan
    scores: Scores
    place: Place
    spans: Tensor | None


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
    batch = enter_pairs(plug, pairs, *sweep_extent(plug, pairs))
    return sweep_batch(plug, batch, metric, plan, scores, rows=rows, advance=advance)


def sweep_batch(
    plug: Plug,
    batch: Batch,
    metric: Metric,
    plan: SweepPlan,
    scores: Scores,
    *,
    rows: Tensor,
    advance: Callable[[], object] = lambda: None,
    watched: AbstractContextManager[object] = _NOTHING,
    release: Callable[[], bool] = lambda: False,
) -> tuple[Tensor, Tensor]:
    """`sweep` of a batch that is at the first layer: both runs, the metric, and the layers from the top.

    watched: entered around the parts that attribution.replay may record; release: called when memory runs out, whether it made
    room.
    """
    while True:
        try:
            with watched:
                runs = run_forwards(plug, batch, plan, scores)
            break
        except torch.OutOfMemoryError:
            if not release():
                raise
    check_outputs(plug, batch, runs)
    clean_value, corrupted_value, cotangent = top_cotangent(plug, runs, metric)
    place = batch.place(rows, scores.space.positions)
    state = SweepState(plug, runs, plan, scores, place, batch.spans)
    cotangents, chunk = cotangent[None], plan.chunk
    if batch.any_live:
        add_behind(state, cotangents)
    for number in reversed(range(len(plug.layers))):
        if batch.any_live:
            cotangents, chunk = try_layer(state, number, cotangents, chunk, watched, release)
        advance()
    return clean_value, corrupted_value


def try_layer(
    state: SweepState,
    number: int,
    cotangents: Tensor,
    chunk: int,
    watched: AbstractContextManager[object] = _NOTHING,
    release: Callable[[], bool] = lambda: False,
) -> tuple[Tensor, int]:
    """sweep_layer with as many cotangents per chunk as memory is there for, `chunk` at most; also how many those were."""
    added: dict[str, int] = {}
    while True:
        try:
            with watched:
                return sweep_layer(state, number, cotangents, chunk, added), chunk
        except torch.OutOfMemoryError as error:
            # the others are in the middle of this layer
            if (group := state.plug.shares.group) is not None:
                raise torch.OutOfMemoryError(
                    f"out of memory in layer {number} in process {group.rank} of the {group.size} that share the "
                    "model: give a smaller memory_budget"
                ) from error
            if release():
                continue
            taken = min(chunk, len(cotangents))
            if taken == 1:
                raise
            chunk = (taken + 1) // 2
            warnings.warn(
                f"out of memory in layer {number}: trying again with {chunk} cotangents at once",
                stacklevel=3,
            )


def key_fixed(method: Method, kinds: Sequence[str]) -> bool:
    """Whether queries or keys are scored with the softmax recomputed."""
    return method.qk_fix and bool({"q", "k"} & set(kinds))


def sweep_size(
    plug: Plug,
    pairs: PromptPairs,
    metric: Metric,
    method: Method,
    kinds: tuple[str, ...],
    precision: str | None,
) -> SweepSize:
    """What a sweep of pairs has to do."""
    start, positions = sweep_extent(plug, pairs)
    return SweepSize(
        positions=positions,
        prefix=start,
        cotangents=len(plug.layers) + 1 if method.graddrop else 1,
        kinds=kinds,
        logits=metric.columns(pairs),
        precision=precision,
        spans=0 if pairs.spans is None else pairs.width,
        statistics=key_fixed(method, kinds),
    )


def run_forwards(plug: Plug, batch: Batch, plan: SweepPlan, scores: Scores) -> PairRuns:
    """Both prompts' runs, as a sweep with this plan for these scores needs them."""
    kinds = scores.space.kinds
    fixed = key_fixed(scores.method, kinds)
    return run_batch(plug, batch, kinds, plan=plan, statistics=fixed)


def sweep_layer(
    state: SweepState, number: int, cotangents: Tensor, chunk: int, added: dict[str, int]
) -> Tensor:
    """Add a layer's effects to the scores; returns the cotangents of its input. Its tape is gone then.

    Below the lowest layer that has nodes, nothing is done.
    """
    plug = state.plug
    if number < plug.lowest(state.scores.space.kinds):
        return cotangents
    layer = _Layer(state, number, added)
    return layer.sweep(plug.moved(cotangents, number), chunk)


def add_behind(state: SweepState, cotangents: Tensor) -> None:
    """Add the effects of the dictionaries behind the last layer."""
    plug, runs, plan, scores, place, spans = state
    behind = len(plug.layers), "resid_pre"
    device = cotangents.device
    place, spans = place.to(device), None if spans is None else spans.to(device)
    features = FeatureEffects(plug, scores, plan, place, spans)
    if features.stand_at(*behind):
        corrupted = runs.aligned(plug, behind[0], {"resid_pre": runs.corrupted[-1]})["resid_pre"]
        features.add(behind, cotangents, 0, runs.clean[-1], corrupted, 1, {})


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
        gradient = torch.autograd.grad(value.sum(), last)[0].contiguous()
    return value.detach(), metric(corrupted, runs.given, source), gradient


class _Layer:
    """One layer's part of the sweep: effects of its nodes, and the cotangents of its input."""

    def __init__(self, state: SweepState, number: int, added: dict[str, int]) -> None:
        """added: by kind, the cotangents whose effects are in the scores."""
        plug, runs, plan, scores, place, spans = state
        self.plug, self.scores, self.number = plug, scores, number
        device, self.added = plug.device_of(number), added
        self.place, self.spans = place.to(device), None if spans is None else spans.to(device)
        self.features = FeatureEffects(plug, scores, plan, self.place, self.spans)
        self.kinds, self.method = scores.space.kinds, scores.method
        self.start, self.prefix = runs.start, runs.prefixes[number]
        self.skip = plug.layers[number].skip
        kept = runs.tapes.pop(number, None)
        if kept is None:
            shown = plug.visited(self.kinds)
            tape = taped(plug, runs, number, shown, plan.precision)
            kept = tape, corrupted_values(plug, runs, number, shown)[1]
        self.tape, self.corrupted = kept

    def sweep(self, cotangents: Tensor, chunk: int) -> Tensor:
        """Take all cotangents (C, pairs, positions, hidden) through the layer, `chunk` at a time.

        Returns those of its input; the layer's effects are added to the scores. With GradDrop there is one more, as which
        the ordinary cotangent skips this dropped layer.
        """
        self.chunk = chunk
        below = self.number > 0 or self._looked_at("resid_pre")
        inputs: list[Tensor] | None = [] if below else None
        for i in range(0, len(cotangents), chunk):
            self._through(cotangents[i : i + chunk], i, inputs)
        if inputs is None:
            return cotangents
        if self.method.graddrop:
            inputs.append(cotangents[:1] * self.skip if self.skip != 1 else cotangents[:1])
        joined = inputs[0] if len(inputs) == 1 else torch.cat(inputs)
        self._first_order("resid_pre", joined, 0)
        return joined

    def _looked_at(self, kind: str) -> bool:
        """Whether the kind is scored here, or a dictionary stands where it has its values."""
        return kind in self.kinds or self.features.stand_at(self.number, kind)

    def _through(self, cotangents: Tensor, first: int, inputs: list[Tensor] | None) -> None:
        """A chunk of cotangents, the first of which is number `first`; those of the layer's input join `inputs`."""
        tape, run = self.tape, self.tape.run
        inner = [
            k for k in ("neuron", "attn_out", "mlp_out") if self._looked_at(k) and k in tape.values
        ]
        ends = [] if inputs is None else [tape.x]
        if run.q is None or run.z is None:  # a layer without attention
            wanted = [*(tape.values[kind] for kind in inner), *ends]
            grads = tape.from_output(cotangents, wanted) if wanted else []
            for kind, grad in zip(inner, grads, strict=False):
                self._first_order(kind, grad, first)
            if inputs is not None:
                inputs.append(grads[-1])
            return
        wanted = [run.z, *(tape.values[kind] for kind in inner), *ends]
        grad_z, *grads = tape.from_output(cotangents, wanted)
        for kind, grad in zip(inner, grads, strict=False):
            self._first_order(kind, grad, first)
        self._first_order("z", grad_z, first)
        if inputs is None and not {"q", "k", "v"} & set(self.kinds):
            return
        grad_q, grad_k, grad_v = self._through_attention(grad_z.to(run.q.dtype), first)
        if "v" in self.kinds:
            self._first_order("v", grad_v[..., self.start :, :], first)
        if inputs is not None:
            own = slice(self.start, None)
            by_kind = {"q": grad_q, "k": grad_k[..., own, :], "v": grad_v[..., own, :]}
            inputs.append(tape.from_attention(by_kind, grads[-1]))

    def _through_attention(self, grad_z: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        options, backend = self.tape.run.options, self.plug.backend
        assert options is not None
        q, k, v, stats = self.tape.attention()
        if not key_fixed(self.method, self.kinds):
            grads = options.attention_vjp(q, k, v, stats=stats, grad_z=grad_z, backend=backend)
            if "q" in self.kinds:
                self._first_order("q", grads[0], first)
            if "k" in self.kinds:
                self._first_order("k", grads[1][..., self.start :, :], first)
            return grads
        k_corrupted = self.corrupted["k"]
        if self.prefix is not None:
            k_corrupted = torch.cat([self.prefix.k, k_corrupted], 2)
        found = options.attention_vjp_effects(
            q,
            k,
            v,
            q_corrupted=self.corrupted["q"],
            k_corrupted=k_corrupted,
            stats=stats,
            grad_z=grad_z,
            backend=backend,
        )
        if "q" in self.kinds:
            self._given("q", found.effect_q, first)
        if "k" in self.kinds:
            self._given("k", found.effect_k[:, :, self.start :], first)
        return found.grad_q, found.grad_k, found.grad_v

    def _first_order(self, kind: str, grad: Tensor, first: int) -> None:
        """Effects (corrupted - clean) . grad under cotangents `first`..., grad (C, *shape of the kind's values), of the kind
        and of the dictionaries that stand there, as far as they are scored."""
        if not self._looked_at(kind):
            return
        clean, corrupted = self.tape.clean(kind), self.corrupted[kind]
        self.features.add(
            (self.number, kind), grad, first, clean, corrupted, self.chunk, self.added
        )
        grad, first = self._new(kind, grad, first)
        if kind not in self.kinds or len(grad) == 0:
            return
        if self.spans is None:
            self._add(kind, first, grad, (clean, corrupted))
            return
        delta, grad = corrupted - clean, grad.to(clean.dtype)
        if kind == "neuron":  # each neuron is a node of its own
            delta, grad = delta[..., None], grad[..., None]
        effects = ops.node_effects(delta, grad, backend=self.plug.backend)
        self._add_spans(kind, first, _rows_first(kind, effects), self.spans)

    def _given(self, kind: str, effects: Tensor, first: int) -> None:
        """Signed effects (C, pairs, positions, width) under cotangents `first`..."""
        effects, first = self._new(kind, effects, first)
        if len(effects) == 0:
            return
        if self.spans is None:
            self._add(kind, first, effects)
        else:
            self._add_spans(kind, first, effects, self.spans)

    def _new(self, kind: str, grad: Tensor, first: int) -> tuple[Tensor, int]:
        """What is not yet in the scores, which it is after a try that ran out of memory later on."""
        known = max(self.added.get(kind, 0) - first, 0)
        return grad[known:], first + known

    def _add_spans(self, kind: str, first: int, effects: Tensor, spans: Tensor) -> None:
        live = spans.any(1)[..., None]
        self._add(kind, first, spans.to(effects.dtype) @ torch.where(live, effects, 0))

    def _add(
        self, kind: str, first: int, grad: Tensor, values: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self.scores.add(
            kind, self.number, self.place, first, grad, values, backend=self.plug.backend
        )
        self.added[kind] = first + len(grad)


def _rows_first(kind: str, effects: Tensor) -> Tensor:
    """(..., heads, positions) of a headed kind -> (..., positions, heads); writes get a width of one."""
    if kind in ATTENTION_KINDS:
        return effects.transpose(-1, -2)
    return effects if kind == "neuron" else effects[..., None]
