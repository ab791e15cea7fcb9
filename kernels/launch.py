"""How the kernels are launched: sizes and dtypes they take, block sizes, tuning, start.

A kernel's blocks come from the caller or from its CONFIGS, keyed by dtype and padded head size. On CUDA, where
several suit the device, triton.autotune measures them once per (head sizes, dtype), not per sequence length, on the first
call that fills the device, and keeps what it found in Triton's cache; elsewhere (calls too small to tell, the
interpreter, a compile without a GPU) the first one is taken. No kernel reads what it writes, so that runs repeated by the
autotuner change nothing.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from atp_fast.kernels import tiles

INTERPRETED: bool = not isinstance(tiles.exp, JITFunction)
"""Whether TRITON_INTERPRET was set when the kernels were defined: then they run on CPU tensors, slowly."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_DIM = 256
_starting = threading.Lock()  # an autotuner keeps the arguments of the call that it is in


class Scoring(NamedTuple):
    """How a query and a key become a logit, as in the reference: the options of every attention op."""

    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    key_mask: Tensor | None


class Blocks(NamedTuple):
    """Block sizes of one launch: queries, keys, cotangents per program; warps and pipeline stages.

    width: columns that a product of rows takes at a time (tiles.row_products), whole rows by default.
    majors: the compute capabilities whose registers it suits. 9 and 10 have matrix instructions that read shared
    memory; anything else counts as 8.
    side, lanes: cotangents whose rows one product takes, and parts in which a row is summed (key_patch_effects.py).
    """

    block_m: int
    block_n: int
    chunk: int
    num_warps: int
    num_stages: int
    width: int = 256
    majors: tuple[int, ...] = (8, 9, 10)
    side: int = 1
    lanes: int = 1


Configs = Mapping[tuple[torch.dtype, int], tuple[Blocks, ...]]


class Sizes(NamedTuple):
    """The extents of an attention call."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    v_dim: int


def check_dtype(name: str, x: Tensor) -> None:
    """ValueError unless the kernels take x's dtype (float64 runs on the CPU backends only)."""
    if x.dtype not in _DTYPES:
        raise ValueError(
            f"{name} must be float32, bfloat16 or float16 for backend 'triton', got {x.dtype}"
        )


def sizes_of(q: Tensor, k: Tensor, v: Tensor) -> Sizes:
    """Extents of q (batch, heads, queries, head_dim), k and v; ValueError for what no kernel takes."""
    check_dtype("q", q)
    sizes = Sizes(
        q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3]
    )
    check_dims(q, v)
    return sizes


def check_dims(q: Tensor, v: Tensor) -> None:
    """ValueError for heads that fit no tile."""
    for name, x in (("q", q), ("v", v)):
        if x.shape[-1] > _MAX_DIM:
            raise ValueError(
                f"{name}'s head_dim must be at most {_MAX_DIM} for backend 'triton', got {x.shape[-1]}"
            )


def cdiv(x: int, y: int) -> int:
    """x / y rounded up; triton.cdiv takes microseconds outside a kernel."""
    return -(-x // y)


def power_of_2(x: int) -> int:
    """The least power of two from x on, 1 for none; triton.next_power_of_2 takes microseconds outside a kernel."""
    return 1 << max(x - 1, 0).bit_length()


def padded(dim: int) -> int:
    """The tile width that holds dim columns: a power of two that a matrix instruction accepts."""
    return max(16, power_of_2(dim))


def dot_precision(dtype: torch.dtype) -> str:
    """input_precision of the products of float32 tiles.

    float32 inputs: six bfloat16 products of three parts each, error about 2**-23 of sum |x| |y|, on the tensor cores
    at the price of three TF32 products, which would keep 2**-21. float16 inputs: one TF32 product, it holds them
    exactly. AMD has full float32 matrix instructions, the interpreter numpy. bfloat16 tiles ignore it.
    """
    if INTERPRETED or torch.version.hip is not None:
        return "ieee"
    return "bf16x6" if dtype == torch.float32 else "tf32"


def strides(name: str, x: Tensor, axes: str) -> dict[str, int]:
    """x's strides as kernel arguments: strides("q", q, "bhmd") names them stride_qb to stride_qd."""
    return dict(zip(_stride_names(name, axes), x.stride(), strict=True))


@functools.cache
def _stride_names(name: str, axes: str) -> tuple[str, ...]:
    return tuple(f"stride_{name}{axis}" for axis in axes)


def window_of(scoring: Scoring, sizes: Sizes) -> int | None:
    """The window, None where it reaches every key."""
    window = scoring.window
    return None if window is None or window >= sizes.keys else window


def scoring_arguments(scoring: Scoring, sizes: Sizes) -> dict[str, Any]:
    """The arguments by which every tile kernel scores: what is absent is None and costs nothing."""
    mask = scoring.key_mask
    return {
        "mask_ptr": None if mask is None else mask.view(torch.uint8),
        "stride_mb": 0 if mask is None else mask.stride(0),
        "stride_mn": 0 if mask is None else mask.stride(1),
        "heads": sizes.heads,
        "kv_heads": sizes.kv_heads,
        "queries": sizes.queries,
        "keys": sizes.keys,
        "scale": scoring.scale,
        "window": window_of(scoring, sizes),
        "softcap": scoring.softcap,
        "HEAD_DIM": sizes.head_dim,
        "V_DIM": sizes.v_dim,
        "BLOCK_D": padded(sizes.head_dim),
        "BLOCK_V": padded(sizes.v_dim),
        "CAUSAL": scoring.causal,
    }


@functools.cache
def _major(device: torch.device) -> int | None:
    """The compute capability that a device counts as in Blocks.majors; None where any will do."""
    if device.type != "cuda":
        return None
    major = 8 if torch.version.hip is not None else torch.cuda.get_device_capability(device)[0]
    return major if major in (9, 10) else 8


def candidates(configs: Configs, x: Tensor, *dims: int) -> tuple[Blocks, ...]:
    """The configurations for x's dtype and device and the widest of the head sizes."""
    listed = configs[(x.dtype, max(64, *(padded(dim) for dim in dims)))]
    major = _major(x.device)
    return tuple(blocks for blocks in listed if major is None or major in blocks.majors)


def shared_out(choices: tuple[Blocks, ...], cotangents: int) -> tuple[Blocks, ...]:
    """The choices with chunks of even size: seven cotangents by at most six are four and three, one is one.

    Chunks are rounded up to whole products of b.side cotangents, or to a power of two below that. What a program computes for
    cotangents that are not there is thrown away.
    """

    def even(b: Blocks) -> int:
        chunk = cdiv(cotangents, cdiv(cotangents, b.chunk))
        return cdiv(chunk, b.side) * b.side if chunk > b.side else 1 << (chunk - 1).bit_length()

    return tuple(dict.fromkeys(b._replace(chunk=even(b)) if cotangents else b for b in choices))


@functools.cache
def _processors(device: torch.device) -> int:
    """How many programs a device runs at once, at the least; the interpreter runs one."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def group_parts(programs: int, sizes: Sizes, on: Tensor) -> int:
    """Into how many parts the query heads of a group go, so that a kernel of `programs` occupies the device of `on`.

    The least that do, or as many as there are heads. Every part is summed by a program of its own, and the parts in their order.
    """
    group = sizes.heads // sizes.kv_heads
    wanted = _processors(on.device)
    even = (parts for parts in range(1, group + 1) if group % parts == 0)
    return next((parts for parts in even if programs * parts >= wanted), group)


def too_few(programs: int, on: Tensor) -> bool:
    """Whether a kernel of `programs` leaves the device of `on` waiting for memory: less than four per processor do."""
    return programs < 4 * _processors(on.device)


@functools.cache
def _meta(kernel: Any, blocks: Blocks) -> dict[str, int]:
    meta = {
        "BLOCK_M": blocks.block_m,
        "BLOCK_N": blocks.block_n,
        "CHUNK": blocks.chunk,
        "SIDE": math.gcd(blocks.chunk, blocks.side),
        "LANES": blocks.lanes,
        "WIDTH": blocks.width,
        "STAGES": blocks.num_stages,
    }
    return {name: x for name, x in meta.items() if name in kernel.arg_names}


@functools.cache
def _tuned(kernel: Any, choices: tuple[Blocks, ...]) -> Any:
    configs = [
        triton.Config(_meta(kernel, b), num_warps=b.num_warps, num_stages=b.num_stages)
        for b in choices
    ]
    return triton.autotune(configs=configs, key=["HEAD_DIM", "V_DIM"], cache_results=True)(kernel)


class _Ready(NamedTuple):
    """A kernel as Triton compiled it for certain arguments, its blocks, and the arguments that these are, by number."""

    compiled: Any
    blocks: Blocks
    beside: list[tuple[int, int]]


_ready: dict[tuple[Hashable, ...], _Ready] = {}
_READY_AT_MOST = 4096


def _start(kernel: Any, grid: Any, arguments: dict[str, Any]) -> Any:
    """Start a kernel by Triton's own way, which takes tens of microseconds; what was compiled for it, if anything was."""
    return kernel[grid](**arguments)


def _specialised(x: Tensor) -> Hashable:
    """What a tensor's kernel may depend on."""
    # for AMD, kernels of tensors below 2 GiB are others
    small = torch.version.hip is None or x.untyped_storage().nbytes() < 2**31
    return x.dtype, x.data_ptr() % 16, small


def run(
    kernel: Any,
    programs: Callable[[Blocks], int],
    arguments: dict[str, Any],
    choices: tuple[Blocks, ...],
    on: Tensor,
    parts: int = 1,
) -> None:
    """Start kernel on the device of `on` with one of the choices; programs gives their grid's size, of which there are `parts`.

    What was started before with the same numbers, and tensors of the same dtypes and alignments, is started as it was
    compiled then, whatever Triton's knobs for compiling say now.
    """
    blocks = choices[0]
    tunes = on.is_cuda and len(choices) > 1 and programs(blocks) * parts >= _processors(on.device)
    values = [arguments.get(name) for name in kernel.arg_names]
    # an id, because a kernel's hash is that of its source; it lives as long as this module. Triton tells fewer numbers apart: 1,
    # multiples of 16, those beyond 32 bits.
    numbers = [_specialised(x) if isinstance(x, Tensor) else x for x in values]
    key = (id(kernel), on.device, choices if tunes else blocks, *numbers)
    with torch.cuda.device_of(on):
        if (ready := _ready.get(key)) is not None:
            for number, value in ready.beside:
                values[number] = value
            ready.compiled[programs(ready.blocks), parts, 1](*values)
            return
        # a default that Triton's versions and environment change
        arguments = {**arguments, "enable_fp_fusion": True}
        if tunes:
            tuned = _tuned(kernel, choices)
            with _starting:
                compiled = _start(tuned, lambda m: (programs(_chosen(m)), parts), arguments)
                meta = tuned.best_config.kwargs if compiled is not None else {}
        else:
            meta = _meta(kernel, blocks)
            launch = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
            compiled = _start(kernel, (programs(blocks), parts), {**arguments, **meta, **launch})
    if compiled is None:  # interpreted
        return
    if len(_ready) >= _READY_AT_MOST:
        _ready.clear()
    beside = [(kernel.arg_names.index(name), value) for name, value in meta.items()]
    _ready[key] = _Ready(compiled, _chosen(meta) if tunes else blocks, beside)


def _chosen(meta: dict[str, int]) -> Blocks:
    """The blocks that an autotuner has chosen, as far as they make a grid."""
    return Blocks(meta["BLOCK_M"], meta["BLOCK_N"], meta["CHUNK"], 0, 0)
