"""transformers' attention, taken over: the function and its mask function, registered under the name "atp_fast"."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from atp_fast import ops
from atp_fast.hf.options import AttentionOptions

NAME = "atp_fast"
Visit = Callable[[str, Tensor], Tensor]

# Arguments of an attention call that do not change its result, or that arrive in another form:
# the window is read from the mask function, positions are already in q and k.
_HARMLESS = frozenset(
    "dropout sliding_window is_causal position_ids position_embeddings cache_position use_cache past_key_values "
    "layer_past output_attentions output_hidden_states output_router_logits return_dict training layer_idx "
    "logits_to_keep cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k num_items_in_batch".split()
)
# What others are, where the name does not say it.
_ARGUMENTS = {"position_bias": " (a number of its own for each query and key)"}

# What a mask is called that our attention does not compute; chunks of n positions are called _CHUNKS - n.
_NOT_CAUSAL, _OF_THE_INPUT, _CHUNKS = -1, -2, -2
_FOREIGN_MASKS = {
    _NOT_CAUSAL: "is no causal mask or causal sliding window, nor a causal mask in chunks",
    _OF_THE_INPUT: "depends on the model's input",
}


class Prefix(NamedTuple):
    """Keys and values of the positions before the ones being run, (batch, kv_heads, prefix, head_dim)."""

    k: Tensor
    v: Tensor


class Stopped(Exception):
    """Ends a layer's run at its attention."""


class Mixture(NamedTuple):
    """A call of a layer's fused experts: their neurons over all experts, and the tokens that were run."""

    module: nn.Module
    neurons: int
    tokens: int


@dataclass
class LayerRun:
    """One layer's run: what goes in beside its input, and what its attention and experts left behind.

    statistics: those of the key fix are noted; cut: z becomes a fresh leaf of the autograd graph; stop: the run ends once k
    and v are there, by Stopped; shape: (batch, positions) of the input, for code that sees its tokens in one row.
    """

    backend: str = "auto"
    visit: Visit | None = None
    prefix: Prefix | None = None
    kinds: tuple[str, ...] = ()
    statistics: bool = False
    cut: bool = False
    stop: bool = False
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    z: Tensor | None = None
    stats: ops.AttentionStats | None = None
    options: AttentionOptions | None = None
    attention_module: nn.Module | None = None
    calls: int = 0
    shape: tuple[int, int] = (0, 0)
    mixtures: list[Mixture] = field(default_factory=list)
    biased: bool = False  # q and k have a last dimension more, which holds a bias per key
    entered: tuple[Tensor, Tensor] | None = None  # see hf/parallel.py

    def seen(self, kind: str, value: Tensor) -> Tensor:
        return value if self.visit is None else self.visit(kind, value)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        """z of this layer, (batch, heads, positions, v_dim)."""
        self.calls += 1
        q, k, v = self.seen("q", q), self.seen("k", k), self.seen("v", v)
        if self.prefix is not None:
            k = torch.cat([self.prefix.k, k], 2)
            v = torch.cat([self.prefix.v, v], 2)
        if self.stop:
            self.k, self.v = k, v
            raise Stopped
        z, stats = options.attention(
            q.detach(), k.detach(), v.detach(), statistics=self.statistics, backend=self.backend
        )
        if self.cut:
            z = z.detach().requires_grad_()  # a new tensor: stats.z, which may be z, stays plain
        self.q, self.k, self.v, self.z, self.stats, self.options = q, k, v, z, stats, options
        return self.seen("z", z)


running: ContextVar[LayerRun | None] = ContextVar("atp_fast_running_layer", default=None)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: hands q, k, v to the running layer's `LayerRun`."""
    run = running.get()
    if run is None:
        raise RuntimeError(f"attention {NAME!r} works inside atp_fast.Engine only")
    where = type(module).__name__
    for name, given in kwargs.items():
        if given is not None and name not in _HARMLESS:
            raise NotImplementedError(
                f"{where} calls attention with {name!r}{_ARGUMENTS.get(name, '')}, which atp_fast does not compute"
            )
    if attention_mask is None or attention_mask.dtype != torch.int64 or attention_mask.numel() != 1:
        raise NotImplementedError(
            f"{where} does not use the mask that transformers' mask interface made for it"
        )
    width = int(attention_mask.item())
    if width in _FOREIGN_MASKS:
        raise NotImplementedError(f"{where} has an attention mask that {_FOREIGN_MASKS[width]}")
    window, chunk = (width or None, None) if width >= 0 else (None, _CHUNKS - width)
    run.attention_module = module
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    z = run.attend(query, key, value, AttentionOptions(scale, window, softcap, s_aux, chunk))
    return z.transpose(1, 2).contiguous(), None  # some models take a view of it


def _mask(
    *args: Any,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """transformers' mask function: the window's width (0: plain causal) as a one-element tensor, or a number of _FOREIGN_MASKS
    or _CHUNKS.

    No queries x keys mask is built. The model's own mask function is asked about pairs of positions around every
    place where a causal window or chunk could differ from it (the diagonal, the window's edge, multiples of the window,
    far apart); a mask that is neither is refused when a layer attends by it.
    """
    if attention_mask is not None and not bool(attention_mask.all()):
        raise NotImplementedError(
            "atp_fast runs prompts without padding, the model made an attention mask with some"
        )
    width = local_size or 0
    w = width or 32
    queries = torch.tensor(
        [0, 1, 2, w - 1, w, w + 1, 2 * w - 1, 2 * w, 2 * w + 1, 3 * w, 5 * w + 3, 4099, 65537]
    )
    distances = torch.tensor([-w, -2, -1, 0, 1, 2, w - 1, w, w + 1, 2 * w, 3 * w])
    q = queries.repeat_interleave(len(distances))
    kv = q - distances.repeat(len(queries))
    keep = kv >= 0
    q, kv = q[keep].to(device), kv[keep].to(device)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    causal = kv <= q
    wanted = {width: causal & (kv > q - width) if width else causal}
    if width:
        wanted[_CHUNKS - width] = causal & (kv // width == q // width)
    try:
        allowed = mask_function(zero, zero, q, kv).expand_as(causal)
        alike = (name for name, expected in wanted.items() if torch.equal(allowed, expected))
        width = next(alike, _NOT_CAUSAL)
    except (IndexError, RuntimeError):
        width = _OF_THE_INPUT
    return torch.full((1, 1, 1, 1), width, dtype=torch.int64)


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)
