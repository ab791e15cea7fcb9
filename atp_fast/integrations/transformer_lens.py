"""TransformerLens 4: its bridged models in, scores under its hook names and its own results out.

`attribution_patch` and the `get_act_patch_*` sweeps take the library's arguments and give its values, by the engine: to
change over, import them from here. A bridge is un-bridged while the engine runs and put back after every call.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from atp_fast.engine import Engine
from atp_fast.extras import require_version
from atp_fast.integrations.opaque_metrics import LogitsMetric, of_batch, of_one_row
from atp_fast.nodes import ATTENTION_KINDS, Node
from atp_fast.patching.sessions import Patching
from atp_fast.prompts.pairs import PromptPairs
from atp_fast.results import Attribution

require_version("transformer-lens", "4.3", "5", "transformer-lens")

from transformer_lens import ActivationCache, patching  # noqa: E402
from transformer_lens.model_bridge import TransformerBridge  # noqa: E402
from transformer_lens.model_bridge.generalized_components.base import (  # noqa: E402
    GeneralizedComponent,
)
from transformer_lens.patching import (  # noqa: E402,F401  what the engine does not compute is the library's own
    PatchingResult,
    get_act_patch_attn_head_pattern_all_pos,
    get_act_patch_attn_head_pattern_by_pos,
    get_act_patch_attn_head_pattern_dest_src_pos,
    get_act_patch_resid_mid,
)
from transformer_lens.tools.analysis import attribution_patching as tool  # noqa: E402
from transformer_lens.tools.analysis.attribution_patching import (  # noqa: E402
    AttributionResult,
    EdgeAttributionConfig,
)

HOOK_NAMES = {
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "z": "attn.hook_z",
    "neuron": "mlp.hook_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "resid_pre": "hook_resid_pre",
}
"""Node kind -> hook point inside a block."""


def hook_name(kind: str, layer: int) -> str:
    """The library's hook point of a node kind, such as `blocks.3.attn.hook_q`."""
    return f"blocks.{layer}.{HOOK_NAMES[kind]}"


# ---- models


@contextlib.contextmanager
def unbridged(bridge: TransformerBridge) -> Iterator[nn.Module]:
    """The bridge's HuggingFace model without the bridge's components in it; they are back when the block ends.

    Raises TypeError for what is no TransformerBridge, ValueError for one whose weights were folded or centred.
    """
    if not isinstance(bridge, TransformerBridge):
        raise TypeError(
            f"model must be a TransformerBridge of TransformerLens 4, got {type(bridge).__name__}"
        )
    if getattr(bridge, "_weights_processed", False):
        raise ValueError(
            "model must have the weights of its HuggingFace model, this bridge's were folded or centred "
            "(enable_compatibility_mode does so unless it is given no_processing=True)"
        )
    undo: list[tuple[nn.Module, str, nn.Module | None]] = []

    def walk(module: nn.Module) -> None:
        for name, child in list(module._modules.items()):
            plain = child
            while isinstance(plain, GeneralizedComponent) and plain.original_component is not None:
                plain = plain.original_component
            if plain is not child:
                undo.append((module, name, child))
                module._modules[name] = plain
            if plain is not None:
                walk(plain)

    root = bridge.original_model
    try:
        walk(root)
        yield root
    finally:
        for module, name, child in reversed(undo):
            module._modules[name] = child


class _Kept(Engine):
    """An engine kept for the next call on the same bridge, as long as its model stays where it is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.dtype_and_device = _dtype_and_device(model)


def _dtype_and_device(model: nn.Module) -> tuple[torch.dtype, torch.device]:
    parameter = next(model.parameters())
    return parameter.dtype, parameter.device


_engines: weakref.WeakKeyDictionary[TransformerBridge, _Kept] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def engine(bridge: TransformerBridge, **options: Any) -> Iterator[Engine]:
    """An engine on the un-bridged model, for all of the engine's verbs; options: those of Engine.

    Raises what `unbridged` and Engine raise.
    """
    with unbridged(bridge) as model:
        if options:
            yield Engine(model, **options)
            return
        found = _engines.get(bridge)
        if found is None or found.dtype_and_device != _dtype_and_device(model):
            found = _engines[bridge] = _Kept(model)
        yield found


# ---- scores


def to_activation_cache(
    found: Attribution, bridge: TransformerBridge, scores: str = "effect"
) -> ActivationCache:
    """Scores under the library's hook names, in an ActivationCache without a batch axis.

    scores: "effect" (signed) or "contribution"; "per_pair" gives each pair's own, with a batch axis, as found holds them.
    Shapes: q, k, v, z (positions, heads), mlp.hook_post (positions, neurons), the others (positions,), with the batch
    axis ahead. So `cache.stack_activation("z")` is (layers, positions, heads). Grouped keys and values have their own
    number of heads. Nodes of dictionaries are left out. Raises ValueError for other scores or per_pair numbers that were not kept.
    """
    if scores not in ("effect", "contribution", "per_pair"):
        raise ValueError(f"scores must be effect, contribution or per_pair, got {scores!r}")
    tables = getattr(found, scores)
    if tables is None:
        raise ValueError("scores must have been kept (per_pair=True of attribute), these were not")
    cache = {}
    for kind, table in tables.items():
        for layer in range(0 if kind in found.space.only else found.space.layers):
            x = table.select(-3, layer)
            headed = kind in ATTENTION_KINDS or kind == "neuron"
            cache[hook_name(kind, layer)] = x if headed else x[..., 0]
    return ActivationCache(cache, bridge, has_batch_dim=scores == "per_pair")


def to_attribution_result(found: Attribution) -> AttributionResult:
    """The signed effects of the kinds that the library's result knows: heads' outputs and MLP outputs, per position.

    From z comes attn_head_out, from mlp_out mlp_out, and from layer 0 of resid_pre embed. Positive: patching raises the
    metric of the run patched into, by the direction of `found`; the library's own convention is denoising.
    """
    counted = (found.counts > 0).nonzero().flatten().tolist()
    effect = {kind: x.cpu() for kind, x in found.effect.items()}
    nodes: dict[tool.Node, float] = {}
    if "resid_pre" in effect:
        values = effect["resid_pre"][0, :, 0].tolist()
        nodes |= {tool.Node("embed", t): values[t] for t in counted}
    for layer in range(found.space.layers):  # in the library's own order
        heads = effect["z"][layer].tolist() if "z" in effect else None
        writes = effect["mlp_out"][layer, :, 0].tolist() if "mlp_out" in effect else None
        for t in counted:
            for head, value in enumerate(heads[t] if heads else ()):
                nodes[tool.Node("attn_head_out", t, layer, head)] = value
            if writes:
                nodes[tool.Node("mlp_out", t, layer)] = writes[t]
    return AttributionResult(node_scores=nodes)


def attribution_patch(
    model: TransformerBridge,
    clean: Tensor,
    corrupt: Tensor,
    metric_fn: LogitsMetric,
    config: EdgeAttributionConfig | None = None,
) -> AttributionResult:
    """As transformer_lens.tools.analysis.attribution_patching.attribution_patch, by the engine.

    clean, corrupt: token ids, (pairs, positions); metric_fn: logits (1, positions, vocab) of one prompt -> a scalar, a
    function of its argument alone. Edges (config) are left to the library. Raises what the library raises for prompts
    that do not line up, and what `unbridged` and Engine raise.
    """
    if config is not None and config.granularity != "node":
        return tool.attribution_patch(model, clean, corrupt, metric_fn, config)
    pairs = _pairs(clean, corrupt, "clean", "corrupt")
    with engine(model) as found:
        metric = of_one_row(metric_fn, clean.shape[1], _vocabulary(found.model))
        kinds = ("z", "mlp_out", "resid_pre")
        scores = found.attribute(pairs, metric, "atp", kinds, direction="denoising", progress=False)
    return to_attribution_result(scores)


# ---- exact patching


def _sweep(kind: str, all_positions: bool) -> Callable[..., Tensor | PatchingResult]:
    """The library's sweep over one kind: every layer and head (with all_positions), or layer, position (and head)."""
    headed = kind in ATTENTION_KINDS
    axes = ["layer", *([] if all_positions else ["pos"]), *(["head"] if headed else [])]

    def run(
        model: TransformerBridge,
        corrupted_tokens: Tensor,
        clean_cache: ActivationCache,
        patching_metric: LogitsMetric | Mapping[str, LogitsMetric],
        *,
        reduce: str = "scalar",
        baseline: bool = False,
        clean_tokens: Tensor | None = None,
    ) -> Tensor | PatchingResult:
        return _patched(
            model,
            corrupted_tokens,
            clean_cache,
            patching_metric,
            kind,
            axes,
            reduce,
            baseline,
            clean_tokens,
        )

    what = "head's " + {"z": "output"}.get(kind, kind) if headed else kind
    run.__doc__ = f"""Exact patching of every {what}, by the engine: [{", ".join(axes)}].

    As the sweep of that name in transformer_lens.patching: clean values are put into the corrupted run; the tensor holds
    the metric after each patch. clean_tokens: the prompts of clean_cache; found from its hook_embed when None.
    Raises ValueError where clean_cache is not that of a plain run of its prompts.
    """
    return run


def _patched(
    model: TransformerBridge,
    corrupted_tokens: Tensor,
    clean_cache: ActivationCache,
    patching_metric: LogitsMetric | Mapping[str, LogitsMetric],
    kind: str,
    axes: Sequence[str],
    reduce: str,
    baseline: bool,
    clean_tokens: Tensor | None,
) -> Tensor | PatchingResult:
    if reduce not in ("scalar", "mean", "none"):
        raise ValueError(f"reduce must be scalar, mean or none, got {reduce!r}")
    several = isinstance(patching_metric, Mapping)
    metrics: dict[str, LogitsMetric] = (
        dict(patching_metric)
        if isinstance(patching_metric, Mapping)
        else {"metric": patching_metric}
    )
    if not metrics:
        raise ValueError("patching_metric must hold at least one metric, got an empty mapping")
    with engine(model) as found:
        if clean_tokens is None:
            clean_tokens = _tokens_of(clean_cache, found.model, corrupted_tokens)
        pairs = _pairs(clean_tokens, corrupted_tokens, "clean_tokens", "corrupted_tokens")
        batch, positions = corrupted_tokens.shape
        space = found.plug.space(positions, (kind,))
        if kind in space.counts:
            raise NotImplementedError(
                f"layers with different numbers of {kind} have no table: {list(space.counts[kind])}"
            )
        width = space.widths[kind]
        nodes = [
            Node(kind, layer, position, index)
            for layer in range(space.layers)
            for position in range(positions)
            for index in range(width)
        ]
        sets = None
        if "pos" not in axes:
            sets = [
                [(layer * positions + t) * width + index for t in range(positions)]
                for layer in range(space.layers)
                for index in range(width)
            ]
        values, before = [], []
        for fn in metrics.values():
            metric = of_batch(fn, batch, positions, _vocabulary(found.model), reduce != "scalar")
            session = found.patching(pairs, (kind,), metric, "denoising")
            with found.plug.plugged():
                _check_cache(session, clean_cache, kind)
            effect, _ = session.effects(nodes, sets)
            value = session.clean_value[:, None] + effect
            if reduce == "none":
                values.append(value.T)
                before.append(session.clean_value)
            else:  # a scalar stands in every row
                values.append(value.mean(0))
                before.append(session.clean_value.mean())
    shape = [
        space.layers,
        *([positions] if "pos" in axes else []),
        *([width] if "head" in axes else []),
    ]
    device = corrupted_tokens.device
    stacked = torch.stack(values).to(device, torch.get_default_dtype())
    table = stacked.reshape(len(metrics), *shape, *([batch] if reduce == "none" else []))
    if not several and reduce != "none" and not baseline:
        return table[0]
    base = torch.stack(before).to(device, torch.get_default_dtype()) if baseline else None
    return PatchingResult(
        values=table if several else table[0],
        axis_names=list(axes),
        index_df=patching.make_df_from_ranges(shape, list(axes)),
        metric_names=list(metrics),
        reduced=reduce != "none",
        baseline=base if several or base is None else base[0],
        has_metric_axis=several,
    )


get_act_patch_resid_pre = _sweep("resid_pre", all_positions=False)
get_act_patch_attn_out = _sweep("attn_out", all_positions=False)
get_act_patch_mlp_out = _sweep("mlp_out", all_positions=False)
get_act_patch_attn_head_out_by_pos = _sweep("z", all_positions=False)
get_act_patch_attn_head_q_by_pos = _sweep("q", all_positions=False)
get_act_patch_attn_head_k_by_pos = _sweep("k", all_positions=False)
get_act_patch_attn_head_v_by_pos = _sweep("v", all_positions=False)
get_act_patch_attn_head_out_all_pos = _sweep("z", all_positions=True)
get_act_patch_attn_head_q_all_pos = _sweep("q", all_positions=True)
get_act_patch_attn_head_k_all_pos = _sweep("k", all_positions=True)
get_act_patch_attn_head_v_all_pos = _sweep("v", all_positions=True)


def _every(
    sweeps: Sequence[Callable[..., Any]], axes: Sequence[str], names: Sequence[str]
) -> Callable[..., Tensor | PatchingResult]:
    """Several sweeps stacked on a leading patch_type axis; fewer key and value heads are filled up with zeros."""

    def run(
        model: TransformerBridge,
        corrupted_tokens: Tensor,
        clean_cache: ActivationCache,
        metric: LogitsMetric | Mapping[str, LogitsMetric],
        **options: Any,
    ) -> Tensor | PatchingResult:
        given = (model, corrupted_tokens, clean_cache, metric)
        theirs = {key: value for key, value in options.items() if key != "clean_tokens"}
        found = [sweep(*given, **(theirs if sweep in _LIBRARY else options)) for sweep in sweeps]
        results = [x for x in found if isinstance(x, PatchingResult)]
        lead = int(bool(results) and results[0].has_metric_axis)
        tables = []
        for x in found:
            table = x.values if isinstance(x, PatchingResult) else x
            if x is found[-1] and sweeps[-1] is get_act_patch_attn_head_pattern_by_pos:
                table = table.transpose(lead + 1, lead + 2)  # theirs is (layer, head, position)
            tables.append(table)
        head = lead + len(axes) - 1
        if "head" in axes:
            tables = [_filled(x, head, int(model.cfg.n_heads)) for x in tables]
        stacked = torch.stack(tables, lead)
        if not results:
            return stacked
        shape = list(stacked.shape[lead : lead + 1 + len(axes)])
        return PatchingResult(
            values=stacked,
            axis_names=["patch_type", *axes],
            index_df=patching.make_df_from_ranges(shape, ["patch_type", *axes]),
            metric_names=results[0].metric_names,
            reduced=results[0].reduced,
            baseline=results[0].baseline,
            has_metric_axis=results[0].has_metric_axis,
            patch_type_names=list(names),
        )

    run.__doc__ = f"""{", ".join(names)}, stacked: [{len(names)}, {", ".join(axes)}].

    As the function of that name in transformer_lens.patching; patterns come from the library itself.
    """
    return run


_LIBRARY = (get_act_patch_attn_head_pattern_all_pos, get_act_patch_attn_head_pattern_by_pos)
get_act_patch_block_every = _every(
    (get_act_patch_resid_pre, get_act_patch_attn_out, get_act_patch_mlp_out),
    ("layer", "pos"),
    ("resid_pre", "attn_out", "mlp_out"),
)
get_act_patch_attn_head_all_pos_every = _every(
    (
        get_act_patch_attn_head_out_all_pos,
        get_act_patch_attn_head_q_all_pos,
        get_act_patch_attn_head_k_all_pos,
        get_act_patch_attn_head_v_all_pos,
        get_act_patch_attn_head_pattern_all_pos,
    ),
    ("layer", "head"),
    ("out", "q", "k", "v", "pattern"),
)
get_act_patch_attn_head_by_pos_every = _every(
    (
        get_act_patch_attn_head_out_by_pos,
        get_act_patch_attn_head_q_by_pos,
        get_act_patch_attn_head_k_by_pos,
        get_act_patch_attn_head_v_by_pos,
        get_act_patch_attn_head_pattern_by_pos,
    ),
    ("layer", "pos", "head"),
    ("out", "q", "k", "v", "pattern"),
)


# ---- inputs


def _filled(x: Tensor, axis: int, heads: int) -> Tensor:
    shape = list(x.shape)
    shape[axis] = heads - shape[axis]
    return torch.cat([x, x.new_zeros(shape)], axis) if shape[axis] else x


def _vocabulary(model: nn.Module) -> int:
    """Entries of the model's logits."""
    plain: Any = model
    head = plain.get_output_embeddings()
    return int(plain.config.vocab_size if head is None else head.weight.shape[0])


def _pairs(clean: Tensor, corrupted: Tensor, one: str, other: str) -> PromptPairs:
    """Pairs of unpadded prompts; the metric knows the answers, so that they are left open."""
    for name, x in ((one, clean), (other, corrupted)):
        if not isinstance(x, Tensor) or x.ndim != 2:
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be token ids, (pairs, positions), got {shape}")
    if clean.shape != corrupted.shape:
        raise ValueError(
            f"{one} and {other} must have the same shape, got {tuple(clean.shape)} and {tuple(corrupted.shape)}"
        )
    return PromptPairs(clean, corrupted, clean.new_zeros(len(clean)))


def _tokens_of(cache: ActivationCache, model: nn.Module, like: Tensor) -> Tensor:
    """The prompts of a cache, (batch, positions), by the rows of the embedding that stand in its hook_embed."""
    stored = cache.cache_dict
    embedded = stored.get("hook_embed", stored.get("embed.hook_out"))
    if embedded is None:
        raise ValueError("clean_cache must hold hook_embed, or clean_tokens must be given")
    embedded = embedded if embedded.ndim == 3 else embedded[None]
    plain: Any = model
    table = plain.get_input_embeddings().weight.detach()
    rows = embedded.reshape(-1, embedded.shape[-1]).to(table)
    nearest = [torch.cdist(part.float(), table.float()).argmin(1) for part in rows.split(64)]
    ids = torch.cat(nearest)
    if not torch.equal(table[ids], rows):
        raise ValueError(
            "clean_cache must hold rows of the model's embedding as hook_embed, these are others: give clean_tokens"
        )
    return ids.reshape(embedded.shape[:2]).to(like)


def _check_cache(session: Patching, cache: ActivationCache, kind: str) -> None:
    """ValueError unless the cache's values are those of the clean run, which is made again here: they would be ignored.

    Lengths of vectors are compared, which a rotation by position leaves alone.
    """
    for rows, part in zip(session.batches, session.sessions(), strict=True):
        for layer, values in enumerate(part.runs.values):
            stored = cache.cache_dict.get(hook_name(kind, layer))
            if stored is None:
                continue
            ours = values[kind].transpose(1, 2) if kind in ATTENTION_KINDS else values[kind]
            theirs = stored if stored.ndim == ours.ndim else stored[None]
            at = rows.to(theirs.device)
            length = theirs[at][:, part.runs.start :].to(ours).norm(dim=-1)
            own = ours.norm(dim=-1)
            if length.shape != own.shape or not torch.allclose(
                length, own, rtol=1e-2, atol=1e-2 * float(own.max())
            ):
                raise ValueError(
                    f"clean_cache must be that of a plain run of its prompts, {hook_name(kind, layer)} holds other "
                    "values; the library's own function patches any cache"
                )
