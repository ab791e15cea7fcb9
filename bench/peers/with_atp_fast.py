"""atp_fast on the libraries' tasks, and AtP* of everything on the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from common import Case, Scores

from atp_fast import __version__
from atp_fast.engine import Engine
from atp_fast.nodes import NODE_KINDS, Node
from atp_fast.prompts.pairs import PromptPairs


def version() -> str:
    """What the rows say of the library."""
    return f"atp_fast {__version__}"


def attribution(
    method: str, nodes: Sequence[str], precision: str | None = None
) -> Callable[[Case], Callable[[], Scores]]:
    """A way: `method` on nodes, signed effects summed over positions.

    With the QK fix the effects of q and k are not those of plain AtP, which alone the others give: v and z are returned.
    """
    returned = "qkvz" if method == "atp" else "vz"

    def setup(case: Case) -> Callable[[], Scores]:
        engine, pairs = Engine(case.model, precision=precision), PromptPairs(*case.prompts)

        def call() -> Scores:
            found = engine.attribute(
                pairs, "logit_diff", method, nodes, direction="denoising", progress=False
            )
            return {kind: found.effect[kind].sum(1) for kind in returned}

        return call

    return setup


def patch_heads(case: Case) -> Callable[[], Scores]:
    """One subset per head: its z at every position."""
    engine, pairs = Engine(case.model), PromptPairs(*case.prompts)
    positions = case.prompts.clean.shape[1]

    def call() -> Scores:
        subsets = [
            [Node("z", layer, position, head) for position in range(positions)]
            for layer in range(case.layers)
            for head in range(case.heads)
        ]
        found = engine.patch_subsets(
            pairs, subsets, "logit_diff", direction="denoising", progress=False
        )
        values = (found.effect + found.clean_value[:, None]).mean(0)
        return {"z": values.view(case.layers, case.heads)}

    return call


WAYS = {
    "atp": attribution("atp", ("q", "k", "v", "z")),
    "atp*, neurons too": attribution("atp*", NODE_KINDS),
    "atp*, neurons too, products bf16": attribution("atp*", NODE_KINDS, "bf16"),
    "patch heads": patch_heads,
}
