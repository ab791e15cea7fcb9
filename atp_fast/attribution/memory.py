"""Memory as a budget: how many pairs, cotangents and patched rows are taken at once, and which layers leave tapes.

The estimates count the tensors that are alive at the peak of one layer's work, per position; tests/test_memory.py
compares them with measured peaks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from atp_fast.attribution.measured import measured_layers
from atp_fast.hf import Plug

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
# Rows of matrix products (pairs or patched rows, times positions, times cotangents) beyond which a larger batch gains
# nothing more.
_ROWS_ENOUGH = {"cpu": 2048, "cuda": 65536}
# The same for rows that leave tapes (pairs times positions): plain AtP of eight pairs of 256 tokens took 11 s two or four
# pairs at a time and 15 s all at once, when tapes and activations no longer stay in the caches of a CPU.
_TAPED_ROWS_ENOUGH = {"cpu": 512, "cuda": 65536}
# Of either prompt (pairs times positions): on a CPU, so many at most go through a layer with the other prompt's.
_FEW_ROWS = 256
# Numbers of a dictionary's features (positions times cotangents times features) at once, if an eighth of the budget holds them.
_FEATURES_ENOUGH = {"cpu": 2**23, "cuda": 2**27}
# Both runs' features and what encodes them; and for each cotangent gradients, and these once more where they are summed.
_FEATURE_COPIES, _GRADIENT_COPIES = 4, 2
# Under "auto" tapes take this share of the budget; an explicit one is used up. A tape saves two forwards of its layer: two
# fifths of plain AtP's work, a fifth of AtP*'s on twelve layers.
_AUTO_TAPE_SHARE = 1 / 16


class SweepPlan(NamedTuple):
    """How a sweep is done: pairs run together, cotangents taken at once, the first layer that leaves a tape, the type of
    the cotangents' products ("bf16", or None for the model's), whether a taped layer runs both prompts in one batch, and
    the numbers of a dictionary's features at once."""

    pairs: int
    chunk: int
    taped_from: int
    precision: str | None = None
    together: bool = False
    features: int = 0


class Budget(NamedTuple):
    """Bytes that a call may take beyond the model and the result; `auto` when they come from what is free."""

    bytes: int
    auto: bool


def read_budget(memory_budget: int | str | None) -> int | None:
    """Bytes of a budget such as 2_000_000_000, "8GiB" or "500 MB"; None for None and "auto".

    Raises TypeError or ValueError naming memory_budget for anything else.
    """
    if memory_budget is None or memory_budget == "auto":
        return None
    if isinstance(memory_budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", memory_budget.lower())
        if match is None or match[2] not in _UNITS:
            raise ValueError(
                f"memory_budget must be bytes, a size such as '8GiB' or 'auto', got {memory_budget!r}"
            )
        size = int(float(match[1]) * _UNITS[match[2]])
    elif isinstance(memory_budget, int) and not isinstance(memory_budget, bool):
        size = memory_budget
    else:
        raise TypeError(
            f"memory_budget must be an int or a string, got {type(memory_budget).__name__}"
        )
    if size <= 0:
        raise ValueError(f"memory_budget must be positive, got {memory_budget!r}")
    return size


def free_memory(device: torch.device) -> int:
    """Bytes free on a device: CUDA's own figure, or the machine's available memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 * 2**30  # no figure to be had (macOS): what any machine that runs a language model has


def budget_for(plug: Plug, asked: int | None, held: int = 0) -> Budget:
    """The asked budget, or half of what is free on each of the model's devices, shared by torchrun's processes on a machine.

    held: bytes that recorded sweeps hold and would give back (attribution.replay). Of processes that share the model, the
    least of theirs: all must do as much at once.
    """
    if asked is not None:
        return Budget(-int(plug.shares.largest(-asked)), auto=False)
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if plug.device.type == "cpu" else 1
    free = (min(map(free_memory, plug.devices)) + held) // 2 // sharing
    return Budget(-int(plug.shares.largest(-free)), auto=True)


class SweepSize(NamedTuple):
    """How much a sweep has to do, beside the number of its pairs."""

    positions: int  # of each pair, that are run
    prefix: int  # shared positions before them, of which keys and values are kept
    cotangents: int  # carried at the lowest layer
    kinds: tuple[str, ...]
    logits: int  # positions of each pair at which the metric looks
    precision: str | None = None  # of the cotangents' products
    spans: int = 0  # then effects are kept per cotangent until they are summed over its positions
    statistics: bool = False  # attention notes those of the key fix


class Costs(NamedTuple):
    """Bytes, per pair and position unless said otherwise."""

    stored: int  # both runs' layer inputs
    forward: int  # the worst moment of a layer's forward
    tape: int  # what a layer's tape holds, and the node values of the corrupted run
    twin: int  # what a tape keeps of the corrupted prompt, where both ran in one batch, its node values among it
    values: int  # those
    statistics: int  # what a tape holds of the key fix
    summed: int  # with spans: neurons' effects while they are summed
    carried: int  # one cotangent: of a layer's output, and of its input
    output: int  # one cotangent on its way from the layer's output to z
    attention: int  # one on its way through the attention, and on to the layer's input
    prefix: int  # per prefix position: keys and values of all layers, and those of the layer at work, of both runs
    taped_prefix: int  # per prefix position and tape: keys and values ahead of its own
    prefix_gradient: int  # per prefix position: one cotangent of keys and values
    logits: int  # per logit position: logits, their copy in the user's columns, the metric's own work, gradients
    signed: int  # one cotangent's effects of the widest kind, and their copy where they count
    narrow: int  # per tape, whatever the pairs and positions: the weights in bfloat16


def costs(plug: Plug, kinds: Sequence[str]) -> Costs:
    found, item, layers = plug.shares.held, plug.itemsize, len(plug.layers)
    layer = measured_layers(plug)
    hidden, kinds = found.hidden, plug.visited(kinds)
    heads = found.heads * (found.head_dim + found.v_dim)  # q and z
    kv_heads = found.kv_heads * (found.head_dim + found.v_dim)  # k and v
    neurons, given = found.neurons, layer.given
    held = layer.tape + layer.neurons
    if "neuron" not in kinds:
        neurons, given, held = 0, given - item * neurons, layer.tape
    writes = hidden * sum(kind in kinds for kind in ("attn_out", "mlp_out"))
    values = heads + kv_heads + neurons + writes
    gradients = item * (heads // 2 + kv_heads)  # of q, k and v
    return Costs(
        stored=item * 2 * (layers + 1) * hidden,
        forward=layer.forward,
        tape=held + item * values,
        twin=held,
        values=item * values,
        statistics=layer.statistics,
        summed=item * 5 * neurons,
        carried=item * 2 * hidden,
        output=layer.output,
        attention=given + gradients + layer.input,
        prefix=item * kv_heads * (layers + 3),
        taped_prefix=item * kv_heads,
        prefix_gradient=item * 2 * kv_heads,
        logits=item * 6 * plug.vocabulary,
        signed=2 * item * max(found.heads, neurons),
        narrow=2 * plug.layer_weights,
    )


def estimate_sweep(plug: Plug, plan: SweepPlan, size: SweepSize, cost: Costs | None = None) -> int:
    """Bytes that a sweep under this plan takes at its peak, beside the model and the scores.

    The largest of: a layer's forward, the metric's logits with all kept tapes, and every layer at work with the tapes kept
    below it. cost: by default `costs`. Not counted: attention matrices of the reference backend, and freed blocks that the C
    library holds on to.
    """
    cost = cost or costs(plug, size.kinds)
    layers, pairs = len(plug.layers), plan.pairs
    rows = pairs * size.positions
    always = rows * cost.stored + pairs * size.prefix * cost.prefix + plug.made_bytes
    always += _feature_bytes(plug, plan, size)
    each = cost.tape
    if plan.together:  # with spans the values are moved, and so copied
        each += cost.twin if size.spans else max(0, cost.twin - cost.values)
    each += cost.statistics if size.statistics else 0
    tape = rows * each + pairs * size.prefix * cost.taped_prefix
    tape += cost.narrow if size.precision == "bf16" else 0
    taped = layers - plan.taped_from
    together = plan.taped_from > 0 or plan.together
    peak = always + max(
        2 * rows * cost.forward if together else 0, taped * tape + rows * cost.forward
    )
    peak = max(peak, always + taped * tape + pairs * size.logits * cost.logits)
    for layer in range(layers):
        tapes = 1 + max(0, layer - plan.taped_from)
        cotangents = min(size.cotangents, layers - layer)
        chunk = min(plan.chunk, cotangents)
        # effects are added to the scores in place, but for those that are summed over spans first
        found = cost.summed + chunk * cost.signed if size.spans else 0
        work = size.positions * (found + chunk * max(cost.output, cost.attention))
        work += size.positions * cotangents * cost.carried
        work += size.prefix * chunk * cost.prefix_gradient
        peak = max(peak, always + tapes * tape + pairs * work)
    return peak


def _feature_bytes(plug: Plug, plan: SweepPlan, size: SweepSize) -> int:
    """Bytes that effects of dictionaries' nodes take while one layer's are found."""
    most = max((d.features for d in plug.asked(size.kinds)), default=0)
    chunk = min(plan.chunk, size.cotangents)
    row = plan.pairs * most  # of one position and cotangent
    numbers = min(max(plan.features // chunk, row), row * size.positions)
    copies = _FEATURE_COPIES + _GRADIENT_COPIES * chunk
    return _wide(plug) * (copies * numbers + 2 * size.spans * chunk * row)


def _wide(plug: Plug) -> int:
    """Bytes of a number in which effects are summed."""
    return max(4, plug.itemsize)


def features_at_once(plug: Plug, room: int) -> int:
    """Numbers of a dictionary's features that an eighth of `room` bytes holds, as far as they are of use."""
    # one cotangent takes most
    most = room // 8 // (_FEATURE_COPIES + _GRADIENT_COPIES) // _wide(plug)
    return min(_rows_enough(plug, _FEATURES_ENOUGH), most)


def plan_sweep(
    plug: Plug,
    budget: Budget,
    size: SweepSize,
    *,
    pairs: int,
    together: bool,
    cost: Costs | None = None,
) -> SweepPlan:
    """Fit a sweep into a budget: as many pairs, then cotangents, then tapes as there is room for and use.

    pairs: at most so many; together: all of them must be run at once. Where even one pair and one cotangent do not
    fit, they are the plan.
    """
    layers, offloaded = len(plug.layers), plug.offloaded
    rows = _rows_enough(plug, _ROWS_ENOUGH)

    features = features_at_once(plug, budget.bytes) if plug.asked(size.kinds) else 0

    def fits(batch: int, chunk: int, tapes: int) -> bool:
        plan = SweepPlan(batch, chunk, layers - tapes, features=features)
        return estimate_sweep(plug, plan, size, cost) <= budget.bytes

    pair_rows = rows // size.cotangents
    if not offloaded:  # such a model keeps no tapes
        pair_rows = min(pair_rows, _rows_enough(plug, _TAPED_ROWS_ENOUGH))
    useful = -(-pair_rows // size.positions)
    batch = (
        pairs
        if together
        else _largest(pairs if pairs < useful else useful, lambda n: fits(n, size.cotangents, 0))
    )
    useful = max(1, rows // (batch * size.positions))
    chunk = _largest(min(size.cotangents, useful), lambda n: fits(batch, n, 0))
    tapes = layers
    if budget.auto:
        tape = batch * size.positions * costs(plug, size.kinds).tape
        tapes = min(layers, int(budget.bytes * _AUTO_TAPE_SHARE) // tape)
    if offloaded:  # a tape would hold its layer's weights in memory
        tapes = 0
    if tapes == layers and saves_starts(plug.device, batch * size.positions):
        plan = SweepPlan(batch, chunk, 0, size.precision, together=True, features=features)
        twins = layers * batch * size.positions * costs(plug, size.kinds).twin
        room = budget.bytes - (twins / _AUTO_TAPE_SHARE if budget.auto else 0)
        if estimate_sweep(plug, plan, size) <= room:
            return plan
    while tapes and not fits(batch, chunk, tapes):
        tapes -= 1
    return SweepPlan(batch, chunk, layers - tapes, size.precision, features=features)


def saves_starts(device: torch.device, rows: int) -> bool:
    """Whether one forward of both prompts, `rows` positions of each, is faster than two: on a GPU, which waits for kernels to
    be started; on a CPU for few rows, which wait for Python and for the weights.

    GPT-NeoX 160M, Zen 4, two threads: plain AtP 1.10 times as fast at 32 rows, 1.02 at 256, AtP* 1.06 and 1.01; from 512 on no
    faster, with more memory.
    """
    return device.type != "cpu" or rows <= _FEW_ROWS


def _rows_enough(plug: Plug, of: dict[str, int]) -> int:
    return of.get(plug.device.type, of["cuda"])


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to limit that fits, 1 if none does; a number fits if a larger one does."""
    low, high = 1, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def stored_pair(plug: Plug, start: int, positions: int, kinds: Sequence[str]) -> int:
    """Bytes that exact patching stores of a pair: layer inputs of both runs and the corrupted values of `kinds` at `positions`
    positions, the clean keys and values there and at the `start` positions before them."""
    found, layers = plug.shares.held, len(plug.layers)
    keys_values = found.kv_heads * (found.head_dim + found.v_dim)
    widths = {
        "q": found.heads * found.head_dim,
        "k": found.kv_heads * found.head_dim,
        "v": found.kv_heads * found.v_dim,
        "z": found.heads * found.v_dim,
        "neuron": found.neurons,
    }
    shown = plug.visited(kinds)
    values = sum(widths.get(kind, found.hidden) for kind in shown if kind != "resid_pre")
    position = 2 * (layers + 1) * found.hidden + layers * values
    return plug.itemsize * (positions * position + (start + positions) * layers * keys_values)


def stored_pairs(plug: Plug, room: int, positions: int, kinds: Sequence[str]) -> int:
    """Pairs that exact patching can store in `room` bytes, at least one."""
    return max(1, room // stored_pair(plug, 0, positions, kinds))


def patched_row(plug: Plug, positions: int, prefix: int, logits: int) -> int:
    """Bytes of one row of exact patching at its peak.

    positions: of the row, that are run; prefix: positions before them, whose keys and values every row gets a copy of;
    logits: positions at which the metric looks.
    """
    found, item = plug.shares.held, plug.itemsize
    kv_heads = found.kv_heads * (found.head_dim + found.v_dim)
    # a layer's forward, its input and that with a patch
    layer = measured_layers(plug).forward + item * 2 * found.hidden
    keys_values = 2 * kv_heads  # the prefix, and the prefix with the row's own
    return positions * layer + item * (prefix * keys_values + logits * 6 * plug.vocabulary)


def end_row(plug: Plug, positions: int, prefix: int, logits: int) -> int:
    """The same in the last layer, where its output is needed at one position: its input, normed, and its keys and values."""
    found, item = plug.shares.held, plug.itemsize
    kv_heads = found.kv_heads * (found.head_dim + found.v_dim)
    each = positions * (3 * found.hidden + 2 * kv_heads) + prefix * 2 * kv_heads
    return item * (each + logits * 6 * plug.vocabulary)


def patched_rows(plug: Plug, room: int, positions: int, prefix: int, logits: int) -> int:
    """Rows of exact patching run at once in `room` bytes, at least one; the rest as `patched_row` has it.

    With room for a patched copy of the widest values, should that fall on the worst moment.
    """
    found = plug.shares.held
    widest = max(found.neurons, found.heads * max(found.head_dim, found.v_dim))
    enough = -(-_rows_enough(plug, _ROWS_ENOUGH) // positions)
    room = max(0, room - plug.made_bytes)
    row = patched_row(plug, positions, prefix, logits) + positions * plug.itemsize * widest
    return max(1, min(enough, room // row))
