"""The shards of a run: cut by the pairs alone, each written whole, reduced in the order of their numbers.

A shard's file is the Attribution of its pairs. The reduction adds mean * count of one shard after the other in
float64, so its bits do not depend on which process computed which shard, nor on when.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from atp_fast._version import __version__
from atp_fast.attribution.question import Question, check_method
from atp_fast.distributed.peers import Peers
from atp_fast.engine import Engine
from atp_fast.files import write_text
from atp_fast.metrics import resolve
from atp_fast.nodes import ERROR, FEATURES, KINDS, check_kinds
from atp_fast.prompts.directions import sign_text
from atp_fast.prompts.pairs import PromptPairs
from atp_fast.results import Attribution
from atp_fast.results.prompts import kept_prompts

SHARD_SIZE = 16
MANIFEST = "manifest.json"
RESULT = "run.safetensors"
_FILES = "[0-9]*.safetensors"


class ShardError(RuntimeError):
    """A shard could not be computed; the message names the process and the pairs."""


def describe_question(
    question: Question, pairs: PromptPairs, kinds: Sequence[str] = KINDS
) -> dict[str, Any]:
    """The options as JSON values; kinds: the node kinds that there are. Raises what Engine.attribute would, and ValueError for a metric that must see all
    pairs at once.
    """
    check_method(question.method)
    sign_text(question.direction)
    metric = resolve(question.metric, pairs)
    if metric.all_pairs_at_once:
        raise ValueError(
            f"metric {metric.name!r} must take (logits, pairs), to be used on one shard after another, "
            "got one that sees the logits of all pairs at once"
        )
    return {
        "metric": metric.name,
        "method": question.method,
        "nodes": list(check_kinds(question.nodes, kinds)),
        "direction": question.direction,
        "per_pair": question.per_pair,
    }


def describe_engine(engine: Engine, pairs: PromptPairs) -> dict[str, Any]:
    """What the numbers of an engine depend on, as JSON values. Raises ValueError for pairs it cannot run."""
    if not isinstance(pairs, PromptPairs):
        raise TypeError(f"pairs must be PromptPairs, got {type(pairs).__name__}")
    engine.check_pairs(pairs)
    group = engine.plug.shares.group
    own = [[d.name, d.layer, d.site, d.features] for d in engine.dictionaries]
    return (
        ({"dictionaries": own} if own else {})
        | {
            "model": engine.model_name,
            "model_class": engine.plug.name,
            "dtype": str(engine.plug.dtype).removeprefix("torch."),
            "backend": engine.backend,
            "precision": engine.precision,
        }
        | ({} if group is None else {"tensor_parallel": group.size})
    )


def cut(pairs: PromptPairs, shard_size: int) -> list[Tensor]:
    """Numbers of the pairs of each shard. Pairs that split late go together: a shard runs its shared prefix once."""
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1, got {shard_size}")
    order = torch.argsort(pairs.split.cpu(), descending=True, stable=True)
    return [rows.sort().values for rows in torch.split(order, shard_size)]


class Shards:
    """The shards of one run and the folder that holds them, one file each beside a manifest.

    rows: numbers of the pairs of each shard; manifest: all that the numbers depend on.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        pairs: PromptPairs,
        question: Question,
        engine: Mapping[str, Any],
        shard_size: int,
    ) -> None:
        self.folder, self.pairs, self.question = Path(folder), pairs, question
        self.rows = cut(pairs, shard_size)
        names = dict.fromkeys(name for name, *_ in engine.get("dictionaries", ()))
        kinds = (*KINDS, *(name + end for name in names for end in (FEATURES, ERROR)))
        columns = pairs.attention_mask.cpu().numpy().tobytes()
        self.manifest = {
            "atp_fast": __version__,
            **engine,
            **describe_question(question, pairs, kinds),
            "pairs": len(pairs),
            "positions": pairs.width,
            "pairs_digest": pairs.digest(),
            "columns_digest": hashlib.sha256(columns).hexdigest(),
            "shard_size": shard_size,
        }

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def size(self, numbers: Sequence[int]) -> int:
        """Pairs in these shards."""
        return sum(len(self.rows[number]) for number in numbers)

    def begin(self) -> list[int]:
        """Open the folder, made where it is missing; returns the numbers of the shards that are still to be done.

        What a killed run left half-written is removed or counts as not done. Raises ValueError naming what differs
        if the folder holds another run, OSError if it cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_manifest()
        for left in self.folder.glob(".*.tmp"):
            left.unlink(missing_ok=True)
        return [number for number in range(len(self.rows)) if not self._is_done(number)]

    def write(self, number: int, found: Attribution) -> None:
        found.save(self.path(number))

    def reduce(self) -> Attribution:
        """The Attribution of all pairs, from all shards, whose files must be there."""
        first = Attribution.load(self.path(0))
        space, kinds = first.space, first.space.kinds
        sums = {
            name: {k: torch.zeros(space.shape(k), dtype=torch.float64) for k in kinds}
            for name in ("contribution", "effect")
        }
        counts = torch.zeros_like(first.counts)
        values = {
            name: torch.zeros(len(self.pairs), dtype=first.clean_value.dtype)
            for name in ("clean_value", "corrupted_value")
        }
        per_pair = None
        if first.per_pair is not None:
            per_pair = {
                k: torch.zeros(len(self.pairs), *space.shape(k), dtype=first.per_pair[k].dtype)
                for k in kinds
            }
        seconds, threads = 0.0, set()
        for number, rows in enumerate(self.rows):
            part = Attribution.load(self.path(number))
            for name, table in sums.items():
                for kind, total in table.items():
                    mean: Tensor = getattr(part, name)[kind]
                    total += mean.double() * part.counts[None, :, None]
            counts += part.counts
            for name, value in values.items():
                value[rows] = getattr(part, name)
            for kind, all_pairs in (per_pair or {}).items():
                assert part.per_pair is not None
                all_pairs[rows] = part.per_pair[kind]
            seconds += float(part.metadata["seconds"])
            threads.add(part.metadata["threads"])
        divisor = counts.clamp(min=1)[None, :, None]
        contribution, effect = (
            {k: (total / divisor).to(first.effect[k].dtype) for k, total in table.items()}
            for table in sums.values()
        )
        directed = self.pairs if first.direction == "noising" else self.pairs.swapped()
        return Attribution(
            contribution=contribution,
            effect=effect,
            per_pair=per_pair,
            space=space,
            counts=counts,
            tokens=directed.column_tokens(),
            prompts=kept_prompts(directed),
            method=first.method,
            metric=first.metric,
            direction=first.direction,
            backend=first.backend,
            model=first.model,
            **values,
            metadata=first.metadata
            | {
                "pairs": str(len(self.pairs)),
                "pairs_digest": str(self.manifest["pairs_digest"]),
                "seconds": f"{seconds:.3f}",
                "shards": str(len(self.rows)),
                "threads": ", ".join(sorted(threads)),
            },
        )

    def _check_manifest(self) -> None:
        path = self.folder / MANIFEST
        if not path.exists():
            if any(self.folder.glob(_FILES)):
                raise ValueError(
                    f"folder must hold the {MANIFEST} of its shards, got none in {str(self.folder)!r}: take an empty "
                    "folder"
                )
            write_text(path, json.dumps(self.manifest, indent=1) + "\n")
            return
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
            found = differences(there, self.manifest)
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"folder must hold a {MANIFEST} of JSON, got {path}: {error}"
            ) from error
        if found:
            raise ValueError(
                f"folder {str(self.folder)!r} must hold shards of this run, got those of another one: {found}; take "
                "another folder, or delete this one"
            )

    def _is_done(self, number: int) -> bool:
        """Whether the shard's file is there, whole, and of these pairs."""
        try:
            with safe_open(self.path(number), framework="pt") as file:
                metadata = json.loads((file.metadata() or {})["metadata"])
        except (SafetensorError, OSError, ValueError, KeyError):
            return False
        return bool(metadata.get("pairs_digest") == self.pairs[self.rows[number]].digest())


def remove_shards(folder: str | os.PathLike[str]) -> None:
    """Delete a run's shards, manifest and result, and their folder if nothing else is in it."""
    place = Path(folder)
    if not (place / MANIFEST).exists():
        return
    for path in (*place.glob(_FILES), place / RESULT, place / MANIFEST):
        path.unlink(missing_ok=True)
    if not any(place.iterdir()):
        place.rmdir()


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Where two manifests differ, in words; empty if nowhere."""
    return ", ".join(
        f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
        for name in dict.fromkeys((*here, *there))
        if there.get(name) != here.get(name)
    )


def compute(
    engine: Engine,
    pairs: PromptPairs,
    rows: Tensor,
    question: Question,
    who: str,
    peers: Peers | None = None,
) -> Attribution:
    """The Attribution of the pairs `rows`. Raises ShardError naming `who` and the pair that fails, counted from 0.

    peers: those that share the model, and do the same: which of them gives no sign is named too.
    """
    try:
        return _ask(engine, pairs[rows], question)
    except Exception as error:
        if peers is not None:
            _check_peers(peers, f"{who} failed on {named(rows)}", error)
        failed, reason = _blame(engine, pairs, rows, question) or (named(rows), error)
        raise ShardError(f"{who} failed on {failed}: {type(reason).__name__}: {reason}") from error


def _check_peers(peers: Peers, what: str, error: Exception) -> None:
    """ShardError unless all that share the model failed, and are there to try each pair with."""
    if (said := peers.told()) is not None:
        raise ShardError(said) from error
    if silent := peers.missing():
        ranks = " and ".join(f"rank {rank}" for rank in silent)
        text = f"{what}: {type(error).__name__}: {error} ({ranks}, of those that share the model, gave no sign: has it died, or does it wait for this one?)"
        peers.tell(text)
        raise ShardError(text) from error


def _ask(engine: Engine, pairs: PromptPairs, question: Question) -> Attribution:
    found = engine.attribute(pairs, **vars(question), progress=False)
    found.metadata["threads"] = str(torch.get_num_threads())
    return found


def _blame(
    engine: Engine, pairs: PromptPairs, rows: Tensor, question: Question
) -> tuple[str, Exception] | None:
    """The first pair that fails even alone, and how."""
    for row in rows.tolist():
        try:
            _ask(engine, pairs[row], question)
        except Exception as error:
            return f"{named([row])}, run alone", error
    return None


def named(rows: Tensor | Sequence[int]) -> str:
    """Pairs by their numbers, runs of neighbours as first-last: "pairs 3, 16-31"."""
    numbers = sorted(int(row) for row in rows)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = (str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"{'pair' if len(numbers) == 1 else 'pairs'} {', '.join(texts)}"
