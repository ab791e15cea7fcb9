"""Whether a model can be served: taken apart at its layers, its parts found, and compared with its own eager run."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from atp_fast.hf.attention import LayerRun, Prefix
from atp_fast.hf.dictionaries import Dictionary, side_by_side
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
    hooked,
    trace,
)
from atp_fast.hf.layers import LayerArguments, LayeredModel
from atp_fast.hf.quantised import Comparison, dequantised
from atp_fast.hf.shares import Shares
from atp_fast.hf.switching import alone_with
from atp_fast.nodes import COARSE_KINDS, KINDS, Node, NodeSpace

# Settings under which layers count the positions that they are given from 0, wherever these stand.
_COUNTED_FROM_0 = ("attn_temperature_tuning",)
# RoPE kinds whose frequencies depend on the length of the whole prompt: their prefixes are not computed alone.
_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


class Plug(LayeredModel):
    """A causal language model, taken apart at its layers, without per-model code; `inspection` says what it is made of.

    Raises TypeError for what is no transformers causal language model, ValueError for one in training mode, and
    NotImplementedError, naming the class and the reason, for one that cannot be served exactly.
    """

    def __init__(self, model: nn.Module, backend: str = "auto", memory: int | None = None) -> None:
        """memory: bytes that a call may take, which must hold a layer whose weights are fetched."""
        served = check_model(model)
        with alone_with(served):
            check_eval(served)
            super().__init__(served, backend)
            self.dictionaries: list[Dictionary] = []
            if memory is not None:
                self.check_fits(memory)
            with self._refusing():
                self._open()

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """Errors of ours name the model; the model's own become a refusal."""
        refused = f"{self.name} is not served: "
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except NotImplementedError as error:
            if str(error).startswith(refused):
                raise
            raise NotImplementedError(refused + str(error)) from error
        except ValueError as error:
            if str(error).startswith(("model ", "backend ")):
                raise
            raise NotImplementedError(refused + self._failed(error)) from error
        except Exception as error:
            raise NotImplementedError(refused + self._failed(error)) from error

    @staticmethod
    def _failed(error: Exception) -> str:
        return f"its layers do not run one after the other on hidden states alone ({type(error).__name__})"

    def _open(self) -> None:
        self.inspection = Inspection(self.name, len(self.layers))
        self.shares = Shares(self.parallel, self.inspection)
        config = self.model.config.get_text_config(decoder=True)
        self.inspection.context = getattr(config, "max_position_embeddings", None)
        parameters = inspect.signature(self.model.forward).parameters
        self.moves = (
            "position_ids" in parameters
            and not self.own_softmax  # its masks start at the first position that is run
            and not self._rope_kinds(config) & _LENGTH_DEPENDENT_ROPE
            and not any(getattr(config, name, False) for name in _COUNTED_FROM_0)
        )
        quantised = self.quantised  # refused before anything runs
        ids, comparison = self.short_prompt(), Comparison()
        with dequantised(quantised, self.backend, comparison):
            own = self._own_logits(ids)
        comparison.check(quantised)
        self.made_numbers = comparison.largest
        with self.plugged():
            self._learn(ids, own)
        self._check_gradients()

    @staticmethod
    def _rope_kinds(config: Any) -> set[str]:
        rope = getattr(config, "rope_parameters", None) or {}
        nested = [rope, *(v for v in rope.values() if isinstance(v, dict))]
        return {str(r.get("rope_type", "default")) for r in nested}

    def short_prompt(self) -> Tensor:
        """A few different tokens, (1, positions), to try a model on."""
        config = self.model.config.get_text_config(decoder=True)
        length = min(8, self.inspection.context or 8)
        ids = (torch.arange(length, device=self.device)[None] * 7 + 3) % self.vocabulary
        padding = getattr(config, "pad_token_id", None)
        return ids if padding is None else ids.where(ids != padding, self.plain_token)

    def _own_logits(self, ids: Tensor) -> Tensor:
        """The model's own eager logits; notes on the way how many outputs its layers have.

        Raises NotImplementedError where a layer is given another one's output beside the hidden states.
        """
        beside: list[Any] = []  # the last layer's other outputs
        given: set[int] = set()  # layers that got one of them

        def note(number: int, layer: Layer) -> Any:
            def hook(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
                if any(x is y for x in (*args, *kwargs.values()) for y in beside):
                    given.add(number)
                several = isinstance(output, (tuple, list))
                layer.outputs = len(output) if several else 0
                beside[:] = [x for x in output[1:] if isinstance(x, Tensor)] if several else []

            return hook

        with contextlib.ExitStack() as hooks, self.implementation("eager"), torch.no_grad():
            for number, layer in enumerate(self.layers):
                hook = layer.module.register_forward_hook(note(number, layer), with_kwargs=True)
                hooks.callback(hook.remove)
            try:
                own: Tensor = self.model(input_ids=ids, use_cache=False).logits
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                raise ValueError(
                    f"model must run on token ids alone, {self.name} raises {type(error).__name__} on {ids[0].tolist()}"
                ) from error
        if given:
            raise NotImplementedError(
                f"layer {min(given)} is given more of the layer before it than its hidden states"
            )
        return own

    def _learn(self, ids: Tensor, own: Tensor) -> None:
        """Run a short prompt, find out what each layer is made of, and compare with the model's own eager logits."""
        x, arguments = self.enter(ids)
        self.dtype = x.dtype
        self._learn_rows(ids, 0, arguments)
        half = ids.shape[1] // 2
        if self.moves:  # roberta counts its positions from another number than 0
            start, moved = self.enter(ids[:, half:], half)
            self.moves = self.error(start, x[:, half:]) <= self.tolerance(x)
            self._learn_rows(ids[:, half:], half, moved)
        shapes: list[tuple[int, ...]] = []
        counts: list[dict[str, int]] = []
        windows, streams = [], []
        for number, layer in enumerate(self.layers):
            run = LayerRun(backend=self.backend, cut=True)
            x = self.moved(x, number).detach().requires_grad_()
            streams.append(x.detach())
            try:
                with self.attending(run, len(x)):
                    given = arguments[number]
                    out, calls = trace(layer, x, given.args, given.kwargs, run)
            except NotImplementedError as error:
                raise NotImplementedError(
                    f"{self.name} is not served: layer {number}: {error}"
                ) from error
            if run.calls > 1:
                raise NotImplementedError(
                    f"{self.name} is not served: layer {number} computes attention {run.calls} times"
                )
            check_finite(out, f"layer {number}")
            windows.append(None if run.options is None else run.options.window)
            if run.q is None or run.k is None or run.v is None:
                self.moves = False  # a layer without attention may carry a state
            else:
                dim = run.q.shape[3] - run.biased
                shapes.append((run.q.shape[1], run.k.shape[1], dim, run.v.shape[3]))
            layer.attention = run.attention_module
            counts.append(self._name_parts(number, calls, run, x.detach(), out.detach()))
            self.shares.note(number, layer, run.mixtures)
            if self.moves and run.k is not None and run.v is not None:
                prefix = Prefix(run.k[:, :, :half].detach(), run.v[:, :, :half].detach())
                with torch.no_grad():
                    alone = LayerRun(self.backend, prefix=prefix)
                    rest = self.run_layer(number, x[:, half:], moved[number], alone)
                self.moves = self.error(rest, out[:, half:].detach()) <= self.tolerance(out)
            x = out.detach()
        if not shapes:
            raise NotImplementedError(
                f"{self.name} is not served: no layer computes attention through transformers' attention interface or in its "
                "own scores"
            )
        found = self.inspection
        found.heads, found.kv_heads, found.head_dim, found.v_dim = map(
            max, zip(*shapes, strict=True)
        )
        found.hidden, found.windows = x.shape[-1], tuple(windows)
        self._count(counts)
        self.shares.count_all()
        self._compare_with_eager(ids, [*streams, x], own)

    def _learn_rows(self, ids: Tensor, first: int, one: Sequence[LayerArguments]) -> None:
        """Which of the layers' arguments have rows of the batch: those that have twice as many for two prompts.

        Such rows must be the same for all prompts: the clean run's arguments are the corrupted run's too.
        """
        two = self.enter(torch.cat([ids, ids.flip(1)]), first)[1]
        self.by_row[first > 0] = [
            tuple(
                x.ndim > 0 and y.shape[0] == 2 * x.shape[0]
                for x, y in zip(a.tensors(), b.tensors(), strict=True)
            )
            for a, b in zip(one, two, strict=True)
        ]
        for number, (given, by_row) in enumerate(zip(two, self.by_row[first > 0], strict=True)):
            for x, rows in zip(given.tensors(), by_row, strict=True):
                if rows and not torch.equal(*x.chunk(2)):
                    raise NotImplementedError(
                        f"layer {number} is given more of the prompt than its hidden states"
                    )

    def _name_parts(
        self, number: int, calls: list[Call], run: LayerRun, x: Tensor, out: Tensor
    ) -> dict[str, int]:
        """Find the modules of a layer that are nodes; how many there are of each kind, per position.

        What it lacks is noted as refused, by node kind.
        """
        layer, attention = self.layers[number], run.attention_module
        refused = self.inspection.refused
        lacking: dict[str, str] = {}
        neurons = 0
        try:
            neurons = find_down_projection(layer, calls, attention, x, run.mixtures)
        except NotImplementedError as error:
            lacking["neuron"] = str(error)
        try:
            mlp = neurons > 0 or "neuron" in lacking
            lacking |= find_writes(layer, calls, attention, x, out, mlp)
        except NotImplementedError as error:
            lacking |= dict.fromkeys(("attn_out", "mlp_out", "graddrop"), str(error))
        if neurons == 0 and (layer.mlp_write is not None or "mlp_out" in lacking):
            lacking.setdefault("neuron", "has no down projection")
        refused.update({kind: f"layer {number} {why}" for kind, why in lacking.items()})
        heads = 0 if run.q is None else run.q.shape[1]
        kv_heads = 0 if run.k is None else run.k.shape[1]
        return {
            "q": heads,
            "k": kv_heads,
            "v": kv_heads,
            "z": heads,
            "neuron": neurons,
            "attn_out": int(layer.attn_write is not None),
            "mlp_out": int(layer.mlp_write is not None),
        }

    def _count(self, counts: Sequence[dict[str, int]]) -> None:
        """Note the nodes of each kind, of each layer where layers differ."""
        found = self.inspection
        for kind in counts[0]:
            of_layers = tuple(count[kind] for count in counts)
            if not any(of_layers):
                found.refused.setdefault(kind, "no layer has any")
            elif len(set(of_layers)) > 1:
                found.counts[kind] = of_layers
        found.neurons = max(count["neuron"] for count in counts)

    def _compare_with_eager(self, ids: Tensor, streams: Sequence[Tensor], own: Tensor) -> None:
        """Refuse a model that, taken apart, is not what its own eager code computes.

        streams: every layer's input and the last one's output, (1, positions, hidden). Layer by layer, the eager layer
        must give the same output on the same input, so that rounding does not pile up with depth; and eager layers
        one after the other must give the model's own logits.
        """
        with self.implementation("eager"), torch.no_grad():
            if not bool(torch.isfinite(own).all()):
                raise ValueError(
                    f"model gives logits that are not finite on the tokens {ids[0].tolist()}"
                )
            x, arguments = self.enter(ids)
            for number, layer in enumerate(self.layers):
                args, kwargs, _ = arguments[number]
                eager = first_tensor(layer.module(streams[number], *args, **kwargs))
                self._check_close(f"layer {number}'s output", streams[number + 1], eager)
                x = first_tensor(layer.module(self.moved(x, number), *args, **kwargs))
            self._check_close("logits", self.logits(x), own)

    @staticmethod
    def tolerance(own: Tensor) -> float:
        rounding = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2}
        return rounding.get(own.dtype, 5e-2)

    @staticmethod
    def error(ours: Tensor, own: Tensor) -> float:
        """The largest difference, as a share of the largest value."""
        return float((ours.to(own.device) - own).abs().max() / own.abs().max().clamp(min=1e-30))

    def _check_close(self, what: str, ours: Tensor, own: Tensor) -> None:
        error = self.error(ours, own)
        if not error <= self.tolerance(own):
            raise NotImplementedError(
                f"{self.name} is not served: taken apart, its {what} differ from its own by {error:.1e} of the largest"
                f"{hooked(self.model)}"
            )

    def _check_gradients(self) -> None:
        """See that cotangents get through every kind of layer."""
        with self.plugged(), torch.enable_grad():
            x, arguments = self.enter(self.short_prompt())
            x = x.detach().requires_grad_()
            for number in self.first_of_each_kind:
                run = LayerRun(backend=self.backend, cut=True)
                try:
                    out = self.run_layer(number, x, arguments[number], run)
                    gradient = torch.autograd.grad(out.sum(), x)[0]
                except RuntimeError as error:
                    reason = str(error).splitlines()[0]
                    raise NotImplementedError(
                        f"{self.name} is not served: no gradient flows through its layers (quantised weights?): {reason}"
                    ) from error
                if not bool(torch.isfinite(gradient).all()):
                    raise ValueError(f"model gives gradients that are not finite in layer {number}")

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
        only: dict[str, tuple[int, ...]] = {}
        for dictionary in self.dictionaries:
            for kind, width in zip(dictionary.kinds, (dictionary.features, 1), strict=True):
                widths[kind] = width
                only[kind] = (*only.get(kind, ()), dictionary.layer)
        return NodeSpace(
            found.layers,
            positions,
            {kind: widths[kind] for kind in self.kinds if kind in kinds},
            {kind: counts for kind, counts in found.counts.items() if kind in kinds},
            {kind: layers for kind, layers in only.items() if kind in kinds},
        )

    # ---- dictionaries

    @property
    def kinds(self) -> tuple[str, ...]:
        """Every node kind that can be asked for: those of all models, and those of the dictionaries."""
        own = dict.fromkeys(kind for d in self.dictionaries for kind in d.kinds)
        return (*KINDS, *own)

    def asked(self, kinds: Sequence[str]) -> tuple[Dictionary, ...]:
        """The dictionaries that have nodes of these kinds."""
        return tuple(d for d in self.dictionaries if not set(d.kinds).isdisjoint(kinds))

    def visited(self, kinds: Sequence[str]) -> tuple[str, ...]:
        """The kinds whose values a layer must show for nodes of these kinds."""
        places = {d.seat[1] for d in self.asked(kinds)}
        return tuple(kind for kind in KINDS if kind in kinds or kind in places)

    def lowest(self, kinds: Sequence[str]) -> int:
        """The layer below which none has nodes of these kinds: not 0 where all are those of dictionaries."""
        seats = [0 if kind in KINDS else self.inspection.layers for kind in kinds]
        return min([*seats, *(d.seat[0] for d in self.asked(kinds))], default=0)

    def add_dictionary(self, dictionary: Dictionary) -> Dictionary:
        """Keep a dictionary, tried on a few tokens; Engine.add_dictionary says what it raises."""
        if self.shares.group is not None:
            raise NotImplementedError(
                f"dictionaries are not served on {self.name} while processes share it"
            )
        layers, (number, kind) = self.inspection.layers, dictionary.seat
        if not 0 <= dictionary.layer < layers:
            raise ValueError(f"layer must be in [0, {layers}), got {dictionary.layer}")
        if kind != "resid_pre":
            self.space(1, (kind,)).check(Node(kind, number, 0))
        same = [d for d in self.dictionaries if d.name == dictionary.name]
        if any(d.layer == dictionary.layer for d in same):
            raise ValueError(
                f"name must be another one for a second dictionary of layer {dictionary.layer}, got {dictionary.name!r}"
            )
        x = side_by_side(kind, self._values_at(number, kind))[0]
        with torch.no_grad():
            found = dictionary.learnt(x, self.tolerance(x))
        for other in same:
            if (other.site, other.features) != (found.site, found.features):
                raise ValueError(
                    f"name {found.name!r} is that of {other.features} features at {other.site} (layer {other.layer}): give "
                    f"these {found.features} features at {found.site} another name"
                )
        self.dictionaries = sorted([*self.dictionaries, found], key=lambda d: d.layer)
        return found

    def _values_at(self, number: int, kind: str) -> Tensor:
        """A kind's values in a layer, where it runs, on a few tokens; before the layer behind the last one, the last one's output."""
        seen: list[Tensor] = []

        def keep(name: str, value: Tensor) -> Tensor:
            if name == kind:
                seen.append(value)
            return value

        with self.plugged(), torch.no_grad():
            x, arguments = self.enter(self.short_prompt())
            last = number if kind == "resid_pre" else number + 1
            for layer in range(last):
                run = LayerRun(self.backend, keep, kinds=(kind,))
                x = self.run_layer(layer, x, arguments[layer], run)
        return self.moved(x, number) if kind == "resid_pre" else seen[-1]
