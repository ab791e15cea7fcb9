"""Exact patching by the engine, against one full forward pass per node, in one process (make bench-patching).

The demo model on the paper's IOI pair. Both patch the same attention nodes, drawn at random from all of the pair's, and
from those that can change anything ("moving": at the first differing token or after it; the engine skips the others).
The engine does it in one call, the naive way in batches of 64 rows, with hooks on the plain model and its own
scaled-dot-product attention. The effects are compared before anything is timed. Both sides run with their defaults. Rows go to
bench/results/patching.csv:
  wall_seconds, cpu_seconds, foreign_cores         of patching all drawn nodes, both once per round
  times_faster_than naive, times_less_cpu_than naive   per round
  largest_difference                               of effects, by the largest effect
  wall_seconds, ... in mode "every attention node" of patching all q, k, v and z nodes of the pair in one call
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from measure import Timing, alone, check_environment, interleaved, timed, write_ratios
from rows import RESULTS, RowFile
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from atp_fast.engine import Engine
from atp_fast.models import DEMO_MODEL, load_model
from atp_fast.nodes import ATTENTION_KINDS, Node
from atp_fast.prompts.pairs import PromptPairs
from atp_fast.prompts.tasks import load_task

AGREEMENT = 1e-4
"""Largest difference of float32 effects, by the largest effect."""


class Naive:
    """Effects of attention nodes on the logit difference of one pair, a full forward pass each."""

    def __init__(self, model: PreTrainedModel, pairs: PromptPairs, batch_size: int) -> None:
        self.model, self.pairs, self.batch_size = model, pairs, batch_size
        self.layers = model.config.num_hidden_layers
        self.corrupted: dict[tuple[str, int], Tensor] = {}
        self.batch: Sequence[Node] | None = None

    def __call__(self, nodes: Sequence[Node]) -> Tensor:
        """Signed effects, (nodes,)."""
        ALL_ATTENTION_FUNCTIONS.register("naive", self._attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register("naive", sdpa_mask)
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation("naive")
        try:
            self.corrupted = {}
            self._values(self.pairs.corrupted_ids, None)
            clean = self._values(self.pairs.clean_ids, [])
            parts = [
                self._values(self.pairs.clean_ids.expand(len(batch), -1), batch)
                for batch in (
                    nodes[i : i + self.batch_size] for i in range(0, len(nodes), self.batch_size)
                )
            ]
        finally:
            self.model.set_attn_implementation(before)
        return torch.cat(parts) - clean

    def _values(self, ids: Tensor, batch: Sequence[Node] | None) -> Tensor:
        """The logit difference of each row; row i is patched at node i of the batch, None records instead."""
        self.batch = batch
        with torch.no_grad():
            logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        wrong = self.pairs.wrong_answer_ids
        assert wrong is not None
        return logits[:, int(self.pairs.answer_ids)] - logits[:, int(wrong)]

    def _patched(self, kind: str, layer: int, value: Tensor) -> Tensor:
        """value: (rows, heads, positions, dim)."""
        if self.batch is None:
            self.corrupted[kind, layer] = value
            return value
        rows = [i for i, n in enumerate(self.batch) if n.kind == kind and n.layer == layer]
        if not rows:
            return value
        heads = [self.batch[i].index for i in rows]
        positions = [self.batch[i].position for i in rows]
        value = value.clone()
        value[rows, heads, positions] = self.corrupted[kind, layer][0, heads, positions]
        return value

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        layer = module.layer_idx
        assert isinstance(layer, int)
        q, k, v = (
            self._patched(kind, layer, x) for kind, x in (("q", query), ("k", key), ("v", value))
        )
        z, _ = sdpa_attention_forward(module, q, k, v, attention_mask, **options)
        return self._patched("z", layer, z.transpose(1, 2)).transpose(1, 2).contiguous(), None


def bench(options: argparse.Namespace) -> None:
    model, tokenizer = load_model(DEMO_MODEL)
    pairs = load_task("ioi_pair", tokenizer)
    engine, naive = Engine(model, backend=options.backend), Naive(model, pairs, options.batch)
    positions = pairs.clean_ids.shape[1]
    every = list(engine.plug.space(positions, ATTENTION_KINDS))
    first = int(pairs.starts + pairs.split)
    moving = [node for node in every if node.position >= first]
    file, shape = RowFile(options.out), {"model": DEMO_MODEL, "T": positions, "B": 1}
    drawn_from = {"attention nodes": every, "moving attention nodes": moving}
    for what, candidates in drawn_from.items():
        nodes = Random(0).sample(candidates, min(options.nodes, len(candidates)))
        compare(
            engine,
            naive,
            pairs,
            nodes,
            options,
            file,
            mode=f"{len(nodes)} {what}",
            shape=shape,
            note=f"{sum(n.position < first for n in nodes)} of the nodes lie before the first differing token",
        )
    if options.every:
        timing = Timing()
        with alone(options.lock):
            timing.add(*timed(lambda: engine.patch(pairs, every, progress=False)))
        timing.write(
            file,
            op="patch",
            provider=f"atp_fast {engine.backend}",
            mode="every attention node",
            shape=shape,
            dtype="float32",
            note=f"{len(every)} nodes",
        )


def compare(
    engine: Engine,
    naive: Naive,
    pairs: PromptPairs,
    nodes: list[Node],
    options: argparse.Namespace,
    file: RowFile,
    **columns: Any,
) -> None:
    """Effects compared, then both ways timed in turns."""

    def ours() -> Tensor:
        return engine.patch(pairs, nodes, progress=False).effect[0]

    columns |= {"op": "patch", "dtype": "float32"}
    provider = f"atp_fast {engine.backend}"
    with alone(options.lock):
        exact, found = naive(nodes), ours()
    difference = float((found - exact).abs().max() / exact.abs().max())
    if not difference < AGREEMENT:
        raise RuntimeError(f"effects differ by {difference:.2g} of the largest")
    file.add([difference], metric="largest_difference", provider=provider, **columns)
    timings = interleaved(
        {"naive": lambda: naive(nodes), provider: ours},
        options.rounds,
        warmup=0,  # both ran for the comparison
        lock=options.lock,
    )
    for name, timing in timings.items():
        timing.write(file, provider=name, **columns)
    write_ratios(
        file, timings["naive"], timings[provider], of="naive", provider=provider, **columns
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=512, help="how many are drawn")
    parser.add_argument("--batch", type=int, default=64, help="rows of the naive way's batches")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backend", default="auto")
    parser.add_argument(
        "--no-every", dest="every", action="store_false", help="not every attention node"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "patching.csv")
    parser.add_argument("--lock", type=Path, help="file to lock while timing, on a shared machine")
    options = parser.parse_args()
    check_environment()
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    bench(options)


if __name__ == "__main__":
    main()
