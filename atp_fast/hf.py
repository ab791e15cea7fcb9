"""The only module that knows transformers: where a model's layers, heads and neurons are, and how to run them.

A `Plug` runs a HuggingFace causal language model piece by piece without any per-model code:
  enter      token ids -> the first layer's input and every layer's other arguments
  run_layer  one layer on a given input; each node's value passes through a `visit` function on its way
  logits     the last layer's output -> logits, position by position
`enter` and `logits` run the model's own forward with its layers stepped over, so embeddings, position
encodings, final norms, heads and softcaps are the model's own. Attention arrives through transformers'
AttentionInterface under the name "atp_fast", after RoPE and QK-norm, and is computed by `atp_fast.ops`.
Everything is switched inside `Plug.plugged` and restored when it ends.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from atp_fast import ops
from atp_fast.nodes import COARSE_KINDS, KINDS, NodeSpace

NAME = "atp_fast"
Visit = Callable[[str, Tensor], Tensor]

# Arguments of an attention call that do not change its result, or that arrive in another form:
# the window is read from the mask function, positions are already in q and k.
_HARMLESS = frozenset(
    "dropout sliding_window is_causal position_ids position_embeddings cache_position use_cache past_key_values "
    "layer_past output_attentions output_hidden_states output_router_logits return_dict training layer_idx "
    "logits_to_keep cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k num_items_in_batch".split()
)
# RoPE kinds whose frequencies depend on the length of the whole prompt: their prefixes are not computed alone.
_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})
_MIXTURE_NAMES = ("expert", "moe", "router")


class AttentionOptions(NamedTuple):
    """The keyword arguments with which a layer's attention goes to `atp_fast.ops`."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None


class Prefix(NamedTuple):
    """Keys and values of the positions before the ones being run, (batch, kv_heads, prefix, head_dim)."""

    k: Tensor
    v: Tensor


@dataclass
class LayerRun:
    """One layer's run: what goes in beside its input, and what its attention call left behind."""

    backend: str = "auto"
    visit: Visit | None = None
    prefix: Prefix | None = None
    kinds: tuple[str, ...] = ()
    cut: bool = False
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    z: Tensor | None = None
    stats: ops.AttentionStats | None = None
    options: AttentionOptions | None = None
    attention_module: nn.Module | None = None
    calls: int = 0

    def seen(self, kind: str, value: Tensor) -> Tensor:
        return value if self.visit is None else self.visit(kind, value)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        """z of this layer, (batch, heads, positions, v_dim); with `cut` a fresh leaf of the autograd graph."""
        self.calls += 1
        q, k, v = self.seen("q", q), self.seen("k", k), self.seen("v", v)
        if self.prefix is not None:
            k = torch.cat([self.prefix.k, k], 2)
            v = torch.cat([self.prefix.v, v], 2)
        z, stats = ops.attention(
            q.detach(), k.detach(), v.detach(), backend=self.backend, **options._asdict()
        )
        if self.cut:
            z = z.detach().requires_grad_()  # a new tensor: stats.z, which may be z, stays plain
        self.q, self.k, self.v, self.z, self.stats, self.options = q, k, v, z, stats, options
        return self.seen("z", z)


class LayerArguments(NamedTuple):
    """What the model hands one of its layers beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def rows(self, index: Tensor, batch: int) -> LayerArguments:
        """The same arguments for a batch made of rows `index` of this one, which had `batch` rows."""

        def pick(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == batch > 1:
                return value[index.to(value.device)]
            if isinstance(value, tuple):
                return tuple(pick(v) for v in value)
            return value

        return LayerArguments(pick(self.args), {k: pick(v) for k, v in self.kwargs.items()})


_running: ContextVar[LayerRun | None] = ContextVar("atp_fast_running_layer", default=None)


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
    run = _running.get()
    if run is None:
        raise RuntimeError(f"attention {NAME!r} works inside atp_fast.Engine only")
    where = type(module).__name__
    for name, given in kwargs.items():
        if given is not None and name not in _HARMLESS:
            raise NotImplementedError(
                f"{where} calls attention with {name!r}, which atp_fast does not compute"
            )
    if attention_mask is None or attention_mask.dtype != torch.int64 or attention_mask.numel() != 1:
        raise NotImplementedError(
            f"{where} does not use the mask that transformers' mask interface made for it"
        )
    window = int(attention_mask.item()) or None
    run.attention_module = module
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    z = run.attend(query, key, value, AttentionOptions(scale, window, softcap, s_aux))
    return z.transpose(1, 2), None


def _mask(
    *args: Any,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """transformers' mask function: the window's width (0: plain causal) as a one-element tensor.

    No queries x keys mask is built. The model's own mask function is asked about pairs of positions around every
    place where a causal window could differ from it (the diagonal, the window's edge, multiples of the window, far
    apart); a mask that is not a causal window raises.
    """
    if attention_mask is not None:
        raise NotImplementedError(
            "atp_fast runs prompts without an attention mask, the model made one"
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
    expected = (kv <= q) & (kv > q - width) if width else kv <= q
    try:
        allowed = mask_function(zero, zero, q, kv)
    except (IndexError, RuntimeError) as error:
        raise NotImplementedError(
            f"the model's attention mask depends on its input ({error})"
        ) from error
    if not torch.equal(allowed.expand_as(expected), expected):
        raise NotImplementedError(
            "the model's attention mask is no causal mask or causal sliding window"
        )
    return torch.full((1, 1, 1, 1), width, dtype=torch.int64)


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)


class _Step(nn.Module):
    """Stands in for a layer: keeps the arguments it is called with and returns `result` or its input."""

    def __init__(self, layer: nn.Module, result: Tensor | None, as_tuple: bool) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)  # not a submodule: the layer stays where it is
        self.result, self.as_tuple = result, as_tuple
        self.hidden: Tensor | None = None
        self.arguments: LayerArguments | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor | tuple[Tensor, ...]:
        self.hidden, self.arguments = hidden_states, LayerArguments(args, kwargs)
        out = hidden_states if self.result is None else self.result
        return (out,) if self.as_tuple else out


@dataclass
class Layer:
    """One decoder layer and the modules whose inputs or outputs are nodes."""

    module: nn.Module
    as_tuple: bool = False
    down: nn.Module | None = None  # its input is the neurons
    attn_write: nn.Module | None = None
    mlp_write: nn.Module | None = None


@dataclass
class Inspection:
    """Whether atp_fast serves a model, and its shape; `refused` says per node kind why it cannot be had."""

    served: bool
    reason: str | None = None
    model: str = ""
    layers: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    v_dim: int = 0
    hidden: int = 0
    neurons: int = 0
    tape_bytes: int = 0  # what autograd keeps of one layer, per position
    context: int | None = None
    windows: tuple[int | None, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)


def inspect_model(model: nn.Module) -> Inspection:
    """What `Engine` would say of a model, without raising."""
    try:
        return Plug(model).inspection
    except (NotImplementedError, TypeError, ValueError) as error:
        return Inspection(False, str(error), type(model).__name__)


class Plug:
    """A causal language model, taken apart at its layers.

    Raises TypeError for what is no transformers causal language model, ValueError for one in training mode, and
    NotImplementedError, naming the class and the reason, for one that cannot be served exactly.
    """

    def __init__(self, model: nn.Module, backend: str = "auto") -> None:
        self.model = _check_model(model)
        self.name = type(model).__name__
        self.backend = backend
        self.list_parent, self.list_name, modules = self._find_layers()
        self.layers = [Layer(module) for module in modules]
        self.inspection = Inspection(True, None, self.name, len(self.layers))
        config = self.model.config.get_text_config(decoder=True)
        self.inspection.context = getattr(config, "max_position_embeddings", None)
        parameters = inspect.signature(self.model.forward).parameters
        self.moves = (
            "position_ids" in parameters and not self._rope_kinds(config) & _LENGTH_DEPENDENT_ROPE
        )
        with self.plugged(), torch.no_grad():
            self._learn(config)
        self._check_gradients()

    # ---- finding the pieces

    def _find_layers(self) -> tuple[nn.Module, str, list[nn.Module]]:
        count = self.model.config.get_text_config(decoder=True).num_hidden_layers
        found: list[tuple[str, nn.Module, str, list[nn.Module]]] = []
        for path, parent in self.model.named_modules():
            for name, child in parent.named_children():
                inside = any(path == p or path.startswith(p + ".") for p, *_ in found)
                if isinstance(child, nn.ModuleList) and len(child) == count and not inside:
                    found.append((f"{path}.{name}" if path else name, parent, name, list(child)))
        if len(found) != 1:
            raise NotImplementedError(
                f"{self.name} is not served: it has {len(found)} lists of {count} layers, not one"
            )
        return found[0][1:]

    @staticmethod
    def _rope_kinds(config: Any) -> set[str]:
        rope = getattr(config, "rope_parameters", None) or {}
        nested = [rope, *(v for v in rope.values() if isinstance(v, dict))]
        return {str(r.get("rope_type", "default")) for r in nested}

    def _learn(self, config: Any) -> None:
        """Run a short prompt, find out what each layer is made of, and compare with the model's own eager run."""
        length = min(8, self.inspection.context or 8)
        vocabulary = self.vocabulary
        ids = (torch.arange(length, device=self.device)[None] * 7 + 3) % vocabulary
        ids = (
            torch.where(ids == config.pad_token_id, self._plain_token, ids)
            if config.pad_token_id is not None
            else ids
        )
        x, arguments = self.enter(ids)
        shapes: set[tuple[int, ...]] = set()
        windows = []
        for number, layer in enumerate(self.layers):
            run = LayerRun(backend=self.backend)
            events: list[tuple[nn.Module, Tensor, Tensor]] = []
            out = self._traced(layer, x, arguments[number], run, events)
            if (
                run.calls != 1
                or run.q is None
                or run.k is None
                or run.v is None
                or run.options is None
            ):
                raise NotImplementedError(self._not_called(number, run.calls))
            shapes.add((run.q.shape[1], run.k.shape[1], run.q.shape[3], run.v.shape[3]))
            windows.append(run.options.window)
            self._name_parts(number, layer, x, out, run, events)
            x = out
        if len(shapes) != 1:
            raise NotImplementedError(
                f"{self.name} is not served: its layers have heads of different shapes"
            )
        found = self.inspection
        found.heads, found.kv_heads, found.head_dim, found.v_dim = shapes.pop()
        found.hidden, found.windows = x.shape[-1], tuple(windows)
        self._compare_with_eager(ids, self.logits(x))

    def _not_called(self, layer: int, calls: int) -> str:
        if calls > 1:
            why = f"layer {layer} computes attention {calls} times"
        elif getattr(self.model.config, "num_attention_heads", None) is None:
            why = f"layer {layer} has no attention (a state-space or recurrent layer)"
        else:
            why = f"layer {layer} computes its own softmax or none, not through transformers' attention interface"
        return f"{self.name} is not served: {why}"

    def _traced(
        self,
        layer: Layer,
        x: Tensor,
        arguments: LayerArguments,
        run: LayerRun,
        events: list[tuple[nn.Module, Tensor, Tensor]],
    ) -> Tensor:
        """Run a layer and list its modules' (module, first input, first output) in the order they finish."""

        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            result = output[0] if isinstance(output, tuple) else output
            if isinstance(result, Tensor):
                events.append((module, args[0] if args else result, result))

        with contextlib.ExitStack() as hooks:
            for module in layer.module.modules():
                if module is not layer.module:
                    hooks.callback(module.register_forward_hook(note).remove)
            token = _running.set(run)
            try:
                out = layer.module(x, *arguments.args, **arguments.kwargs)
            finally:
                _running.reset(token)
        layer.as_tuple = isinstance(out, tuple)
        return _first(out)

    def _name_parts(
        self,
        number: int,
        layer: Layer,
        x: Tensor,
        out: Tensor,
        run: LayerRun,
        events: list[tuple[nn.Module, Tensor, Tensor]],
    ) -> None:
        """Find the down projection, and the two modules whose outputs the layer adds to the residual stream."""
        refused = self.inspection.refused
        attention = (
            set(run.attention_module.modules()) if run.attention_module is not None else set()
        )
        outside = [event for event in events if event[0] not in attention]
        linear = [
            e for e in outside if isinstance(e[0], (nn.Linear, Conv1D)) or _weight_ndim(e[0]) == 2
        ]
        linear = [e for e in linear if e[2].shape[-1] == x.shape[-1]]
        mixture = [m for m in layer.module.modules() if _is_mixture(m)]
        if mixture:
            refused["neuron"] = (
                f"layer {number} is a mixture of experts ({type(mixture[0]).__name__})"
            )
        elif not linear:
            refused["neuron"] = f"layer {number} has no down projection"
        else:
            layer.down, neurons = linear[-1][0], linear[-1][1].shape[-1]
            if self.inspection.neurons not in (0, neurons):
                refused["neuron"] = f"layer {number} has another number of neurons"
            self.inspection.neurons = neurons

        # the writes: the first two outputs of the layer's own parts with input + write + write == output
        parts = set(layer.module.children()) | {run.attention_module}
        scale = float(getattr(self.model.config, "residual_multiplier", 1.0))
        writes = [
            (m, scale * y.reshape(x.shape))
            for m, _, y in events
            if m in parts and y.numel() == x.numel()
        ]
        tolerance = 64 * torch.finfo(out.dtype).eps * float(out.abs().max())
        for i, (first, a) in enumerate(writes):
            for second, b in writes[i + 1 :]:
                if layer.attn_write is None and float((x + a + b - out).abs().max()) <= tolerance:
                    layer.attn_write, layer.mlp_write = first, second
        if layer.attn_write is None:
            why = f"layer {number} does not add an attention write and an MLP write to its input"
            refused.update(attn_out=why, mlp_out=why, graddrop=why)

    def _compare_with_eager(self, ids: Tensor, logits: Tensor) -> None:
        with self._implementation("eager"):
            eager: Tensor = self.model(input_ids=ids, use_cache=False).logits
        tolerance = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2}.get(
            logits.dtype, 5e-2
        )
        if not bool(torch.isfinite(eager).all()):
            raise ValueError(
                f"model gives logits that are not finite on the tokens {ids[0].tolist()}"
            )
        error = float((logits - eager).abs().max() / eager.abs().max().clamp(min=1e-30))
        if not error <= tolerance:
            raise NotImplementedError(
                f"{self.name} is not served: taken apart, its logits differ from its own by {error:.1e} of the largest"
            )

    def _check_gradients(self) -> None:
        """See that cotangents get through a layer, and how much autograd keeps of it per position."""
        positions = min(8, self.inspection.context or 8)
        try:
            few, many = self._bytes_kept(positions // 2), self._bytes_kept(positions)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise NotImplementedError(
                f"{self.name} is not served: no gradient flows through its layers (quantised weights?): {reason}"
            ) from error
        self.inspection.tape_bytes = (many - few) // max(1, positions - positions // 2)

    def _bytes_kept(self, positions: int) -> int:
        """Bytes that autograd keeps of layer 0 on so many positions, weights included."""
        kept: dict[int, int] = {}

        def note(saved: Tensor) -> Tensor:
            storage = saved.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return saved

        ids = torch.full((1, positions), self._plain_token, dtype=torch.int64, device=self.device)
        with self.plugged():
            x, arguments = self.enter(ids)
            x = x.detach().requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
                run = LayerRun(backend=self.backend, cut=True)
                out = self.run_layer(0, x, arguments[0], run)
            gradient = torch.autograd.grad(out.sum(), x)[0]
        if not bool(torch.isfinite(gradient).all()):
            raise ValueError("model gives gradients that are not finite in layer 0")
        return sum(kept.values())

    # ---- switching and restoring

    @property
    def device(self) -> torch.device:
        return self._embedding.device

    @property
    def offloaded(self) -> bool:
        """Whether some weights are fetched when their layer runs; what holds on to a layer then holds its weights."""
        return any(p.device.type == "meta" for p in self.model.parameters())

    @property
    def itemsize(self) -> int:
        return self._embedding.element_size()

    @property
    def vocabulary(self) -> int:
        return self._embedding.shape[0]

    @property
    def _embedding(self) -> Tensor:
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight

    @contextlib.contextmanager
    def _implementation(self, name: str) -> Iterator[None]:
        """Every config of the model says attention `name`; the settings come back at the end."""
        configs: dict[int, Any] = {
            id(m.config): m.config for m in self.model.modules() if hasattr(m, "config")
        }
        for config in list(configs.values()):
            for key in getattr(config, "sub_configs", {}):
                if (sub := getattr(config, key, None)) is not None:
                    configs[id(sub)] = sub
        before = [(config, config._attn_implementation) for config in configs.values()]
        try:
            for config, _ in before:
                config._attn_implementation_internal = name
            yield
        finally:
            for config, old in before:
                config._attn_implementation_internal = old

    @contextlib.contextmanager
    def plugged(self) -> Iterator[None]:
        """The model's attention is ours and its parameters need no gradients; both are restored at the end."""
        _check_eval(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        with self._implementation(NAME):
            try:
                for p in trained:
                    p.requires_grad_(False)
                yield
            finally:
                for p in trained:
                    p.requires_grad_(True)

    @contextlib.contextmanager
    def _stepped_over(self, result: Tensor | None) -> Iterator[list[_Step]]:
        """The model's layers replaced by steps, the last of which returns `result` if there is one."""
        last = len(self.layers) - 1
        steps = [
            _Step(layer.module, result if i == last else None, layer.as_tuple)
            for i, layer in enumerate(self.layers)
        ]
        original = self.list_parent._modules[self.list_name]
        self.list_parent._modules[self.list_name] = nn.ModuleList(steps)
        try:
            yield steps
        finally:
            self.list_parent._modules[self.list_name] = original

    @property
    def _plain_token(self) -> int:
        """A token that is not padding, where the choice does not matter."""
        return int(self.model.config.get_text_config(decoder=True).pad_token_id == 0)

    # ---- running

    def enter(self, ids: Tensor, first_position: int = 0) -> tuple[Tensor, list[LayerArguments]]:
        """Layer 0's input (batch, positions, hidden) for token ids (batch, positions), and all layers' arguments."""
        where: dict[str, Tensor] = {}
        if first_position:
            positions = torch.arange(
                first_position, first_position + ids.shape[1], device=ids.device
            )
            where["position_ids"] = positions[None].expand(ids.shape[0], -1)
        with self._stepped_over(None) as steps, torch.no_grad():
            self.model.base_model(input_ids=ids, use_cache=False, **where)
        arguments = [step.arguments for step in steps if step.arguments is not None]
        if len(arguments) != len(steps) or steps[0].hidden is None:
            raise NotImplementedError(
                f"{self.name} is not served: it does not call its layers one after the other"
            )
        return steps[0].hidden, arguments

    def run_layer(self, number: int, x: Tensor, arguments: LayerArguments, run: LayerRun) -> Tensor:
        """The layer's output; node values of `run.kinds` (and q, k, v, z) pass through `run.visit`."""
        layer = self.layers[number]
        token = _running.set(run)
        try:
            with contextlib.ExitStack() as hooks:
                for kind, module in self._watched(layer, run.kinds):
                    hooks.callback(_watch(module, kind, run, x.shape[:2]).remove)
                out = layer.module(x, *arguments.args, **arguments.kwargs)
        finally:
            _running.reset(token)
        return _first(out)

    @staticmethod
    def _watched(layer: Layer, kinds: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
        modules = {"neuron": layer.down, "attn_out": layer.attn_write, "mlp_out": layer.mlp_write}
        for kind in kinds:
            module = modules.get(kind)
            if module is not None:
                yield kind, module

    def logits(self, x: Tensor) -> Tensor:
        """Logits (batch, positions, vocab) of the last layer's output x (batch, positions, hidden)."""
        ids = torch.full(x.shape[:2], self._plain_token, dtype=torch.int64, device=self.device)
        with self._stepped_over(x):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    # ---- nodes

    def space(self, positions: int, kinds: Sequence[str]) -> NodeSpace:
        """The nodes of these kinds on prompts of `positions` tokens; NotImplementedError for kinds not to be had."""
        found = self.inspection
        for kind in kinds:
            if kind in found.refused:
                raise NotImplementedError(
                    f"nodes {kind!r} of {self.name} are not served: {found.refused[kind]}"
                )
        widths = dict(
            q=found.heads, k=found.kv_heads, v=found.kv_heads, z=found.heads, neuron=found.neurons
        )
        widths.update(dict.fromkeys(COARSE_KINDS, 1))
        return NodeSpace(
            found.layers, positions, {kind: widths[kind] for kind in KINDS if kind in kinds}
        )


def _check_model(model: nn.Module) -> PreTrainedModel:
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {name}")
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"{name} is not served: it is an encoder-decoder, not a decoder-only model"
        )
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise NotImplementedError(
            f"{name} is not served: it is no causal language model with logits"
        )
    if getattr(config, "num_attention_heads", None) is None and not hasattr(config, "text_config"):
        raise NotImplementedError(
            f"{name} is not served: it has no attention heads (a state-space or recurrent model)"
        )
    if not model._can_set_attn_implementation():
        raise NotImplementedError(
            f"{name} is not served: it computes its own softmax, not through transformers' attention interface"
        )
    _check_eval(model)
    return model


def _first(out: Any) -> Tensor:
    """The hidden states a layer returns, alone or first of a tuple."""
    hidden = out[0] if isinstance(out, tuple) else out
    assert isinstance(hidden, Tensor)
    return hidden


def _check_eval(model: nn.Module) -> None:
    if any(module.training for module in model.modules()):
        raise ValueError(
            "model must be in evaluation mode (dropout would make every effect noise): call model.eval()"
        )


def _weight_ndim(module: nn.Module) -> int:
    weight = getattr(module, "weight", None)
    return weight.ndim if isinstance(weight, Tensor) else 0


def _is_mixture(module: nn.Module) -> bool:
    named = any(part in type(module).__name__.lower() for part in _MIXTURE_NAMES)
    return named and any(True for _ in module.parameters())


def _watch(module: nn.Module, kind: str, run: LayerRun, shape: torch.Size) -> Any:
    """A hook that passes the module's input (neurons) or output (writes), as (batch, positions, width), to visit."""

    def seen(value: Tensor) -> Tensor:
        flat = value.reshape(
            *shape, value.shape[-1]
        )  # some models run their MLP on (batch * positions, width)
        return run.seen(kind, flat).reshape(value.shape)

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (seen(args[0]), *args[1:])

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        return (seen(output[0]), *output[1:]) if isinstance(output, tuple) else seen(output)

    if kind == "neuron":
        return module.register_forward_pre_hook(before)
    return module.register_forward_hook(after)
