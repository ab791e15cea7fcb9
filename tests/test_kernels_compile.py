"""The Triton kernels compiled without a GPU: a sample of the shipped configurations, and the AMD target.

`make test-compile` takes every configuration (compile_all_kernels.py). What a binary promises is in compiled.py: it
fits shared memory, puts every product on the tensor cores, copies asynchronously; with the pinned Triton it also
spills nothing, but for the configurations measured faster with spills, and stays within tests/triton_budget.json.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import compiled
from atp_fast.kernels import launch
from atp_fast.ops import triton

pytestmark = pytest.mark.skipif(
    triton.INTERPRETED, reason="the interpreter replaces what would be compiled"
)
SAMPLE = [
    *compiled.cases(("bf16",), (64,), ("sm_90",)),
    *(
        case
        for case in (
            *compiled.cases(("bf16",), (128,), ("sm_90",)),
            *compiled.cases(("f32",), (64,), ("sm_90",)),
            *compiled.cases(("bf16",), (64,), ("sm_80", "sm_100")),
        )
        if case.kernel in ("key_gradients", "key_effects")
    ),
]


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_sample(case: compiled.Case) -> None:
    compiled.check(case)


@pytest.mark.parametrize("name", compiled.KERNELS)
def test_every_device_dtype_and_size_has_a_configuration(name: str) -> None:
    _, configs = compiled.KERNELS[name]
    for dtype in compiled.DTYPES.values():
        for dim in compiled.DIMS:
            choices = configs[(dtype, dim)]
            assert len(choices) <= 12
            for major in (8, 9, 10):
                assert any(major in blocks.majors for blocks in choices), (name, dtype, dim, major)


def test_the_budget_is_of_the_shipped_configurations_and_the_pinned_triton() -> None:
    version, kernels = compiled.budget()
    assert list(kernels) == [str(case) for case in compiled.shipped()]
    constraints = Path(__file__).parent.parent / "constraints.txt"
    assert f"triton=={version}" in constraints.read_text().splitlines()


def test_a_missing_budget_says_how_to_write_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BUDGET", Path("nowhere.json"))
    with pytest.raises(FileNotFoundError, match="python tests/compiled.py"):
        compiled.budget()


def test_what_is_worse_than_the_budget_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    case, *_ = compiled.cases(("bf16",), (64,), ("sm_90",))
    _, kernels = compiled.budget()
    held = kernels[str(case)]
    monkeypatch.setattr(compiled, "numbers", lambda _: held)
    compiled.check(case)
    here = compiled.triton.__version__
    for name, change in (("registers", -1), ("async_copies", 1)):
        tight = {str(case): {**held, name: held[name] + change}}
        monkeypatch.setattr(compiled, "budget", lambda tight=tight: (here, tight))
        with pytest.raises(AssertionError, match=f"worse than.*{name}"):
            compiled.check(case)


@pytest.mark.parametrize("target", compiled.TARGETS)
@pytest.mark.parametrize(("name", "weights"), [("key_gradients", 2), ("query_gradients", 1)])
def test_float16_weights_are_raised_before_a_product_truncates_them(
    name: str, weights: int, target: str
) -> None:
    """No rounding by the compiler: the sum of tiles.half_a_place_up stands there for every element of p and dS."""
    case = next(case for case in compiled.cases(("f16",), (64,), (target,)) if case.kernel == name)
    (start,) = compiled.starts(case)
    ptx = compiled.binaries.compiled(start, target).asm["ptx"]
    elements = weights * case.blocks.block_m * case.blocks.block_n // (32 * case.blocks.num_warps)
    assert "tf32" in ptx
    assert "cvt.rna.tf32" not in ptx
    assert len(re.findall(r"add\.s32.*, 4096;", ptx)) >= elements


@pytest.mark.parametrize("name", compiled.TILED)
def test_amd(name: str) -> None:
    """It compiles, fits and uses the matrix instructions; registers were not tuned for this target."""
    case = next(
        case for case in compiled.cases(("bf16",), (64,), ("gfx942",)) if case.kernel == name
    )
    for start in compiled.starts(case):
        kernel = compiled.binaries.compiled(start, "gfx942")
        assert kernel.metadata.shared <= compiled.binaries.SHARED_LIMIT["gfx942"]
        assert "v_mfma" in kernel.asm["amdgcn"]


def test_lengths_do_not_compile_again() -> None:
    case = compiled.cases(("bf16",), (64,), ("sm_90",))[0]
    hashes = {
        compiled.binaries.compiled(start, "sm_90").hash
        for keys in (1, 63, 64, 1000)
        for start in compiled.starts(case, keys)
    }
    assert len(hashes) == 1


def test_slices_of_weights_do_not_compile_again() -> None:
    """A layer's cotangents and a batch's pairs begin anywhere in their tables."""
    case = next(c for c in compiled.shipped() if c.kernel == "add_effects")
    (start,) = compiled.starts(case)
    mock = compiled.binaries.MockTensor
    arguments = {
        name: mock(x.dtype) if isinstance(x, torch.Tensor) else x
        for name, x in start.arguments.items()
    }
    numbers, hashes = torch.zeros(64), set()
    for begin in (0, 1):
        weights, rows = numbers[begin:], numbers.long()[begin:]
        assert (weights.data_ptr() % 16 == 0) == (rows.data_ptr() % 16 == 0) == (begin == 0)
        arguments |= {"weights_ptr": weights, "first_ptr": rows, "rows_ptr": rows}
        arguments["pair_ptr"] = mock(torch.float32)
        with compiled.binaries.stub_driver("sm_90"):
            hashes.add(start.kernel.warmup(**arguments, grid=(1,)).hash)
    assert len(hashes) == 1


def test_rows_of_many_axes_are_counted_in_64_bits() -> None:
    """Cotangents lie rows2 * rows1 * rows0 numbers apart, which int32 need not hold though it holds each."""
    delta = torch.empty(4, 6, 10, 1, device="meta").transpose(0, 1)[:, :, :8]
    grad = torch.empty(3, 4, 6, 10, 1, device="meta").transpose(1, 2)[:, :, :, :8]
    (start,) = compiled.binaries.captured(
        lambda: compiled.node_effects.launch_node_effects(delta, grad, None)
    )
    assert [start.arguments[f"rows{i}"] for i in range(3)] == [6, 4, 8]
    text = compiled.binaries.compiled(start, "sm_90").asm["ttir"]
    products = [line for line in text.splitlines() if "arith.muli" in line]
    assert products
    assert [line for line in products if ": i64" not in line] == []


@pytest.mark.parametrize("rotated", [2, 32, 64])
def test_rotations_of_few_columns_keep_to_the_tile(rotated: int) -> None:
    """The columns beside them count: as many rows as their own columns allow spilled, or compiled for ten minutes."""
    x = torch.empty(1, 4, 64, 16, 128, device="meta").transpose(2, 3)
    cos = torch.empty(4, 64, rotated, device="meta")
    (start,) = compiled.binaries.captured(
        lambda: compiled.rotate.launch_rotate(x, cos, cos, True, x)
    )
    rows, *columns = (start.arguments[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_REST"))
    assert rows * max(columns) == 2048
    found = compiled.binaries.inspect(compiled.binaries.compiled(start, "sm_90"))
    assert found.spilled == 0
    assert found.registers <= 96


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Tensors say that they are on a device of 16 processors; what is started there."""
    started: list[Any] = []
    monkeypatch.setattr(launch, "_start", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: pytest.MonkeyPatch.context())
    monkeypatch.setattr(launch, "_processors", lambda device: 16)
    return started


def test_autotuning_starts_one_of_the_configurations(on_cuda: list[Any]) -> None:
    """What CUDA would do: the autotuner gets the choices, keys and a grid that follows the blocks."""
    kernel = compiled.attention._attention_fwd_kernel
    choices = (launch.Blocks(64, 64, 1, 4, 2), launch.Blocks(128, 64, 1, 8, 2))
    launch.run(kernel, lambda b: 1024 // b.block_m, {}, choices, torch.empty(0))
    ((tuned, grid, arguments),) = on_cuda
    assert arguments == {"enable_fp_fusion": True}
    assert [config.kwargs["BLOCK_M"] for config in tuned.configs] == [64, 128]
    assert [config.num_warps for config in tuned.configs] == [4, 8]
    assert grid(tuned.configs[1].kwargs) == (8, 1)
    assert launch._tuned(kernel, choices) is tuned
    assert tuned.cache_results


@pytest.mark.parametrize(
    ("length", "parts", "tuned"), [(960, 1, False), (1024, 1, True), (512, 2, True)]
)
def test_what_does_not_fill_the_device_is_not_tuned(
    length: int, parts: int, tuned: bool, on_cuda: list[Any]
) -> None:
    """Of few programs the time says nothing about many: the first configuration runs, and a later call is measured."""
    kernel = compiled.attention._attention_fwd_kernel
    choices = (launch.Blocks(64, 64, 1, 4, 2), launch.Blocks(128, 64, 1, 8, 2))
    launch.run(kernel, lambda b: length // b.block_m, {}, choices, torch.empty(0), parts)
    ((started, grid, arguments),) = on_cuda
    assert (started is not kernel) == tuned
    if not tuned:
        assert grid == (15, 1) and (arguments["BLOCK_M"], arguments["num_warps"]) == (64, 4)


@pytest.mark.parametrize(
    ("cotangents", "chunk", "side", "even"),
    [
        *((1, 2, 1, 1), (2, 2, 1, 2), (3, 2, 1, 2), (7, 6, 1, 4), (12, 6, 1, 6)),
        *((1, 6, 2, 1), (2, 6, 2, 2), (3, 6, 2, 4), (6, 6, 2, 6), (7, 6, 2, 4), (13, 6, 2, 6)),
        *((1, 12, 4, 1), (2, 12, 4, 2), (3, 12, 4, 4), (5, 12, 4, 8), (12, 12, 4, 12)),
        *((13, 12, 4, 8), (25, 12, 4, 12)),
    ],
)
def test_cotangents_are_shared_out_evenly(
    cotangents: int, chunk: int, side: int, even: int
) -> None:
    blocks = launch.Blocks(64, 64, chunk, 4, 2, side=side)
    assert launch.shared_out((blocks, blocks), cotangents) == (blocks._replace(chunk=even),)


def test_one_cotangent_starts_programs_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = []
    monkeypatch.setattr(launch, "_start", lambda kernel, grid, given: chunks.append(given["CHUNK"]))
    x = compiled.tensors(torch.bfloat16, 64, 256)
    one = x.grad_z[:1]
    for start in (
        compiled.attention_vjp.launch_query_gradients,
        compiled.attention_vjp.launch_key_gradients,
    ):
        start(x.q, x.k, x.v, one, x.stats.logsumexp, x.mean[:1], x.scoring)
    compiled.key_patch_effects.launch_other_effects(
        *(x.q, x.k, x.v, x.k, one, x.stats.top_key, x.stats.logsumexp, x.mean[:1], x.scoring)
    )
    assert chunks == [1, 1, 1]


@pytest.mark.parametrize(
    ("programs", "heads", "parts"),
    [(64, 32, 4), (132, 32, 1), (131, 32, 2), (1, 32, 4), (40, 24, 3), (64, 8, 1)],
)
def test_a_group_is_split_where_programs_are_few(
    programs: int, heads: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_processors", lambda device: 132)
    sizes = launch.Sizes(1, heads, 8, 512, 512, 64, 64)
    assert launch.group_parts(programs, sizes, torch.empty(0)) == parts


def test_parts_of_a_group_are_programs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    grids = []
    monkeypatch.setattr(launch, "_start", lambda kernel, grid, given: grids.append(grid))
    monkeypatch.setattr(launch, "_processors", lambda device: 10**6)
    x = compiled.tensors(torch.bfloat16, 64, 256)
    blocks = launch.Blocks(64, 64, 2, 4, 2)
    rows = (x.grad_z, x.stats.logsumexp, x.mean, x.scoring)
    compiled.attention_vjp.launch_key_gradients(x.q, x.k, x.v, *rows, blocks=blocks)
    compiled._other_effects(x, blocks)
    programs = 256 // 64 * compiled.BATCH * compiled.KV_HEADS * compiled.COTANGENTS // 2
    assert grids == [(programs, compiled.HEADS // compiled.KV_HEADS)] * 2


@pytest.mark.parametrize(
    ("pairs", "cotangents", "block_m", "groups"),
    [
        (400, 10, 16, 58),
        (4000, 1, 16, 64),
        (60, 10, 16, 15),  # of at least 32 cotangents
        (6, 9, 16, 1),
        (7, 90, 16, 7),
        (400, 10, 512, 16),
        (400, 10, 2048, 4),  # of neurons
    ],
)
def test_pairs_go_in_groups(pairs: int, cotangents: int, block_m: int, groups: int) -> None:
    assert compiled.add_effects.pair_groups(pairs, cotangents, block_m) == groups


def _added(
    pairs: int, positions: int, monkeypatch: pytest.MonkeyPatch, width: int = 16, dim: int = 64
) -> list[tuple[str, tuple[int, ...]]]:
    """Kernels and grids that add effects by 10 cotangents on 132 processors."""
    starts: list[tuple[str, tuple[int, ...]]] = []
    monkeypatch.setattr(
        launch, "_start", lambda kernel, grid, given: starts.append((kernel.__name__, grid))
    )
    monkeypatch.setattr(launch, "_processors", lambda device: 132)
    z = torch.empty(pairs, positions, width, dim, device="meta")
    grad, sums = z.expand(10, *z.shape), z[0, :, :, 0]
    compiled.add_effects.launch_add_effects(
        grad, grad[:, 0, 0, 0, 0], sums, sums, z, z, None, None, None, None, False
    )
    return starts


def test_groups_of_pairs_have_programs_of_their_own_where_these_are_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = [("_add_effects_kernel", (16, 58)), ("_add_parts_kernel", (2, 1))]
    assert _added(400, 16, monkeypatch) == few
    # few pairs, or many programs, are one start
    assert _added(6, 16, monkeypatch) == [("_add_effects_kernel", (16, 1))]
    assert len(_added(400, 527, monkeypatch)) == 2
    assert _added(400, 528, monkeypatch) == [("_add_effects_kernel", (528, 1))]


def test_tables_of_groups_take_8_mb_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(_added(400, 32, monkeypatch, 8192, 1)) == 2
    assert len(_added(400, 33, monkeypatch, 8192, 1)) == 1
