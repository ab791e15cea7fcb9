"""Exact patching taken literally: whole forward passes of the plain model, its nodes overwritten by hooks.

Shares nothing with hf/ and patching/. Every pair is run alone and without padding, a family's modules are named
in a table, and attention is written out in the dtype of its input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from atp_fast.metrics import Metric
from atp_fast.nodes import COARSE_KINDS, Node
from atp_fast.prompts.pairs import PromptPairs

_LLAMA = ("self_attn", "mlp", "mlp.down_proj")
_NORMED = ("post_attention_layernorm", "post_feedforward_layernorm", "mlp.down_proj")
# modules of a layer: what attention (the first of several that it has) and MLP add to the residual stream, and the down
# projection (None: the first of _DOWN that the layer has)
PARTS: dict[str, tuple[str, str, str | None]] = {
    "gpt2": ("attn", "mlp", "mlp.c_proj"),
    "gpt_neox": ("attention", "mlp", "mlp.dense_4h_to_h"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _NORMED,
    "gemma3_text": _NORMED,
    "phi": ("self_attn", "mlp", "mlp.fc2"),
    "opt": ("self_attn", "fc2", "fc2"),
    "olmo2": _NORMED,
    "gpt_oss": ("self_attn", "mlp", ""),
    "mixtral": ("self_attn", "mlp", ""),
    "minicpm3": _LLAMA,
    "beam": _NORMED,
    "gemma4_text": _NORMED,
    "falcon_h1": ("self_attn", "feed_forward", "feed_forward.down_proj"),
    "granitemoehybrid": ("mamba self_attn", "block_sparse_moe", ""),
    "nemotron_h": ("mixer", "mixer", None),
}

# the first of these that a layer has is its down projection, where PARTS has no row
_DOWN = """output.adapter_modules.en_XX.dense2 mlp.down_proj mlp.c_proj mlp.fc2 mlp.fc_out mlp.fc_in mlp.dense_4h_to_h mlp.w2 mlp.wo mlp.Wo mlp.proj_2 mlp_block.down_proj ffn.down_proj mixer.down_proj
ffn.2 feed_forward.w2 feed_forward.down_proj feed_forward.output_dense fc2 output.dense""".split()


class Own(NamedTuple):
    """Where a layer that writes out its own softmax has q, k, v (a module's output each) and z (a module's input).

    heads: (projection's output (rows, positions, width), heads, which of q, k, v) -> (rows, positions, heads, dim), a view.
    """

    q: str
    k: str
    v: str
    z: str
    heads: Callable[[Tensor, int, int], Tensor]


def _apart(x: Tensor, heads: int, which: int) -> Tensor:
    return x.unflatten(-1, (heads, -1))


def _q_k_v(x: Tensor, heads: int, which: int) -> Tensor:
    return x.unflatten(-1, (3, heads, -1))[:, :, which]


def _q_k_v_of_each_head(x: Tensor, heads: int, which: int) -> Tensor:
    return x.unflatten(-1, (heads, 3, -1))[..., which, :]


def _one_key_head(x: Tensor, heads: int, which: int) -> Tensor:
    by_head = x.unflatten(-1, (heads + 2, -1))
    return by_head[:, :, (slice(0, -2), slice(-2, -1), slice(-1, None))[which]]


def _codegen(x: Tensor, heads: int, which: int) -> Tensor:
    """Four groups of heads, each q, v, k; one head per group here."""
    return x.unflatten(-1, (4, 3, -1))[:, :, :, (0, 2, 1)[which]]


def _projections(path: str, names: str, z: str) -> Own:
    return Own(*(f"{path}.{name}" for name in (*names.split(), z)), _apart)


def _fused(path: str, name: str, z: str, heads: Callable[[Tensor, int, int], Tensor]) -> Own:
    return Own(*[f"{path}.{name}"] * 3, f"{path}.{z}", heads)


_BERT = Own(
    *(f"attention.self.{n}" for n in ("query", "key", "value")), "attention.output.dense", _apart
)
_BART = _projections("self_attn", "q_proj k_proj v_proj", "out_proj")
OWN: dict[str, Own] = {
    "gpt_neo": _projections("attn.attention", "q_proj k_proj v_proj", "out_proj"),
    "gptj": _projections("attn", "q_proj k_proj v_proj", "out_proj"),
    "codegen": _fused("attn", "qkv_proj", "out_proj", _codegen),
    "openai-gpt": _fused("attn", "c_attn", "c_proj", _q_k_v),
    "gpt_neox_japanese": _fused("attention", "query_key_value", "dense", _q_k_v_of_each_head),
    "bloom": _fused("self_attention", "query_key_value", "dense", _q_k_v_of_each_head),
    "falcon": _fused("self_attention", "query_key_value", "dense", _one_key_head),
    "mpt": _fused("attn", "Wqkv", "out_proj", _q_k_v),
    **dict.fromkeys(("xglm", "trocr", "mvp"), _BART),
    **dict.fromkeys(("megatron-bert", "rembert", "roformer", "big_bird"), _BERT),
}

# what layers multiply their input with on its way past their writes, where that is not 1
SKIPS: dict[str, Callable[[Any], float]] = {
    "beam": lambda layer: math.sqrt(
        math.prod(1 - 1 / i for i in (layer.attn_residual_add_idx, layer.mlp_residual_add_idx))
    ),
    "gemma4_text": lambda layer: float(layer.layer_scalar),
}

Change = Callable[[str, int, Tensor], Tensor]
Key = tuple[str, int]


def naive_effects(
    model: PreTrainedModel, pairs: PromptPairs, subsets: Sequence[Sequence[Node]], metric: Metric
) -> tuple[Tensor, Tensor]:
    """Signed effects (pairs, subsets) of patching each subset, and the metric of the clean runs (pairs,).

    Nodes in padding change nothing, and the logits of padding are zero.
    """
    clean, source, patched = [], [], []
    with _Hooked(model).running() as run:
        for row in range(len(pairs)):
            real = pairs.attention_mask[row]
            corrupted: dict[Key, Tensor] = {}
            ids = pairs.corrupted_ids[row, real][None]
            source.append(run(ids, lambda kind, layer, x, to=corrupted: _note(to, kind, layer, x)))
            ids = pairs.clean_ids[row, real][None]
            clean.append(run(ids, lambda kind, layer, x: x))
            change = _patch(subsets, int(pairs.starts[row]), ids.shape[1], corrupted)
            patched.append(run(ids.expand(len(subsets), -1), change))

    def logits(parts: Sequence[Tensor], i: int) -> Tensor:
        """Logits of run i of every pair where the metric looks, in the pairs' own columns."""
        if metric.positions == "last":
            return torch.stack([part[i, -1:] for part in parts])
        whole = parts[0].new_zeros((*pairs.clean_ids.shape, parts[0].shape[-1]))
        whole[pairs.attention_mask] = torch.cat([part[i] for part in parts])
        return whole

    given = logits(source, 0) if metric.needs_source_logits else None
    clean_value = metric(logits(clean, 0), pairs, given)
    values = [metric(logits(patched, i), pairs, given) for i in range(len(subsets))]
    return torch.stack(values, 1) - clean_value[:, None], clean_value


def _note(to: dict[Key, Tensor], kind: str, layer: int, x: Tensor) -> Tensor:
    to[kind, layer] = x
    return x


def _patch(
    subsets: Sequence[Sequence[Node]], start: int, length: int, corrupted: dict[Key, Tensor]
) -> Change:
    """A change that gives row i of a batch the corrupted values of subset i."""
    at: dict[Key, list[tuple[int, Any]]] = {}
    for row, subset in enumerate(subsets):
        for kind, layer, column, index in subset:
            position = column - start
            if not 0 <= position < length:
                continue
            place: Any = (index, position)
            if kind in COARSE_KINDS:
                place = position
            elif kind == "neuron":
                place = (position, index)
            at.setdefault((kind, layer), []).append((row, place))

    def change(kind: str, layer: int, x: Tensor) -> Tensor:
        x = x.clone()
        for row, place in at.get((kind, layer), ()):
            x[row][place] = corrupted[kind, layer][0][place]
        return x

    return change


def _down_of(layer: nn.Module) -> str:
    names = {name for name, _ in layer.named_modules()}
    return next((name for name in _DOWN if name in names), "")


class _Hooked:
    """A plain model in which every node's value passes through the function `change`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        config = model.config.get_text_config(decoder=True)
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
        count = getattr(config, "decoder_layers", config.num_hidden_layers)
        self.layers = next(list(m) for m in lists if len(m) == count)
        self.number = {m: i for i, layer in enumerate(self.layers) for m in layer.modules()}
        self.own = OWN.get(config.model_type)
        self.heads: int = 0 if self.own is None else config.num_attention_heads
        self.parts = PARTS.get(config.model_type) or ("", "", None)
        self.skip = SKIPS.get(config.model_type, lambda layer: 1.0)
        self.dropped: int | None = None
        self.inputs: dict[int, Tensor] = {}
        self.rows = 0
        self.change: Change = lambda kind, layer, x: x

    @contextmanager
    def running(self) -> Iterator[Callable[[Tensor, Change], Tensor]]:
        """A function (ids, change) -> logits, both over (rows, positions)."""
        ALL_ATTENTION_FUNCTIONS.register("naive_patching", _attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register("naive_patching", eager_mask)
        # some models give their modules copies of the config
        configs = {id(m.config): m.config for m in self.model.modules() if hasattr(m, "config")}
        before = [(config, config._attn_implementation) for config in configs.values()]
        token = _hooked.set(self)
        try:
            for config, _ in before if self.own is None else ():
                config._attn_implementation = "naive_patching"
            with ExitStack() as hooks:
                for handle in self._hooks():
                    hooks.callback(handle.remove)
                yield self._run
        finally:
            _hooked.reset(token)
            for config, name in before:
                config._attn_implementation = name

    def _run(self, ids: Tensor, change: Change) -> Tensor:
        with torch.no_grad():
            return self.run(ids, change)

    def run(self, ids: Tensor, change: Change, dropped: int | None = None) -> Tensor:
        """Logits; `dropped`: the layer through whose write no gradient flows."""
        self.rows, self.change, self.dropped = len(ids), change, dropped
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    def _hooks(self) -> Iterator[Any]:
        attention, mlp, down_of_all = self.parts
        for number, layer in enumerate(self.layers):
            hook = self._input_hook("resid_pre", number)
            yield layer.register_forward_pre_hook(hook, with_kwargs=True)
            yield layer.register_forward_hook(self._drop_hook(number))
            for kind, name in (("attn_out", attention), ("mlp_out", mlp)):
                module = next((m for n in name.split() if (m := getattr(layer, n, None))), None)
                if module is not None:
                    yield module.register_forward_hook(self._output_hook(kind, number))
            if self.own is not None:
                for which, kind in enumerate("qkv"):
                    module = layer.get_submodule(self.own[which])
                    yield module.register_forward_hook(self._heads_hook(kind, number, which))
                hook = self._z_hook(number)
                yield layer.get_submodule(self.own.z).register_forward_pre_hook(hook)
            experts = self._mixture(layer)
            down = _down_of(layer) if down_of_all is None else down_of_all
            if experts is not None:
                self.number[experts] = number
                yield _Replaced(experts, self._experts)
            elif down:
                hook = self._input_hook("neuron", number)
                yield layer.get_submodule(down).register_forward_pre_hook(hook, with_kwargs=True)

    def _heads_hook(self, kind: str, layer: int, which: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            output = output.clone()
            value = self.own.heads(output, self.heads, which)
            value[:] = self.change(kind, layer, value.transpose(1, 2)).transpose(1, 2)
            return output

        return hook

    def _z_hook(self, layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            value = args[0].unflatten(-1, (self.heads, -1)).transpose(1, 2)
            return self.change("z", layer, value).transpose(1, 2).flatten(2), *args[1:]

        return hook

    def _drop_hook(self, layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if self.dropped != layer:
                return output
            before, after = self.inputs[layer], output[0] if isinstance(output, tuple) else output
            past = before * self.skip(self.layers[layer])
            held = past + (after - past).detach()
            return (held, *output[1:]) if isinstance(output, tuple) else held

        return hook

    def _experts(self, experts: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Each token's experts one by one; their neurons stand side by side, 0 where an expert was not chosen."""
        found = []
        for row, own in zip(x, chosen, strict=True):
            neurons = []
            for e in range(experts.num_experts):
                h = _linear(experts, "gate_up_proj" if experts.has_gate else "up_proj", e, row)
                h = experts._apply_gate(h[None])[0] if experts.has_gate else experts.act_fn(h)
                neurons.append(h if e in own.tolist() else torch.zeros_like(h))
            found.append(torch.cat(neurons))
        neurons = self._changed("neuron", self.number[experts], torch.stack(found))
        out = torch.zeros_like(x)
        for t, h in enumerate(neurons.view(len(x), experts.num_experts, -1)):
            for e, weight in zip(chosen[t].tolist(), weights[t], strict=True):
                y = _linear(experts, "down_proj", e, h[e])
                out[t] += weight * (
                    experts.post_expert_norm(y) if experts.has_post_expert_norm else y
                )
        return out

    @staticmethod
    def _mixture(layer: nn.Module) -> Any:
        """The layer's fused experts, if they go through transformers' interface."""
        return next((m for m in layer.modules() if hasattr(m, "_is_expert_parallel")), None)

    def _input_hook(self, kind: str, layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (self._changed(kind, layer, args[0]), *args[1:]), kwargs
            given = kwargs["hidden_states"]
            return args, {**kwargs, "hidden_states": self._changed(kind, layer, given)}

        return hook

    def _output_hook(self, kind: str, layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if isinstance(output, tuple):
                return self._changed(kind, layer, output[0]), *output[1:]
            return self._changed(kind, layer, output)

        return hook

    def _changed(self, kind: str, layer: int, x: Tensor) -> Tensor:
        """Some MLPs run on (rows * positions, width)."""
        x = self.change(kind, layer, x.reshape(self.rows, -1, x.shape[-1])).reshape(x.shape)
        if kind == "resid_pre":
            self.inputs[layer] = x
        return x

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
    ) -> Tensor:
        layer = self.number[module]
        q, k, v = (self.change(kind, layer, x) for kind, x in (("q", q), ("k", k), ("v", v)))
        group = q.shape[1] // k.shape[1]
        scores = scale * q @ k.repeat_interleave(group, 1).mT
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        scores = scores + mask
        if sinks is not None:
            sink = sinks[None, :, None, None].expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, sink], -1)
        z = scores.softmax(-1)[..., : k.shape[2]] @ v.repeat_interleave(group, 1)
        return self.change("z", layer, z)


class _Replaced:
    """A module whose forward is another function, until `remove`."""

    def __init__(self, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        self.module = module
        module.forward = lambda *args: forward(module, *args)

    def remove(self) -> None:
        del self.module.forward


def _linear(experts: Any, name: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(experts, name)[expert]
    y = x @ weight if experts.is_transposed else weight @ x
    return y + getattr(experts, f"{name}_bias")[expert] if experts.has_bias else y


_hooked: ContextVar[_Hooked] = ContextVar("naive_patching")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    z = _hooked.get().attention(module, query, key, value, attention_mask, scale, softcap, s_aux)
    return z.transpose(1, 2).contiguous(), None
