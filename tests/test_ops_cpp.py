"""The CPU backend in the matrix op x dtype x shape, on every instruction set of this machine."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import op_cases
from atp_fast import _C, ops
from atp_fast.ops import cpp, reference

SMALL = ["T1", "T65", "gqa", "D33", "Dv40", "everything", "sliced", "masked", "spread20"]
BY_NAME = {case.name: case for case in op_cases.CASES}


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    before = _C.use_instruction_set(name)
    try:
        yield
    finally:
        _C.use_instruction_set(before)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("op", ["attention", "attention_alone", "attention_vjp_effects"])
@pytest.mark.parametrize("dtype", op_cases.DTYPES)
@pytest.mark.parametrize("case", op_cases.CASES, ids=lambda case: case.name)
def test_op(op: str, dtype: str, case: op_cases.Case) -> None:
    with op_cases.guarded_outputs():
        op_cases.check(op, op_cases.make_inputs(case, op_cases.DTYPES[dtype]), "cpp")


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", op_cases.DTYPES)
@pytest.mark.parametrize("isa", _C.instruction_sets()[1:])
def test_other_instruction_sets(isa: str, dtype: str, name: str) -> None:
    x = op_cases.make_inputs(BY_NAME[name], op_cases.DTYPES[dtype])
    with instruction_set(isa), op_cases.guarded_outputs():
        op_cases.check("attention", x, "cpp")
        op_cases.check("attention_vjp_effects", x, "cpp")


@pytest.mark.parametrize("case", op_cases.CASES, ids=lambda case: case.name)
def test_separate_ops_are_the_fused_one(case: op_cases.Case) -> None:
    x = op_cases.make_inputs(case, torch.float32)
    with op_cases.guarded_outputs():
        parts = [
            op_cases.run(op, x, "cpp")
            for op in ("attention_vjp", "query_patch_effects", "key_patch_effects")
        ]
        fused = op_cases.run("attention_vjp_effects", x, "cpp")
    assert_same(parts[0] | parts[1] | parts[2], fused)


@pytest.mark.parametrize("op", ["attention", "attention_vjp_effects", "key_patch_effects"])
@pytest.mark.parametrize("batch_heads", [(1, 1), (1, 3), (2, 2)])
def test_threads_change_nothing(op: str, batch_heads: tuple[int, int]) -> None:
    batch, heads = batch_heads
    case = op_cases.Case(
        f"threads{heads}",
        batch=batch,
        heads=2 * heads,
        kv_heads=heads,
        queries=150,
        keys=170,
        cotangents=5,
    )
    x = op_cases.make_inputs(case, torch.float32)
    with threads(1):
        one, again = op_cases.run(op, x, "cpp"), op_cases.run(op, x, "cpp")
    with threads(4):
        four = op_cases.run(op, x, "cpp")
    assert_same(one, again)
    assert_same(one, four)


def test_cotangents_are_independent() -> None:
    """More cotangents than one unit of work holds give what each gives alone."""
    case = dataclasses.replace(BY_NAME["gqa"], name="many", cotangents=21)
    x = op_cases.make_inputs(case, torch.bfloat16)
    together = op_cases.run("attention_vjp_effects", x, "cpp")
    for c in (0, 7, 20):
        alone = op_cases.run("attention_vjp_effects", x._replace(grad_z=x.grad_z[c : c + 1]), "cpp")
        assert_same(alone, {name: y[c : c + 1] for name, y in together.items()})


def test_statistics_of_another_backend_and_layout() -> None:
    x = op_cases.make_inputs(BY_NAME["everything"], torch.float32)
    stats = reference.attention(x.q, x.k, x.v, x.scoring)[1]
    mixed = type(stats)(*(torch.stack([y, y], -1)[..., 0] for y in stats))
    args = dict(q_corrupted=x.q_corrupted, k_corrupted=x.k_corrupted, grad_z=x.grad_z)
    got = ops.attention_vjp_effects(x.q, x.k, x.v, stats=mixed, backend="cpp", **args, **x.options)
    want = ops.attention_vjp_effects(
        x.q, x.k, x.v, stats=stats, backend="reference", **args, **x.options
    )
    for name, y in got._asdict().items():
        torch.testing.assert_close(y, getattr(want, name), msg=lambda m, name=name: f"{name}: {m}")


def any_layout(draw: st.DrawFn, x: Tensor) -> Tensor:
    """The same values in a memory order, with gaps and an offset, of hypothesis' choice."""
    order = draw(st.permutations(range(x.ndim)))
    steps = [draw(st.sampled_from([1, 1, 2, 3])) for _ in order]
    room = torch.full([x.shape[i] * steps[i] + 1 for i in order], torch.nan, dtype=x.dtype)
    view = room.permute([order.index(i) for i in range(x.ndim)])
    for axis in range(x.ndim):
        step = steps[axis]
        view = view.narrow(axis, 1, x.shape[axis] * step)
        view = view[(slice(None),) * axis + (slice(0, None, step),)]
    view.copy_(x)
    shared = draw(st.sampled_from([None, None, *range(x.ndim)]))
    if shared is not None and x.shape[shared]:
        view = view.narrow(shared, 0, 1).expand(x.shape)
    return view


@st.composite
def any_inputs(draw: st.DrawFn) -> op_cases.Inputs:
    kv_heads, prefix = draw(st.integers(1, 2)), draw(st.integers(0, 70))
    queries = draw(st.integers(0, 70))
    case = op_cases.Case(
        f"any{draw(st.integers(0, 99))}",
        batch=draw(st.integers(1, 2)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        queries=queries,
        keys=queries + prefix,
        head_dim=draw(st.integers(1, 40)),
        value_dim=draw(st.integers(1, 40)),
        cotangents=draw(st.integers(1, 3)),
        causal=draw(st.booleans()),
        window=draw(st.sampled_from([None, 1, 7, 64, 80])),
        softcap=draw(st.sampled_from([None, 2.0])),
        sinks=draw(st.booleans()),
        key_mask=draw(st.sampled_from([None, "padding", "left", "all"])),
        spread=draw(st.sampled_from([1.0, 8.0])),
    )
    x = op_cases.make_inputs(case, draw(st.sampled_from(list(op_cases.DTYPES.values()))))
    return op_cases.Inputs(*(any_layout(draw, y) for y in x[:6]), x.options)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(any_inputs())
def test_any_shape_and_strides(x: op_cases.Inputs) -> None:
    with op_cases.guarded_outputs():
        op_cases.check("attention", x, "cpp")
        op_cases.check("attention_vjp_effects", x, "cpp")


@pytest.mark.parametrize("isa", _C.instruction_sets())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_results_are_rounded_to_nearest_even(isa: str, dtype: torch.dtype) -> None:
    """Two keys of equal weight: z and grad_v are means and halves that float32 holds exactly, ties among them."""
    finfo = torch.finfo(dtype)
    low = 1 + finfo.eps * torch.arange(64, dtype=torch.float64)
    steps = torch.tensor([0, 1, 2, 3, 5, 7], dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0])
    first = (low[:, None, None] * signs[:, None]).expand(64, 2, 6)
    second = first + finfo.eps * steps * signs[:, None]
    v = torch.stack([first.reshape(-1), second.reshape(-1)]).to(dtype)[None, None]
    q = torch.zeros(1, 1, 2, 8, dtype=dtype)
    grad = v[None]
    with instruction_set(isa):
        z, stats = ops.attention(q, q, v, causal=False, backend="cpp")
        grads = ops.attention_vjp(q, q, v, stats=stats, grad_z=grad, causal=False, backend="cpp")
    exact = v.double().mean(2, keepdim=True).expand_as(v)
    assert (exact.to(dtype).double() != exact).any()
    assert torch.equal(z, exact.to(dtype))
    assert torch.equal(grads[2][0], exact.to(dtype))


@pytest.mark.parametrize("isa", _C.instruction_sets())
@pytest.mark.parametrize(
    ("real", "low", "high"), [(np.float32, -87.3, 88), (np.float64, -708, 709)]
)
def test_exponential(isa: str, real: type, low: float, high: float) -> None:
    x = np.concatenate([np.linspace(low, high, 200_003), np.linspace(-1, 1, 100_001)]).astype(real)
    y = np.empty_like(x)
    with instruction_set(isa):
        _C.exponential(x.ctypes.data, y.ctypes.data, x.size, real is np.float64)
    truth = np.exp(x.astype(np.longdouble))
    worst = (np.abs(y - truth) / np.spacing(truth.astype(real))).max()
    assert worst <= (1.2 if isa == "portable" else 1)


@pytest.mark.parametrize("isa", _C.instruction_sets())
def test_exponential_outside_its_range(isa: str) -> None:
    x = np.array([-np.inf, -1e30, -88, 89, np.inf], np.float32)
    y = np.empty_like(x)
    with instruction_set(isa):
        _C.exponential(x.ctypes.data, y.ctypes.data, x.size, False)
    assert (y[:3] == 0).all()
    np.testing.assert_allclose(y[3:], np.exp(np.float32(88)), rtol=1e-6)


def test_an_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match="no instruction set 'mmx'"):
        _C.use_instruction_set("mmx")


def test_memory_is_linear_in_the_length() -> None:
    """A thread's scratch at T = 4096 with 12 cotangents, by the growth of the process's peak."""
    import resource

    q, k, v, k_corrupted = (torch.randn(1, 1, 4096, 64) for _ in range(4))
    grad = torch.randn(1, 1, 1, 4096, 64).expand(12, 1, 1, 4096, 64)
    scoring = reference.Scoring(0.125, True, None, None, None, None)
    with threads(2):
        stats = cpp.attention(q[:, :, :64], k[:, :, :64], v[:, :, :64], scoring)[1]
        stats = cpp.attention(q, k, v, scoring)[1]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        effects = cpp.key_patch_effects(q, k, v, k_corrupted, grad, stats, scoring)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert torch.isfinite(effects).all()
    assert after - before < 20 * 1024  # KiB; one 4096 x 4096 matrix is 64 MiB


@pytest.mark.parametrize("dtype", op_cases.DTYPES)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        (64,),
        (3, 64),
        (2, 3, 70, 64),
        (2, 300, 1),
        (5000, 1),
        (2, 3, 1),
        (7, 19),
        (2, 129, 160),
        (0, 3),
        (3, 0),
    ],
    ids=str,
)
def test_node_effects(dtype: str, weighted: bool, shape: tuple[int, ...]) -> None:
    rng = torch.Generator().manual_seed(len(shape))
    delta = torch.randn(shape, generator=rng).to(op_cases.DTYPES[dtype])
    grad = torch.randn(4, *shape, generator=rng).to(op_cases.DTYPES[dtype])
    weights = torch.tensor([1.0, 0.0, -2.0, 0.5]) if weighted else None
    for isa in _C.instruction_sets():
        with instruction_set(isa), op_cases.guarded_outputs():
            check_node_effects(delta, grad, weights)


def check_node_effects(delta: Tensor, grad: Tensor, weights: Tensor | None) -> None:
    got = ops.node_effects(delta, grad, weights=weights, backend="cpp")
    same = ops.node_effects(delta, grad, weights=weights, backend="reference")
    wide = (delta.double(), grad.double())
    truth = ops.node_effects(
        *wide, weights=None if weights is None else weights.double(), backend="reference"
    )
    scale = ops.node_effects(
        *(x.abs() for x in wide),
        weights=None if weights is None else weights.double().abs(),
        backend="reference",
    )
    assert got.shape == same.shape
    assert got.dtype == same.dtype
    bound = 2 * (same - truth).abs() + op_cases.FEW * torch.finfo(got.dtype).eps * scale
    assert ((got - truth).abs() <= bound).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_node_effects_of_any_strides(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    dtype = data.draw(st.sampled_from(list(op_cases.DTYPES.values())))
    rng = torch.Generator().manual_seed(sum(shape))
    delta = any_layout(data.draw, torch.randn(shape, generator=rng).to(dtype))
    grad = any_layout(data.draw, torch.randn(2, *shape, generator=rng).to(dtype))
    weights = data.draw(st.sampled_from([None, torch.tensor([0.3, 1.7])]))
    with op_cases.guarded_outputs():
        check_node_effects(delta, grad, weights)


def test_node_effects_of_the_gradient_of_a_sum() -> None:
    delta = torch.randn(3, 5, 8)
    grad = torch.ones(1, 1, 1, 1).expand(2, 3, 5, 8)
    torch.testing.assert_close(
        ops.node_effects(delta, grad, backend="cpp"), delta.sum(-1).expand(2, 3, 5)
    )


def test_more_axes_than_the_kernel_takes() -> None:
    delta = torch.ones([1] * 18)
    with pytest.raises(ValueError, match="delta has too many axes"):
        ops.node_effects(delta, delta[None], backend="cpp")


def test_a_tensor_with_the_negative_bit_is_refused() -> None:
    delta = torch.randn(4, 6, dtype=torch.complex64).conj().imag
    with pytest.raises(ValueError, match="negative bit"):
        ops.node_effects(delta, delta[None].contiguous(), backend="cpp")


def test_the_version_is_the_package_s() -> None:
    import atp_fast

    assert _C.__version__ == atp_fast.__version__
