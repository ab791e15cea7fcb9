"""Effects of a dictionary's features and error terms, and values in which some of them are exchanged.

The value at the dictionary's place is x = decode(f) + error: f is a leaf and the error held, so that what follows sees x as it
is. Features outnumber everything else in a layer: positions are taken in blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atp_fast.attribution.memory import SweepPlan
from atp_fast.attribution.scores import Place, Scores
from atp_fast.hf import Dictionary, Plug, side_by_side


def exchanged(
    dictionary: Dictionary, x: Tensor, corrupted: Tensor, features: Tensor, errors: Tensor
) -> Tensor:
    """Values x (rows, width) with some features and error terms of the other run's values `corrupted`.

    features: numbers of row and feature of those to exchange, (2, exchanged); errors: bool, (rows,).
    """
    to, own = dictionary.encode(corrupted), dictionary.encode(x)
    rows, index = features
    mixed = own.clone()
    mixed[rows, index] = to[rows, index]
    before = dictionary.decode(own)
    change = dictionary.decoded(mixed, x) - before
    if bool(errors.any()):
        error = corrupted - dictionary.decoded(to, x) - (x - before)
        change = change + torch.where(errors[:, None], error, 0)
    return (x + change).to(x.dtype)


class FeatureEffects:
    """Adds the effects of dictionaries' nodes on a batch of pairs to the scores."""

    def __init__(
        self, plug: Plug, scores: Scores, plan: SweepPlan, place: Place, spans: Tensor | None
    ) -> None:
        """spans: which positions each span sums, as Batch has them."""
        self.scores, self.place, self.spans = scores, place, spans
        self.kinds, self.backend = scores.space.kinds, plug.backend
        self.dictionaries, self._plan = plug.asked(self.kinds), plan

    def stand_at(self, layer: int, kind: str) -> bool:
        """Whether there is a dictionary where a kind of a layer has its values."""
        return any(d.seat == (layer, kind) for d in self.dictionaries)

    def add(
        self,
        seat: tuple[int, str],
        grad: Tensor,
        first: int,
        clean: Tensor,
        corrupted: Tensor,
        chunk: int,
        added: dict[str, int],
    ) -> None:
        """Add the effects of the dictionaries at a place (layer, kind) under cotangents `first`..., `chunk` at a time.

        grad: gradients by the clean values, (C, *their shape); clean, corrupted: the values; added: by kind and block of
        positions, the cotangents whose effects are in the scores.
        """
        if not self.stand_at(*seat):
            return
        grad, clean, corrupted = (side_by_side(seat[1], x) for x in (grad, clean, corrupted))
        for dictionary in self.dictionaries:
            for i in range(0, len(grad) if dictionary.seat == seat else 0, chunk):
                part = grad[i : i + chunk]
                self._add(dictionary, part, first + i, clean, corrupted, added)

    def _add(
        self,
        dictionary: Dictionary,
        grad: Tensor,
        first: int,
        clean: Tensor,
        corrupted: Tensor,
        added: dict[str, int],
    ) -> None:
        pairs, positions = clean.shape[:2]
        step = max(1, self._plan.features // (dictionary.features * self._plan.chunk * pairs))
        sums: dict[str, Tensor] = {}
        for begin in range(0, positions, step):
            end = min(begin + step, positions)
            block = slice(begin, end)
            parts = grad[:, :, block], clean[:, block], corrupted[:, block]
            for kind, slope, own, other in self._parts(dictionary, *parts):
                if self.spans is None:
                    name = f"{kind} {dictionary.layer} from {begin}"
                    place = self.place.part(begin, end)
                    self._put(dictionary, kind, name, place, first, slope, (own, other), added)
                else:
                    effects = slope * (other - own)
                    if kind == dictionary.kinds[1]:
                        effects = effects.sum(-1, keepdim=True)
                    spans = self.spans[..., block]
                    effects = torch.where(spans.any(1)[..., None], effects, 0)
                    sums[kind] = sums.get(kind, 0) + spans.to(effects.dtype) @ effects
        for kind, effects in sums.items():
            name = f"{kind} {dictionary.layer}"
            self._put(dictionary, kind, name, self.place, first, effects, None, added)

    def _parts(
        self, dictionary: Dictionary, grad: Tensor, clean: Tensor, corrupted: Tensor
    ) -> list[tuple[str, Tensor, Tensor, Tensor]]:
        """Of each kind asked for: gradients (C, ...), and the parts of both runs' values (pairs, positions, width)."""
        x, other = clean.flatten(0, 1), corrupted.flatten(0, 1)
        features, error = dictionary.kinds
        found: list[tuple[str, Tensor, Tensor, Tensor]] = []

        def keep(kind: str, *tensors: Tensor) -> None:
            wide = (t.to(self.scores.dtype) for t in tensors)
            slope, own, to = (t.reshape(*t.shape[:-2], *clean.shape[:2], -1) for t in wide)
            found.append((kind, slope, own, to))

        with torch.no_grad():
            to, own = dictionary.encode(other), dictionary.encode(x)
        with torch.enable_grad():
            leaf = own.detach().requires_grad_()
            values = dictionary.decode(leaf)
        with torch.no_grad():
            if features in self.kinds:
                cotangents = grad.flatten(1, 2).to(values.dtype)
                keep(features, _slopes(values, leaf, cotangents), own, to)
            if error in self.kinds:
                errors = x - values.detach(), other - dictionary.decoded(to, x)
                keep(error, grad.flatten(1, 2), *errors)
        return found

    def _put(
        self,
        dictionary: Dictionary,
        kind: str,
        name: str,
        place: Place,
        first: int,
        grad: Tensor,
        values: tuple[Tensor, Tensor] | None,
        added: dict[str, int],
    ) -> None:
        """Scores.add for what is not yet in the scores, which it is after a try that ran out of memory later on."""
        known = max(added.get(name, 0) - first, 0)
        if known < len(grad):
            self.scores.add(
                kind,
                dictionary.layer,
                place,
                first + known,
                grad[known:],
                values,
                seat=dictionary.seat,
                backend=self.backend,
            )
            added[name] = first + len(grad)


def _slopes(values: Tensor, leaf: Tensor, cotangents: Tensor) -> Tensor:
    """Gradients by the leaf, (C, *its shape), for each cotangent of the values."""

    def slope(cotangent: Tensor) -> Tensor:
        return torch.autograd.grad(values, leaf, cotangent, retain_graph=True)[0]

    if len(cotangents) == 1:
        return slope(cotangents[0])[None]
    return torch.func.vmap(slope)(cotangents)
