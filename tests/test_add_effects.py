"""Effects added in place to the scores of all pairs, by every backend, against sums written out in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import op_cases
from atp_fast import ops
from atp_fast.kernels import add_effects
from atp_fast.ops import triton

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
}
if triton.INTERPRETED:  # it computes bfloat16 wrongly, and the kernels take no float64
    BACKENDS = [("triton", "f32"), ("triton", "f16")]
else:
    BACKENDS = [(backend, dtype) for backend in ("reference", "cpp") for dtype in DTYPES]
    if torch.cuda.is_available():
        BACKENDS += [("triton", dtype) for dtype in ("f32", "bf16", "f16")]


class Case(NamedTuple):
    """Sizes of a call; columns: of the scores, more than positions where pairs start at different ones."""

    cotangents: int
    batch: int
    positions: int
    width: int
    dim: int
    columns: int = 0
    live: bool = False
    given: bool = False  # the effects themselves
    per_pair: str = ""  # "score" or "effect"


CASES = {
    "heads": Case(3, 2, 5, 4, 16),
    "many cotangents": Case(9, 1, 3, 3, 20, per_pair="score"),
    "neurons": Case(5, 2, 3, 300, 1, live=True, per_pair="score"),
    "many neurons": Case(2, 1, 2, 5000, 1),
    "write": Case(2, 2, 4, 1, 1500, live=True),
    "given": Case(6, 3, 7, 5, 1, live=True, given=True, per_pair="score"),
    "moved": Case(2, 3, 6, 4, 8, columns=9, live=True, per_pair="score"),
    "moved neurons": Case(1, 3, 6, 40, 1, columns=9, per_pair="effect"),
    "many pairs": Case(2, 7, 3, 5, 8, columns=5, live=True, per_pair="score"),
    "many pairs' neurons": Case(1, 9, 2, 300, 1, per_pair="effect"),
    "plain": Case(1, 2, 5, 4, 16, live=True, per_pair="effect"),
    "no pairs": Case(2, 0, 5, 4, 16),
    "no cotangents": Case(0, 2, 5, 4, 16),
    "no positions": Case(2, 2, 0, 4, 16),
}


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers, differently in memory."""
    if layout == "heads first":  # as attention has them
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "sliced":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan, dtype=x.dtype)
        wide[..., 1::2] = x.cpu()
        return wide.to(x.device)[..., 1::2]
    return x


def check(backend: str, dtype: str, name: str, layout: str) -> None:
    """A call of a case adds what the formula says, within its rounding, and nothing beside it."""
    case, rng = CASES[name], torch.Generator().manual_seed(3)
    device = "cuda" if backend == "triton" and not triton.INTERPRETED else "cpu"
    kind, wide = DTYPES[dtype], torch.float64 if dtype == "f64" else torch.float32
    columns = case.columns or case.positions
    sizes = (case.batch, case.positions, case.width, case.dim)

    def random(*shape: int, to: torch.dtype = wide) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(to).to(device)

    grad = laid_out(random(case.cotangents, *sizes, to=kind), layout)
    if case.given:
        clean = corrupted = None
    else:
        clean, corrupted = (laid_out(random(*sizes, to=kind), layout) for _ in range(2))
    weights = torch.rand(case.cotangents, generator=rng).to(wide).to(device)
    live = torch.rand(case.batch, case.positions, generator=rng) < 0.7 if case.live else None
    if live is not None:
        live = live.to(device)
        grad = torch.where(live[..., None, None], grad, torch.nan)  # it is not looked at
    first = torch.tensor([2, 0, 4] * 3)[: case.batch].to(device) if case.columns else None
    rows = torch.tensor([4, 0, 2, 8, 1, 7, 3, 6, 5])[: case.batch].to(device)
    # among the nodes of other layers
    wide_score, wide_effect = (random(columns, 2 * case.width + 3) for _ in range(2))
    score, effect = (x[:, 3 : 3 + case.width] for x in (wide_score, wide_effect))
    per_pair = random(9, columns, case.width)
    others = [x.clone() for x in (wide_score, wide_effect)]
    for x in others:
        x[:, 3 : 3 + case.width] = 0
    wanted = [x.double().clone() for x in (score, effect, per_pair)]
    bounds = [x.abs() for x in wanted]
    for b in range(case.batch):
        for i in range(case.positions):
            j = i + (int(first[b]) if first is not None else 0)
            if j >= columns or (live is not None and not live[b, i]):
                continue
            delta = 1.0 if clean is None else corrupted[b, i].double() - clean[b, i].double()
            products = delta * grad[:, b, i].double()
            found, size = products.sum(-1), products.abs().sum(-1)
            parts = [
                (weights.double() @ found.abs(), weights.double() @ size),
                (found[0], size[0]) if case.cotangents else (0.0, 0.0),
            ]
            for n, (part, bound) in enumerate(parts):
                wanted[n][j] += part
                bounds[n][j] += bound
            part, bound = parts[case.per_pair == "effect"]
            wanted[2][rows[b], j] += part
            bounds[2][rows[b], j] += bound
    with op_cases.guarded_outputs():
        ops.add_effects(
            grad,
            weights=weights,
            score=score,
            effect=effect,
            clean=clean,
            corrupted=corrupted,
            live=live,
            first=first,
            per_pair=per_pair if case.per_pair else None,
            rows=rows if case.per_pair else None,
            pair_signed=case.per_pair == "effect",
            backend=backend,
        )
    for got, right, bound in zip((score, effect, per_pair), wanted, bounds, strict=True):
        if got is per_pair and not case.per_pair:
            continue
        assert ((got - right).abs() <= 8 * torch.finfo(wide).eps * bound).all()
    for x, before in zip((wide_score, wide_effect), others, strict=True):
        x[:, 3 : 3 + case.width] = 0
        assert torch.equal(x, before)


@pytest.mark.parametrize("layout", ["contiguous", "heads first", "sliced"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_it_adds_what_is_written_out(backend: str, dtype: str, name: str, layout: str) -> None:
    check(backend, dtype, name, layout)


if ("triton", "f32") in BACKENDS:
    DEVICE = "cpu" if triton.INTERPRETED else "cuda"

    @pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
    @pytest.mark.parametrize("name", [name for name in CASES if CASES[name].batch > 1])
    def test_pairs_in_groups(name: str, split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(add_effects, "pair_groups", lambda *_: 3)
        monkeypatch.setattr(add_effects, "too_few", lambda *_: split)
        check("triton", "f32", name, "contiguous")

    @pytest.mark.parametrize("columns", [1, 5])
    def test_parts_are_added_to_what_is_there(columns: int) -> None:
        rng = torch.Generator().manual_seed(5)
        parts = torch.randint(-8, 9, (2, 37, columns, 70), generator=rng).float().to(DEVICE)
        tables = torch.randint(-8, 9, (2, columns, 90), generator=rng).float().to(DEVICE)
        wanted = tables.clone()
        wanted[..., 7:77] += parts.sum(1)
        wanted[1, :, 7:77] += parts[1].sum(0)
        score, effect = tables[..., 7:77]
        add_effects.launch_add_parts(parts, score, effect)
        add_effects.launch_add_parts(parts[1:], effect, None)
        assert torch.equal(tables, wanted)

    @pytest.mark.parametrize("pairs", [40, 41])
    def test_split_or_not_is_the_same_to_the_bit(pairs: int) -> None:
        """And whether a padded batch's columns are cut, as they are in eager sweeps and not in replayed ones."""
        rng = torch.Generator().manual_seed(6)
        grad = torch.randn(12, pairs, 3, 4, 16, generator=rng).to(DEVICE)
        tables = torch.randn(2, 3, 4, generator=rng).to(DEVICE)
        assert add_effects.pair_groups(pairs, 12, 4) > 8
        found = []
        for columns, split in ((3, False), (3, True), (3, True), (2, False), (2, True)):
            g, (score, effect) = grad[:, :, :columns], tables[:, :columns].clone()
            add_effects.launch_add_effects(
                *(g, torch.ones(12, device=DEVICE), score, effect, g[0], g[1]),
                *(None, None, None, None, False),
                split=split,
            )
            found.append(torch.stack([score, effect])[:, :2])
        assert not torch.equal(found[0], tables[:, :2])
        for other in found[1:]:
            assert torch.equal(other, found[0])


def arguments() -> dict[str, Tensor]:
    return {
        "grad": torch.zeros(2, 1, 3, 4, 5),
        "clean": torch.zeros(1, 3, 4, 5),
        "corrupted": torch.zeros(1, 3, 4, 5),
        "weights": torch.zeros(2),
        "score": torch.zeros(3, 4),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad": torch.zeros(1, 3, 4, 5)}, r"grad must be \(cotangents, batch, .* got shape \(1"),
        ({"grad": torch.zeros(2, 1, 3, 4, 5, dtype=torch.int32)}, "grad must be float64, float32"),
        ({"clean": None}, "clean and corrupted must be given together"),
        ({"clean": None, "corrupted": None}, "grad must have dim 1 .* got 5"),
        ({"score": torch.zeros(4, 4)}, "score must have a column for each of 3 positions, got 4"),
        ({"weights": torch.zeros(3)}, r"weights must have shape \(2,\), got \(3,\)"),
        ({"score": torch.zeros(3, 4).double()}, "score must be torch.float32 on cpu"),
        ({"score": torch.zeros(4, 3).t()}, "score must have a contiguous last axis"),
        ({"effect": torch.zeros(3, 8)[:, :4]}, r"effect must have score's strides \(4, 1\)"),
        ({"per_pair": torch.zeros(1, 3, 4)}, "per_pair and rows must be given together"),
        ({"live": torch.ones(1, 3)}, "live must be torch.bool on cpu, got torch.float32"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Tensor | None], message: str) -> None:
    given = {**arguments(), **changes}
    with pytest.raises(ValueError, match=message):
        ops.add_effects(given.pop("grad"), **given, backend="reference")


def test_signed_rows_need_the_effect() -> None:
    given = {**arguments(), "per_pair": torch.zeros(1, 3, 4), "rows": torch.zeros(1).long()}
    with pytest.raises(ValueError, match="effect must be given where per_pair is signed"):
        ops.add_effects(given.pop("grad"), **given, pair_signed=True)


@pytest.mark.skipif(triton.INTERPRETED, reason="it is of the C++ backend")
def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    grad, clean, corrupted = (torch.randn(*n, 40, 8, 64) for n in ((5, 2), (2,), (2,)))
    found = []
    for threads in (1, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        score = torch.zeros(40, 8)
        ops.add_effects(
            grad,
            weights=torch.arange(1.0, 6),
            score=score,
            clean=clean,
            corrupted=corrupted,
            backend="cpp",
        )
        found.append(score)
    assert torch.equal(*found)
