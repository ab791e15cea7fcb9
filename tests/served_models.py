"""Which of transformers' causal language models are served, type by type, each checked in a process of its own (make coverage).

    python tests/served_models.py [--write docs/models.md] [TYPE ...]

A tiny random float64 model of each type is opened, what it computes in float32 whatever its weights (norms, softmax) in
float64 too. If it is served, its logits are compared with its own eager ones, AtP*
(AtP with the QK fix where GradDrop is refused) with the literal code, or where that does not know the model with
naive_attribution.py, and 50 random nodes patched exactly with naive_patching.py, whose hooks know nothing of ours.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import sys
import warnings
from collections.abc import Iterator, Sequence
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

import tiny_models
import zoo
from atp_fast import Engine, PromptPairs
from atp_fast.attribution.literal import literal_attribution
from atp_fast.metrics import resolve
from atp_fast.nodes import KINDS, NodeSpace
from naive_attribution import naive_attribution
from naive_patching import PARTS, naive_effects

TIME_LIMIT = 120  # seconds for a type
MEMORY = 10 << 30
PATCHED = 50
LIMIT = 1e-9  # of the largest value, or effect of a kind
COMMAND = "make coverage"
Row = dict[str, Any]


class _Wide(TorchFunctionMode):
    """Inside, float32 is float64: then nothing is rounded on the way and the limit can be small."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        wide = {torch.float32: torch.float64}
        args, kwargs = tree_map(
            lambda x: wide.get(x, x) if isinstance(x, torch.dtype) else x, (args, kwargs or {})
        )
        return args[0].double() if func is torch.Tensor.float else func(*args, **kwargs)


def check(model_type: str) -> Row:
    """What a type is: "served" with its kinds and how far it is from the definitions, "refused" or "not built" with a reason."""
    try:
        model = tiny_models.build(model_type)
    except Exception as error:
        return {"state": "not built", "reason": _first_line(error)}
    row: Row = {"class": type(model).__name__}
    try:
        engine = Engine(model, "reference")
    except (NotImplementedError, ValueError) as error:
        return row | {"state": "refused", "reason": str(error)}
    refused = engine.plug.inspection.refused
    kinds = [kind for kind in KINDS if kind not in refused]
    row |= {"state": "served", "kinds": kinds, "refused": refused}
    pairs = zoo.random_pairs(model, 2, 9, seed=3)
    with torch.no_grad():
        row["logits"] = _logits_error(engine, pairs.clean_ids)
    row |= _attribution_error(engine, pairs, kinds)
    row["patching"], row["patched"] = _patching_error(engine, pairs, kinds)
    return row


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _share(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found - right).abs().max() / right.abs().max().clamp(min=1e-30))


def _logits_error(engine: Engine, ids: torch.Tensor) -> float:
    """Logits of the model taken apart, beside its own."""
    plug = engine.plug
    with plug.implementation("eager"):
        own = engine.model(input_ids=ids, use_cache=False).logits
    with plug.plugged():
        x, arguments = plug.enter(ids)
        from atp_fast.hf import LayerRun

        for number, given in enumerate(arguments):
            x = plug.run_layer(number, x, given, LayerRun("reference"))
        return _share(plug.logits(x), own)


def _attribution_error(engine: Engine, pairs: PromptPairs, kinds: Sequence[str]) -> Row:
    """The largest error of contribution and effect, as a share of the largest of its kind; and beside what."""
    graddrop = "graddrop" not in engine.plug.inspection.refused
    method = "atp*" if graddrop else "atp+qk"
    found = engine.attribute(pairs, "nll", method, kinds, progress=False)
    try:
        if engine.plug.own_softmax:
            raise NotImplementedError(
                "the literal code knows transformers' attention interface only"
            )
        wanted = literal_attribution(engine.model, pairs, "nll", method, kinds)[:2]
        beside = "literal"
    except NotImplementedError:
        known = _named(engine, kinds)
        wanted = naive_attribution(engine.model, pairs, resolve("nll", pairs), known, graddrop)
        for kind in known:  # modules that the naive code takes for writes stand in other layers too
            for layer, count in enumerate(found.space.in_layers(kind)):
                wanted[0][kind][layer, :, count:] = wanted[1][kind][layer, :, count:] = 0
        beside = "naive"
    errors = [
        _share(ours[kind], right[kind])
        for ours, right in zip((found.contribution, found.effect), wanted, strict=True)
        for kind in right
    ]
    moved = min(float(wanted[0][kind].abs().max()) for kind in wanted[0])
    return {"method": method, "beside": beside, "atp": max(errors), "smallest": moved}


def _named(engine: Engine, kinds: Sequence[str]) -> list[str]:
    """The kinds that naive_patching.py knows by the names of modules."""
    if engine.model.config.model_type in PARTS:
        return list(kinds)
    return [kind for kind in kinds if kind not in ("attn_out", "mlp_out")]


def _patching_error(engine: Engine, pairs: PromptPairs, kinds: Sequence[str]) -> tuple[float, int]:
    space: NodeSpace = engine.plug.space(pairs.width, _named(engine, kinds))
    nodes = random.Random(0).sample(list(space), min(PATCHED, len(space)))
    found = engine.patch(pairs, nodes, "nll", progress=False).effect
    wanted, _ = naive_effects(
        engine.model, pairs, [[node] for node in nodes], resolve("nll", pairs)
    )
    return _share(found, wanted), len(nodes)


# ---- all types, each in a process of its own


def rows(types: Sequence[str]) -> Iterator[Row]:
    fork = multiprocessing.get_context(
        "fork"
    )  # the imports, seconds of each process, are made once
    for model_type in types:
        ours, theirs = fork.Pipe(duplex=False)
        process = fork.Process(target=_check_alone, args=(model_type, theirs))
        process.start()
        theirs.close()
        row: Row = {"state": "failed", "reason": f"ran over {TIME_LIMIT} s"}
        if ours.poll(TIME_LIMIT):
            try:
                row = ours.recv()
            except EOFError:
                row["reason"] = "its process ended without a word"
        process.kill()
        process.join()
        yield {"type": model_type, **row}


def _check_alone(model_type: str, answer: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # xglm's lowest score has to fit it
    warnings.filterwarnings("ignore")
    try:
        with _Wide():
            answer.send(check(model_type))
    except BaseException as error:
        answer.send({"state": "failed", "reason": _first_line(error)})


def wrong(row: Row) -> str | None:
    """What is wrong with a type, if something is: an error too large, or one that is not a refusal."""
    if row["state"] in ("failed", "not built"):
        known = row["state"] == "not built" and row["type"] in tiny_models.NOT_BUILT
        return None if known else str(row["reason"])
    if row["state"] == "refused":
        reason, name = row["reason"], row["class"]
        named = reason.startswith(f"{name} is not served: ") or reason.startswith("model ")
        return None if named else f"refused without the class name: {reason}"
    far = [
        f"{what} {row[what]:.1e}"
        for what in ("logits", "atp", "patching")
        if not row[what] <= LIMIT
    ]
    if row["smallest"] == 0:
        far.append("a kind without effects")
    return ", ".join(far) or None


_PAGE = """<!-- written by {command} -->
# Models

Of the {types} causal language model types that transformers {version} registers, **{served} are served exactly**: {all_nodes} with every
kind of node, {no_neurons} without neurons (experts that do not go through transformers' interface), {no_mlp} without `mlp_out` (shared experts beside
routed ones), {no_graddrop} by `atp` and `atp+qk` alone, without GradDrop and writes.
{refused} are refused with a reason{not_built}. `{command}` made this page on {day}: it takes about twenty minutes.

Each type is a tiny model of three layers with random float64 weights, in a process of its own. What a model computes in float32
whatever its weights (norms, softmax) is computed in float64 there, so that nothing hides in rounding. For each served type:

- its logits, taken apart layer by layer, equal its own eager ones;
- AtP\\* (`atp+qk` where there is no GradDrop) equals the literal code, `atp_fast.attribution.literal`, or, for models that code does not
  know, `tests/naive_attribution.py`: whole forward passes with hooks, one per dropped layer;
- {patched} random nodes, patched exactly, equal whole forward passes of the plain model whose nodes hooks overwrite
  (`tests/naive_patching.py`); these hooks know nothing of atp_fast.

All three to {limit:.0e} of the largest value or effect; the worst of all types is {worst:.1e} ({worst_type}). A model of your own is asked by
`atp-fast doctor --model MODEL`; at every opening, layer by layer, it is compared with its own eager code.

Models that write out their own softmax run their own code on scores that are noted and not formed. Layers without attention (state spaces,
linear attention) have neurons and writes, and cotangents go through them by autograd. Both are run from a prompt's first token: tokens that
all pairs share are not run once for all.

Layers may differ: in heads, head size and neurons (a dense layer below mixtures of experts), in having no attention or no MLP. A node that a
layer lacks is in no table and is refused by name. A layer's writes are found by what they add up to, each times a number; so is what the
layer multiplies its input with on its way past them, which GradDrop's cotangents are multiplied with too. Of two mixers side by side
(falcon_h1) attention's write is `attn_out`; a mixture's routed experts beside shared ones that are no part of it (granitemoehybrid) leave no
`mlp_out`. Attention in chunks (llama4) is one attention for each chunk. Models whose layers normalise the sum of input and write
(bert, minimax) have no write to hold, and so no GradDrop.

## Served

| Type | Class | Nodes | Method | AtP beside | Largest error |
|---|---|---|---|---|---|
{served_rows}

## Refused

| Type | Reason |
|---|---|
{refused_rows}
"""


def page(found: Sequence[Row]) -> str:
    """docs/models.md"""
    served = [row for row in found if row["state"] == "served" and not wrong(row)]
    refused = [row for row in found if row["state"] == "refused"]
    others = [row for row in found if row not in served and row not in refused]

    def error(row: Row) -> float:
        return max(row["logits"], row["atp"], row["patching"])

    def nodes(row: Row) -> str:
        return "all" if not row["refused"] else ", ".join(f"`{kind}`" for kind in row["kinds"])

    worst = max(served, key=error)
    reasons = [(row["type"], row["reason"]) for row in refused]
    reasons += [(row["type"], f"{row['state']}: {wrong(row) or row['reason']}") for row in others]
    return _PAGE.format(
        command=COMMAND,
        types=len(found),
        version=transformers.__version__,
        served=len(served),
        all_nodes=sum(not row["refused"] for row in served),
        no_neurons=sum(set(row["refused"]) == {"neuron"} for row in served),
        no_mlp=sum(set(row["refused"]) == {"mlp_out"} for row in served),
        no_graddrop=sum("graddrop" in row["refused"] for row in served),
        refused=len(refused),
        not_built=f", {len(others)} could not be built tiny" if others else "",
        day=date.today().isoformat(),
        patched=PATCHED,
        limit=LIMIT,
        worst=error(worst),
        worst_type=worst["type"],
        served_rows="\n".join(
            f"| {row['type']} | {row['class']} | {nodes(row)} | `{row['method']}` | {row['beside']} | {error(row):.0e} |"
            for row in served
        ),
        refused_rows="\n".join(
            f"| {name} | {reason.replace('|', '/')} |" for name, reason in sorted(reasons)
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", default=tiny_models.TYPES)
    parser.add_argument("--write", type=Path, help="the page to write")
    options = parser.parse_args()
    found = []
    for row in rows(options.types):
        found.append(row)
        print(row["type"], row["state"], wrong(row) or row.get("reason", ""), flush=True)
    if options.write:
        options.write.write_text(page(found), encoding="utf-8")
    faults = [row["type"] for row in found if wrong(row)]
    counts = {
        s: sum(row["state"] == s for row in found)
        for s in ("served", "refused", "not built", "failed")
    }
    print(counts, f"{len(faults)} wrong: {' '.join(faults)}" if faults else "")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
