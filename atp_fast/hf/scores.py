"""Attention that a model writes out itself, taken over: its own code runs on scores that are never formed.

While a layer runs in `taken_over`, the product of queries and keys is a `Scores`: it notes what the model's code does to it
(scaled, masked, a bias per key added, softmax) and becomes the layer's attention when it meets the values. A step that is
not understood raises NotImplementedError, so a model is refused, never served wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from atp_fast.hf.attention import LayerRun
from atp_fast.hf.options import AttentionOptions

_MASKED = -1e4  # what is added or filled in below this keeps a key out: exp(-1e4) is 0
_PRODUCTS = ("matmul", "__matmul__", "bmm", "baddbmm")


@dataclass
class _Parts:
    """scale * q k^T + bias where allowed: q, k (rows, heads, positions, dim), bias (heads or 1, positions)."""

    q: Tensor
    k: Tensor
    scale: float = 1.0
    bias: Tensor | None = None
    allowed: Tensor | None = None  # (positions, positions) bool, or with heads and rows ahead
    zeroed: Tensor | None = None  # keys multiplied by 0, which the next sum must keep out
    probabilities: bool = False


class Scores(Tensor):
    """A (rows, heads, positions, positions) tensor, in any view, of which only the parts exist."""

    parts: _Parts

    @staticmethod
    def of(parts: _Parts, like: Tensor) -> Scores:
        made: Scores = Tensor._make_wrapper_subclass(
            Scores, like.shape, dtype=like.dtype, device=parts.q.device
        )
        made.parts = parts
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"uses its attention scores in {func.__name__}")


class taken_over(TorchFunctionMode):
    """Inside, a layer's own attention over `rows` prompts goes to the LayerRun."""

    def __init__(self, run: LayerRun, rows: int) -> None:
        super().__init__()
        self.run, self.rows = run, rows

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        given = [*args, *kwargs.values()]
        scores = next((x for x in given if isinstance(x, Scores)), None)
        if scores is not None and name == "__get__":  # shape, dtype, device
            return func(*args, **kwargs)
        product = name in _PRODUCTS and all(isinstance(x, Tensor) and x.ndim > 2 for x in given[:2])
        if scores is None and not product:
            return func(*args, **kwargs)
        if scores is None and name == "baddbmm":
            return self._sum_and_product(*args, **kwargs)
        like = func(*tree_map(_shape_only, args), **tree_map(_shape_only, kwargs))
        if not isinstance(like, Tensor):
            return like
        if scores is None:
            return Scores.of(self._product(*given[:2]), like)
        if product and scores.parts.probabilities and given[0] is scores:
            return self._attend(scores.parts, given[1]).reshape(like.shape)
        in_place = name.endswith("_") and not name.endswith("__")
        rule = _RULES.get(name.rstrip("_") if in_place else name)
        if rule is None:
            raise NotImplementedError(f"uses its attention scores in {name}")
        parts = rule(scores, [x for x in given if x is not scores])
        if in_place:
            scores.parts = parts
            return scores
        return Scores.of(parts, like)

    def _product(self, q: Tensor, k: Tensor) -> _Parts:
        return _Parts(self._by_heads(q), self._by_heads(k.transpose(-1, -2)))

    def _sum_and_product(
        self, input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1
    ) -> Scores:
        """baddbmm: beta * input + alpha * batch1 batch2, over rows and heads; input may be of other rows."""
        parts = replace(self._product(batch1, batch2), scale=float(alpha))
        like = torch.empty(*batch1.shape[:2], batch2.shape[-1], dtype=batch1.dtype, device="meta")
        scores = Scores.of(parts, like)
        if input.ndim == 3:
            heads = parts.q.shape[1]
            own = input.reshape(-1, heads, *input.shape[1:])
            if not bool((own == own[:1]).all()):
                raise NotImplementedError("adds another bias to each prompt's attention scores")
            input = own[:1].expand(self.rows, *own.shape[1:]).flatten(0, 1)
        return Scores.of(_added(scores, [input * beta]), like)

    def _by_heads(self, x: Tensor) -> Tensor:
        """(rows * heads, positions, dim) as (rows, heads, positions, dim)."""
        return x if x.ndim == 4 else x.reshape(self.rows, -1, *x.shape[1:])

    def _attend(self, parts: _Parts, v: Tensor) -> Tensor:
        v = self._by_heads(v)
        q, k, scale = parts.q.to(v.dtype), parts.k.to(v.dtype), parts.scale
        if parts.bias is not None:
            q, k = _with_bias(q, k, parts.bias.to(v.dtype) / scale)
            self.run.biased = True
        window = _window(parts.allowed, q.shape[2], k.shape[2])
        return self.run.attend(q, k, v, AttentionOptions(scale, window, None, None))


def _shape_only(x: Any) -> Any:
    return torch.empty(x.shape, dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x


def _with_bias(q: Tensor, k: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys of one dimension more, whose product holds the bias (heads or 1, keys)."""
    rows, heads, keys = k.shape[:3]
    if bias.shape[0] not in (1, heads):
        raise NotImplementedError("adds another bias to each query head of one key")
    more = bias.expand(rows, heads, keys)[..., None]
    return torch.cat([q, torch.ones_like(q[..., :1])], -1), torch.cat([k, more], -1)


def _window(allowed: Tensor | None, queries: int, keys: int) -> int | None:
    """The causal window that a mask (..., queries, keys) is."""
    if allowed is None:
        if queries == keys == 1:
            return None
        raise NotImplementedError("does not mask its attention scores")
    width = int(allowed[..., -1, :].sum(-1).max())
    i = torch.arange(queries, device=allowed.device)[:, None]
    j = torch.arange(keys, device=allowed.device)
    if not bool((allowed == ((j <= i) & (j > i - width))).all()):
        raise NotImplementedError("has a mask that is no causal mask or causal sliding window")
    return None if width == keys else width


# ---- what the model's code may do to its scores: (scores, the other arguments) -> parts

Rule = Callable[[Scores, list[Any]], _Parts]


def _same(scores: Scores, others: list[Any]) -> _Parts:
    return scores.parts


def _linear(scores: Scores) -> _Parts:
    if scores.parts.probabilities:
        raise NotImplementedError("changes its attention probabilities")
    return scores.parts


def _number(x: Any) -> float | None:
    return float(x) if not isinstance(x, Tensor) or x.ndim == 0 else None


def _multiplied(scores: Scores, others: list[Any]) -> _Parts:
    parts, factor = _linear(scores), _number(others[0])
    if factor is None:
        by = others[0]
        if parts.zeroed is not None or not bool(((by == 0) | (by == 1)).all()):
            raise NotImplementedError("multiplies its attention scores by a tensor")
        return replace(parts, zeroed=by == 0)
    if not factor > 0 or not math.isfinite(factor):
        raise NotImplementedError(f"multiplies its attention scores by {factor}")
    bias = None if parts.bias is None else parts.bias * factor
    return replace(parts, scale=parts.scale * factor, bias=bias)


def _divided(scores: Scores, others: list[Any]) -> _Parts:
    if (by := _number(others[0])) is None:
        raise NotImplementedError("divides its attention scores by a tensor")
    return _multiplied(scores, [1 / by])


def _added(scores: Scores, others: list[Any]) -> _Parts:
    """A mask (very negative where a key is kept out), a bias per key, or both in one tensor."""
    parts, more = _linear(scores), others[0]
    if _number(more) is not None:
        return parts  # a softmax does not see it
    keys = more.shape[-1]
    if more.ndim < 2 or more.shape[-2] == 1 < scores.shape[-2]:
        return replace(parts, bias=_sum(parts.bias, _per_head(scores, more)))
    out = more <= _MASKED
    if parts.zeroed is not None:
        if not bool((out | ~parts.zeroed).all()):
            raise NotImplementedError("multiplies its attention scores by a tensor")
        parts = replace(parts, zeroed=None)
    parts = _kept_out(parts, out)
    lowest = torch.finfo(more.dtype).min
    per_key = more.masked_fill(out, lowest).amax(-2, keepdim=True)
    if not bool((out | (more == per_key)).all()):
        raise NotImplementedError("adds a bias to its attention scores that is not one per key")
    per_key = per_key.masked_fill(per_key == lowest, 0)
    if keys == 0 or not bool(per_key.any()):
        return parts
    return replace(parts, bias=_sum(parts.bias, _per_head(scores, per_key)))


def _sum(bias: Tensor | None, more: Tensor) -> Tensor:
    return more if bias is None else bias + more


def _per_head(scores: Scores, bias: Tensor) -> Tensor:
    """A bias that broadcasts to the scores with one row of queries, as (heads or 1, keys)."""
    rows, heads = scores.parts.q.shape[:2]
    if bias.ndim == 3 and scores.ndim == 3 and bias.shape[0] != 1:
        bias = bias.reshape(rows, heads, *bias.shape[1:])
    bias = bias.reshape((1,) * (4 - bias.ndim) + tuple(bias.shape))
    if not bool((bias == bias[:1]).all()):
        raise NotImplementedError("adds another bias to each prompt's attention scores")
    return bias[0, :, 0]


def _kept_out(parts: _Parts, out: Tensor) -> _Parts:
    return replace(parts, allowed=~out if parts.allowed is None else parts.allowed & ~out)


def _filled(scores: Scores, others: list[Any]) -> _Parts:
    """masked_fill(mask, value)"""
    mask, value = others
    _check_masked(value)
    return _kept_out(_linear(scores), mask)


def _chosen(scores: Scores, others: list[Any]) -> _Parts:
    """where(condition, scores, value)"""
    condition, value = others
    _check_masked(value)
    return _kept_out(_linear(scores), ~condition)


def _raised(scores: Scores, others: list[Any]) -> _Parts:
    """max(scores, lowest)"""
    _check_masked(others[0])
    return _linear(scores)


def _check_masked(value: Any) -> None:
    if (number := _number(value)) is None or number > _MASKED:
        raise NotImplementedError("replaces attention scores by others")


def _softmax(scores: Scores, others: list[Any]) -> _Parts:
    parts = _linear(scores)
    if parts.zeroed is not None or others[0] not in (-1, scores.ndim - 1):
        raise NotImplementedError("takes a softmax of another kind")
    return replace(parts, probabilities=True)


_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("view", "reshape", "to", "float", "double", "type_as", "contiguous", "dropout"), _same
    ),
    **dict.fromkeys(("mul", "__mul__", "__rmul__", "__imul__"), _multiplied),
    **dict.fromkeys(("div", "__truediv__", "__itruediv__"), _divided),
    **dict.fromkeys(("add", "__add__", "__radd__", "__iadd__"), _added),
    "masked_fill": _filled,
    "where": _chosen,
    "max": _raised,
    "softmax": _softmax,
}
