"""The C++ product of linear layers: right on every shape and instruction set, and in a model's layers only inside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import accelerate
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import op_cases
import zoo
from atp_fast import _C
from atp_fast.attribution import precision
from atp_fast.attribution.adjoint import Adjoint
from atp_fast.engine import Engine
from atp_fast.hf import linears
from atp_fast.hf.linears import find_linears, own_linears
from atp_fast.nodes import Node
from atp_fast.ops import cpp

CPU = torch.device("cpu")
ATTENTION_AND_NEURONS = ("q", "k", "v", "z", "neuron")


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Own products whatever the CPU; holds the rows of every one that ran."""
    rows: list[int] = []
    product = cpp.linear

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows.append(x.shape[:-1].numel())
        return product(x, weight, bias)

    monkeypatch.setattr(linears, "own_products_are_faster", lambda: True)
    monkeypatch.setattr(cpp, "linear", noted)
    yield rows


@pytest.fixture(params=_C.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    before = _C.use_instruction_set(request.param)
    yield
    _C.use_instruction_set(before)


def check_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Each element is off by at most what any order of summing may cost."""
    with op_cases.guarded_outputs():
        found = cpp.linear(x, weight, bias)
    exact, size = x.double() @ weight.double(), x.double().abs() @ weight.double().abs()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    assert found.shape == exact.shape and found.dtype == x.dtype
    bound = (weight.shape[0] + 2) * torch.finfo(x.dtype).eps * size
    assert bool(((found.double() - exact).abs() <= bound).all())


SHAPES = [
    (1, 1, 1), (0, 3, 4), (2, 0, 5), (3, 4, 0), (4, 320, 96), (5, 321, 97), (15, 37, 53),
    (192, 24, 64), (193, 8, 8), (200, 640, 25), (3, 768, 300), (31, 1000, 10), (500, 2000, 200),
    (9, 40, 48), (41, 5, 100), (64, 650, 145), (65, 16, 48), (128, 390, 50), (129, 400, 330),
    (40, 800, 100), (100, 770, 49), (770, 400, 200), (1541, 30, 70),
]  # fmt: skip


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(shape: tuple[int, int, int], transposed: bool, dtype: torch.dtype) -> None:
    rows, depth, columns = shape
    torch.manual_seed(rows)
    x = torch.randn(rows, depth + 3, dtype=dtype)[:, :depth]
    weight = torch.randn(columns, depth, dtype=dtype).t()
    if not transposed:
        weight = weight.contiguous()
    for bias in (None, torch.randn(columns, dtype=dtype)):
        check_product(x, weight, bias)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 400), st.integers(1, 700), st.integers(1, 300),
    st.booleans(), st.booleans(), st.integers(0, 9),
)  # fmt: skip
def test_random_products(
    rows: int, depth: int, columns: int, transposed: bool, biased: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(columns, depth).t() if transposed else torch.randn(depth, columns)
    # three axes, the first two of which are not neighbours in memory
    x = torch.randn(2, rows, depth).transpose(0, 1)
    check_product(x, weight, torch.randn(columns) if biased else None)


PARTS = [
    slice(*ends)
    for ends in (
        (0, 2),
        (7, 18),
        (150, 214),
        (150, 215),
        (70, 198),
        (70, 199),
        (800, 1570),
        (1599, 1600),
    )
]
"""Rows on either side of where the way is another one: 64 and 128, and 192 and 768 in a tile."""


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("transposed", [False, True])
def test_bits_depend_neither_on_threads_nor_on_other_rows(transposed: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1600, 800), torch.randn(700, 800).t(), torch.randn(700)
    if not transposed:
        weight = weight.contiguous()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(cpp.linear(x, weight, bias))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], each) for each in results)
    for part in PARTS:
        assert torch.equal(cpp.linear(x[part], weight, bias), results[0][part])


def test_what_is_not_finite_stays_in_its_row() -> None:
    x, weight = torch.ones(6, 50), torch.ones(50, 30)
    x[3, 7] = float("nan")
    found = cpp.linear(x, weight)
    assert bool(found[3].isnan().all()) and bool((found[[0, 1, 2, 4, 5]] == 50).all())


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(24, 40), nn.GELU(), Conv1D(16, 40), nn.Linear(16, 8, bias=False)
    )
    return model.requires_grad_(False)


def gradients(model: nn.Module, x: Tensor, cotangents: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)

    def gradient(cotangent: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, cotangent, retain_graph=True)[0]

    alone = torch.stack([gradient(c) for c in cotangents])
    (together,) = Adjoint([y], [x])([cotangents])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    return y.detach(), together


@pytest.mark.parametrize("lead", [(1,), (5,), (2, 3)], ids=str)
def test_layers_and_their_gradients(everywhere: list[int], lead: tuple[int, ...]) -> None:
    model = small_model()
    x, cotangents = torch.randn(*lead, 24), torch.randn(4, *lead, 8)
    wanted = gradients(model, x, cotangents)
    with own_linears(find_linears(model), CPU, "auto"):
        found = gradients(model, x, cotangents)
        with torch.no_grad():
            assert torch.equal(model(x), found[0])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (4 * x.shape[:-1].numel() in everywhere) and min(everywhere) > 1
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("tokens", [0, 3, 9000])
def test_gradients_of_few_tokens(everywhere: list[int], rows: int, tokens: int) -> None:
    torch.manual_seed(0)
    head = nn.Linear(6, 9000).requires_grad_(False)
    x = torch.randn(rows, 6, requires_grad=True)
    cotangent = torch.zeros(rows, 9000)
    cotangent[-1, torch.randperm(9000)[:tokens]] = torch.randn(tokens)
    with own_linears([head], CPU, "cpp"):
        y = head(x)
        everywhere.clear()
        found = torch.autograd.grad(y, x, cotangent)[0]
    torch.testing.assert_close(found, cotangent @ head.weight, rtol=1e-4, atol=1e-4)
    few = tokens < 9000 and rows <= 8
    assert everywhere == ([] if few or rows == 1 else [rows])


def test_what_is_left_to_torch(everywhere: list[int]) -> None:
    def run(model: nn.Module, x: Tensor, backend: str = "cpp") -> Tensor:
        with own_linears(find_linears(model), CPU, backend):
            y: Tensor = model(x)
        return y

    x = torch.randn(3, 24)
    layer = nn.Linear(24, 5).requires_grad_(False)
    strided = nn.Linear(24, 5).requires_grad_(False)
    strided.weight.data = torch.randn(5, 48)[:, ::2]
    for model, inputs, backend in [
        (layer, x, "reference"),
        (nn.Linear(24, 5), x, "cpp"),  # its weights are trained
        (strided, x, "cpp"),
        (nn.Linear(24, 5).requires_grad_(False).double(), x.double(), "cpp"),
        (nn.Linear(24, 5).requires_grad_(False).bfloat16(), x.bfloat16(), "cpp"),
    ]:
        assert torch.equal(run(model, inputs, backend), model(inputs))
    assert everywhere == []
    run(layer, x)
    assert everywhere == [3]


def test_what_another_has_switched_stays(everywhere: list[int]) -> None:
    layer: Any = nn.Linear(4, 4).requires_grad_(False)

    def theirs(x: Tensor) -> Tensor:
        return x + 1

    layer.forward = theirs
    with own_linears(find_linears(layer), CPU, "auto"):
        assert layer(torch.zeros(2, 4)).tolist() == [[1] * 4] * 2
    assert layer.forward is theirs and everywhere == []


def test_weights_that_accelerate_fetches(everywhere: list[int]) -> None:
    model, x = small_model(), torch.randn(3, 24)
    with own_linears(find_linears(model), CPU, "auto"):
        wanted = model(x)
    everywhere.clear()
    accelerate.cpu_offload(model, execution_device=CPU)
    before = {module: dict(vars(module)) for module in model.modules()}
    with own_linears(find_linears(model), CPU, "auto"):
        assert torch.equal(model(x), wanted)
    assert everywhere == [3, 3, 3]
    for module, attributes in before.items():
        for name in ("forward", "_old_forward"):
            assert vars(module).get(name) is attributes.get(name)


def test_own_code_is_back_after_an_error(everywhere: list[int]) -> None:
    layer = nn.Linear(4, 4).requires_grad_(False)
    with pytest.raises(RuntimeError, match="stop"), own_linears(find_linears(layer), CPU, "auto"):
        assert "forward" in vars(layer)
        raise RuntimeError("stop")
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_engine_finds_the_same(everywhere: list[int], family: str) -> None:
    model = zoo.build(family, dtype=torch.float32)
    pairs = zoo.random_pairs(model, 2, 9)
    nodes = [Node("z", 0, 3, 1), Node("v", 1, 8, 0)]

    def scores() -> list[Tensor]:
        engine = Engine(model, backend="cpp")
        kinds = [k for k in ATTENTION_AND_NEURONS if k not in engine.plug.inspection.refused]
        found = engine.attribute(pairs, nodes=kinds, progress=False)
        effects = engine.patch(pairs, nodes, progress=False)
        return [*found.contribution.values(), effects.effect]

    own = scores()
    assert len(everywhere) > 20
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linears, "own_products_are_faster", lambda: False)
        count = len(everywhere)
        torchs = scores()
        assert len(everywhere) == count
    for a, b in zip(own, torchs, strict=True):
        assert float((a - b).abs().max()) <= 2e-4 * float(b.abs().max())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("units", [True, False], ids=["bfloat16 units", "none"])
def test_narrow_cotangents(
    everywhere: list[int], units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded once each, forward values untouched."""
    monkeypatch.setattr(precision, "_multiplies_bfloat16", lambda device_type: units)
    model = small_model()
    x, cotangents = torch.randn(3, 24), torch.randn(4, 3, 8)
    with own_linears(find_linears(model), CPU, "auto"):
        wide = gradients(model, x, cotangents)
        count = len(everywhere)
        with precision.NarrowCotangents():
            y = model(x.requires_grad_())
        assert len(everywhere) == count + 3
        found = torch.stack(
            [torch.autograd.grad(y, x, c, retain_graph=True)[0] for c in cotangents]
        )
    assert len(everywhere) == count + (3 if units else 15)
    assert torch.equal(y, wide[0])
    error = float((found - wide[1]).abs().max() / wide[1].abs().max())
    assert 1e-4 < error < 2e-2
