"""A run on Ray whose model no single worker holds: groups of actors that share it, each group a shard at a time."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from atp_fast.attribution.question import Question
from atp_fast.distributed.peers import GRACE, Peers
from atp_fast.distributed.shards import ShardError, Shards, compute, describe_engine, named
from atp_fast.engine import Engine
from atp_fast.prompts.pairs import PromptPairs
from atp_fast.results import Attribution


class Member:
    """An actor: one of the processes that share a model, as torchrun would have started them."""

    def address(self) -> tuple[str, int]:
        """This machine, and a port that is free on it."""
        with socket.socket() as free:
            free.bind(("", 0))
            return socket.gethostbyname(socket.gethostname()), free.getsockname()[1]

    def open(
        self,
        rank: int,
        size: int,
        where: tuple[str, int],
        make_engine: Callable[[], Engine],
        pairs: PromptPairs,
    ) -> dict[str, Any]:
        """Make this process's part of the engine; what its numbers depend on."""
        known: dict[str, object] = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        # Ray shows an actor its own GPU alone, as number 0
        known |= {"LOCAL_RANK": 0, "MASTER_ADDR": where[0], "MASTER_PORT": where[1]}
        os.environ.update({name: str(value) for name, value in known.items()})
        self._engine, self._pairs, self._turns = make_engine(), pairs, 0
        self._rank, self._ranks = rank, range(size)
        group = self._engine.plug.shares.group
        if group is None or group.size != size:
            holders = 1 if group is None else group.size
            raise ValueError(
                f"make_engine must load its model with tensor_parallel={size}, got one that {holders} processes share"
            )
        return describe_engine(self._engine, pairs)

    def compute(self, rows: Tensor, question: Question) -> Attribution | None:
        """The pairs' Attribution, which the first process hands over."""
        self._turns += 1
        store = PrefixStore("atp_fast/shards", dist.distributed_c10d._get_default_store())
        peers = Peers(store, f"turn {self._turns}", self._rank, self._ranks)
        who = f"process {self._rank} ({os.getpid()} on {socket.gethostname()})"
        found = compute(self._engine, self._pairs, rows, question, who, peers)
        return found if self._rank == 0 else None


class _Group:
    """The actors of one model, and what they are at."""

    def __init__(self, ray: Any, actor: Any, size: int, maker: Any, pairs: Any) -> None:
        self._ray = ray
        self.members = [actor.remote() for _ in range(size)]
        where = ray.get(self.members[0].address.remote())
        self.number = -1  # of the shard that it is at
        self.results = [
            member.open.remote(rank, size, where, maker, pairs)
            for rank, member in enumerate(self.members)
        ]

    def ask(self, number: int, rows: Tensor, question: Any) -> None:
        self.number = number
        self.results = [member.compute.remote(rows, question) for member in self.members]

    def answer(self) -> Any:
        """What the first process answers, once all have; raises _Died, or what a process raised itself."""
        exceptions = self._ray.exceptions
        waiting = {result: member for member, result in enumerate(self.results)}
        failed: dict[int, Any] = {}
        while waiting:
            limit = 2 * GRACE if failed else None  # then the others may wait for ever
            ready, _ = self._ray.wait(list(waiting), num_returns=1, timeout=limit)
            if not ready:
                break
            member = waiting.pop(ready[0])
            try:
                self._ray.get(ready[0])
            except exceptions.RayError as error:
                failed[member] = error
        for member, failure in failed.items():
            if not isinstance(failure, exceptions.RayTaskError):
                raise _Died(
                    f"process {member} of the {len(self.members)} that share the model"
                ) from failure
        for failure in failed.values():
            raise failure.cause from failure
        return self._ray.get(self.results[0])

    def end(self) -> None:
        for member in self.members:
            self._ray.kill(member)


class _Died(Exception):
    """An actor died; the message names it."""


class Groups:
    """The groups of a run, as many as the cluster has room for."""

    def __init__(self, ray: Any, size: int, resources: dict[str, float], *made: Any) -> None:
        """size: processes that share a model; resources: of each; made: the engine's maker and the pairs, in Ray's store."""
        self._ray, self._size, self._made = ray, size, made
        self._actor = ray.remote(**resources)(Member)
        there, wanted = (
            ray.cluster_resources(),
            dict(zip(("CPU", "GPU"), resources.values(), strict=True)),
        )
        room = [int(there.get(k, 0) // (n * size)) for k, n in wanted.items() if n > 0]
        self._most = min(room, default=1)
        if self._most < 1:
            raise ValueError(
                f"tensor_parallel={size} workers of {wanted} must fit into the cluster, which has "
                f"{ {k: there.get(k, 0) for k in wanted} }"
            )
        self._groups: list[_Group] = []

    def _start(self) -> _Group:
        group = _Group(self._ray, self._actor, self._size, *self._made)
        self._groups.append(group)
        return group

    def describe(self) -> dict[str, Any]:
        """What the numbers of the first group's engine depend on."""
        return self._facts(self._start())

    def _facts(self, group: _Group) -> dict[str, Any]:
        try:
            facts: dict[str, Any] = group.answer()
        except _Died as error:
            raise ShardError(
                f"{error} died while its engine was made: {error.__cause__}"
            ) from error
        return facts

    def run(
        self, shards: Shards, todo: list[int], asked: Any, retries: int
    ) -> Iterator[tuple[int, Attribution]]:
        """Every shard's number and Attribution, as they are finished."""
        left, tries = list(reversed(todo)), dict.fromkeys(todo, retries)
        while len(self._groups) < min(self._most, len(todo)):
            self._start()
        for group in self._groups[1:]:
            self._facts(group)
        idle = list(self._groups)
        while left or len(idle) < len(self._groups):
            while left and idle:
                number = left.pop()
                idle.pop(0).ask(number, shards.rows[number], asked)
            busy = {r: g for g in self._groups if g not in idle for r in g.results}
            (ready,), _ = self._ray.wait(list(busy), num_returns=1)
            group = busy[ready]
            number = group.number
            try:
                found = group.answer()
            except _Died as error:
                group.end()
                self._groups.remove(group)
                tries[number] -= 1
                if tries[number] < 0:
                    raise ShardError(
                        f"{error} died too often on {named(shards.rows[number])}: {error.__cause__}"
                    ) from error
                left.append(number)
                idle.append(self._start())
                self._facts(idle[-1])
            else:
                idle.append(group)
                yield number, found

    def close(self) -> None:
        for group in self._groups:
            group.end()
