"""The matrix op x backend x dtype x shape: cases, truth and tolerances shared by every backend's tests.

Truth is the reference in float64 on inputs already rounded to the dtype. A kernel's error may be twice that of
the same-dtype reference plus FEW eps x scale per element, where the scale is a first-order error bound: a logit
is uncertain by eps times the sum of its absolute products, a weight p by p times that (and by the smallest
normal number: underflow to 0 is no error), and so on to the output (`magnitudes`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import zlib
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from atp_fast import ops
from atp_fast.ops import reference
from atp_fast.ops.reference import AttentionStats, Scoring

FEW = 4
DTYPES = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f64": torch.float64,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and options of one attention call; `layout` says how its tensors lie in memory.

    key_mask: None, "padding" (the last keys of every second row), "left" (the first keys of it) or "all"
    (every key of the first batch row). layout: "contiguous", "transposed" (positions before heads), "sliced"
    (every second element of the last axis), "expanded" (stride 0 over the batch; grad_z and the sinks over everything).
    key_mask and sinks lie likewise.
    spread: standard deviation of the logits. shift: that of the corrupted ones around the clean ones.
    """

    name: str
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    queries: int = 17
    keys: int = 17
    head_dim: int = 16
    value_dim: int | None = None
    cotangents: int = 2
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    key_mask: str | None = None
    scale: float | None = None
    layout: str = "contiguous"
    spread: float = 1.5
    shift: float = 1.0


CASES = [
    Case("T1", queries=1, keys=1),
    Case("T2", queries=2, keys=2, batch=2),
    *(Case(f"T{t}", queries=t, keys=t, head_dim=64) for t in (15, 16, 31, 32, 63, 64, 65, 67, 129)),
    Case(
        "T150-B2-H3", batch=2, heads=3, kv_heads=3, queries=150, keys=150, head_dim=32, cotangents=3
    ),
    Case("prefix", queries=9, keys=83, head_dim=32),
    Case("prefix-block", queries=70, keys=134, head_dim=32),
    Case("one-query", queries=1, keys=77, head_dim=64),
    Case("gqa", heads=6, kv_heads=2, queries=40, keys=40, head_dim=24),
    Case("mqa", heads=5, kv_heads=1, batch=2, queries=70, keys=70, head_dim=32),
    *(
        Case(f"D{d}", heads=1, kv_heads=1, queries=21, keys=21, head_dim=d)
        for d in (8, 20, 33, 80, 96, 128, 256)
    ),
    *(Case(f"D{d}-T70", queries=70, keys=70, head_dim=d) for d in (8, 16)),
    Case("Dv40", queries=33, keys=33, head_dim=24, value_dim=40),
    Case("Dv8", queries=33, keys=33, head_dim=40, value_dim=8),
    Case("full", queries=35, keys=70, head_dim=32, causal=False),
    Case("window1", queries=70, keys=70, window=1),
    Case("window5", queries=70, keys=75, window=5, head_dim=32),
    Case("window70", queries=150, keys=150, window=70, head_dim=32),
    Case("window-full", queries=70, keys=80, window=9, causal=False),
    # windows that end at, before and behind the edges of tiles of 16, 32 and 64
    *(
        Case(f"window{w}-T{t}", queries=t, keys=t, window=w)
        for t, w in ((129, 2), (200, 66), (128, 64), (130, 65), (97, 33), (66, 63), (49, 17))
    ),
    Case("window-prefix", queries=65, keys=193, window=64),
    Case("softcap", queries=67, keys=67, softcap=3.0, head_dim=32),
    Case("sinks", queries=67, keys=67, sinks=True, head_dim=32),
    Case("scale", queries=30, keys=30, scale=0.37),
    Case("padding", batch=3, queries=70, keys=70, key_mask="padding", head_dim=32),
    Case("left", batch=3, queries=70, keys=70, key_mask="left", head_dim=32),
    Case("masked", batch=2, queries=20, keys=20, key_mask="all"),
    Case("masked-sinks", batch=2, queries=20, keys=20, key_mask="all", sinks=True),
    Case(
        "everything",
        batch=2,
        heads=4,
        kv_heads=2,
        queries=70,
        keys=100,
        head_dim=48,
        value_dim=40,
        window=33,
        softcap=5.0,
        sinks=True,
        key_mask="left",
        layout="transposed",
    ),
    Case(
        "transposed",
        batch=2,
        heads=4,
        kv_heads=2,
        queries=66,
        keys=66,
        head_dim=32,
        layout="transposed",
    ),
    Case("sliced", batch=2, queries=33, keys=40, head_dim=20, layout="sliced"),
    Case("expanded", batch=2, queries=33, keys=33, head_dim=20, layout="expanded"),
    *(
        Case(
            f"side-{layout}",
            batch=3,
            heads=4,
            kv_heads=2,
            queries=37,
            keys=37,
            sinks=True,
            key_mask="left",
            layout=layout,
        )
        for layout in ("transposed", "sliced", "expanded")
    ),
    Case("no-batch", batch=0),
    Case("no-heads", heads=0, kv_heads=1),
    Case("no-queries", queries=0, keys=5),
    Case("no-keys", queries=0, keys=0),
    Case("no-cotangents", cotangents=0),
    Case("no-values", value_dim=0),
    *(Case(f"spread{s}", queries=64, keys=64, head_dim=64, spread=s, shift=s) for s in (6, 20, 60)),
    Case("nearly-equal", queries=50, keys=50, head_dim=64, shift=1e-3),
]


class Inputs(NamedTuple):
    """Everything the attention ops take; `options` are their keyword arguments."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_corrupted: Tensor
    k_corrupted: Tensor
    grad_z: Tensor
    options: dict[str, object]

    def to(self, dtype: torch.dtype) -> Inputs:
        tensors = (x.to(dtype) for x in self[:6])
        options = dict(self.options)
        if isinstance(options["sinks"], Tensor):
            options["sinks"] = options["sinks"].to(dtype)
        return Inputs(*tensors, options)

    @property
    def scoring(self) -> Scoring:
        o = self.options
        scale = o["scale"] if o["scale"] is not None else max(self.q.shape[-1], 1) ** -0.5
        return Scoring(scale, o["causal"], o["window"], o["softcap"], o["sinks"], o["key_mask"])  # type: ignore[arg-type]


def _laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "transposed" and x.ndim > 1:
        axes = (-3, -2) if x.ndim > 2 else (0, 1)
        return x.transpose(*axes).contiguous().transpose(*axes)
    if layout == "sliced":
        shape = (*x.shape[:-1], 2 * x.shape[-1] + 1)
        filler = True if x.dtype == torch.bool else torch.nan
        wide = torch.full(shape, filler, dtype=x.dtype, device=x.device)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "expanded" and x.ndim in (1, 5):
        return x[(slice(1),) * x.ndim].expand(x.shape)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    return x


def make_inputs(case: Case, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """The case's inputs, the same on every call."""
    rng = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    d, dv = case.head_dim, case.head_dim if case.value_dim is None else case.value_dim
    scale = d**-0.5 if case.scale is None else case.scale
    gain = math.sqrt(case.spread / (scale * math.sqrt(d)))
    rows = (case.batch, case.heads, case.queries)
    columns = (case.batch, case.kv_heads, case.keys)
    q, k = gain * normal(*rows, d), gain * normal(*columns, d)
    step = gain * case.shift / case.spread
    tensors = [
        q,
        k,
        normal(*columns, dv),
        q + step * normal(*rows, d),
        k + step * normal(*columns, d),
        normal(case.cotangents, *rows, dv),
    ]
    tensors = [_laid_out(x.to(dtype).to(device), case.layout) for x in tensors]
    mask = None
    if case.key_mask is not None:
        mask = torch.ones(case.batch, case.keys, dtype=torch.bool)
        third = case.keys // 3
        if case.key_mask == "all":
            mask[0] = False
        elif case.key_mask == "left":
            mask[::2, :third] = False
        else:
            mask[::2, case.keys - third :] = False
        mask = _laid_out(mask.to(device), case.layout)
    sinks = _laid_out(normal(case.heads).to(dtype).to(device), case.layout) if case.sinks else None
    options: dict[str, object] = {
        "scale": case.scale,
        "causal": case.causal,
        "window": case.window,
        "softcap": case.softcap,
        "sinks": sinks,
        "key_mask": mask,
    }
    return Inputs(*tensors, options)


Outputs = dict[str, Tensor]
OPS = (
    "attention",
    "attention_alone",
    "attention_vjp",
    "query_patch_effects",
    "key_patch_effects",
    "attention_vjp_effects",
)


def run(op: str, x: Inputs, backend: str) -> Outputs:
    """An op's outputs by name; the statistics that it takes come from the same backend."""
    options = {**x.options, "backend": backend}
    if op == "attention_alone":
        z, stats = ops.attention(x.q, x.k, x.v, statistics=False, **options)  # type: ignore[arg-type]
        assert stats[2:] == (None, None, None)
        return {"z": z, "stats.z": stats.z, "stats.logsumexp": stats.logsumexp}
    z, stats = ops.attention(x.q, x.k, x.v, **options)  # type: ignore[arg-type]
    if op == "attention":
        return {"z": z, **{f"stats.{name}": y for name, y in stats._asdict().items()}}
    if op == "attention_vjp":
        grads = ops.attention_vjp(x.q, x.k, x.v, stats=stats, grad_z=x.grad_z, **options)  # type: ignore[arg-type]
        return dict(zip(("grad_q", "grad_k", "grad_v"), grads, strict=True))
    if op == "query_patch_effects":
        effect = ops.query_patch_effects(
            x.q,
            x.k,
            x.v,
            q_corrupted=x.q_corrupted,
            grad_z=x.grad_z,
            **options,  # type: ignore[arg-type]
        )
        return {"effect_q": effect}
    if op == "key_patch_effects":
        effect = ops.key_patch_effects(
            x.q,
            x.k,
            x.v,
            k_corrupted=x.k_corrupted,
            grad_z=x.grad_z,
            stats=stats,
            **options,  # type: ignore[arg-type]
        )
        return {"effect_k": effect}
    if op == "attention_vjp_effects":
        effects = ops.attention_vjp_effects(
            x.q,
            x.k,
            x.v,
            q_corrupted=x.q_corrupted,
            k_corrupted=x.k_corrupted,
            stats=stats,
            grad_z=x.grad_z,
            **options,  # type: ignore[arg-type]
        )
        return effects._asdict()
    raise ValueError(f"op must be among {', '.join(OPS)}, got {op!r}")


def _softmax(scores: Tensor, sink: Tensor) -> Tensor:
    return reference.softmax_and_logsumexp(scores, sink)[0]


def statistics(x: Inputs, top_key: Tensor) -> AttentionStats:
    """Statistics in float64 for a given choice of top keys (ties may be broken either way)."""
    x = x.to(torch.float64)
    scores, sink = reference.logits(x.q, x.k, x.scoring), reference.sink_logits(x.q, x.scoring)
    values = reference.grouped(x.v, x.q.shape[1])
    probs, lse = reference.softmax_and_logsumexp(scores, sink)
    if scores.shape[-1]:
        scores = scores.scatter(-1, top_key.clamp(min=0)[..., None].to(scores.device), -torch.inf)
    loo_probs, loo_lse = reference.softmax_and_logsumexp(scores, sink)
    return AttentionStats(probs @ values, lse, top_key, loo_lse, loo_probs @ values)


def magnitudes(x: Inputs, top_key: Tensor) -> Outputs:
    """By output name the first-order error bound of each element in units of eps, float64."""
    precision = torch.finfo(reference.accumulation_dtype(x.q))
    underflow = precision.tiny / precision.eps
    x = x.to(torch.float64)
    scoring, heads, kv_heads = x.scoring, x.q.shape[1], x.k.shape[1]
    sink = reference.sink_logits(x.q, scoring)
    is_top = torch.zeros(*x.q.shape[:3], x.k.shape[2], dtype=torch.bool, device=x.q.device)
    if x.k.shape[2]:
        is_top.scatter_(-1, top_key.clamp(min=0)[..., None], (top_key >= 0)[..., None])

    def weights(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weights, their uncertainty, the logits', and the logsumexps'."""
        scores = reference.logits(q, k, scoring)
        products = scoring.scale * (q.abs() @ reference.grouped(k, heads).abs().transpose(-1, -2))
        probs = _softmax(scores, sink)
        mean = (probs * products).sum(-1, keepdim=True)
        return probs, probs * (1 + products + mean) + underflow, products, mean

    v, g = reference.grouped(x.v, heads).abs(), x.grad_z.abs()
    _, p_error, products, mean = weights(x.q, x.k)
    scores = reference.logits(x.q, x.k, scoring)
    loo = _softmax(scores.masked_fill(is_top, -torch.inf), sink)
    loo_mean = (loo * products).sum(-1, keepdim=True)
    z_error = p_error @ v
    loo_z_error = (loo * (1 + products + loo_mean) + underflow) @ v
    finite = [torch.nan_to_num(y, neginf=0.0) for y in statistics(x, top_key)[1:4:2]]

    # gradients
    r_error = g @ v.transpose(-1, -2) + (g * z_error).sum(-1, keepdim=True)
    ds_error = p_error * r_error * scoring.scale * (1 if scoring.softcap is None else 3)

    # key effects: w = (sigmoid(x') - sigmoid(x)) / (1 - a), without the division for the top key
    allowed = reference.admissible(x.q, x.k, scoring)
    base = (
        torch.where(
            is_top,
            reference.softmax_and_logsumexp(scores.masked_fill(is_top, -torch.inf), sink)[1][
                ..., None
            ],
            torch.logsumexp(torch.cat([scores, sink], -1), -1)[..., None],
        )
        if scores.shape[-1]
        else scores
    )
    base = torch.where(torch.isneginf(base), 0, base)
    raw = reference.score_derivative(x.q, x.k, scoring)[0]
    moved = reference.score_derivative(x.q, x.k_corrupted, scoring)[0]
    moved_products = scoring.scale * (
        x.q.abs() @ reference.grouped(x.k_corrupted, heads).abs().transpose(-1, -2)
    )
    a = torch.where(is_top, torch.sigmoid(raw - base), torch.exp(raw - base))
    left = torch.where(is_top, 1, 1 - a).masked_fill(~allowed, 1)
    changed = torch.where(
        is_top, torch.sigmoid(moved - base), torch.sigmoid(moved - base - left.log())
    )
    uncertain = 1 + torch.where(is_top, loo_mean, mean)
    w_error = (
        changed * (1 - changed) * (uncertain + moved_products)
        + a * (1 - a) * (uncertain + products)
        + (changed - a).abs()
    ) / left
    w_error = (w_error + underflow).masked_fill(~allowed, 0)
    top_r_error = g @ v.transpose(-1, -2) + (g * loo_z_error).sum(-1, keepdim=True)
    key = (w_error * torch.where(is_top, top_r_error, r_error)).sum(-2)

    q_error = (g * (z_error + weights(x.q_corrupted, x.k)[1] @ v)).sum(-1)
    return {
        "z": z_error,
        "stats.z": z_error,
        "stats.logsumexp": 1 + finite[0].abs() + mean[..., 0],
        "stats.loo_logsumexp": 1 + finite[1].abs() + loo_mean[..., 0],
        "stats.loo_z": loo_z_error,
        "grad_q": ds_error @ reference.grouped(x.k, heads).abs(),
        "grad_k": reference.ungrouped(ds_error.transpose(-1, -2) @ x.q.abs(), kv_heads, 2),
        "grad_v": reference.ungrouped(p_error.transpose(-1, -2) @ g, kv_heads, 2),
        "effect_q": q_error.transpose(-1, -2),
        "effect_k": reference.ungrouped(key, kv_heads, 2).transpose(-1, -2),
    }


def rounded_operands(x: Inputs) -> tuple[float, Outputs]:
    """What the Triton backend's narrow products may add, since their weights are operands too.

    First the relative error of the weights of z, which go in as two parts of x's dtype; then by gradient the
    first-order bound, float64, of one rounding of p or dS: to bfloat16, or to TF32 for float16.
    """
    parts, one = {torch.bfloat16: (2.0**-17, 2.0**-8), torch.float16: (2.0**-22, 2.0**-11)}[
        x.q.dtype
    ]
    x = x.to(torch.float64)
    heads, kv_heads = x.q.shape[1], x.k.shape[1]
    values, keys = reference.grouped(x.v, heads), reference.grouped(x.k, heads)
    slope = reference.score_derivative(x.q, x.k, x.scoring)[1]
    probs = _softmax(reference.logits(x.q, x.k, x.scoring), reference.sink_logits(x.q, x.scoring))
    dp = x.grad_z @ values.transpose(-1, -2)
    ds = (probs * (dp - (probs * dp).sum(-1, keepdim=True)) * slope).abs()
    return parts, {
        "grad_q": one * (ds @ keys.abs()),
        "grad_k": one * reference.ungrouped(ds.transpose(-1, -2) @ x.q.abs(), kv_heads, 2),
        "grad_v": one * reference.ungrouped(probs.transpose(-1, -2) @ x.grad_z.abs(), kv_heads, 2),
    }


def check(op: str, x: Inputs, backend: str) -> None:
    """Asserts that a backend's outputs have the reference's shapes and dtypes and are as near to the truth."""
    got, same = run(op, x, backend), run(op, x, "reference")
    truth = run(op, x.to(torch.float64), "reference")
    top_key = (got if op == "attention" else run("attention", x, backend))["stats.top_key"]
    _check_top(x, top_key)
    if op == "attention":
        exact = statistics(x, top_key)
        truth = {**truth, **{f"stats.{name}": y for name, y in exact._asdict().items()}}
        near = statistics(x, same["stats.top_key"])
        reference_truth = {**truth, **{f"stats.{name}": y for name, y in near._asdict().items()}}
    else:
        reference_truth = truth
    scale = magnitudes(x, top_key)
    parts, operands = 0.0, Outputs()
    narrow = x.q.dtype in (torch.bfloat16, torch.float16)
    if backend == "triton" and x.q.is_cuda and narrow:
        parts, operands = rounded_operands(x)
    if backend == "triton" and narrow and op == "attention_alone":  # one rounding of the weights
        parts = torch.finfo(x.q.dtype).eps
    assert got.keys() == same.keys()
    for name, y in got.items():
        assert y.shape == same[name].shape, name
        assert y.dtype == same[name].dtype, name
        if name == "stats.top_key":
            continue
        wide_eps = torch.finfo(reference.accumulation_dtype(x.q)).eps
        weights = 0.0 if "logsumexp" in name else parts
        bound = (FEW * wide_eps + weights) * scale[name] + operands.get(name, 0.0)
        bound = bound + torch.finfo(y.dtype).eps / 2 * truth[name].abs()  # rounded to nearest
        bound = bound + 2 * _difference(same[name], reference_truth[name])
        error = _difference(y, truth[name])
        assert not torch.isnan(error).any(), f"{name} has NaN"
        worst = (error / bound).nan_to_num(nan=0.0)
        assert (error <= bound).all(), f"{name} is off by {worst.max():.3g} times what it may be"


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| in float64; infinities of one sign are equal."""
    a = a.double()
    return torch.where(a == b, 0.0, (a - b).abs())


def _check_top(x: Inputs, top_key: Tensor) -> None:
    """The top key has the largest logit, up to the logits' rounding; -1 only where no key is admissible."""
    wide = x.to(torch.float64)
    scores = reference.logits(wide.q, wide.k, wide.scoring)
    if scores.shape[-1] == 0:
        assert (top_key == -1).all()
        return
    best = scores.max(-1).values
    assert torch.equal(top_key < 0, torch.isneginf(best))
    products = wide.scoring.scale * (
        wide.q.abs() @ reference.grouped(wide.k, x.q.shape[1]).abs().transpose(-1, -2)
    )
    chosen = scores.gather(-1, top_key.clamp(min=0)[..., None])[..., 0]
    slack = FEW * torch.finfo(reference.accumulation_dtype(x.q)).eps * products.amax(-1)
    assert ((chosen >= best - slack) | (top_key < 0)).all()


@contextlib.contextmanager
def guarded_outputs() -> Iterator[None]:
    """torch.empty gives NaN-filled tensors inside larger NaN buffers, whose borders are checked at the end."""
    border, buffers = 64, []
    plain = torch.empty

    def empty(
        *shape: int | tuple[int, ...], dtype: torch.dtype | None = None, device: object = None
    ) -> Tensor:
        size = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        count = math.prod(size)  # type: ignore[arg-type]
        dtype = dtype or torch.get_default_dtype()
        filler = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min
        buffer = plain(count + 2 * border, dtype=dtype, device=device).fill_(filler)  # type: ignore[call-overload]
        buffers.append((buffer, count))
        return buffer[border : border + count].view(size)

    with mock.patch.object(torch, "empty", empty):
        yield
    for buffer, count in buffers:
        for edge in (buffer[:border], buffer[border + count :]):
            untouched = (
                torch.isnan(edge)
                if edge.is_floating_point()
                else edge == torch.iinfo(edge.dtype).min
            )
            assert untouched.all(), "a kernel wrote outside its output"
