"""Engine: the few public verbs on a model, orchestration only."""

from __future__ import annotations

import datetime
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

from atp_fast._version import __version__
from atp_fast.attribution.memory import Budget, budget_for, plan_sweep, read_budget
from atp_fast.attribution.precision import check_precision
from atp_fast.attribution.question import Question, check_method
from atp_fast.attribution.replay import Replays
from atp_fast.attribution.scores import Scores
from atp_fast.attribution.streaming import StreamPlan, plan_stream, stream_sweeps
from atp_fast.attribution.sweep import sweep, sweep_size
from atp_fast.attribution.tape import check_walk
from atp_fast.estimates import Estimate, SweepCall, patch_estimate, sweep_estimate
from atp_fast.hf import Dictionary, Plug, read_dictionary, recording
from atp_fast.metrics import Metric, MetricLike, resolve
from atp_fast.nodes import Node, check_kinds
from atp_fast.ops.backends import backend_for, check_backend
from atp_fast.ops.reference import accumulation_dtype
from atp_fast.patching.diagnostics import MissedBound, bound_missed
from atp_fast.patching.sessions import Patching
from atp_fast.patching.subsets import NodePatcher, moving_ids
from atp_fast.prompts.directions import Direction, directed
from atp_fast.prompts.pairs import PromptPairs
from atp_fast.results import Attribution, PatchEffects
from atp_fast.results.prompts import kept_prompts


class Engine:
    """Attribution, exact patching and diagnostics on one HuggingFace causal language model.

    model: a transformers causal language model in evaluation mode; it is left as it was after every call.
    backend: "auto", "reference", "cpp" or "triton", for the attention and reduction ops;
    precision: None keeps the model's dtype; "bf16" takes cotangents through linear maps in bfloat16 with float32
    accumulation. The runs and so the metric's values stay the same bits, effects are summed in float32 and lie within
    3 % of the largest of their kind (tests/test_precision.py, three layers). On a model that itself is in bfloat16
    effects lie within 2 % of the largest of all, beside the same weights in float32 (trained tiny models);
    memory_budget: bytes, a size such as "8GiB", or "auto" (None), half of what is free, for what a call needs beside
    the model and its result; it changes how much is done at once, never the numbers beyond rounding;
    replay: by backend "triton", batches of shapes that the engine met before are swept by CUDA graphs, which give the
    same bits (docs/gpu.md); False never records one.
    Raises TypeError, ValueError or NotImplementedError, naming the model's class and the reason, for a model that is
    not in evaluation mode, cannot be intercepted, or cannot be served exactly.
    """

    @recording
    def __init__(
        self,
        model: nn.Module,
        backend: str = "auto",
        precision: str | None = None,
        memory_budget: int | str | None = None,
        replay: bool = True,
    ) -> None:
        check_backend(backend)
        if not isinstance(replay, bool):
            raise TypeError(f"replay must be True or False, got {replay!r}")
        self.precision = check_precision(precision)
        self._asked_budget = read_budget(memory_budget)
        self.plug = Plug(model, backend, self._asked_budget)
        check_walk(self.plug)
        self.model = self.plug.model
        self.backend = backend_for(torch.empty(0, device=self.plug.device), backend)
        self._replays = Replays() if replay and self.backend == "triton" else None

    @recording
    def attribute(
        self,
        pairs: PromptPairs,
        metric: MetricLike = Question.metric,
        method: str = Question.method,
        nodes: Sequence[str] = Question.nodes,
        direction: Direction = Question.direction,
        per_pair: bool = Question.per_pair,
        progress: bool | None = None,
    ) -> Attribution:
        """Score every node of the given kinds on prompt pairs (AtP*, arXiv 2403.00745).

        metric: "nll", "logit_diff", "prob_diff", "kl", or a callable (see metrics.resolve);
        method: "atp", "atp+qk", "atp+graddrop" or "atp*"; nodes: any of nodes.KINDS, and kinds of dictionaries;
        direction: "noising" runs the clean prompt and patches corrupted values in, "denoising" the reverse;
        per_pair: also keep every pair's own numbers; progress: a progress bar, by default on a terminal only.
        Returns contribution c(n) = mean over pairs of |I(n)| and the signed effect, per kind, (layers, positions, width),
        on the model's device: for neurons the way to the CPU can take longer than the run (`Attribution.cpu` goes it).
        """
        run_pairs, asked = self._asked(pairs, metric, method, nodes, direction, per_pair)
        keep = len(pairs) if per_pair else 0
        held = self.plug.shares.space(asked.space)
        scores = Scores(held, asked.method, self.plug.device, asked.dtype, keep)
        clean_value = torch.zeros(len(pairs), dtype=asked.dtype)
        corrupted_value = torch.zeros(len(pairs), dtype=asked.dtype)
        budget = self._budget()
        plan = self._plan(run_pairs, asked, budget)
        batches = self._batches(run_pairs, plan.sweep.pairs)
        began = time.perf_counter()
        if self._replays is not None and plan.held is None:
            self._replays.opened(self.plug, budget)
        total = len(batches) * len(self.plug.layers)
        with self.plug.plugged(), _bar(progress, total, f"{method} layers") as bar:
            values: Iterable[tuple[Tensor, Tensor]]
            if plan.held is None:
                run = sweep if self._replays is None else self._replays.sweep
                values = (
                    run(
                        self.plug,
                        run_pairs[rows],
                        asked.metric,
                        plan.sweep,
                        scores,
                        rows=rows.to(self.plug.device),
                        advance=bar.update,
                    )
                    for rows in batches
                )
            else:
                values = stream_sweeps(
                    self.plug, run_pairs, asked.metric, plan, scores, batches, bar.update
                )
            # on their device, so that the host does not wait between batches; copies, for a value may be a view of the logits
            found = [(clean.clone(), corrupted.clone()) for clean, corrupted in values]
        for rows, (clean, corrupted) in zip(batches, found, strict=True):
            clean_value[rows] = clean.to(clean_value)
            corrupted_value[rows] = corrupted.to(clean_value)
        scores.gather(self.plug.shares.whole, asked.space)
        seconds = time.perf_counter() - began
        _warn_of_nothing(scores, run_pairs, asked.metric)
        counts = pairs.present.sum(0).cpu()
        per_position = counts.clamp(min=1)[None, :, None].to(self.plug.device)
        return Attribution(
            contribution={kind: t.div_(per_position) for kind, t in scores.score.items()},
            effect={kind: t.div_(per_position) for kind, t in scores.effect.items()},
            per_pair=scores.per_pair,
            space=asked.space,
            counts=counts,
            tokens=run_pairs.column_tokens(),
            prompts=kept_prompts(run_pairs),
            method=method,
            metric=asked.metric.name,
            direction=direction,
            backend=self.backend,
            model=self.model_name,
            clean_value=clean_value,
            corrupted_value=corrupted_value,
            metadata=self._metadata(pairs, seconds, asked.space.kinds),
        )

    @recording
    def estimate_patch(
        self,
        pairs: PromptPairs,
        nodes: Sequence[Node],
        metric: MetricLike = Question.metric,
        direction: Direction = Question.direction,
    ) -> Estimate:
        """What `patch` would take with the same arguments, as `estimate` says it."""
        listed = list(nodes)
        kinds = self._checked_kinds(pairs, listed)
        self._check_estimated(kinds)
        self.plug.shares.check_same(nodes=listed)
        patching = self.patching(pairs, kinds, metric, direction)
        return patch_estimate(self.plug, patching, listed)

    @recording
    def estimate(
        self,
        pairs: PromptPairs,
        metric: MetricLike = Question.metric,
        method: str = Question.method,
        nodes: Sequence[str] = Question.nodes,
        direction: Direction = Question.direction,
        per_pair: bool = Question.per_pair,
    ) -> Estimate:
        """What `attribute` would take with the same arguments: seconds, and bytes on each device (`estimates.Estimate`).

        Nothing but a layer of each kind is run, on the first batch of pairs.
        """
        run_pairs, asked = self._asked(pairs, metric, method, nodes, direction, per_pair)
        self._check_estimated(asked.space.kinds)
        plan = self._plan(run_pairs, asked, self._budget())
        batches = self._batches(run_pairs, plan.sweep.pairs)
        return sweep_estimate(self.plug, run_pairs, batches, plan, asked)

    def patch(
        self,
        pairs: PromptPairs,
        nodes: Sequence[Node],
        metric: MetricLike = Question.metric,
        direction: Direction = Question.direction,
        progress: bool | None = None,
    ) -> PatchEffects:
        """Exact effect of patching each node alone: I(n) = metric(run with n patched) - metric(run).

        nodes: Node or ScoredNode, positions in the pairs' own columns, as `Attribution.top` gives them.
        Returns effect (pairs, nodes), signed; `valid` is False where a pair has no token at a node's position.
        """
        return self._patched(pairs, list(nodes), None, None, metric, direction, progress)

    def patch_subsets(
        self,
        pairs: PromptPairs,
        subsets: Sequence[Sequence[Node]],
        metric: MetricLike = Question.metric,
        direction: Direction = Question.direction,
        pair_index: Tensor | None = None,
        progress: bool | None = None,
    ) -> PatchEffects:
        """Exact effect of patching all nodes of a subset at once, for each subset.

        pair_index: (subsets,), measure subset s on pair pair_index[s] only; on every pair when None.
        Returns effect (pairs, subsets), signed, 0 for an empty subset; `valid` is False where a subset was not measured or
        the pair has no token at one of its positions.
        """
        return self._patched(pairs, None, subsets, pair_index, metric, direction, progress)

    @recording
    def bound_missed(
        self,
        pairs: PromptPairs,
        exclude: Sequence[Node] = (),
        metric: MetricLike = Question.metric,
        direction: Direction = Question.direction,
        nodes: Sequence[str] = Question.nodes,
        confidence: Sequence[float] = (0.9, 0.99, 0.999),
        forwards: int = 1000,
        probability: float = 0.03,
        seed: int = 0,
        progress: bool | None = None,
    ) -> MissedBound:
        """Upper bounds on the largest |effect| among the nodes that were not verified (see diagnostics.bound_missed).

        exclude: the verified nodes, such as `patch(...).nodes`; nodes: the kinds the bound is about. Nodes before the
        first differing token have effect 0 and are left out.
        """
        self.check_pairs(directed(pairs, direction))
        space = self.plug.space(pairs.width, check_kinds(nodes, self.plug.kinds))
        candidates = [space.node(int(flat)) for flat in moving_ids(space, pairs)]
        known = set(candidates)
        return bound_missed(
            self.patcher(pairs, candidates, metric, direction),
            exclude=[node for node in exclude if node in known],
            confidence=confidence,
            forwards=forwards,
            probability=probability,
            seed=seed,
            progress=progress,
        )

    def patcher(
        self,
        pairs: PromptPairs,
        nodes: Sequence[Node],
        metric: MetricLike = Question.metric,
        direction: Direction = Question.direction,
    ) -> NodePatcher:
        """Candidate nodes on these pairs, whose sets the baselines and the bound patch (see `patching.subsets.Patcher`)."""
        return NodePatcher(self.patching(pairs, self._kinds_of(nodes), metric, direction), nodes)

    @recording
    def patching(
        self,
        pairs: PromptPairs,
        kinds: Sequence[str],
        metric: MetricLike = Question.metric,
        direction: Direction = Question.direction,
    ) -> Patching:
        """The pairs' two runs, kept for many calls of `Patching.effects`."""
        run_pairs = directed(pairs, direction)
        self.check_pairs(pairs)
        # empty subsets alone have none
        kinds = check_kinds(kinds, self.plug.kinds) if kinds else ()
        self.plug.space(1, kinds)
        budget = self._budget()
        budget = budget._replace(bytes=max(1, budget.bytes - self._held()))
        measure = resolve(metric, run_pairs)
        self.plug.shares.check_same(**_facts(run_pairs, measure), nodes=kinds)
        return Patching(self.plug, run_pairs, measure, kinds, budget)

    @recording
    def _patched(
        self,
        pairs: PromptPairs,
        nodes: list[Node] | None,
        subsets: Sequence[Sequence[Node]] | None,
        pair_index: Tensor | None,
        metric: MetricLike,
        direction: Direction,
        progress: bool | None,
    ) -> PatchEffects:
        sets = [list(subset) for subset in subsets] if subsets is not None else None
        members = nodes if nodes is not None else [node for subset in sets or [] for node in subset]
        distinct = members if sets is None else list(dict.fromkeys(members))
        columns = len(distinct) if sets is None else len(sets)
        kinds = self._checked_kinds(pairs, distinct)
        if columns == 0:
            raise ValueError(f"{'nodes' if sets is None else 'subsets'} must not be empty, got []")
        numbers = None
        if sets is not None:
            place = {node: i for i, node in enumerate(distinct)}
            numbers = [[place[node] for node in subset] for subset in sets]
        if pair_index is not None:
            _check_pair_index(pair_index, len(sets or []), len(pairs))
        self.plug.shares.check_same(nodes=distinct, subsets=numbers, pair_index=_listed(pair_index))
        began = time.perf_counter()
        patching = self.patching(pairs, kinds, metric, direction)
        rows = columns * (len(pairs) if pair_index is None else 1)
        with _bar(progress, rows, "patched runs") as bar:
            effect, measured = patching.effects(distinct, numbers, pair_index, bar.update)
        return PatchEffects(
            effect=effect,
            clean_value=patching.clean_value,
            metric=resolve(metric, pairs).name,
            direction=direction,
            backend=self.backend,
            model=self.model_name,
            nodes=nodes,
            subsets=sets,
            valid=None if bool(measured.all()) else measured,
            tokens=directed(pairs, direction).column_tokens(),
            metadata=self._metadata(pairs, time.perf_counter() - began, kinds),
        )

    # ---- dictionaries

    @property
    def dictionaries(self) -> tuple[Dictionary, ...]:
        """Those that were added, by layer."""
        return tuple(self.plug.dictionaries)

    @recording
    def add_dictionary(
        self,
        layer: int,
        site: str,
        encode: Callable[[Tensor], Tensor] | Any,
        decode: Callable[[Tensor], Tensor] | None = None,
        *,
        name: str | None = None,
    ) -> tuple[str, str]:
        """Make a sparse autoencoder's features and its error term nodes: x = decode(f) + error, f = encode(x).

        site: where x stands, "resid_pre", "resid_post", "attn_out", "mlp_out", "neuron" or "z" (heads side by side);
        encode: values (rows, width) -> features (rows, features), each row by itself; decode: features -> values,
        differentiable; or encode: an object with both, such as one of sae-lens, and no decode;
        name: the site when None. Dictionaries of several layers may share it if they have as many features.
        Returns the kinds of its nodes, "NAME.features" and "NAME.error", for `attribute(nodes=...)` and Node. They stay with
        this engine; the model is left as it is.
        Raises TypeError, ValueError or NotImplementedError naming the argument: an unknown site or layer, one that the model
        does not have, values of another shape, device or NaN, features that depend on other rows (BatchTopK), values
        without a gradient, a transcoder, an object that was made for another place, a name that is taken.
        """
        given = read_dictionary(layer, site, encode, decode, name, self.plug.inspection.v_dim)
        return self.plug.add_dictionary(given).kinds

    def remove_dictionary(self, name: str) -> None:
        """Forget the dictionaries of a name, in all layers. Raises ValueError if there is none."""
        names = [d.name for d in self.plug.dictionaries]
        if name not in names:
            raise ValueError(
                f"name must be among {', '.join(dict.fromkeys(names)) or 'none'}, got {name!r}"
            )
        self.plug.dictionaries = [d for d in self.plug.dictionaries if d.name != name]

    # ---- plans and checks

    def _check_estimated(self, kinds: Sequence[str]) -> None:
        if asked := self.plug.asked(kinds):
            raise NotImplementedError(
                f"nodes of dictionaries have no estimate, got {asked[0].kinds[0]!r}: measure a few pairs"
            )

    def _kinds_of(self, nodes: Sequence[Node]) -> tuple[str, ...]:
        for node in nodes:
            if not isinstance(node, Node):
                raise TypeError(f"nodes must be Node(kind, layer, position, index), got {node!r}")
        return check_kinds({node.kind for node in nodes}, self.plug.kinds) if nodes else ()

    def _checked_kinds(self, pairs: PromptPairs, nodes: Sequence[Node]) -> tuple[str, ...]:
        """The kinds of nodes that can be patched on these pairs; raises ValueError where one cannot."""
        if not isinstance(pairs, PromptPairs):
            raise TypeError(f"pairs must be PromptPairs, got {type(pairs).__name__}")
        kinds = self._kinds_of(nodes)
        space = self.plug.space(pairs.width, kinds)
        for node in nodes:
            space.check(node)
        return kinds

    def _asked(
        self,
        pairs: PromptPairs,
        metric: MetricLike,
        method: str,
        nodes: Sequence[str],
        direction: Direction,
        per_pair: bool,
    ) -> tuple[PromptPairs, SweepCall]:
        """An attribution's arguments, checked: the pairs as they are run, and what is asked of them."""
        chosen = check_method(method)
        run_pairs = directed(pairs, direction)
        self.check_pairs(pairs)
        measure = resolve(metric, run_pairs)
        space = self.plug.space(pairs.width, check_kinds(nodes, self.plug.kinds))
        if chosen.graddrop and "graddrop" in self.plug.inspection.refused:
            reason = self.plug.inspection.refused["graddrop"]
            raise NotImplementedError(
                f"method {method!r} is not served on {self.plug.name}: {reason}"
            )
        self.plug.shares.check_same(
            **_facts(run_pairs, measure), method=method, nodes=space.kinds, per_pair=per_pair
        )
        dtype = accumulation_dtype(torch.empty(0, dtype=self.plug.dtype))
        return run_pairs, SweepCall(measure, chosen, space, dtype, per_pair)

    def _budget(self) -> Budget:
        return budget_for(self.plug, self._asked_budget, self._held())

    def _held(self) -> int:
        """Bytes of recorded sweeps."""
        return 0 if self._replays is None else self._replays.bytes

    def _plan(self, pairs: PromptPairs, asked: SweepCall, budget: Budget) -> StreamPlan:
        kinds = asked.space.kinds
        size = sweep_size(self.plug, pairs, asked.metric, asked.method, kinds, self.precision)
        many: dict[str, Any] = {"pairs": len(pairs), "together": asked.metric.all_pairs_at_once}
        if self.plug.offloaded:
            return plan_stream(self.plug, budget, size, **many)
        return StreamPlan(plan_sweep(self.plug, budget, size, **many))

    def _batches(self, pairs: PromptPairs, size: int) -> list[Tensor]:
        """Rows of pairs that are run together: pairs that split late share a batch, so that they share a prefix."""
        if size >= len(pairs):
            return [torch.arange(len(pairs))]
        order = torch.argsort(pairs.split, descending=True, stable=True)
        return list(torch.split(order, size))

    def check_pairs(self, pairs: PromptPairs) -> None:
        """Raises ValueError, naming the pair, where the model's context or vocabulary cannot hold a prompt."""
        context = self.plug.inspection.context
        length = torch.maximum(pairs.lengths, pairs.corrupted_lengths)
        if context is not None and int(length.max()) > context:
            raise ValueError(
                f"pairs must fit the model's context of {context} tokens, got a prompt of {int(length.max())} "
                f"in pair {int(length.argmax())}"
            )
        vocabulary = self.plug.vocabulary
        largest = torch.maximum(pairs.clean_ids, pairs.corrupted_ids).amax(1)
        if int(largest.max()) >= vocabulary:
            raise ValueError(
                f"pairs must hold token ids below the model's {vocabulary}, got {int(largest.max())} "
                f"in pair {int(largest.argmax())}"
            )

    @property
    def model_name(self) -> str:
        return getattr(self.model.config, "name_or_path", "") or self.plug.name

    def _metadata(self, pairs: PromptPairs, seconds: float, kinds: Sequence[str]) -> dict[str, str]:
        some = {} if pairs.spans is None else {"axis": "span"}
        if self.plug.shares.group is not None:
            some["tensor_parallel"] = str(self.plug.shares.group.size)
        if asked := self.plug.asked(kinds):
            some["dictionaries"] = "; ".join(
                f"{d.name}: {d.features} features at {d.site} of layer {d.layer}" for d in asked
            )
        return some | {
            "atp_fast": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "model_class": self.plug.name,
            "dtype": str(self.plug.dtype).removeprefix("torch."),
            "device": str(self.plug.device),
            "pairs": str(len(pairs)),
            "pairs_digest": pairs.digest(),
            "seconds": f"{seconds:.3f}",
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }


def _warn_of_nothing(scores: Scores, pairs: PromptPairs, metric: Metric) -> None:
    """Prompts that differ have values that differ; in a model of several layers some of every kind have an effect, but for
    features, which may be inactive, and error terms."""
    none = [
        kind
        for kind, score in scores.score.items()
        if kind not in scores.space.only and not bool(score.any())
    ]
    if none and scores.space.layers > 1 and bool((pairs.split < pairs.lengths).any()):
        warnings.warn(
            f"every effect of {', '.join(none)} is 0, although the prompts differ: metric {metric.name!r} does not depend on "
            "them (part of it detached, or saturated?), or a forward hook cuts the graph",
            stacklevel=3,
        )


def _facts(pairs: PromptPairs, metric: Metric) -> dict[str, object]:
    """What processes that share a model must be given alike; pairs that were swapped have another digest."""
    columns = tuple(pairs.starts.tolist())
    return {"pairs": (pairs.digest(), pairs.width, columns), "metric": metric.name}


def _listed(index: Tensor | None) -> list[int] | None:
    return None if index is None else index.tolist()


def _check_pair_index(pair_index: Tensor, subsets: int, pairs: int) -> None:
    if not isinstance(pair_index, Tensor):
        raise TypeError(f"pair_index must be a Tensor, got {type(pair_index).__name__}")
    if pair_index.is_floating_point() or pair_index.dtype == torch.bool:
        raise ValueError(f"pair_index must hold integers, got {pair_index.dtype}")
    if tuple(pair_index.shape) != (subsets,):
        raise ValueError(f"pair_index must have shape ({subsets},), got {tuple(pair_index.shape)}")
    if not 0 <= int(pair_index.min()) <= int(pair_index.max()) < pairs:
        raise ValueError(f"pair_index must be in [0, {pairs}), got {pair_index.tolist()[:8]}")


def _bar(progress: bool | None, total: int, what: str) -> tqdm[Any]:
    """A progress bar; without an explicit choice only on a terminal."""
    return tqdm(
        total=total, desc=what, disable=None if progress is None else not progress, leave=False
    )
