"""The sweep against the literal AtP*, which shares nothing with it but the definitions of the ops."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import atp_fast.engine
import zoo
from atp_fast import Engine, PromptPairs
from atp_fast.attribution.literal import METHODS, literal_attribution
from atp_fast.attribution.memory import SweepPlan
from atp_fast.nodes import KINDS

DENSE = ["gpt2", "gemma2", "phi"]


def assert_close(
    ours: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float
) -> None:
    """Within tolerance of the kind's largest number; same kinds, shapes and dtypes."""
    assert list(ours) == list(wanted)
    for kind, right in wanted.items():
        assert ours[kind].shape == right.shape, kind
        assert ours[kind].dtype == right.dtype, kind
        error, largest = (ours[kind] - right).abs().max(), right.abs().max()
        assert largest > 0, kind
        assert error <= tolerance * largest, (kind, float(error / largest))


def assert_equals_literal(
    model: object,
    pairs: PromptPairs,
    tolerance: float,
    backend: str = "reference",
    **options: object,
) -> None:
    wanted = literal_attribution(model, pairs, **options)
    ours = Engine(model, backend=backend).attribute(pairs, per_pair=True, progress=False, **options)
    assert ours.per_pair is not None
    for got, right in zip((ours.contribution, ours.effect, ours.per_pair), wanted, strict=True):
        assert_close(got, right, tolerance)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_equals_the_literal_reference(family: str, method: str) -> None:
    """All kinds, pairs of three lengths. mixtral takes its routing weights in float32, hence 1e-6 there."""
    model = zoo.build(family, wide_norms=True)
    pairs = zoo.random_pairs(model, 3, 8, ragged=True)
    tolerance = 1e-6 if family == "mixtral" else 1e-9
    assert_equals_literal(model, pairs, tolerance, method=method, nodes=KINDS)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize(("name", "tolerance"), [("tiny_gpt2_3L", 1e-9), ("tiny_llama_2L", 1e-6)])
def test_trained_weights(name: str, tolerance: float, backend: str) -> None:
    """Models that do induction and IOI, so that some attention rows are saturated."""
    path = Path(__file__).parent / "data" / name
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    pairs = zoo.random_pairs(model, 3, 12, ragged=True, shared_prefix=3)
    half = pairs.clean_ids.shape[1] // 2
    clean, corrupted = pairs.clean_ids.clone(), pairs.corrupted_ids.clone()
    clean[:, half:], corrupted[:, half:] = clean[:, :half], corrupted[:, :half]
    repeated = PromptPairs(clean, corrupted, pairs.answer_ids, pairs.wrong_answer_ids)
    for metric in ("logit_diff", "kl"):
        assert_equals_literal(model, repeated, tolerance, backend, metric=metric, nodes=KINDS)


@pytest.mark.parametrize("method", ["atp", "atp*"])
@pytest.mark.parametrize("family", zoo.FLOAT32_NORMS)
def test_equals_the_literal_reference_with_float32_norms(family: str, method: str) -> None:
    """The models as they come: their RMSNorm rounds to float32, so 1e-6 is what is left of float64."""
    model = zoo.build(family)
    pairs = zoo.random_pairs(model, 2, 7)
    assert_equals_literal(model, pairs, 1e-6, method=method, nodes=KINDS)


@pytest.mark.parametrize("method", ["atp", "atp*"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_compiled_backend_equals_the_literal_reference(family: str, method: str) -> None:
    model = zoo.build(family, wide_norms=True)
    pairs = zoo.random_pairs(model, 2, 9, ragged=True, shared_prefix=1)
    tolerance = 1e-6 if family == "mixtral" else 1e-9
    assert_equals_literal(model, pairs, tolerance, "cpp", method=method, nodes=KINDS)


@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("family", ["gpt2", "mistral", "gpt_oss"])
def test_chunks_of_cotangents_change_nothing(
    family: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.build(family, wide_norms=True)
    pairs = zoo.random_pairs(model, 2, 7)
    whole = atp_fast.engine.sweep
    sizes = []

    def chunked(plug: Any, pairs: Any, metric: Any, plan: Any, *args: Any, **options: Any) -> Any:
        sizes.append(chunk)
        return whole(plug, pairs, metric, plan._replace(chunk=chunk), *args, **options)

    monkeypatch.setattr(atp_fast.engine, "sweep", chunked)
    assert_equals_literal(model, pairs, 1e-9, nodes=KINDS)
    assert sizes


def assert_as_good_as_the_literal(family: str, dtype: torch.dtype, kinds: list[str]) -> None:
    """Against the float64 literal: at most twice the error of the literal in the same dtype, and a few eps."""
    wide, narrow = zoo.build(family), zoo.build(family, dtype=dtype)
    pairs = zoo.random_pairs(wide, 3, 9)
    truth = literal_attribution(wide, pairs, nodes=kinds)[0]
    literal = literal_attribution(narrow, pairs, nodes=kinds)[0]
    ours = Engine(narrow, "reference").attribute(pairs, nodes=kinds, progress=False).contribution
    for kind in kinds:
        assert ours[kind].dtype == torch.float32
        largest = float(truth[kind].abs().max())
        allowed = 2 * float((literal[kind] - truth[kind]).abs().max())
        allowed += 8 * torch.finfo(dtype).eps * largest
        error = float((ours[kind] - truth[kind]).abs().max())
        assert error <= allowed, (kind, error, allowed, largest)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_float32(family: str) -> None:
    assert_as_good_as_the_literal(family, torch.float32, KINDS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "phi", "opt"])
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    kinds = [kind for kind in KINDS if kind not in ("attn_out", "mlp_out")]
    assert_as_good_as_the_literal(family, dtype, kinds)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "phi", "opt"])
def test_writes_in_half_precision(family: str, dtype: torch.dtype) -> None:
    assert_as_good_as_the_literal(family, dtype, ["attn_out", "mlp_out"])


@pytest.mark.parametrize("budget", [1, 20_000, "1MB", "8GiB", "auto"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_the_memory_budget_changes_nothing(family: str, budget: int | str) -> None:
    model = zoo.build(family, wide_norms=True)
    pairs = zoo.random_pairs(model, 5, 9, ragged=True)
    wanted = literal_attribution(model, pairs, nodes=KINDS)
    engine = Engine(model, "reference", memory_budget=budget)
    found = engine.attribute(pairs, nodes=KINDS, progress=False)
    assert_close(found.contribution, wanted[0], 1e-12)
    assert_close(found.effect, wanted[1], 1e-12)


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi"])
def test_bf16_cotangents(family: str) -> None:
    """precision="bf16" rounds gradients to 8 bits at every linear map: a few per cent, and not less than rounding."""
    model = zoo.build(family, dtype=torch.float32)
    pairs = zoo.random_pairs(model, 3, 9)
    wanted = Engine(model).attribute(pairs, nodes=KINDS, progress=False)
    found = Engine(model, precision="bf16").attribute(pairs, nodes=KINDS, progress=False)
    for kind in KINDS:
        largest = wanted.contribution[kind].max()
        error = (found.contribution[kind] - wanted.contribution[kind]).abs().max()
        assert 1e-5 * largest < error < 0.03 * largest, (kind, float(error / largest))


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("metric", ["nll", "logit_diff", "prob_diff", "kl"])
def test_metrics_and_directions(metric: str, direction: str) -> None:
    model = zoo.build("gpt2")
    pairs = zoo.random_pairs(model, 3, 7, ragged=True, padding_side="left")
    assert_equals_literal(model, pairs, 1e-9, metric=metric, direction=direction, nodes=KINDS)


def test_the_linear_toy_is_exact() -> None:
    """Engine and literal give the same hand-checked numbers bit for bit (tests/test_literal.py works them out)."""
    model = zoo.build_linear()
    six, seven = torch.tensor([6]), torch.tensor([7])
    pairs = PromptPairs(torch.tensor([[1, 2]]), torch.tensor([[3, 5]]), six, seven)
    for method in METHODS:
        wanted = literal_attribution(model, pairs, method=method, nodes=KINDS)
        ours = Engine(model, "reference").attribute(
            pairs, method=method, nodes=KINDS, progress=False
        )
        for kind in KINDS:
            assert torch.equal(ours.contribution[kind], wanted[0][kind]), (method, kind)
            assert torch.equal(ours.effect[kind], wanted[1][kind]), (method, kind)


def spread(logits: Tensor) -> Tensor:
    """A metric of every position of every pair at once."""
    return logits.tanh().sum((1, 2))


def first_answers(logits: Tensor, pairs: PromptPairs) -> Tensor:
    """A metric of a middle position: later positions have no effect on it."""
    rows = torch.arange(len(pairs))
    return logits[rows, pairs.last - 2, pairs.answer_ids]


def eap_ig(
    logits: Tensor,
    clean_logits: Tensor,
    input_length: Tensor,
    labels: Tensor,
    mean: bool = True,
    loss: bool = True,
) -> Tensor:
    last = logits[torch.arange(len(logits)), input_length - 1]
    good_bad = last.gather(1, labels)
    result = good_bad[:, 0] - good_bad[:, 1]
    result = -result if loss else result
    return result.mean() if mean else result


def last_only(logits: Tensor, pairs: PromptPairs) -> Tensor:
    return logits[:, 0].gather(1, pairs.answer_ids[:, None])[:, 0] ** 2


last_only.positions = "last"  # type: ignore[attr-defined]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("metric", [first_answers, eap_ig, last_only])
def test_callable_metrics(metric: object, side: str) -> None:
    model = zoo.build("opt")
    pairs = zoo.random_pairs(model, 3, 7, ragged=True, padding_side=side, shared_prefix=2)
    assert_equals_literal(model, pairs, 1e-9, metric=metric, nodes=KINDS)


def test_a_metric_of_all_pairs_at_once() -> None:
    model = zoo.build("opt")
    pairs = zoo.random_pairs(model, 20, 6)
    assert_equals_literal(model, pairs, 1e-9, metric=spread, nodes=KINDS)


@pytest.mark.parametrize("family", [*DENSE, "mistral", "gpt_oss"])
@pytest.mark.parametrize("shared", [1, 5, 8])
def test_a_shared_prefix_changes_nothing(family: str, shared: int) -> None:
    """With 8 of 9 shared tokens only the last one differs; the literal reference knows no prefixes."""
    model = zoo.build(family, wide_norms=True)
    pairs = zoo.random_pairs(model, 2, 9, shared_prefix=shared)
    kinds = KINDS
    assert_equals_literal(model, pairs, 1e-9, nodes=kinds)
    ours = Engine(model, "reference").attribute(pairs, nodes=kinds, progress=False)
    for kind in kinds:
        assert not ours.contribution[kind][:, :shared].any(), kind
        assert ours.contribution[kind][:, shared:].any(), kind


def test_pairs_that_split_at_different_places() -> None:
    """One batch whose pairs share 0, 3 and 6 of their tokens, of two lengths, padded on either side."""
    model = zoo.build("qwen2", wide_norms=True)
    parts = [zoo.random_pairs(model, 1, 8, seed=s, shared_prefix=s) for s in (0, 3, 6)]
    for side in ("right", "left"):
        short = zoo.random_pairs(model, 2, 8, 9, ragged=True, padding_side=side, shared_prefix=2)
        pairs = PromptPairs(
            torch.cat([p.clean_ids for p in (*parts, short)]),
            torch.cat([p.corrupted_ids for p in (*parts, short)]),
            torch.cat([p.answer_ids for p in (*parts, short)]),
            attention_mask=torch.cat([p.attention_mask for p in (*parts, short)]),
        )
        assert_equals_literal(model, pairs, 1e-9, metric="nll", nodes=KINDS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", DENSE)
def test_padding_side_and_batch_composition_change_nothing(family: str, method: str) -> None:
    """Each pair's numbers are those it has alone, zero on padding, whatever it is padded and batched with."""
    model = zoo.build(family, wide_norms=True)
    engine = Engine(model, "reference")

    def per_pair(pairs: PromptPairs) -> Mapping[str, Tensor]:
        found = engine.attribute(
            pairs, method=method, nodes=KINDS, per_pair=True, progress=False
        ).per_pair
        assert found is not None
        return found

    right = zoo.random_pairs(model, 4, 8, ragged=True)
    left = zoo.random_pairs(model, 4, 8, ragged=True, padding_side="left")
    on_right, on_left = per_pair(right), per_pair(left)
    for row in range(4):
        alone = per_pair(right[[row]])
        for kind in KINDS:
            for found, pairs in ((on_right, right), (on_left, left)):
                real = pairs.attention_mask[row]
                own, wanted = found[kind][row], alone[kind][0][:, : int(real.sum())]
                assert not own[:, ~real].any(), kind
                assert (own[:, real] - wanted).abs().max() <= 1e-12 * wanted.abs().max(), kind


@pytest.mark.parametrize(
    ("method", "direction"), [("atp", "denoising"), ("atp*", "noising")], ids=["atp", "atp*"]
)
@pytest.mark.parametrize("padding", ["right", "left", "all left"])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_batches_of_mixed_pairs(
    size: int, padding: str, method: str, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs with a common start that split anywhere, in batches of any size: every pair's own numbers and values."""
    model = zoo.build("qwen2" if size % 2 else "gpt2", wide_norms=True)
    pairs = zoo.mixed_pairs(model, padding)
    plan = atp_fast.engine.plan_sweep
    seen = []

    def few(*args: Any, **options: Any) -> SweepPlan:
        seen.append(size)
        return plan(*args, **options)._replace(pairs=size, taped_from=2)

    monkeypatch.setattr(atp_fast.engine, "plan_sweep", few)
    kinds = ["q", "k", "v", "z", "mlp_out", "resid_pre"]
    options: dict[str, Any] = {"metric": "nll", "method": method, "nodes": kinds}
    assert_equals_literal(model, pairs, 1e-9, direction=direction, **options)
    found = Engine(model, "reference").attribute(
        pairs, direction=direction, per_pair=True, progress=False, **options
    )
    assert seen
    assert found.per_pair is not None
    for row, pair in enumerate(pairs):
        values = own_values(model, pair if direction == "noising" else pair.swapped())
        assert found.clean_value[row].item() == pytest.approx(values[0], rel=1e-12)
        assert found.corrupted_value[row].item() == pytest.approx(values[1], rel=1e-12)
        for kind in kinds:
            assert not found.per_pair[kind][row][:, ~pairs.attention_mask[row]].any(), kind


def own_values(model: Any, pair: PromptPairs) -> list[float]:
    """The negative log probability of a pair's answer after either prompt, by whole forward passes."""
    real = pair.attention_mask[0]
    with torch.no_grad():
        logits = [
            model(ids[0, real][None]).logits[0, -1] for ids in (pair.clean_ids, pair.corrupted_ids)
        ]
    return [float(-x.log_softmax(-1)[pair.answer_ids[0]]) for x in logits]


def test_many_pairs_in_several_batches() -> None:
    model = zoo.build("gpt2")
    pairs = zoo.random_pairs(model, 37, 5)
    assert_equals_literal(model, pairs, 1e-9, nodes=["q", "k", "neuron"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_depths(layers: int, method: str) -> None:
    model = zoo.build("gpt_neox", num_hidden_layers=layers)
    pairs = zoo.random_pairs(model, 2, 6)
    assert_equals_literal(model, pairs, 1e-9, method=method, nodes=KINDS)


@pytest.mark.parametrize("kinds", [[kind] for kind in KINDS])
def test_each_kind_alone(kinds: list[str]) -> None:
    model = zoo.build("gemma3", wide_norms=True)
    pairs = zoo.random_pairs(model, 2, 7)
    for method in METHODS:
        assert_equals_literal(model, pairs, 1e-9, method=method, nodes=kinds)


def test_one_token_prompts() -> None:
    model = zoo.build("gpt2")
    pairs = zoo.random_pairs(model, 3, 1)
    found = Engine(model, "reference").attribute(pairs, nodes=KINDS, progress=False)
    wanted = literal_attribution(model, pairs, nodes=KINDS)[0]
    for kind in KINDS:
        right = wanted[kind]
        assert (found.contribution[kind] - right).abs().max() <= 1e-9 * right.abs().max() + 1e-18
    assert not found.contribution["q"].any()  # nothing else to attend to
    assert not found.contribution["k"].any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_identical_prompts_give_exact_zeros(family: str, method: str) -> None:
    """Beside another pair, in float32 and without a warning missed."""
    model = zoo.build(family, dtype=torch.float32)
    pairs = zoo.random_pairs(model, 2, 6)
    ids = pairs.corrupted_ids.clone()
    ids[0] = pairs.clean_ids[0]
    with pytest.warns(UserWarning, match="identical"):
        pairs = PromptPairs(pairs.clean_ids, ids, pairs.answer_ids, pairs.wrong_answer_ids)
        found = Engine(model, "reference").attribute(
            pairs, method=method, nodes=KINDS, per_pair=True, progress=False
        )
    assert found.per_pair is not None
    for kind, scores in found.per_pair.items():
        assert not scores[0].any(), kind
        assert scores[1].any(), kind


def test_values_of_the_metric() -> None:
    model = zoo.build("gpt2")
    pairs = zoo.random_pairs(model, 3, 7, ragged=True)
    for direction in ("noising", "denoising"):
        found = Engine(model, "reference").attribute(
            pairs, metric="nll", direction=direction, progress=False
        )
        for row in range(3):
            real = pairs.attention_mask[row]
            runs = [pairs.clean_ids[row, real], pairs.corrupted_ids[row, real]]
            with torch.no_grad():
                logits = [model(ids[None]).logits[0, -1].log_softmax(-1) for ids in runs]
            values = [float(-x[pairs.answer_ids[row]]) for x in logits]
            values = values if direction == "noising" else values[::-1]
            assert found.clean_value[row].item() == pytest.approx(values[0], rel=1e-12)
            assert found.corrupted_value[row].item() == pytest.approx(values[1], rel=1e-12)


def test_two_runs_are_bit_equal() -> None:
    model = zoo.build("llama", dtype=torch.float32)
    pairs = zoo.random_pairs(model, 3, 9, ragged=True)
    first, second = (
        Engine(model, "reference").attribute(pairs, nodes=KINDS, progress=False) for _ in range(2)
    )
    for kind in KINDS:
        assert torch.equal(first.contribution[kind], second.contribution[kind])
        assert torch.equal(first.effect[kind], second.effect[kind])
