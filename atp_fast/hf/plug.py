"""A causal language model taken apart at its layers, without per-model code.

A `Plug` runs a HuggingFace model piece by piece:
  enter      token ids -> the first layer's input and every layer's other arguments
  run_layer  one layer on a given input; each node's value passes through a `visit` function on its way
  logits     the last layer's output -> logits, position by position
`enter` and `logits` run the model's own forward with its layers stepped over, so embeddings, position
encodings, final norms, heads and softcaps are the model's own. Everything is switched inside `Plug.plugged` and
restored when it ends.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from atp_fast.hf.activations import find_activations, fused
from atp_fast.hf.attention import NAME, LayerRun, Prefix, Stopped, Visit, running
from atp_fast.hf.inspection import (
    Call,
    Inspection,
    Layer,
    check_eval,
    check_finite,
    check_model,
    find_down_projection,
    find_writes,
    first_tensor,
    trace,
)
from atp_fast.hf.linears import find_linears, own_linears
from atp_fast.nodes import COARSE_KINDS, KINDS, NodeSpace

# RoPE kinds whose frequencies depend on the length of the whole prompt: their prefixes are not computed alone.
_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


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
        self.model = check_model(model)
        self.name = type(model).__name__
        self.backend = backend
        self.list_parent, self.list_name, modules = self._find_layers()
        self.layers = [Layer(module, activations=find_activations(module)) for module in modules]
        self.inspection = Inspection(True, None, self.name, len(self.layers))
        config = self.model.config.get_text_config(decoder=True)
        self.inspection.context = getattr(config, "max_position_embeddings", None)
        parameters = inspect.signature(self.model.forward).parameters
        self.moves = (
            "position_ids" in parameters and not self._rope_kinds(config) & _LENGTH_DEPENDENT_ROPE
        )
        with self.plugged():
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
        ids = (torch.arange(length, device=self.device)[None] * 7 + 3) % self.vocabulary
        if config.pad_token_id is not None:
            ids = ids.where(ids != config.pad_token_id, self._plain_token)
        x, arguments = self.enter(ids)
        shapes: set[tuple[int, ...]] = set()
        windows, streams = [], []
        for number, layer in enumerate(self.layers):
            run = LayerRun(backend=self.backend, cut=True)
            x = x.detach().requires_grad_()
            streams.append(x.detach())
            try:
                out, calls = trace(layer, x, *arguments[number], run)
            except NotImplementedError as error:
                raise NotImplementedError(
                    f"{self.name} is not served: layer {number}: {error}"
                ) from error
            if run.calls != 1:
                raise NotImplementedError(self._not_called(number, run.calls))
            check_finite(out, f"layer {number}")
            assert run.q is not None and run.k is not None and run.v is not None
            assert run.options is not None and run.attention_module is not None
            shapes.add((run.q.shape[1], run.k.shape[1], run.q.shape[3], run.v.shape[3]))
            windows.append(run.options.window)
            self._name_parts(number, calls, run.attention_module, x.detach(), out.detach())
            x = out.detach()
        if len(shapes) != 1:
            raise NotImplementedError(
                f"{self.name} is not served: its layers have heads of different shapes"
            )
        found = self.inspection
        found.heads, found.kv_heads, found.head_dim, found.v_dim = shapes.pop()
        found.hidden, found.windows = x.shape[-1], tuple(windows)
        self._compare_with_eager(ids, [*streams, x])

    def _name_parts(
        self, number: int, calls: list[Call], attention: nn.Module, x: Tensor, out: Tensor
    ) -> None:
        """Find the modules of a layer that are nodes; what it lacks is noted as refused, by node kind."""
        layer, found = self.layers[number], self.inspection
        try:
            neurons = find_down_projection(layer, calls, attention, x.shape[-1])
            if found.neurons not in (0, neurons):
                raise NotImplementedError("has another number of neurons than others")
            found.neurons = neurons
        except NotImplementedError as error:
            found.refused["neuron"] = f"layer {number} {error}"
        try:
            scale = float(getattr(self.model.config, "residual_multiplier", 1.0))
            find_writes(layer, calls, attention, x, out, scale)
        except NotImplementedError as error:
            why = f"layer {number} {error}"
            found.refused.update(attn_out=why, mlp_out=why, graddrop=why)

    def _not_called(self, layer: int, calls: int) -> str:
        if calls > 1:
            why = f"layer {layer} computes attention {calls} times"
        elif getattr(self.model.config, "num_attention_heads", None) is None:
            why = f"layer {layer} has no attention (a state-space or recurrent layer)"
        else:
            why = f"layer {layer} computes its own softmax or none, not through transformers' attention interface"
        return f"{self.name} is not served: {why}"

    def _compare_with_eager(self, ids: Tensor, streams: Sequence[Tensor]) -> None:
        """Refuse a model that, taken apart, is not what its own eager code computes.

        streams: every layer's input and the last one's output, (1, positions, hidden). Layer by layer, the eager layer
        must give the same output on the same input, so that rounding does not pile up with depth; and eager layers
        one after the other must give the model's own logits.
        """
        with self._implementation("eager"), torch.no_grad():
            own: Tensor = self.model(input_ids=ids, use_cache=False).logits
            if not bool(torch.isfinite(own).all()):
                raise ValueError(
                    f"model gives logits that are not finite on the tokens {ids[0].tolist()}"
                )
            x, arguments = self.enter(ids)
            for number, layer in enumerate(self.layers):
                args, kwargs = arguments[number]
                eager = first_tensor(layer.module(streams[number], *args, **kwargs))
                self._check_close(f"layer {number}'s output", streams[number + 1], eager)
                x = first_tensor(layer.module(x, *args, **kwargs))
            self._check_close("logits", self.logits(x), own)

    def _check_close(self, what: str, ours: Tensor, own: Tensor) -> None:
        tolerance = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2}
        error = float((ours - own).abs().max() / own.abs().max().clamp(min=1e-30))
        if not error <= tolerance.get(own.dtype, 5e-2):
            raise NotImplementedError(
                f"{self.name} is not served: taken apart, its {what} differ from its own by {error:.1e} of the largest"
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
        with self.plugged(), torch.enable_grad():
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

    @functools.cached_property
    def layer_weights(self) -> int:
        """Numbers that a layer's parameters hold."""
        return sum(p.numel() for p in self.layers[0].module.parameters())

    @functools.cached_property
    def _linears(self) -> list[nn.Module]:
        return find_linears(self.model)

    @functools.cached_property
    def _configs(self) -> list[Any]:
        """Every config object of the model and its modules, and those inside them."""
        found: dict[int, Any] = {
            id(m.config): m.config for m in self.model.modules() if hasattr(m, "config")
        }
        for config in list(found.values()):
            for key in getattr(config, "sub_configs", {}):
                if (sub := getattr(config, key, None)) is not None:
                    found[id(sub)] = sub
        return list(found.values())

    @contextlib.contextmanager
    def _implementation(self, name: str) -> Iterator[None]:
        """Every config of the model says attention `name`, experts "eager"; the settings come back at the end."""
        # experts one after the other: the grouped product has no batching rule, and would be looped over cotangents
        wanted = {
            "_attn_implementation_internal": name,
            "_experts_implementation_internal": "eager",
        }
        before = [
            (config, key, getattr(config, key))
            for config in self._configs
            for key in wanted
            if hasattr(config, key)
        ]
        try:
            for config, key, _ in before:
                setattr(config, key, wanted[key])
            yield
        finally:
            for config, key, old in before:
                setattr(config, key, old)

    @contextlib.contextmanager
    def plugged(self) -> Iterator[None]:
        """The model's attention is ours, its linear layers where that is faster, and its parameters need no gradients.

        All is restored at the end.
        """
        check_eval(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        own = own_linears(self._linears, self.device, self.backend)
        with self._implementation(NAME), own:
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
        token = running.set(run)
        try:
            with contextlib.ExitStack() as hooks:
                hooks.enter_context(fused(layer.activations))
                for kind, module in self._watched(layer, run.kinds):
                    hooks.callback(_watch(module, kind, run, x.shape[:2]).remove)
                out = layer.module(x, *arguments.args, **arguments.kwargs)
        finally:
            running.reset(token)
        return first_tensor(out)

    def keys_values(
        self,
        number: int,
        x: Tensor,
        arguments: LayerArguments,
        prefix: Prefix | None,
        visit: Visit | None,
    ) -> Prefix:
        """A layer's keys and values, the prefix's ahead of x's own, without the rest of the layer."""
        run = LayerRun(self.backend, visit, prefix, stop=True)
        with contextlib.suppress(Stopped):
            self.run_layer(number, x, arguments, run)
        assert run.k is not None and run.v is not None
        return Prefix(run.k, run.v)

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
