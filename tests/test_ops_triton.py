"""The Triton backend in the matrix op x dtype x shape: on a GPU where there is one, and in Triton's interpreter.

The interpreter's mode is fixed when the kernels are defined, so its tests live in a process with TRITON_INTERPRET
set: `make test-interpret`, or the one test that starts it. There green means that the index arithmetic and the
formulas are right; races, and what the compiler does, only the GPU shows (test_kernels_compile.py reads the binaries).
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton import jit

import op_cases
from atp_fast import ops
from atp_fast.kernels import attention_vjp
from atp_fast.kernels.attention import launch_attention
from atp_fast.kernels.attention_vjp import launch_key_gradients, launch_query_gradients
from atp_fast.kernels.attention_z import launch_attention_z
from atp_fast.kernels.key_patch_effects import (
    launch_key_patch_effects,
    launch_other_effects,
    launch_top_effects,
)
from atp_fast.kernels.launch import Blocks, Scoring, shared_out, sizes_of
from atp_fast.kernels.row_dots import launch_row_dots
from atp_fast.kernels.tiles import half_a_place_up
from atp_fast.ops import reference, triton

BY_NAME = {case.name: case for case in op_cases.CASES}
DEVICE = "cpu" if triton.INTERPRETED else "cuda"
# a case takes the interpreter about a second, and it computes bfloat16 wrongly: left out is what others cover
MATRIX: dict[str, set[str]] = {"f32": set(BY_NAME), "f16": set(BY_NAME), "bf16": set(BY_NAME)}
if triton.INTERPRETED:
    MATRIX["f32"] -= {"T15", "T31", "T63", "T67", "T150-B2-H3", "transposed", "padding", "T129"}
    MATRIX["f32"] -= {"window5", "window70", "window64-T128", "window65-T130", "sliced", "expanded"}
    MATRIX["f32"] -= {"left", "side-sliced", "D16-T70", "window63-T66"}
    MATRIX["f16"] = {"T1", "T65", "gqa", "Dv40", "sliced", "masked-sinks", "spread20"}
    MATRIX["bf16"] = set()

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def inputs(name: str, dtype: str = "f32") -> op_cases.Inputs:
    return op_cases.make_inputs(BY_NAME[name], op_cases.DTYPES[dtype], DEVICE)


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def _product_in_parts(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b as the compiler's "bf16x6" computes it: three bfloat16 parts each, six products summed in float32."""

    def parts(x: np.ndarray) -> list[Tensor]:
        rest, found = torch.from_numpy(np.ascontiguousarray(x)), []
        for _ in range(3):
            found.append(rest.to(torch.bfloat16).float())
            rest = rest - found[-1]
        return found

    (a0, a1, a2), (b0, b1, b2) = parts(a), parts(b)
    small = a1 @ b1 + a0 @ b2 + a2 @ b0
    return ((small + (a0 @ b1 + a1 @ b0)) + a0 @ b0).numpy()


def _in_tf32(x: np.ndarray) -> np.ndarray:
    """x as a TF32 product takes it: float32 without the 13 last bits."""
    return (x.view(np.int32) & -0x2000).view(np.float32)


@jit
def _half_a_place_up_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(out_ptr + offs, half_a_place_up(tl.load(x_ptr + offs)))


if not triton.INTERPRETED:

    @pytest.mark.parametrize(
        "some", ["f32 and attention_vjp_effects", "not (f32 and attention_vjp_effects)"]
    )
    def test_in_the_interpreter(some: str) -> None:
        here = Path(
            __file__
        ).parent  # not the sources' folder, which would hide an installed atp_fast
        files = [__file__, str(here / "test_add_effects.py"), str(here / "test_norm.py")]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
        command += ["-p", "no:xdist", "-k", some]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, cwd=here, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]

    def test_it_needs_cuda_tensors() -> None:
        x = torch.zeros(1, 1, 2, 8)
        with pytest.raises(ValueError, match="backend 'triton' needs CUDA tensors, got cpu"):
            ops.attention(x, x, x, backend="triton")


if triton.INTERPRETED or torch.cuda.is_available():

    @pytest.mark.parametrize("op", ["attention", "attention_alone", "attention_vjp_effects"])
    @pytest.mark.parametrize(
        ("dtype", "name"),
        [(dtype, name) for dtype, names in MATRIX.items() for name in sorted(names)],
    )
    def test_op(op: str, dtype: str, name: str) -> None:
        with op_cases.guarded_outputs():
            op_cases.check(op, inputs(name, dtype), "triton")

    @pytest.mark.parametrize("name", ["T16", "no-queries"])
    def test_separate_ops_are_the_fused_one(name: str) -> None:
        x = inputs(name)
        parts = [
            op_cases.run(op, x, "triton")
            for op in ("attention_vjp", "query_patch_effects", "key_patch_effects")
        ]
        _same(parts[0] | parts[1] | parts[2], op_cases.run("attention_vjp_effects", x, "triton"))

    @pytest.mark.parametrize("name", ["D20", "masked"])
    def test_identical_prompts_have_no_effect(name: str) -> None:
        x = inputs(name)
        x = x._replace(q_corrupted=x.q.clone(), k_corrupted=x.k.clone())
        got = op_cases.run("attention_vjp_effects", x, "triton")
        assert (got["effect_q"] == 0).all()
        assert (got["effect_k"] == 0).all()

    @pytest.mark.skipif(not triton.INTERPRETED, reason="it stands in for the compiler's products")
    @pytest.mark.parametrize("name", ["T32", "spread60"])
    def test_float32_products_in_bfloat16_parts_are_exact_enough(
        name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        products = 0

        def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
            nonlocal products
            products += 1
            return TensorHandle(_product_in_parts(a.data, b.data) + d.data, d.dtype.scalar)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
        x = inputs(name)
        op_cases.check("attention", x, "triton")
        op_cases.check("attention_vjp_effects", x, "triton")
        assert products > 0

    def test_half_a_place_up_and_truncated_is_the_nearest_tf32() -> None:
        rng = np.random.default_rng(1)
        x = rng.standard_normal(4096) * 2.0 ** rng.integers(-60, 60, 4096)
        halves = [1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-11, 2 - 2**-11, 2.0**-126, 0.0]
        x[: len(halves) + 4] = [*halves, np.inf, -np.inf, np.nan, np.nan]
        given = x.astype(np.float32)
        # the NaN that the hardware makes
        given.view(np.int32)[len(halves) + 3] = 0x7FFFFFFF
        out = torch.empty(4096, device=DEVICE)
        _half_a_place_up_kernel[(1,)](torch.from_numpy(given).to(DEVICE), out, SIZE=4096)
        fraction, exponent = np.frexp(given.astype(np.float64))
        places = np.copysign(np.floor(np.abs(fraction) * 2**11 + 0.5), fraction)
        np.testing.assert_array_equal(_in_tf32(out.cpu().numpy()), np.ldexp(places, exponent - 11))

    @pytest.mark.skipif(not triton.INTERPRETED, reason="it stands in for the compiler's products")
    def test_float16_gradients_do_not_shrink_by_truncation(monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
            x, y = (_in_tf32(z.data.astype(np.float32)) for z in (a, b))
            return TensorHandle(x @ y + d.data, d.dtype.scalar)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
        monkeypatch.setattr(attention_vjp, "dot_precision", lambda dtype: "tf32")
        x = inputs("T65", "f16")
        truth = op_cases.run("attention_vjp", x.to(torch.float64), "reference")
        for name, got in op_cases.run("attention_vjp", x, "triton").items():
            size = (got.double() * truth[name]).sum() / truth[name].square().sum()
            assert abs(size - 1) < 1e-4, name

    @pytest.mark.parametrize(
        ("name", "blocks"),
        [
            ("Dv8", Blocks(16, 16, 1, 4, 1)),
            ("Dv40", Blocks(16, 32, 2, 4, 1, width=16)),
            ("sinks", Blocks(32, 16, 3, 4, 1)),
        ],
        ids=["16x16x1", "16x32x2-sliced", "32x16x3"],
    )
    def test_block_sizes_change_rounding_only(name: str, blocks: Blocks) -> None:
        x = inputs(name)
        scoring = Scoring(*x.scoring)
        exact = x.to(torch.float64)
        truth = op_cases.run("attention_vjp_effects", exact, "reference")
        stats = launch_attention(x.q, x.k, x.v, scoring, blocks=blocks)
        mean, logsumexp = launch_row_dots(
            x.grad_z, stats.z, logsumexp=stats.logsumexp, blocks=Blocks(8, 1, 1, 4, 1)
        )
        rows = (x.grad_z, logsumexp, mean, scoring)
        grad_k, grad_v = launch_key_gradients(x.q, x.k, x.v, *rows, blocks=blocks)
        got = {
            "grad_q": launch_query_gradients(x.q, x.k, x.v, *rows, blocks=blocks),
            "grad_k": grad_k,
            "grad_v": grad_v,
        }
        for name, y in got.items():
            torch.testing.assert_close(y.double(), truth[name], rtol=1e-5, atol=1e-5)
        default = launch_attention(x.q, x.k, x.v, scoring)
        others = (
            launch_other_effects(
                *(x.q, x.k, x.v, x.k_corrupted, x.grad_z, stats.top_key, logsumexp, mean, scoring),
                blocks=choice,
            )
            for choice in (blocks, None)
        )
        torch.testing.assert_close(*others, rtol=1e-5, atol=1e-5)
        assert torch.equal(stats.top_key, default.top_key)

    @pytest.mark.parametrize(
        ("before", "window"),
        [
            *((before, None) for before in (14, 15, 16)),
            *((0, window) for window in (15, 16, 17)),
            *((15, window) for window in (30, 31, 32)),
        ],
    )
    def test_tiles_at_the_edges(before: int, window: int | None) -> None:
        """Tiles of 16 that end at, before and behind the diagonal and the window's edge, or are whole."""
        case = op_cases.Case("edges", queries=40, keys=40 + before, window=window, cotangents=1)
        x = op_cases.make_inputs(case, torch.float32, DEVICE)
        scoring, blocks = Scoring(*x.scoring), Blocks(16, 16, 1, 4, 1)
        truth = op_cases.run("attention_vjp_effects", x.to(torch.float64), "reference")
        truth |= op_cases.run("attention_alone", x.to(torch.float64), "reference")
        stats = launch_attention(x.q, x.k, x.v, scoring, blocks=blocks)
        mean, lse = launch_row_dots(x.grad_z, stats.z, logsumexp=stats.logsumexp)
        rows = (x.grad_z, lse, mean, scoring)
        grads = launch_key_gradients(x.q, x.k, x.v, *rows, blocks=blocks)
        grad_q = launch_query_gradients(x.q, x.k, x.v, *rows, blocks=blocks)
        effect_k = launch_key_patch_effects(
            *(x.q, x.k, x.v, x.k_corrupted, x.grad_z, stats, scoring), blocks=blocks
        )
        z, logsumexp = launch_attention_z(x.q, x.k, x.v, scoring, blocks=blocks)
        got = {"grad_q": grad_q, "grad_k": grads[0], "grad_v": grads[1], "effect_k": effect_k}
        got |= {"z": z, "stats.z": stats.z, "stats.logsumexp": logsumexp}
        for name, y in got.items():
            torch.testing.assert_close(y.double(), truth[name], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        ("cotangents", "blocks"),
        [
            *((c, Blocks(16, 32, 12, 4, 1, side=4, lanes=4)) for c in (1, 3, 7, 12, 13)),
            *((c, Blocks(32, 16, 6, 4, 1, width=16, side=2)) for c in (2, 5)),
        ],
        ids=lambda x: str(x) if isinstance(x, int) else f"side{x.side}",
    )
    def test_cotangents_side_by_side(cotangents: int, blocks: Blocks) -> None:
        case = dataclasses.replace(
            BY_NAME["everything"],
            heads=2,
            kv_heads=1,
            queries=19,
            keys=37,
            window=17,
            cotangents=cotangents,
        )
        x = op_cases.make_inputs(case, torch.float32, DEVICE)
        truth = op_cases.run("attention_vjp_effects", x.to(torch.float64), "reference")["effect_k"]
        stats = launch_attention(x.q, x.k, x.v, Scoring(*x.scoring))
        (even,) = shared_out((blocks,), cotangents)
        with op_cases.guarded_outputs():
            got = launch_key_patch_effects(
                *(x.q, x.k, x.v, x.k_corrupted, x.grad_z, stats, Scoring(*x.scoring)), blocks=even
            )
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(("name", "parts"), [("gqa", 3), ("mqa", 5)])
    def test_parts_of_a_group_sum_to_it(name: str, parts: int) -> None:
        x = inputs(name)
        scoring = Scoring(*x.scoring)
        stats = launch_attention(x.q, x.k, x.v, scoring)
        mean, logsumexp = launch_row_dots(x.grad_z, stats.z, logsumexp=stats.logsumexp)
        found = []
        for n in (1, parts):
            grads = launch_key_gradients(x.q, x.k, x.v, x.grad_z, logsumexp, mean, scoring, parts=n)
            effects = launch_other_effects(
                *(x.q, x.k, x.v, x.k_corrupted, x.grad_z, stats.top_key, logsumexp, mean, scoring),
                parts=n,
            )
            found.append((*grads, effects))
        for whole, split in zip(*found, strict=True):
            assert split.dtype == whole.dtype
            torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-5)

    def test_logsumexps_to_the_base_2() -> None:
        given = torch.tensor([[[-torch.inf, 0.0, 3.0]]], device=DEVICE)
        g = torch.ones(2, 1, 1, 3, 4, device=DEVICE)
        mean, got = launch_row_dots(g, g[0], logsumexp=given)
        assert (mean == 4).all()
        torch.testing.assert_close(
            got, torch.tensor([[[torch.inf, 0.0, 3 * 1.4426950408889634]]], device=DEVICE)
        )

    def test_top_parts_are_summed_by_key() -> None:
        x = inputs("gqa")
        sizes = sizes_of(x.q, x.k, x.v)
        top = launch_attention(x.q, x.k, x.v, Scoring(*x.scoring)).top_key
        part = torch.randint(-8, 9, (20, *top.shape), device=DEVICE).float()
        want = torch.zeros(20, sizes.batch, sizes.heads, sizes.keys, device=DEVICE)
        want.scatter_add_(-1, top.expand_as(part), part)
        want = reference.ungrouped(want, sizes.kv_heads, 2).transpose(-1, -2)
        assert torch.equal(launch_top_effects(part, top, sizes, Scoring(*x.scoring)), want)

    @pytest.mark.parametrize("dtype", [name for name in MATRIX if MATRIX[name]])
    @pytest.mark.parametrize("weighted", [False, True], ids=["signed", "weighted"])
    @pytest.mark.parametrize(
        "shape",
        [(0, 4), (3,), (5, 1), (2, 7, 5, 6), (2, 5000, 1), (3, 1500), (2, 3, 2, 2, 3, 4)],
        ids=str,
    )
    def test_node_effects(shape: tuple[int, ...], weighted: bool, dtype: str) -> None:
        rng = torch.Generator().manual_seed(1)
        delta = torch.randn(shape, generator=rng).to(DEVICE, op_cases.DTYPES[dtype])
        grad = torch.randn((3, *shape), generator=rng).to(DEVICE, op_cases.DTYPES[dtype])
        weights = torch.rand(3, generator=rng).to(DEVICE) if weighted else None
        layouts = [(delta, grad)]
        if len(shape) == 4:
            layouts.append((delta.transpose(1, 2), grad.transpose(2, 3)))
            layouts.append((delta[:, ::2, 1:, ::2], grad[:, :, ::2, 1:, ::2]))
            layouts.append((delta[:, :1].expand(shape), grad[:1].expand_as(grad)))
        for x, g in layouts:
            with op_cases.guarded_outputs():
                got = ops.node_effects(x, g, weights=weights, backend="triton")
            truth = reference.node_effects(x.double(), g.double(), weights)
            scale = (x.double() * g.double()).abs().sum(-1)
            if weights is not None:
                scale = torch.tensordot(weights.double(), scale, dims=1)
            assert got.dtype == torch.float32
            assert ((got - truth).abs() <= 8 * torch.finfo(torch.float32).eps * scale).all()

    def test_float64_is_refused() -> None:
        x = torch.zeros(1, 1, 2, 8, dtype=torch.float64, device=DEVICE)
        with pytest.raises(ValueError, match="q must be float32, bfloat16 or float16"):
            ops.attention(x, x, x, backend="triton")
        with pytest.raises(ValueError, match="delta must be float32, bfloat16 or float16"):
            ops.node_effects(x[0], x, backend="triton")

    def test_wide_heads_are_refused() -> None:
        x = torch.zeros(1, 1, 2, 257, device=DEVICE)
        with pytest.raises(ValueError, match="q's head_dim must be at most 256 .* got 257"):
            ops.attention(x, x, x, backend="triton")
