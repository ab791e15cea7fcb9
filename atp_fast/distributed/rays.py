"""The same run as tasks of a Ray cluster: Ray places them, and starts those of a dead worker again."""

from __future__ import annotations

import importlib
import os
import socket
import uuid
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from torch import Tensor

from atp_fast.attribution.question import Question
from atp_fast.distributed.processes import progress_bar
from atp_fast.distributed.ray_groups import Groups
from atp_fast.distributed.shards import (
    SHARD_SIZE,
    ShardError,
    Shards,
    compute,
    describe_engine,
    named,
)
from atp_fast.engine import Engine
from atp_fast.metrics import MetricLike
from atp_fast.prompts.directions import Direction
from atp_fast.prompts.pairs import PromptPairs
from atp_fast.results import Attribution

_engines: dict[str, Engine] = {}


def ray_sweep(
    make_engine: Callable[[], Engine],
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
    cpus: float = 1,
    gpus: float = 0,
    retries: int = 3,
    tensor_parallel: int = 1,
) -> Attribution:
    """Engine.attribute over shards of the pairs, one Ray task each; the result of attribute_sharded, bit for bit.

    make_engine: called once in each of Ray's workers, so it should load the model there and not carry it along;
    folder: where finished shards lie, written by this process only; a run that was killed goes on from there;
    cpus, gpus: what one worker takes of the cluster, which bounds how many work at once;
    retries: how often a shard is tried again after its worker died. The other options are those of attribute_sharded.
    tensor_parallel: so many workers at a time share a model, which make_engine loads with the same (load_model).
    Joins the cluster that ray.init joined; else it starts Ray on this machine and stops it in the end.
    Raises ImportError naming the extra if Ray is missing, ValueError if the folder holds another run, ShardError
    naming the worker and the pair that failed, or the pairs whose worker died too often.
    """
    ray = _ray()
    question = Question(metric, method, nodes, direction, per_pair)
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, include_dashboard=False)
    try:
        resources = {"num_cpus": cpus, "num_gpus": gpus}
        maker, shared, asked = ray.put(make_engine), ray.put(pairs), ray.put(question)
        if tensor_parallel > 1:
            with closing(Groups(ray, tensor_parallel, resources, maker, shared)) as groups:
                shards = Shards(folder, pairs, question, groups.describe(), shard_size)
                todo = shards.begin()
                with progress_bar(progress, shards, todo) as bar:
                    for number, found in groups.run(shards, todo, asked, retries):
                        shards.write(number, found)
                        bar.update(len(shards.rows[number]))
            return shards.reduce()
        describe, task = (
            ray.remote(**resources, max_retries=retries)(f) for f in (_describe, _compute)
        )
        key = uuid.uuid4().hex
        facts = _get(ray, describe.remote(key, maker, shared), "the model")
        shards = Shards(folder, pairs, question, facts, shard_size)
        todo = shards.begin()
        waiting = {
            task.remote(key, maker, shared, shards.rows[number], asked): number for number in todo
        }
        try:
            with progress_bar(progress, shards, todo) as bar:
                while waiting:
                    (ready,), _ = ray.wait(list(waiting), num_returns=1)
                    number = waiting.pop(ready)
                    rows = shards.rows[number]
                    shards.write(number, _get(ray, ready, named(rows)))
                    bar.update(len(rows))
        finally:
            for unfinished in waiting:
                ray.cancel(unfinished)
        return shards.reduce()
    finally:
        if started:
            ray.shutdown()


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ImportError("ray_sweep needs ray: pip install 'atp_fast[ray]'") from error


def _engine(key: str, make_engine: Callable[[], Engine]) -> Engine:
    """The engine of this worker, made when the first of a run's tasks comes."""
    if key not in _engines:
        _engines.clear()
        _engines[key] = make_engine()
    return _engines[key]


def _describe(key: str, make_engine: Callable[[], Engine], pairs: PromptPairs) -> dict[str, Any]:
    return describe_engine(_engine(key, make_engine), pairs)


def _compute(
    key: str,
    make_engine: Callable[[], Engine],
    pairs: PromptPairs,
    rows: Tensor,
    question: Question,
) -> Attribution:
    who = f"worker {os.getpid()} on {socket.gethostname()}"
    return compute(_engine(key, make_engine), pairs, rows, question, who)


def _get(ray: Any, result: Any, what: str) -> Any:
    """A task's result, or the exception that it raised itself; ShardError if its worker died too often."""
    try:
        return ray.get(result)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise ShardError(f"a worker died too often on {what}: {error}") from error
