"""Many pairs over many processes: in shards that survive a kill, under torchrun or on Ray (docs/scaling.md)."""

from __future__ import annotations

from atp_fast.distributed.processes import attribute_sharded, launched, rank, to_local_device
from atp_fast.distributed.rays import ray_sweep
from atp_fast.distributed.shards import SHARD_SIZE, ShardError, remove_shards

__all__ = [
    "SHARD_SIZE",
    "ShardError",
    "attribute_sharded",
    "launched",
    "rank",
    "ray_sweep",
    "remove_shards",
    "to_local_device",
]
