"""One run by the processes that torchrun started, or by this one alone.

Processes claim one shard after another from a counter in torch.distributed's store, so that uneven shards balance,
and meet in the run's folder, which all must see. No tensor travels between them. Where several share one model, they are
a group: its members take the same shards, and the first of them writes.
"""

from __future__ import annotations

import itertools
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

from atp_fast.attribution.question import Question
from atp_fast.distributed.peers import Peers
from atp_fast.distributed.shards import (
    RESULT,
    SHARD_SIZE,
    ShardError,
    Shards,
    compute,
    describe_engine,
    differences,
    named,
)
from atp_fast.engine import Engine
from atp_fast.metrics import MetricLike
from atp_fast.prompts.directions import Direction
from atp_fast.prompts.pairs import PromptPairs
from atp_fast.results import Attribution

_PAUSE = 0.05
_calls = itertools.count()


def attribute_sharded(
    engine: Engine,
    pairs: PromptPairs,
    folder: str | os.PathLike[str],
    *,
    metric: MetricLike = Question.metric,
    method: str = Question.method,
    nodes: Sequence[str] = Question.nodes,
    direction: Direction = Question.direction,
    per_pair: bool = Question.per_pair,
    shard_size: int = SHARD_SIZE,
    progress: bool | None = None,
    timeout: float = 3600.0,
) -> Attribution:
    """Engine.attribute over shards of the pairs, by all processes that torchrun started, or by this one alone.

    Every process calls it with the same arguments and gets the same result, bit for bit whatever their number.
    folder: where finished shards lie, on a disk that all processes see; a run that was killed goes on from there;
    metric: as in Engine.attribute, known by its name when the run goes on, and not one that sees all pairs at once;
    shard_size: pairs per shard; timeout: seconds to wait for the other processes' next shard.
    Processes that share one model (load_model(tensor_parallel=...)) take each shard together.
    Raises ValueError, before any work, naming what differs if the folder holds another run; ShardError, in every
    process, naming the rank and the pair that failed, counted from 0; TimeoutError naming ranks that fell silent.
    """
    question = Question(metric, method, nodes, direction, per_pair)
    shards = Shards(folder, pairs, question, describe_engine(engine, pairs), shard_size)
    group = engine.plug.shares.group
    with _team(1 if group is None else group.size, timeout) as team:
        todo = team.agree(shards)
        with progress_bar(progress if team.rank == 0 else False, shards, todo) as bar:
            before = bar.n

            def advance() -> None:
                bar.update(before + team.counted - bar.n)

            for number in team.claims(todo):
                rows = shards.rows[number]
                found = compute(
                    *(engine, pairs, rows, question, f"rank {team.rank}"), team.peers(number)
                )
                if team.leads:
                    shards.write(number, found)
                    team.count(len(rows))
                advance()
            team.wait_for_all(shards, todo, advance)
        return team.reduce(shards)


def launched() -> bool:
    """Whether torchrun, or a launcher that sets the same variables, started this process among others."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)


def rank() -> int:
    """This process's number among those that were launched; 0 if it is alone."""
    return int(os.environ["RANK"]) if launched() else 0


def to_local_device(model: nn.Module) -> None:
    """Move a model to the GPU of this process on its machine, by LOCAL_RANK; without one it stays where it is."""
    if torch.cuda.is_available():
        model.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))


class _Team:
    """This process and the others of a run, and the store they talk through.

    members: so many processes, of neighbouring ranks, share one model.
    """

    def __init__(
        self, rank: int, size: int, store: Store, timeout: float, members: int = 1
    ) -> None:
        self.rank, self.size, self.store, self.timeout = rank, size, store, timeout
        first = rank - rank % members
        self.group = range(first, first + members)

    @property
    def leads(self) -> bool:
        """Whether this process speaks for those that share its model."""
        return self.rank == self.group[0]

    def peers(self, number: int) -> Peers:
        """Those that take this shard together."""
        return Peers(self.store, f"shard {number}", self.rank, self.group)

    def agree(self, shards: Shards) -> list[int]:
        """The shards that are to be done. Rank 0 opens the folder; what it finds wrong is raised by every rank."""
        said: Any = None
        if self.rank == 0:
            try:
                said = (shards.begin(), shards.manifest)
            except (ValueError, OSError) as error:
                said = error
            self.store.set("plan", pickle.dumps(said).hex())
        else:
            self._wait(lambda: bool(self.store.check(["plan"])), lambda: "rank 0 opens the folder")
            said = pickle.loads(bytes.fromhex(self.store.get("plan").decode()))
        if isinstance(said, Exception):
            raise said
        todo, manifest = said
        if found := differences(manifest, shards.manifest):
            raise ValueError(
                f"every rank must be given the same run, got on rank {self.rank} another than on rank 0: {found} "
                "(there: rank 0)"
            )
        return list(todo)

    def claims(self, todo: Sequence[int]) -> Iterator[int]:
        """Shards that no other process has claimed, one at a time; those who share a model take the same ones."""
        for turn in itertools.count():
            key = f"turn {turn} of rank {self.group[0]}"
            if self.leads:
                place = self.store.add("claimed", 1) - 1
                if place < len(todo):
                    self.check()
                    self.store.set(f"claim {todo[place]}", str(self.rank))
                self.store.set(key, str(place))
            else:
                self._wait(
                    lambda key=key: bool(self.store.check([key])),  # type: ignore[misc]
                    lambda: f"rank {self.group[0]} claims none",
                )
                place = int(self.store.get(key))
            if place >= len(todo):
                return
            yield todo[place]

    def count(self, pairs: int) -> None:
        self.store.add("pairs", pairs)

    @property
    def counted(self) -> int:
        """Pairs done by all processes since the start."""
        return int(self.store.add("pairs", 0))

    def failure(self, error: BaseException) -> str:
        if isinstance(error, ShardError):
            return str(error)
        return f"rank {self.rank} failed: {type(error).__name__}: {error}"

    def fail(self, error: BaseException) -> None:
        """Let the others know, so that they stop after the shard that they are at."""
        if not self.store.check(["failed"]):
            self.store.set("failed", self.failure(error))

    def check(self) -> None:
        if self.store.check(["failed"]):
            raise ShardError(self.store.get("failed").decode())

    def wait_for_all(
        self, shards: Shards, todo: Sequence[int], advance: Callable[[], object]
    ) -> None:
        wanted = shards.size(todo)

        def silent() -> str:
            missing = [number for number in todo if not shards.path(number).exists()]
            owners = {
                number: self.store.get(f"claim {number}").decode()
                for number in missing
                if self.store.check([f"claim {number}"])
            }
            return "; ".join(
                f"rank {owner} has {named(shards.rows[n])}" for n, owner in owners.items()
            )

        self._wait(lambda: self.counted >= wanted, silent, advance)

    def reduce(self, shards: Shards) -> Attribution:
        """All shards' result: rank 0 adds them up and writes the sum, the others read it."""
        path = shards.folder / RESULT
        if self.rank == 0:
            found = shards.reduce()
            if self.size > 1:
                found.save(path)
            self.store.set("reduced", "yes")
        else:
            self._wait(
                lambda: bool(self.store.check(["reduced"])), lambda: "rank 0 adds up the shards"
            )
            found = Attribution.load(path)
        # rank 0 may be home of the store: it leaves last
        self.store.add("left", 1)
        if self.rank == 0:
            self._wait(lambda: self.store.add("left", 0) == self.size, lambda: "not all have read")
        return found

    def _wait(
        self,
        done: Callable[[], bool],
        silent: Callable[[], str],
        advance: Callable[[], object] = lambda: None,
    ) -> None:
        """Until done; raises ShardError if a process fails, TimeoutError if none finishes a shard in time."""
        before, since = self.counted, time.monotonic()
        while not done():
            self.check()
            now = self.counted
            if now != before:
                before, since = now, time.monotonic()
                advance()
            elif time.monotonic() - since > self.timeout:
                raise TimeoutError(f"no shard was finished in {self.timeout:g} s: {silent()}")
            time.sleep(_PAUSE)
        advance()


@contextmanager
def _team(members: int, timeout: float) -> Iterator[_Team]:
    """This process's team, of which `members` at a time share a model."""
    if not (launched() or dist.is_initialized()):
        yield _Team(0, 1, dist.HashStore(), timeout)  # type: ignore[attr-defined]
        return
    if launched():  # all that were, also where only those that share a model have a process group
        store, number, size = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
    else:
        store = dist.distributed_c10d._get_default_store()
        number, size = dist.get_rank(), dist.get_world_size()
    # a prefix per call: the store outlives it
    team = _Team(number, size, PrefixStore(f"atp_fast/{next(_calls)}", store), timeout, members)
    try:
        yield team
    except BaseException as error:
        with suppress(RuntimeError):
            team.fail(error)
        if isinstance(error, RuntimeError) and not isinstance(error, ShardError):
            raise ShardError(team.failure(error)) from error
        raise


def progress_bar(progress: bool | None, shards: Shards, todo: Sequence[int]) -> tqdm[Any]:
    """A bar over pairs, with those of an earlier run; without an explicit choice only on a terminal."""
    total = len(shards.pairs)
    return tqdm(
        total=total,
        initial=total - shards.size(todo),
        desc=f"{shards.question.method} pairs",
        disable=None if progress is None else not progress,
        leave=False,
    )
