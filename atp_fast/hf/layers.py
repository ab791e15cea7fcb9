"""A causal language model run piece by piece, and switched over and back.

  enter      token ids -> the first layer's input and every layer's other arguments
  run_layer  one layer on a given input; each node's value passes through a `visit` function on its way
  logits     the last layer's output -> logits, position by position
`enter` and `logits` run the model's own forward with its layers stepped over, so embeddings, position encodings, final
norms, heads and softcaps are the model's own. Everything is switched inside `LayeredModel.plugged` and restored when it
ends.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import Self

from atp_fast.hf.activations import find_activations, fused
from atp_fast.hf.attention import NAME, LayerRun, Prefix, Stopped, Visit, running
from atp_fast.hf.inspection import Layer, check_eval, first_tensor
from atp_fast.hf.linears import find_linears, own_linears
from atp_fast.hf.norms import find_norms, own_norms
from atp_fast.hf.parallel import find_parallel, held_tensor
from atp_fast.hf.placement import (
    ENDS,
    Fetcher,
    Weights,
    check_exchange,
    devices_of,
    fetchers,
)
from atp_fast.hf.quantised import Quantised, dequantised, find_quantised
from atp_fast.hf.rotations import find_rotations, own_rotations
from atp_fast.hf.scores import taken_over
from atp_fast.hf.switching import alone_with, modules_of, parameters_of


class LayerArguments(NamedTuple):
    """What the model hands one of its layers beside the hidden states.

    by_row: of each of its tensors, whether it has rows (or heads of rows) of the batch ahead; learnt by `Plug`.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_row: tuple[bool, ...] = ()

    def mapped(self, change: Callable[[Tensor], Tensor]) -> LayerArguments:
        """The same arguments with `change` of every tensor; those of keywords come first."""
        kwargs = {key: _mapped(value, change) for key, value in self.kwargs.items()}
        return LayerArguments(_mapped(self.args, change), kwargs, self.by_row)

    def to(self, device: torch.device) -> LayerArguments:
        return self.mapped(lambda value: value.to(device))

    def rows(
        self, index: Tensor, batch: int, known: dict[int, Tensor] | None = None
    ) -> LayerArguments:
        """The same arguments for a batch made of rows `index` of this one, which had `batch` rows.

        known: what was made of which tensor before, for layers that are handed the same ones.
        """
        has_rows, made = iter(self.by_row), {} if known is None else known

        def pick(value: Tensor) -> Tensor:
            if not next(has_rows) or len(value) < 2:
                return value
            if id(value) not in made:
                by_row = value.reshape(batch, -1, *value.shape[1:])
                made[id(value)] = by_row[index.to(value.device)].flatten(0, 1)
            return made[id(value)]

        return self.mapped(pick)

    def tensors(self) -> list[Tensor]:
        """In the order in which `mapped` meets them."""
        found: list[Tensor] = []

        def note(value: Tensor) -> Tensor:
            found.append(value)
            return value

        self.mapped(note)
        return found


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    # no function inside another that calls itself: what it refers to would live until Python looks for cycles
    if isinstance(value, Tensor):
        return change(value)
    return tuple(_mapped(v, change) for v in value) if isinstance(value, tuple) else value


class _Step(nn.Module):
    """Stands in for a layer: keeps the arguments it is called with and returns `result` or its input, and None for the rest."""

    def __init__(self, layer: nn.Module, result: Tensor | None, outputs: int) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)  # not a submodule: the layer stays where it is
        self.result, self.outputs = result, outputs
        self.hidden: Tensor | None = None
        self.arguments: LayerArguments | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor | tuple[Tensor | None, ...]:
        self.hidden, self.arguments = hidden_states, LayerArguments(args, kwargs)
        out = hidden_states if self.result is None else self.result
        return (out, *[None] * (self.outputs - 1)) if self.outputs else out


class LayeredModel:
    """A model whose layers are called one after the other. Raises NotImplementedError where they cannot be found."""

    def __init__(self, model: PreTrainedModel, backend: str) -> None:
        self.model, self.backend = model, backend
        self.name = type(model).__name__
        self.parallel = find_parallel(model)
        decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]  # of a model that also sees images or hears
        self.decoder = decoder if isinstance(decoder, PreTrainedModel) else model
        self.own_softmax = not self.decoder._can_set_attn_implementation()
        self.list_parent, self.list_name, modules = self._find_layers()
        self.by_row: dict[bool, list[tuple[bool, ...]]] = {}  # by whether positions are given
        self._spread: list[torch.device] | None = None  # of each layer, where there are several
        self.dtype = self._embedding.dtype  # of the residual stream; `Plug` looks at it
        self.made_numbers = 0  # of the largest quantised weight
        self.layers = [
            Layer(
                module,
                activations=find_activations(module),
                norms=find_norms(module),
                rotations=find_rotations(module),
            )
            for module in modules
        ]
        check_exchange(self.name, self.device, modules)

    def _find_layers(self) -> tuple[nn.Module, str, list[nn.Module]]:
        config = self.model.config.get_text_config(decoder=True)
        count = getattr(config, "decoder_layers", config.num_hidden_layers)
        for root in (self.model, self.decoder):
            found: list[tuple[str, nn.Module, str, list[nn.Module]]] = []
            for path, parent in root.named_modules():
                for name, child in parent.named_children():
                    inside = any(path == p or path.startswith(p + ".") for p, *_ in found)
                    if isinstance(child, nn.ModuleList) and len(child) == count and not inside:
                        place = f"{path}.{name}" if path else name
                        found.append((place, parent, name, list(child)))
            if len(found) == 1:
                return found[0][1:]
        raise NotImplementedError(
            f"{self.name} is not served: it has {len(found)} lists of {count} layers, not one"
        )

    @property
    def device(self) -> torch.device:
        """Where token ids go and logits come from; layers may lie elsewhere."""
        device = self._embedding.device
        return (
            next(iter(devices_of(self.model.get_input_embeddings())))
            if device.type == "meta"
            else device
        )

    def device_of(self, number: int) -> torch.device:
        """Where a layer runs, inside `plugged`."""
        return self.device if self._spread is None else self._spread[number]

    def moved(self, x: Tensor, number: int) -> Tensor:
        """x where a layer runs; what no layer is left for stays where it is."""
        return x if number == len(self.layers) else x.to(self.device_of(number))

    def stacked(self, number: int, copies: int) -> Self:
        """The model with one of its layers alone, so many times one above the other, to try what that layer takes."""
        found = copy.copy(self)
        found.layers = [self.layers[number]] * copies
        if self._spread is not None:
            found._spread = [self._spread[number]] * copies
        return found

    def _places(self) -> list[torch.device] | None:
        """Where each layer runs, None where all of them run on the model's device."""
        found = {p.device for p in parameters_of(self.model)}
        if len(found) == 1 and next(iter(found)).type != "meta":
            return None
        devices = [next(iter(devices_of(layer.module)), self.device) for layer in self.layers]
        return None if set(devices) == {self.device} else devices

    @property
    def devices(self) -> list[torch.device]:
        """All that the model runs on, its own first."""
        return list(dict.fromkeys([self.device, *(self._places() or ())]))

    @property
    def offloaded(self) -> bool:
        """Whether some weights are fetched when their layer runs; what holds on to a layer then holds its weights."""
        return any(p.is_meta for p in parameters_of(self.model))

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def vocabulary(self) -> int:
        rows = getattr(self.model.get_input_embeddings(), "num_embeddings", None)
        return rows if isinstance(rows, int) else self._embedding.shape[0]

    @property
    def _embedding(self) -> Tensor:
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight

    @functools.cached_property
    def layer_weights(self) -> int:
        """Numbers that the parameters of the largest layer hold, in this process, without the quantised ones."""
        apart = {place.module for place in self.quantised}
        return max(
            sum(
                held_tensor(p).numel()
                for m in set(layer.module.modules()) - apart
                for p in m.parameters(recurse=False)
            )
            for layer in self.layers
        )

    @functools.cached_property
    def alike(self) -> list[list[int]]:
        """The layers of each kind: of the same modules, with parameters of the same shapes."""
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for number, layer in enumerate(self.layers):
            shapes = (p.shape for p in layer.module.parameters())
            kind = (*(type(module) for module in layer.module.modules()), *shapes)
            kinds.setdefault(kind, []).append(number)
        return list(kinds.values())

    @property
    def first_of_each_kind(self) -> list[int]:
        """The lowest layer of each kind."""
        return [numbers[0] for numbers in self.alike]

    @functools.cached_property
    def quantised(self) -> list[Quantised]:
        """The modules that run by their dequantised weights; NotImplementedError where there is no way to have those."""
        return find_quantised(self.model)

    @property
    def made_bytes(self) -> int:
        """Bytes of the floats that are made of the largest quantised weight, once in float32, on their way to a product."""
        return self.made_numbers * (self.itemsize + 4)

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
    def implementation(self, name: str) -> Iterator[None]:
        """Every config of the model says attention and experts `name`; the settings come back at the end."""
        wanted = {"_attn_implementation_internal": name, "_experts_implementation_internal": name}
        with alone_with(self.model):
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
        """The model's attention is ours, its linear layers where they are quantised or that is faster, and its parameters
        need no gradients.

        All is restored at the end.
        """
        with self.implementation("eager" if self.own_softmax else NAME):
            check_eval(self.model)
            # by name: fetching weights puts other parameters in their place
            trained = [
                (module, name)
                for module in modules_of(self.model)
                for name, p in module._parameters.items()
                if p is not None and p.requires_grad
            ]
            try:
                _require_grad(trained, False)
                self._spread = self._places()
                plain = (
                    self.parallel.plain(self.backend) if self.parallel else contextlib.nullcontext()
                )
                with (
                    plain,
                    dequantised(self.quantised, self.backend),
                    own_linears(self._linears, self.device, self.backend),
                    self._own_parts(),
                ):
                    yield
            finally:
                _require_grad(trained, True)

    @contextlib.contextmanager
    def _own_parts(self) -> Iterator[None]:
        """Inside, what is recognised of the layers runs by functions of ours while `run_layer` runs them."""
        activations = [module for layer in self.layers for module in layer.activations]
        norms = [found for layer in self.layers for found in layer.norms]
        files = list(dict.fromkeys(file for layer in self.layers for file in layer.rotations))
        with fused(activations), own_norms(norms, self.backend), own_rotations(files):
            yield

    def weights(self, stages: Sequence[int], ahead: bool) -> Weights:
        """Weights that are fetched, held stage by stage: numbers of layers, or ENDS for all that is no layer."""
        return Weights([self._fetchers(stage) for stage in stages], ahead)

    @contextlib.contextmanager
    def holding(self, number: int) -> Iterator[None]:
        """Inside, a layer's weights are fetched once, however often it is run."""
        with self.weights((number,), ahead=False) as weights, weights.held(0):
            yield

    def fetched_bytes(self) -> dict[int, list[int]]:
        """Of every stage with weights that are fetched, the bytes of each of its tensors."""
        found = {
            stage: [size for fetcher in self._fetchers(stage) for size in fetcher.sizes()]
            for stage in (ENDS, *range(len(self.layers)))
        }
        return {stage: sizes for stage, sizes in found.items() if sizes}

    def check_fits(self, memory: int) -> None:
        """Raises ValueError where `memory` bytes do not hold what has to be fetched for one layer."""
        for stage, sizes in self.fetched_bytes().items():
            if sum(sizes) > memory:
                what = f"layer {stage}" if stage != ENDS else "its embeddings and head"
                raise ValueError(
                    f"memory_budget must hold the offloaded weights of one layer of {self.name}: {what} needs "
                    f"{sum(sizes):,} bytes, got {memory:,}"
                )

    def _fetchers(self, stage: int) -> list[Fetcher]:
        if stage != ENDS:
            return fetchers(self.layers[stage].module)
        inside = {module for layer in self.layers for module in layer.module.modules()}
        return [fetcher for fetcher in fetchers(self.model) if fetcher.module not in inside]

    @contextlib.contextmanager
    def _stepped_over(self, result: Tensor | None) -> Iterator[list[_Step]]:
        """The model's layers replaced by steps, the last of which returns `result` if there is one."""
        last = len(self.layers) - 1
        steps = [
            _Step(layer.module, result if i == last else None, layer.outputs)
            for i, layer in enumerate(self.layers)
        ]
        original = self.list_parent._modules[self.list_name]
        self.list_parent._modules[self.list_name] = nn.ModuleList(steps)
        try:
            yield steps
        finally:
            self.list_parent._modules[self.list_name] = original

    @property
    def plain_token(self) -> int:
        """A token that is not padding, where the choice does not matter."""
        config = self.model.config.get_text_config(decoder=True)
        return int(getattr(config, "pad_token_id", None) == 0)

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
        if by_row := self.by_row.get(first_position > 0):
            arguments = [a._replace(by_row=b) for a, b in zip(arguments, by_row, strict=True)]
        if len(arguments) != len(steps) or steps[0].hidden is None:
            raise NotImplementedError(
                f"{self.name} is not served: it does not call its layers one after the other"
            )
        x = steps[0].hidden
        if self._spread is not None:
            x = x.to(self._spread[0])
            arguments = [a.to(d) for a, d in zip(arguments, self._spread, strict=True)]
        return x, arguments

    def run_layer(self, number: int, x: Tensor, arguments: LayerArguments, run: LayerRun) -> Tensor:
        """The layer's output; node values of `run.kinds` (and q, k, v, z) pass through `run.visit`."""
        layer = self.layers[number]
        if self._spread is not None:
            x = x.to(self._spread[number])
        run.shape = x.shape[0], x.shape[1]
        with contextlib.ExitStack() as hooks:
            hooks.enter_context(self.attending(run, len(x)))
            for kind, module in self._watched(layer, run.kinds):
                hooks.callback(_watch(module, kind, run, x.shape[:2]).remove)
            out = layer.module(x, *arguments.args, **arguments.kwargs)
        return first_tensor(out)

    @contextlib.contextmanager
    def attending(self, run: LayerRun, rows: int) -> Iterator[None]:
        """Inside, attention goes to `run`, by transformers' interface or, where the model has none, from its own scores."""
        token = running.set(run)
        try:
            with taken_over(run, rows) if self.own_softmax else contextlib.nullcontext():
                yield
        finally:
            running.reset(token)

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
        ids = torch.full(x.shape[:2], self.plain_token, dtype=torch.int64, device=self.device)
        with self._stepped_over(x):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits if self._spread is None else logits.to(self.device)


def _require_grad(parameters: Sequence[tuple[nn.Module, str]], wanted: bool) -> None:
    for module, name in parameters:
        parameter = module._parameters[name]
        assert parameter is not None
        parameter.requires_grad_(wanted)


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
        if isinstance(output, (tuple, list)):
            return type(output)((seen(output[0]), *output[1:]))
        return seen(output)

    if kind == "neuron":
        return module.register_forward_pre_hook(before)
    return module.register_forward_hook(after)
