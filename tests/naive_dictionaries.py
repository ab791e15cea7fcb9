"""Dictionaries' nodes by their definitions: whole passes of the plain model, hooks, autograd; nothing of hf/ and the sweep.

Each pair is run alone. At a dictionary's place the value is replaced by decode(f) + error, both leaves of the graph; GradDrop
runs the model once per dropped layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atp_fast import PromptPairs
from atp_fast.metrics import Metric
from atp_fast.nodes import Node
from naive_patching import Key, _Hooked, _patch

Map = Callable[[Tensor], Tensor]


class Given(NamedTuple):
    """A dictionary as it is given to the engine."""

    layer: int
    site: str
    encode: Map
    decode: Map
    name: str

    def key(self) -> Key:
        return self.site, self.layer

    def rows(self, x: Tensor) -> Tensor:
        """Its values, (positions, width), of one prompt."""
        return (x.transpose(1, 2).flatten(2) if self.site == "z" else x)[0]

    def back(self, rows: Tensor, like: Tensor) -> Tensor:
        if self.site != "z":
            return rows[None]
        batch, heads, positions, dim = like.shape
        return rows.reshape(batch, positions, heads, dim).transpose(1, 2)


class Sources(NamedTuple):
    """Corrupted position of each clean one of a pair, -1 where none stands for it, and the nodes' column of each."""

    source: list[int]
    column: list[int]


def by_position(pairs: PromptPairs, row: int) -> Sources:
    length, start = int(pairs.lengths[row]), int(pairs.starts[row])
    return Sources(list(range(length)), [start + t for t in range(length)])


class Naive(_Hooked):
    """The plain model, with what is behind its layers seen too."""

    @contextmanager
    def running_on(self) -> Iterator[None]:
        with self.running():
            hooks = [
                layer.register_forward_hook(self._behind(number))
                for number, layer in enumerate(self.layers)
            ]
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()

    def _behind(self, number: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if isinstance(output, tuple):
                return self.change("resid_post", number, output[0]), *output[1:]
            return self.change("resid_post", number, output)

        return hook

    def seen(self, ids: Tensor) -> dict[Key, Tensor]:
        found: dict[Key, Tensor] = {}

        def note(kind: str, layer: int, x: Tensor) -> Tensor:
            found[kind, layer] = x
            return x

        with torch.no_grad():
            self.run(ids, note)
        return found


def naive_features(
    model: PreTrainedModel,
    pairs: PromptPairs,
    metric: Metric,
    dictionaries: Sequence[Given],
    graddrop: bool,
    sources: Callable[[PromptPairs, int], Sources] = by_position,
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """(scores, signed effects) of every pair: kind -> (layers that have it, columns, nodes)."""
    hooked, scores, effects = Naive(model), [], []
    with hooked.running_on():
        for row in range(len(pairs)):
            pair = pairs[torch.tensor([row])]
            at = sources(pairs, row)
            signed = _signed(hooked, pair, metric, dictionaries, None, at, pairs.width)
            effects.append(_stacked(dictionaries, signed))
            score = {key: x.abs() for key, x in signed.items()}
            if graddrop:
                layers = len(hooked.layers)
                drops = [
                    _signed(hooked, pair, metric, dictionaries, layer, at, pairs.width)
                    for layer in range(layers)
                ]
                score = {
                    (number, end): sum(drop[number, end].abs() for drop in drops)
                    / (layers if dictionaries[number].site.startswith("resid") else layers - 1)
                    for number, end in signed
                }
            scores.append(_stacked(dictionaries, score))
    return scores, effects


def _stacked(
    dictionaries: Sequence[Given], tables: Mapping[tuple[int, str], Tensor]
) -> dict[str, Tensor]:
    found: dict[str, list[tuple[int, Tensor]]] = {}
    for (number, end), table in tables.items():
        given = dictionaries[number]
        found.setdefault(given.name + end, []).append((given.layer, table))
    return {
        kind: torch.stack([table for _, table in sorted(rows, key=lambda row: row[0])])
        for kind, rows in found.items()
    }


def _signed(
    hooked: Naive,
    pair: PromptPairs,
    metric: Metric,
    dictionaries: Sequence[Given],
    dropped: int | None,
    at: Sources,
    columns: int,
) -> dict[tuple[int, str], Tensor]:
    ids, other = (
        x[mask][None]
        for x, mask in (
            (pair.clean_ids, pair.attention_mask),
            (pair.corrupted_ids, pair.corrupted_attention_mask),
        )
    )
    corrupted = hooked.seen(other)
    leaves: dict[int, tuple[Tensor, Tensor]] = {}

    def change(kind: str, layer: int, x: Tensor) -> Tensor:
        for number, given in enumerate(dictionaries):
            if given.key() == (kind, layer):
                rows = given.rows(x)
                with torch.no_grad():
                    features = given.encode(rows)
                    error = rows - given.decode(features)
                leaf = leaves[number] = features.requires_grad_(), error.requires_grad_()
                # the value, and the gradient by it, stay what they are
                x = x + given.back(given.decode(leaf[0]) + leaf[1] - rows.detach(), x)
        return x

    logits = hooked.run(ids, change, dropped)
    value = metric(logits[:, -1:], pair, None).sum()
    wanted = [leaf for number in sorted(leaves) for leaf in leaves[number]]
    grads = iter(torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True))
    found = {}
    live = [t for t, source in enumerate(at.source) if source >= 0]
    for number in sorted(leaves):
        given = dictionaries[number]
        rows = given.rows(corrupted[given.key()])[[at.source[t] for t in live]]
        with torch.no_grad():
            features = given.encode(rows)
            error = rows - given.decode(features)
        for end, own, to in zip(
            (".features", ".error"), leaves[number], (features, error), strict=True
        ):
            effect = (to - own.detach()[live]) * next(grads)[live]
            effect = effect if end == ".features" else effect.sum(-1, keepdim=True)
            table = effect.new_zeros(columns, effect.shape[1])
            table.index_add_(0, torch.tensor([at.column[t] for t in live]), effect)
            found[number, end] = table
    return found


def naive_patched(
    model: PreTrainedModel,
    pairs: PromptPairs,
    subsets: Sequence[Sequence[Node]],
    metric: Metric,
    dictionaries: Sequence[Given],
) -> Tensor:
    """Signed effects (pairs, subsets) of patching, the metric being one of the last position."""
    hooked, found = Naive(model), []
    with hooked.running_on(), torch.no_grad():
        for row in range(len(pairs)):
            pair, at = pairs[torch.tensor([row])], by_position(pairs, row)
            corrupted = hooked.seen(pair.corrupted_ids[pair.attention_mask][None])
            ids = pair.clean_ids[pair.attention_mask][None]
            before = metric(hooked.run(ids, lambda kind, layer, x: x)[:, -1:], pair, None)
            values = []
            for subset in subsets:
                plain = [node for node in subset if "." not in node.kind]
                own = _patch([plain], int(pairs.starts[row]), ids.shape[1], corrupted)

                def change(
                    kind: str,
                    layer: int,
                    x: Tensor,
                    own: Any = own,
                    subset: Sequence[Node] = subset,
                    corrupted: dict[Key, Tensor] = corrupted,
                    at: Sources = at,
                ) -> Tensor:
                    x = own(kind, layer, x)
                    for given in dictionaries:
                        if given.key() == (kind, layer):
                            x = _exchanged(given, x, corrupted[given.key()], subset, at)
                    return x

                logits = hooked.run(ids, change)
                values.append(metric(logits[:, -1:], pair, None) - before)
            found.append(torch.cat(values))
    return torch.stack(found)


def _exchanged(
    given: Given, x: Tensor, corrupted: Tensor, subset: Sequence[Node], at: Sources
) -> Tensor:
    rows, to = given.rows(x).clone(), given.rows(corrupted)
    for t, column in enumerate(at.column):
        nodes = [n for n in subset if (n.layer, n.position) == (given.layer, column)]
        features = [n.index for n in nodes if n.kind == given.name + ".features"]
        error = any(n.kind == given.name + ".error" for n in nodes)
        if features or error:
            own, other = given.encode(rows[t : t + 1]), given.encode(to[t : t + 1])
            rest = rows[t : t + 1] - given.decode(own)
            if error:
                rest = to[t : t + 1] - given.decode(other)
            own[:, features] = other[:, features]
            rows[t : t + 1] = given.decode(own) + rest
    return given.back(rows, x)
