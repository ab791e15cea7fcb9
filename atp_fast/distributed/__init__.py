"""In: an engine and many pairs. Out: one Attribution, from shards that survive a kill (docs/scaling.md).

May import: engine and what stands before it.
"""

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
