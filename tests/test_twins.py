"""Parts of a layer found and run by functions of ours, and both prompts in one forward."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import atp_fast.engine
import zoo
from atp_fast import Engine
from atp_fast.attribution.memory import Budget, SweepSize, plan_sweep
from atp_fast.hf.norms import find_norms
from atp_fast.hf.rotations import find_rotations, own_rotations
from atp_fast.ops import Norm

NORMS = {
    "gpt2": (2, Norm(1e-5, centred=True)),
    "gpt_neox": (2, Norm(1e-5, centred=True)),
    "llama": (2, Norm(1e-6, rounded=True)),
    "qwen3": (4, Norm(1e-6, rounded=True)),
    "gemma3": (6, Norm(1e-6, offset=1.0)),
}


@pytest.mark.parametrize("family", NORMS)
def test_norms_are_found_by_what_they_compute(family: str) -> None:
    model = zoo.build(family, torch.bfloat16)
    engine = Engine(model, "reference")
    count, how = NORMS[family]
    for layer in engine.plug.layers:
        assert [found.how for found in layer.norms] == [how] * count


class Other(nn.Module):
    """Nearly an RMSNorm."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight, self.eps, self.kind = nn.Parameter(torch.ones(8) * 1.5), 1e-3, kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        power = x.square().mean(-1, keepdim=True)
        if self.kind == "eps outside":
            return self.weight * x / (power.sqrt() + self.eps)
        if self.kind == "twice":
            return 2 * self.weight * x * torch.rsqrt(power + self.eps)
        return self.weight * x * torch.rsqrt(power + self.eps)


def test_what_computes_something_else_is_left_alone() -> None:
    assert [found.how for found in find_norms(Other("itself"))] == [Norm(1e-3)]
    assert find_norms(Other("eps outside")) == []
    assert find_norms(Other("twice")) == []


def test_rotations_are_back_when_the_last_layer_has_left() -> None:
    model = zoo.build("llama")
    (file,) = find_rotations(model.model.layers[0])
    own = file.apply_rotary_pos_emb
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with own_rotations([file]):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with own_rotations([file]):
        assert file.apply_rotary_pos_emb is not own
        thread.start()
        assert inside.wait(10)
    assert file.apply_rotary_pos_emb is not own
    leave.set()
    thread.join()
    assert file.apply_rotary_pos_emb is own


def test_a_rotation_of_other_pairs_stays_the_models() -> None:
    """Neighbours turned together instead of halves."""
    file: Any = type(sys)("turned")

    def turned(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        def turn(x: torch.Tensor) -> torch.Tensor:
            swapped = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
            return x * cos[:, None] + swapped * sin[:, None]

        return turn(q), turn(k)

    file.apply_rotary_pos_emb = turned
    from atp_fast.hf.attention import LayerRun, running

    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 1, 5, 8)
    cos, sin = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    token = running.set(LayerRun("reference"))
    try:
        with own_rotations([file]):
            found = file.apply_rotary_pos_emb(q, k, cos, sin)
    finally:
        running.reset(token)
    for got, right in zip(found, turned(q, k, cos, sin), strict=True):
        assert torch.equal(got, right)


def test_a_rotation_of_one_tensor_stays_the_models() -> None:
    """As an indexer's, of queries alone."""
    file: Any = type(sys)("alone")
    file.apply_rotary_pos_emb = lambda q, cos, sin, unsqueeze_dim=1: (
        q * cos.unsqueeze(unsqueeze_dim)
    )
    from atp_fast.hf.attention import LayerRun, running

    token = running.set(LayerRun("reference"))
    try:
        with own_rotations([file]):
            x = torch.ones(2, 3, 5, 8)
            table = torch.full((2, 5, 8), 3.0)
            assert torch.equal(file.apply_rotary_pos_emb(x, cos=table, sin=table), 3 * x)
            assert torch.equal(file.apply_rotary_pos_emb(x, table, table), 3 * x)
    finally:
        running.reset(token)


@pytest.mark.parametrize(
    ("family", "precision"),
    [
        *((family, None) for family in ("gpt2", "llama", "gemma3", "gpt_neox", "opt")),
        *((family, "bf16") for family in ("gpt2", "llama")),
    ],
)
def test_prompts_run_together_score_as_apart(
    family: str, precision: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.build(family, torch.float32)
    pairs, whole, found = zoo.mixed_pairs(model, "left"), atp_fast.engine.sweep, []

    def planned(together: bool) -> Any:
        def sweep(plug: Any, pairs: Any, metric: Any, plan: Any, *args: Any, **named: Any) -> Any:
            return whole(plug, pairs, metric, plan._replace(together=together), *args, **named)

        return sweep

    for together in (True, False):
        monkeypatch.setattr(atp_fast.engine, "sweep", planned(together))
        engine = Engine(model, "cpp", precision)
        found.append(engine.attribute(pairs, progress=False).contribution)
    for kind, ours in found[0].items():
        torch.testing.assert_close(ours, found[1][kind], rtol=2e-4, atol=2e-6)


class Moved(nn.Module):
    """silu on rows that are not ahead."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(x.permute(1, 0, 2)).permute(1, 0, 2)


class Turned(nn.Module):
    """A norm of positions ahead of rows."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.transpose(0, 1)).transpose(0, 1)


def test_a_norm_of_moved_rows_runs_prompts_apart() -> None:
    model = zoo.build("llama", torch.float32)
    pairs = zoo.mixed_pairs(model, "left")
    right = Engine(model, "cpp").attribute(pairs, progress=False).contribution
    layer = model.model.layers[1]
    layer.input_layernorm = Turned(layer.input_layernorm).eval()
    engine = Engine(model, "cpp")
    assert [layer.together for layer in engine.plug.layers] == [True, False, True]
    for kind, ours in engine.attribute(pairs, progress=False).contribution.items():
        torch.testing.assert_close(ours, right[kind], rtol=2e-4, atol=2e-6)


def test_a_layer_whose_rows_are_moved_runs_prompts_apart() -> None:
    model = zoo.build("llama", torch.float32)
    pairs, engine = zoo.mixed_pairs(model, "left"), Engine(model, "cpp")
    right = engine.attribute(pairs, progress=False).contribution
    assert all(layer.together for layer in engine.plug.layers)
    model.model.layers[1].mlp.act_fn = Moved().eval()
    engine = Engine(model, "cpp")
    assert [layer.together for layer in engine.plug.layers] == [True, False, True]
    found = engine.attribute(pairs, progress=False).contribution
    for kind, ours in found.items():
        torch.testing.assert_close(ours, right[kind], rtol=2e-4, atol=2e-6)


class Shaped(nn.Module):
    """tanh, in the shapes that `shape` gives it."""

    def __init__(self, shape: Callable[[Any], torch.Tensor]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shape(x)


def tiled(x: torch.Tensor) -> torch.Tensor:
    """64 tokens at a time: one tile at an engine's opening."""
    parts = x.reshape(-1, x.shape[-1]).split(64)
    return torch.cat([part.tanh() for part in parts]).view(x.shape)


def chosen(x: torch.Tensor) -> torch.Tensor:
    found, some = x.clone(), x[..., 0] > -1
    found[some] = x[some].tanh()
    return found


NUMBER = torch.tensor(1.3, requires_grad=True)
SHAPES: dict[str, Callable[[Any], torch.Tensor]] = {
    "one by one": lambda x: torch.stack([row.tanh() for row in x]),
    "tiles": tiled,
    "chosen": chosen,
    "times a number on the graph": lambda x: x.tanh() * NUMBER,
}


@pytest.mark.parametrize("where", ["everywhere", "in one layer", "after the opening"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_shows_no_rows_is_exact(shape: str, where: str) -> None:
    """Code that is not known to keep the prompts apart, and code that no opening has seen."""
    model = zoo.build("gpt2", torch.float32)
    pairs = zoo.random_pairs(model, 4, 20)
    engine = Engine(model, "cpp") if where == "after the opening" else None
    layers = model.transformer.h
    for layer in layers[1:2] if where == "in one layer" else layers:
        layer.mlp.act = Shaped(SHAPES[shape]).eval()
    engine = engine or Engine(model, "cpp")
    found = engine.attribute(pairs, progress=False).contribution
    for layer in engine.plug.layers:
        layer.together = False
    for kind, right in engine.attribute(pairs, progress=False).contribution.items():
        assert (found[kind] - right).abs().max() <= 2e-5 * right.abs().max()


def test_a_layer_that_fails_on_several_prompts_runs_them_apart() -> None:
    def few(x: torch.Tensor) -> torch.Tensor:
        assert len(x) <= 2, "no more"
        return x.tanh()

    model = zoo.build("gpt2", torch.float32)
    model.transformer.h[0].mlp.act = Shaped(few).eval()
    engine = Engine(model, "cpp")
    assert not engine.plug.layers[0].together
    engine.attribute(zoo.random_pairs(model, 1, 5), progress=False)


def test_experts_run_prompts_apart() -> None:
    """A token's rows are sorted among all tokens'."""
    engine = Engine(zoo.build("mixtral"))
    assert not any(layer.together for layer in engine.plug.layers)


def test_prompts_run_together_where_starts_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    plug = Engine(zoo.build("gpt2")).plug
    size = SweepSize(positions=8, prefix=0, cotangents=3, kinds=("q",), logits=1)
    enough, little = Budget(2**30, auto=False), Budget(1, auto=False)

    def together(budget: Budget, pairs: int = 1, **changes: object) -> bool:
        asked = size._replace(**changes)
        plan = plan_sweep(plug, budget, asked, pairs=pairs, together=True)
        assert plan.pairs == pairs
        return plan.together

    assert together(enough) and together(enough, 32) and together(enough, positions=256)
    assert not together(enough, 33) and not together(enough, positions=257)  # on a CPU
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda", 0))
    assert together(enough, 33) and together(enough, positions=257)
    assert not together(little)
    assert together(enough, precision="bf16")
