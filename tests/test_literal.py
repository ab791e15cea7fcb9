"""The literal AtP* against what it claims to be: hand-worked numbers, exact patching, finite differences, softmax."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import zoo
from atp_fast.attribution.literal import METHODS, literal_attribution
from atp_fast.nodes import KINDS
from atp_fast.prompts.pairs import PromptPairs


def toy_pairs(clean: list[list[int]], corrupted: list[list[int]]) -> PromptPairs:
    n = len(clean)
    return PromptPairs(
        torch.tensor(clean), torch.tensor(corrupted), torch.full((n,), 6), torch.full((n,), 7)
    )


# --- the linear toy: m = 8 (x1 - x0); clean x = (1, 2), corrupted x = (3, 5) ---
# layer 0: h' = (3 x0, x0 + 2 x1), h'' = 2 h' = (6 x0, 2 x0 + 4 x1)
# layer 1: h' = (., (h''1 - h''0)/2), out = 2 h'; m = (3 - 1) out1 = 2 (h''1 - h''0)
# [layer][position][node]
ATP = {
    "q": [[[0], [0]], [[0], [0]]],
    "k": [[[0], [0]], [[0], [0]]],
    "v": [[[-8], [12]], [[-24], [-32]]],
    "z": [[[-16], [20]], [[0], [-56]]],
    "neuron": [[[-36, 24], [48, -32]], [[0, 0], [8, -4]]],
    "attn_out": [[[-16], [20]], [[0], [-56]]],
    "mlp_out": [[[-12], [16]], [[0], [4]]],
    "resid_pre": [[[-16], [24]], [[-24], [32]]],
}
# in-block nodes: layer 0 with layer 1's write held (m = 2 h''1 + const), layer 1 as above.
# resid_pre: half of |layer 0's write held| + |layer 1's write held|: (4 + 8, 6 + 24)/2, (24 + 0, 32 + 32)/2
GRADDROP = {
    "q": ATP["q"],
    "k": ATP["k"],
    "v": [[[8], [12]], [[24], [32]]],
    "z": [[[0], [20]], [[0], [56]]],
    "neuron": [[[0, 0], [48, 32]], [[0, 0], [8, 4]]],
    "attn_out": [[[0], [20]], [[0], [56]]],
    "mlp_out": [[[0], [16]], [[0], [4]]],
    "resid_pre": [[[6], [15]], [[12], [32]]],
}


def toy_metric(x: list[float], patch: dict[tuple[str, int, int, int], float]) -> float:
    """The toy in plain numbers; patch: (kind, layer, position, index) -> the value put there."""

    def node(kind: str, layer: int, position: int, value: float, index: int = 0) -> float:
        seen.setdefault((kind, layer, position, index), value)
        return patch.get((kind, layer, position, index), value)

    seen = toy_metric.seen = {}  # type: ignore[attr-defined]
    weights = ((2, 1, (1, 2), (3, -1)), (1, -1, (1, 1), (2, -1)))
    for layer, (value, out, up, down) in enumerate(weights):
        x = [node("resid_pre", layer, t, x[t]) for t in range(2)]
        v = [node("v", layer, t, value * x[t]) for t in range(2)]
        for t in range(2):
            z = node("z", layer, t, sum(v[: t + 1]) / (t + 1))
            x[t] += node("attn_out", layer, t, out * z)
            neurons = [node("neuron", layer, t, u * x[t], i) for i, u in enumerate(up)]
            write = sum(d * n for d, n in zip(down, neurons, strict=True))
            x[t] += node("mlp_out", layer, t, write)
    return (3 - 1) * x[1]


@pytest.mark.parametrize("method", METHODS)
def test_linear_toy_by_hand(method: str) -> None:
    contribution, effect, per_pair = literal_attribution(
        zoo.build_linear(), toy_pairs([[1, 2]], [[3, 5]]), "logit_diff", method, KINDS
    )
    for kind in KINDS:
        signed = torch.tensor(ATP[kind], dtype=torch.float64)
        wanted = torch.tensor(GRADDROP[kind], dtype=torch.float64)
        dropped = method in ("atp+graddrop", "atp*")
        assert torch.equal(effect[kind], signed), kind
        assert torch.equal(contribution[kind], wanted if dropped else signed.abs()), kind
        assert torch.equal(per_pair[kind][0], wanted if dropped else signed), kind


def test_atp_is_exact_patching_where_the_model_is_linear() -> None:
    assert toy_metric([3, 5], {}) == 16
    values = toy_metric.seen  # type: ignore[attr-defined]
    exact = {node: toy_metric([1, 2], {node: value}) - 8 for node, value in values.items()}
    assert len(exact) == 2 * 2 * 7
    effect = literal_attribution(
        zoo.build_linear(), toy_pairs([[1, 2]], [[3, 5]]), "logit_diff", "atp", KINDS
    )[1]
    for (kind, layer, position, index), wanted in exact.items():
        assert effect[kind][layer, position, index] == wanted, (kind, layer, position, index)


@pytest.mark.parametrize("method", METHODS)
def test_contribution_is_the_mean_of_absolute_effects(method: str) -> None:
    """The second pair undoes the first: effects cancel in the mean, contributions do not."""
    contribution, effect, _ = literal_attribution(
        zoo.build_linear(),
        toy_pairs([[1, 2], [3, 5]], [[3, 5], [1, 2]]),
        method=method,
        nodes=KINDS,
    )
    table = GRADDROP if method in ("atp+graddrop", "atp*") else ATP
    for kind in KINDS:
        assert not effect[kind].any(), kind
        assert torch.equal(contribution[kind], torch.tensor(table[kind]).double().abs()), kind


def test_denoising_exchanges_the_prompts() -> None:
    pairs = toy_pairs([[1, 2]], [[3, 5]])
    effect = literal_attribution(
        zoo.build_linear(), pairs, method="atp", nodes=KINDS, direction="denoising"
    )[1]
    for kind in KINDS:
        assert torch.equal(effect[kind], -torch.tensor(ATP[kind]).double()), kind


def all_logits(model: PreTrainedModel, pairs: PromptPairs) -> Tensor:
    """The clean run's logits, as the literal reference computes them."""
    seen = []

    def metric(logits: Tensor, pairs: PromptPairs) -> Tensor:
        seen.append(logits.detach())
        return logits.sum((1, 2))

    literal_attribution(model, pairs, metric, "atp", ["mlp_out"])
    return seen[0]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_logits_are_the_models_own(family: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' eager attention, with its float32 softmax (and norms) widened; mixtral routes in float32."""
    softmax = nn.functional.softmax
    monkeypatch.setattr(nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))
    tolerance = 1e-6 if family == "mixtral" else 1e-12
    model = zoo.build(family, wide_norms=True)
    pairs = zoo.random_pairs(model, 3, 9, ragged=True, padding_side=side)
    ours = all_logits(model, pairs)
    model.set_attn_implementation("eager")
    for row in range(len(pairs)):
        real = pairs.attention_mask[row]
        with torch.no_grad():
            own = model(pairs.clean_ids[row, real][None]).logits[0]
        assert (ours[row, real] - own).abs().max() <= tolerance * own.abs().max()
        assert not ours[row, ~real].any()


@contextmanager
def recorded(model: PreTrainedModel) -> Iterator[list[dict[str, Any]]]:
    """Each layer's attention call, by an attention of our own that stays in float64: q, k, v, z and redo(q, k)."""
    calls: list[dict[str, Any]] = []

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        scaling: float,
        dropout: float = 0.0,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        def redo(q: Tensor, k: Tensor) -> Tensor:
            group = q.shape[1] // k.shape[1]
            heads = []
            for h in range(q.shape[1]):
                s = q[:, h] @ k[:, h // group].transpose(1, 2) * scaling
                s = s if softcap is None else softcap * torch.tanh(s / softcap)
                weights = torch.exp(s + attention_mask[:, 0])
                total = weights.sum(-1, keepdim=True)
                total = total if s_aux is None else total + torch.exp(s_aux[h])
                heads.append(weights / total @ value[:, h // group])
            return torch.stack(heads, 1)

        z = redo(query, key)
        if z.requires_grad:
            z.retain_grad()
        calls.append({"q": query.detach(), "k": key.detach(), "z": z, "redo": redo})
        return z.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("brute", attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("brute", eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("brute")
    yield calls
    model.set_attn_implementation(before)


@pytest.mark.parametrize(
    "family", ["gpt2", "opt", "llama", "mistral", "qwen2", "gemma2", "gemma3", "gpt_oss"]
)
def test_qk_fix_is_brute_force_softmax_with_a_linear_tail(family: str) -> None:
    """Each query or key replaced alone, the whole attention redone, and only what follows it linearised."""
    model = zoo.build(family, wide_norms=True)
    pairs = zoo.random_pairs(model, 1, 7)
    effect = literal_attribution(model, pairs, "nll", "atp+qk", ["q", "k"])[1]
    with recorded(model) as clean, torch.enable_grad():
        logits = model(pairs.clean_ids, use_cache=False).logits[0, -1]
        (-logits.log_softmax(-1)[pairs.answer_ids[0]]).backward()
    with recorded(model) as corrupted, torch.no_grad():
        model(pairs.corrupted_ids, use_cache=False)
    for layer, (call, other) in enumerate(zip(clean, corrupted, strict=True)):
        for kind in ("q", "k"):
            brute = torch.zeros_like(effect[kind][layer])
            for position in range(brute.shape[0]):
                for head in range(brute.shape[1]):
                    patched = {"q": call["q"].clone(), "k": call["k"].clone()}
                    patched[kind][:, head, position] = other[kind][:, head, position]
                    with torch.no_grad():
                        change = call["redo"](patched["q"], patched["k"]) - call["z"]
                        brute[position, head] = (call["z"].grad * change).sum()
            error = (effect[kind][layer] - brute).abs().max()
            assert error <= 1e-9 * brute.abs().max(), (kind, layer)
            assert brute.abs().max() > 1e-3


class HookedGPT2:
    """GPT-2 whose nodes are read, and can be shifted, and whose layer `hold` writes what it wrote in the first run."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.hold = model, -1
        self.shifts: dict[tuple[str, int], Tensor] = {}
        self.seen: dict[tuple[str, int], Tensor] = {}
        self.writes: dict[int, Tensor] = {}
        for layer, block in enumerate(model.transformer.h):
            block.register_forward_pre_hook(
                lambda m, args, at=layer: (self.node("resid_pre", at, args[0]), *args[1:])
            )
            block.register_forward_hook(lambda m, args, out, at=layer: self.write(at, args[0], out))
            block.attn.register_forward_hook(
                lambda m, args, out, at=layer: (self.node("attn_out", at, out[0]), *out[1:])
            )
            for kind, module in (("mlp_out", block.mlp), ("neuron", block.mlp.act)):
                module.register_forward_hook(
                    lambda m, args, out, at=layer, kind=kind: self.node(kind, at, out)
                )

    def node(self, kind: str, layer: int, value: Tensor) -> Tensor:
        self.seen[kind, layer] = value
        return value + self.shifts.get((kind, layer), 0)

    def write(self, layer: int, before: Tensor, after: Tensor) -> Tensor:
        clean = self.writes.setdefault(layer, after - before)
        return before + clean if layer == self.hold else after

    def nll(self, ids: Tensor, answer: int) -> Tensor:
        with torch.no_grad():
            return -self.model(ids, use_cache=False).logits[:, -1].log_softmax(-1)[:, answer]


def test_graddrop_is_finite_differences_with_the_write_held_clean() -> None:
    """|m(node + e d) - m(node - e d)| / 2e for every node, layer l's write held at its clean value, for every l."""
    model = zoo.build("gpt2")
    pairs = zoo.random_pairs(model, 1, 5)
    nodes = ["neuron", "attn_out", "mlp_out", "resid_pre"]
    contribution = literal_attribution(model, pairs, "nll", "atp+graddrop", nodes)[0]
    answer, step = int(pairs.answer_ids[0]), 1e-5
    hooked = HookedGPT2(model)
    hooked.nll(pairs.clean_ids, answer)
    clean = dict(hooked.seen)
    hooked.nll(pairs.corrupted_ids, answer)
    deltas = {key: value - clean[key] for key, value in hooked.seen.items()}
    for (kind, layer), delta in deltas.items():
        width = delta.shape[-1] if kind == "neuron" else 1
        alone = torch.eye(5 * width, dtype=delta.dtype).view(-1, 5, width, 1)
        alone = (alone * delta.view(1, 5, width, -1)).flatten(2)  # one row per node
        ids = pairs.clean_ids.expand(2 * len(alone), 5)
        hooked.shifts = {(kind, layer): torch.cat([alone, -alone]) * step}
        total = torch.zeros(len(alone), dtype=delta.dtype)
        for hooked.hold in range(3):
            if kind == "resid_pre" or hooked.hold != layer:
                up, down = hooked.nll(ids, answer).chunk(2)
                total += ((up - down) / (2 * step)).abs()
        wanted = total.view(5, width) / (3 if kind == "resid_pre" else 2)
        assert (contribution[kind][layer] - wanted).abs().max() <= 1e-8, (kind, layer)
        assert wanted.max() > 1e-2


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_last_layer_keeps_its_atp_value_under_graddrop(family: str) -> None:
    model = zoo.build(family)
    pairs = zoo.random_pairs(model, 2, 6)
    nodes = [kind for kind in KINDS if kind != "resid_pre"]
    for ordinary, dropped in (("atp", "atp+graddrop"), ("atp+qk", "atp*")):
        signed = literal_attribution(model, pairs, "nll", ordinary, nodes)[2]
        means = literal_attribution(model, pairs, "nll", dropped, nodes)[2]
        for kind in nodes:
            error = (means[kind] - signed[kind].abs()).abs()
            scale = signed[kind].abs().max()
            assert error[:, -1].max() <= 1e-12 * scale, (dropped, kind)
            assert error[:, 0].max() > 1e-3 * scale, (dropped, kind)


def test_direct_only_nodes_keep_their_atp_value_under_graddrop() -> None:
    """Layers above the first write a constant, so nothing that the first one writes has an indirect effect."""
    model = zoo.build("gpt2")
    with torch.no_grad():
        for block in model.transformer.h[1:]:
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
    pairs = zoo.random_pairs(model, 2, 6)
    nodes = [kind for kind in KINDS if kind != "resid_pre"]
    signed = literal_attribution(model, pairs, "nll", "atp+qk", nodes)[2]
    means = literal_attribution(model, pairs, "nll", "atp*", nodes)[2]
    for kind in nodes:
        assert signed[kind][:, 0].abs().max() > 1e-3
        assert (means[kind] - signed[kind].abs()).abs().max() <= 1e-12, kind


@pytest.mark.parametrize("method", ["atp+graddrop", "atp*"])
def test_one_layer_has_nothing_to_drop(method: str) -> None:
    model = zoo.build("llama", num_hidden_layers=1)
    pairs = zoo.random_pairs(model, 2, 6)
    ordinary = "atp" if method == "atp+graddrop" else "atp+qk"
    signed = literal_attribution(model, pairs, "nll", ordinary, KINDS)[2]
    means = literal_attribution(model, pairs, "nll", method, KINDS)[2]
    for kind in KINDS:
        same = torch.equal(means[kind], signed[kind].abs())
        assert same != (kind == "resid_pre"), kind
    assert means["resid_pre"][:, :, -1].min() > 0  # its own layer is dropped: the skip alone


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_oss"])
def test_identical_prompts_give_exact_zeros(family: str, method: str) -> None:
    """Alone, or in dense models beside another pair (experts multiply all pairs' tokens in one matrix)."""
    model = zoo.build(family)
    pairs = zoo.random_pairs(model, 1 if family in zoo.MOE else 2, 6)
    ids = pairs.corrupted_ids.clone()
    ids[0] = pairs.clean_ids[0]
    with pytest.warns(UserWarning, match="identical"):
        pairs = PromptPairs(pairs.clean_ids, ids, pairs.answer_ids, pairs.wrong_answer_ids)
        per_pair = literal_attribution(model, pairs, method=method, nodes=KINDS)[2]
    for kind, scores in per_pair.items():
        assert not scores[0].any(), kind
        assert all(other.any() for other in scores[1:]), kind


@pytest.mark.parametrize("method", ["atp+qk", "atp*"])
@pytest.mark.parametrize("family", ["gpt2", "mistral", "opt"])
def test_padding_is_never_counted(family: str, method: str) -> None:
    """Either side gives each pair the numbers it has alone, zeros on padding, means over the pairs that are there."""
    model = zoo.build(family, wide_norms=True)
    for side in ("right", "left"):
        pairs = zoo.random_pairs(model, 3, 8, ragged=True, padding_side=side)
        contribution, effect, per_pair = literal_attribution(model, pairs, "kl", method, KINDS)
        here = pairs.attention_mask
        for row in range(3):
            alone = PromptPairs(
                pairs.clean_ids[row, here[row]][None],
                pairs.corrupted_ids[row, here[row]][None],
                pairs.answer_ids[row, None],
            )
            wanted = literal_attribution(model, alone, "kl", method, KINDS)[2]
            for kind in KINDS:
                own = per_pair[kind][row]
                error = (own[:, here[row]] - wanted[kind][0]).abs().max()
                assert error <= 1e-12 * wanted[kind].abs().max(), (side, kind)
                assert not own[:, ~here[row]].any(), (side, kind)
        for kind in KINDS:
            mean = per_pair[kind].abs().sum(0) / here.sum(0)[:, None]
            assert torch.allclose(contribution[kind], mean, rtol=1e-14, atol=0)
            if method == "atp+qk":
                mean = per_pair[kind].sum(0) / here.sum(0)[:, None]
                assert torch.allclose(effect[kind], mean, rtol=1e-14, atol=1e-15)


def test_batches_change_nothing() -> None:
    model = zoo.build("gpt2")
    pairs = zoo.random_pairs(model, 5, 7, ragged=True)
    whole = literal_attribution(model, pairs, nodes=KINDS)
    parts = literal_attribution(model, pairs, nodes=KINDS, batch_size=2)
    for ours, theirs in zip(whole, parts, strict=True):
        for kind in KINDS:
            assert (ours[kind] - theirs[kind]).abs().max() <= 1e-12 * ours[kind].abs().max()


def test_model_is_left_as_it_was() -> None:
    model = zoo.build("gemma2")
    pairs = zoo.random_pairs(model, 2, 6)
    next(model.parameters()).requires_grad_(False)

    def state() -> tuple[Any, ...]:
        return (
            model.config._attn_implementation,
            [parameter.requires_grad for parameter in model.parameters()],
            [parameter.grad for parameter in model.parameters()],
            [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        )

    def failing(logits: Tensor) -> Tensor:
        raise KeyboardInterrupt

    before = state()
    literal_attribution(model, pairs)
    assert state() == before
    with pytest.raises(KeyboardInterrupt):
        literal_attribution(model, pairs, failing)
    assert state() == before


def test_refusals_name_the_reason() -> None:
    model = zoo.build("mixtral")
    pairs = zoo.random_pairs(model, 2, 6)
    with pytest.raises(NotImplementedError, match="DbrxBlock adds more than its attention's and"):
        literal_attribution(zoo.build_other_experts(), pairs, nodes=["neuron"])
    with pytest.raises(ValueError, match=r"method must be among atp, .*, got 'AtP'"):
        literal_attribution(model, pairs, method="AtP")
    with pytest.raises(ValueError, match="direction must be noising or denoising, got 'up'"):
        literal_attribution(model, pairs, direction="up")
    with pytest.raises(ValueError, match=r"batch_size must be at least 2 .* got 1"):
        literal_attribution(model, pairs, lambda logits: logits.sum((1, 2)), batch_size=1)
    with pytest.raises(ValueError, match="training mode"):
        literal_attribution(model.train(), pairs)
