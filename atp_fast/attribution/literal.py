"""AtP* on a model, taken literally: full attention matrices and one backward pass per dropped layer.

This is what the sweep is tested against and timed against. One ordinary forward pass with hooks records every
node; the metric is differentiated once for AtP and once more for each layer whose residual write is held clean
(GradDrop); queries and keys get the QK fix from the dense formulas of ops/reference.py. It shares no code with hf/ and sweep.py, so that
an error there cannot hide here, and serves the model families of the tests only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from atp_fast import ops
from atp_fast.metrics import Metric, resolve
from atp_fast.nodes import check_kinds
from atp_fast.ops.reference import Scoring, admissible, grouped, wide
from atp_fast.prompts.pairs import PromptPairs

METHODS = ("atp", "atp+qk", "atp+graddrop", "atp*")
_NAME = "atp_literal"
_tape: ContextVar[Tape] = ContextVar("literal_tape")

Scores = dict[str, Tensor]


class _Gate(torch.autograd.Function):
    """A layer's output; backward sends the gradient into the layer, or to its input alone while it is dropped."""

    @staticmethod
    def forward(ctx: Any, before: Tensor, after: Tensor, layer: int, tape: Tape) -> Tensor:
        ctx.layer, ctx.tape = layer, tape
        return after.view_as(after)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if ctx.layer == ctx.tape.dropped:
            return grad, None, None, None
        return None, grad, None, None


class Tape:
    """The nodes of one forward pass, as they stand in its graph: kind -> one tensor per layer.

    q, k, v, z: (batch, heads, positions, dim), after RoPE and QK-norm; neuron: input of the down projection, in a mixture
    those of all experts side by side, 0 in experts that were not chosen;
    attn_out, mlp_out: what attention and MLP add to the residual stream; resid_pre: the layer's input. scoring holds
    the keyword arguments with which ops repeats each layer's attention; `dropped` is the layer whose write the
    next backward pass holds clean.
    """

    def __init__(self, layers: Sequence[nn.Module], kinds: Sequence[str]) -> None:
        self.kinds = kinds
        self.nodes: dict[str, list[Tensor]] = {kind: [] for kind in ("q", "k", "v", "z", *kinds)}
        self.scoring: list[dict[str, Any]] = []
        self.dropped: int | None = None
        self._layers = layers
        children = [child for layer in layers for child in layer.children()]
        self._child = {module: child for child in children for module in child.modules()}
        self._attention_child: nn.Module | None = None
        self._calls: list[tuple[nn.Module, Tensor, Tensor]] = []
        self._input: Tensor | None = None
        self._mixture: Tensor | None = None

    def hooks(self) -> Iterator[Any]:
        """Handles of the hooks that record the nodes that are no part of attention."""
        for number, layer in enumerate(self._layers):
            yield layer.register_forward_pre_hook(self._enter(number), with_kwargs=True)
            for module in layer.modules():
                if module in layer.children() or isinstance(module, (nn.Linear, Conv1D)):
                    yield module.register_forward_hook(self._call, with_kwargs=True)
            yield layer.register_forward_hook(self._leave(number))

    def _enter(self, number: int) -> Callable[..., Any]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            self._calls, self._attention_child, self._mixture = [], None, None
            x = _first(args, kwargs)
            if number == 0:
                x = x.detach().requires_grad_(torch.is_grad_enabled())
            self._input = x
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

        return hook

    def _call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        self._calls.append((module, _first(args, kwargs), _first((output,))))

    def _leave(self, number: int) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            assert self._input is not None
            after = _first((output,))
            self._record(layer, self._input, after)
            gated = _Gate.apply(self._input, after, number, self)  # type: ignore[no-untyped-call]
            return (gated, *output[1:]) if isinstance(output, tuple) else gated

        return hook

    def attention(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
        window: int | None,
    ) -> Tensor:
        """z of a layer's attention, every step in the dtype of q; the additive mask is the model's own."""
        heads = q.shape[1]
        scores = scale * (q @ grouped(k, heads).transpose(-1, -2))
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores + mask
        if sinks is not None:
            scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:-1], 1)], -1)
        z = scores.softmax(-1)[..., : k.shape[-2]] @ grouped(v, heads)

        allowed = mask == 0
        key_mask = allowed[:, 0].any(1)
        scoring = Scoring(scale, True, window, softcap, sinks, key_mask)
        if not torch.equal(allowed, admissible(q, k, scoring)):
            raise NotImplementedError(
                f"{type(module).__name__} attends by a mask that is not causal with a window of {window}"
            )
        self.scoring.append({name: x for name, x in scoring._asdict().items() if name != "causal"})
        self._attention_child = self._child[module]
        for kind, x in zip("qkvz", (q, k, v, z), strict=True):
            self.nodes[kind].append(x)
        return z

    def experts(self, module: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """A mixture's output, its neurons recorded: (tokens, hidden) -> the same."""
        up = "gate_up_proj" if module.has_gate else "up_proj"
        where = [torch.where(chosen == expert) for expert in range(module.num_experts)]
        parts = [_mapped(module, up, expert, x[rows]) for expert, (rows, _) in enumerate(where)]
        parts = [module._apply_gate(h) if module.has_gate else module.act_fn(h) for h in parts]
        neurons = x.new_zeros((len(x), module.num_experts, parts[0].shape[-1]))
        for expert, (rows, _) in enumerate(where):
            neurons = neurons.index_put((rows, torch.full_like(rows, expert)), parts[expert])
        self._mixture = neurons = neurons.flatten(1)
        out = torch.zeros_like(x)
        for expert, (rows, slot) in enumerate(where):
            h = neurons.view(len(x), module.num_experts, -1)[rows, expert]
            h = _mapped(module, "down_proj", expert, h)
            h = module.post_expert_norm(h) if module.has_post_expert_norm else h
            out = out.index_add(0, rows, (weights[rows, slot, None] * h).to(x.dtype))
        return out

    def _record(self, layer: nn.Module, before: Tensor, after: Tensor) -> None:
        """attn_out, mlp_out, neuron and resid_pre of a layer, from the calls that were made inside it."""
        name, attention = type(layer).__name__, self._attention_child
        if attention is None:
            raise NotImplementedError(f"{name} did not call transformers' attention interface")
        children = set(layer.children())
        steps = [call for call in self._calls if call[0] in children]
        attn_out = next(out for module, _, out in steps if module is attention)
        for _, given, out in steps:
            attn_out = out if given is attn_out else attn_out  # a norm or dropout on the write
        mlp, _, mlp_out = steps[-1]
        write = (after - before) - (attn_out + mlp_out.view_as(after))
        if write.abs().max() > torch.finfo(after.dtype).eps ** 0.5 * after.abs().max():
            raise NotImplementedError(f"{name} adds more than its attention's and MLP's outputs")
        found = {"attn_out": attn_out, "mlp_out": mlp_out, "resid_pre": before}
        if "neuron" in self.kinds and self._mixture is not None:
            found["neuron"] = self._mixture
        elif "neuron" in self.kinds:
            linear = [c for c in self._calls if isinstance(c[0], (nn.Linear, Conv1D))]
            dense = [call for call in linear if self._child[call[0]] is not attention]
            if not dense or not any(torch.equal(dense[-1][2], out) for _, _, out in steps):
                raise NotImplementedError(
                    f"neurons of {type(mlp).__name__} are no nodes: it has no dense down projection"
                )
            found["neuron"] = dense[-1][1]
        for kind in self.kinds:
            if kind in found:
                self.nodes[kind].append(found[kind])


def _mapped(module: Any, name: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    y: Tensor = x @ (weight if module.is_transposed else weight.T)
    return y + getattr(module, f"{name}_bias")[expert] if module.has_bias else y


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Tensor:
    """The hidden states among a module's arguments, or the first output."""
    given = args[0] if args else (kwargs or {})["hidden_states"]
    x: Tensor = given[0] if isinstance(given, tuple) else given
    return x


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (batch, positions, heads, dim), and no weights."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    z = _tape.get().attention(
        module, query, key, value, attention_mask, scale, softcap, s_aux, sliding_window
    )
    return z.transpose(1, 2).contiguous(), None


def _experts(module: nn.Module, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """transformers' experts interface: tokens in a row, their chosen experts and those's weights."""
    return _tape.get().experts(module, x, chosen, weights)


@contextmanager
def _prepared(model: PreTrainedModel, neurons: bool) -> Iterator[Sequence[nn.Module]]:
    """The model's layers while it runs the attention above and its parameters take no gradients.

    neurons: those of experts are recorded; else a mixture's own eager code runs (the grouped one has no float64).
    """
    ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, eager_mask)
    count = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise NotImplementedError(f"{type(model).__name__} has no list of {count} layers")
    ALL_EXPERTS_FUNCTIONS.register(_NAME, _experts)
    mixed = any(hasattr(module, "_is_expert_parallel") for module in model.modules())
    before, experts = model.config._attn_implementation, model.config._experts_implementation
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.set_attn_implementation(_NAME)
        if mixed:
            model.set_experts_implementation(_NAME if neurons else "eager")
        for parameter in trained:
            parameter.requires_grad_(False)
        yield list(lists[0])
    finally:
        model.set_attn_implementation(before)
        if mixed:
            model.set_experts_implementation(experts)
        for parameter in trained:
            parameter.requires_grad_(True)


def _forward(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    kinds: Sequence[str],
    ids: Tensor,
    mask: Tensor,
    last: Tensor | None,
) -> tuple[Tape, Tensor]:
    """One forward pass: its nodes, and the logits at each row's `last` column (all columns when None)."""
    tape = Tape(layers, kinds)
    columns, index = (0, None) if last is None else torch.unique(last, return_inverse=True)
    handles = list(tape.hooks())
    token = _tape.set(tape)
    try:
        logits: Tensor = model(
            input_ids=ids, attention_mask=mask.long(), use_cache=False, logits_to_keep=columns
        ).logits
    finally:
        _tape.reset(token)
        for handle in handles:
            handle.remove()
    if index is not None:
        if logits.shape[1] == ids.shape[1]:  # a model that does not know logits_to_keep
            index = last
        logits = logits[torch.arange(len(ids), device=ids.device), index, None]
    return tape, logits


def _own_columns(x: Tensor, pairs: PromptPairs) -> Tensor:
    """(pairs, positions, ...) moved from the right-padded layout to the pairs' own; zero on padding."""
    columns = torch.arange(pairs.clean_ids.shape[1], device=x.device)
    source = (columns - pairs.starts[:, None]).clamp(0, x.shape[1] - 1)
    moved = x[torch.arange(len(x), device=x.device)[:, None], source]
    real = pairs.attention_mask.reshape(*pairs.attention_mask.shape, *[1] * (x.ndim - 2))
    return torch.where(real, moved, torch.zeros((), dtype=x.dtype, device=x.device))


def _by_position(kind: str, x: Tensor, positions: int) -> Tensor:
    """A recorded tensor as (batch, positions, nodes, dim)."""
    if kind in ("q", "k", "v", "z"):
        return x.transpose(1, 2)
    if kind == "neuron":
        return x.reshape(-1, positions, x.shape[-1], 1)
    return x.reshape(-1, positions, 1, x.shape[-1])


def _batch_effects(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    pairs: PromptPairs,
    metric: Metric,
    kinds: Sequence[str],
    qk_fix: bool,
    graddrop: bool,
) -> tuple[Scores, Scores]:
    """Signed effects under the ordinary gradient, and GradDrop's mean of |effect| (empty without GradDrop).

    Both kind -> (pairs, layers, positions, nodes), in the pairs' own columns.
    """
    right = pairs.right_padded()
    positions = right.clean_ids.shape[1]
    last = right.last if metric.positions == "last" else None

    def run(ids: Tensor) -> tuple[Tape, Tensor]:
        tape, logits = _forward(model, layers, kinds, ids, right.attention_mask, last)
        return tape, logits if last is not None else _own_columns(logits, pairs)

    def by_span(effect: Tensor) -> Tensor:
        """(..., pairs, positions, nodes) summed over the positions of each span, if there are spans."""
        if right.spans is None:
            return effect
        return torch.einsum("pst,...ptn->...psn", right.spans.members(positions).to(effect), effect)

    with torch.no_grad():
        corrupted, source_logits = run(right.corrupted_ids)
    clean, logits = run(right.clean_ids)
    value = metric(logits, pairs, source_logits if metric.needs_source_logits else None).sum()

    fixed = [kind for kind in kinds if qk_fix and kind in ("q", "k")]
    linear = [kind for kind in kinds if kind not in fixed]
    deltas: dict[tuple[str, int], Tensor] = {}
    leaves: list[Tensor] = []
    for kind in linear:
        for layer, node in enumerate(clean.nodes[kind]):
            change = wide(corrupted.nodes[kind][layer]) - wide(node.detach())
            deltas[kind, layer] = _by_position(kind, change, positions)
            leaves.append(node)
    leaves += clean.nodes["z"] if fixed else []
    signed: dict[tuple[str, int], Tensor] = {}
    absolute: dict[tuple[str, int], Tensor] = {}
    grad_z: list[Sequence[Tensor]] = []
    for dropped in (None, *range(len(layers))) if graddrop else (None,):
        clean.dropped = dropped
        grads = torch.autograd.grad(value, leaves, retain_graph=True, materialize_grads=True)
        for (key, delta), grad in zip(deltas.items(), grads[: len(deltas)], strict=True):
            effect = by_span((delta * _by_position(key[0], grad, positions)).sum(-1))
            if dropped is None:
                signed[key] = effect
            else:
                absolute[key] = absolute.get(key, 0) + effect.abs()
        grad_z.append(grads[len(deltas) :])

    for layer in range(len(layers)) if fixed else ():
        z_grads = torch.stack([grads[layer] for grads in grad_z])
        q, k, v = (clean.nodes[kind][layer].detach() for kind in "qkv")
        options = {**clean.scoring[layer], "grad_z": z_grads, "backend": "reference"}
        for kind in fixed:
            other = corrupted.nodes[kind][layer]
            if kind == "q":
                effects = ops.query_patch_effects(q, k, v, q_corrupted=other, **options)
            else:
                effects = ops.key_patch_effects(q, k, v, k_corrupted=other, **options)
            effects = by_span(effects)
            signed[kind, layer] = effects[0]
            absolute[kind, layer] = effects[1:].abs().sum(0)

    def stacked(scores: Mapping[tuple[str, int], Tensor]) -> Scores:
        found = {}
        for kind in kinds:
            of_layers = [scores[kind, layer] for layer in range(len(layers))]
            width = max(x.shape[-1] for x in of_layers)  # a layer with fewer nodes has zeros
            of_layers = [F.pad(x, (0, width - x.shape[-1])) for x in of_layers]
            x = torch.stack(of_layers, 2)
            found[kind] = (x if pairs.spans is not None else _own_columns(x, pairs)).transpose(1, 2)
        return found

    if not graddrop:
        return stacked(signed), {}
    if len(layers) == 1:  # nothing else to drop: nodes in the block keep |I|
        absolute = {
            key: absolute[key] if key[0] == "resid_pre" else signed[key].abs() for key in signed
        }
    means = {
        kind: total / (len(layers) if kind == "resid_pre" else max(len(layers) - 1, 1))
        for kind, total in stacked(absolute).items()
    }
    return stacked(signed), means


def literal_attribution(
    model: PreTrainedModel,
    pairs: PromptPairs,
    metric: str | Callable[..., Tensor] | Metric = "logit_diff",
    method: str = "atp*",
    nodes: Sequence[str] = ("q", "k", "v", "z", "neuron"),
    direction: str = "noising",
    batch_size: int | None = None,
) -> tuple[Scores, Scores, Scores]:
    """(contribution, effect, per_pair) of every node, by the definitions.

    contribution: mean over pairs of |I|, or of GradDrop's mean of |I|; effect: mean over pairs of the signed I under
    the ordinary gradient; both kind -> (layers, positions, nodes), means over the pairs with a token there.
    per_pair: kind -> (pairs, layers, positions, nodes), signed for atp and atp+qk, GradDrop's mean of |I| else.
    In float32, or float64 for float64 models. batch_size: pairs per batch, all at once when None.

    Raises ValueError for an unknown method, kind or direction and for a model in training mode, NotImplementedError
    for a model whose layers it does not understand (naming the class).
    """
    kinds = check_kinds(nodes)
    if method not in METHODS:
        raise ValueError(f"method must be among {', '.join(METHODS)}, got {method!r}")
    if direction not in ("noising", "denoising"):
        raise ValueError(f"direction must be noising or denoising, got {direction!r}")
    if model.training:
        raise ValueError("model must be in evaluation mode, got training mode; call model.eval()")
    pairs = (pairs.swapped() if direction == "denoising" else pairs).to(model.device)
    if pairs.spans is not None and not torch.equal(pairs.spans.clean, pairs.spans.corrupted):
        raise NotImplementedError(
            "the literal code takes spans that stand at the same positions in both prompts, these do not"
        )
    chosen = resolve(metric, pairs)
    size = len(pairs) if batch_size is None else batch_size
    if chosen.all_pairs_at_once and size < len(pairs):
        raise ValueError(
            f"batch_size must be at least {len(pairs)} for a metric of all pairs at once, got {size}"
        )

    graddrop = method in ("atp+graddrop", "atp*")
    results = []
    with _prepared(model, "neuron" in kinds) as layers, torch.enable_grad():
        for start in range(0, len(pairs), size):
            batch = pairs[start : start + size]
            qk_fix = method in ("atp+qk", "atp*")
            results.append(_batch_effects(model, layers, batch, chosen, kinds, qk_fix, graddrop))
    signed = {kind: torch.cat([result[0][kind] for result in results]) for kind in kinds}
    per_pair = signed
    if graddrop:
        per_pair = {kind: torch.cat([result[1][kind] for result in results]) for kind in kinds}
    counts = pairs.present.sum(0).clamp(min=1)[:, None]
    contribution = {kind: x.abs().sum(0) / counts for kind, x in per_pair.items()}
    effect = {kind: x.sum(0) / counts for kind, x in signed.items()}
    return contribution, effect, per_pair
