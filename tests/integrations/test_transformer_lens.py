"""TransformerLens: our functions beside the library's own of the same names, on bridged models. Needs the library."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformer_lens")

from transformer_lens import ActivationCache, patching
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformer_lens.patching import PatchingResult
from transformer_lens.tools.analysis import attribution_patching as tool

import zoo
from atp_fast import Engine, PromptPairs
from atp_fast.integrations import transformer_lens as ours

ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "llama": "LlamaForCausalLM",
}
POSITIONS = 7
TOLERANCE = 1e-5


@pytest.fixture(params=ARCHITECTURES)
def bridge(request):
    return bridged(request.param)


def bridged(family, **options):
    model = zoo.build(family, dtype=torch.float32, wide_norms=False, **options)
    return build_bridge_from_module(model, ARCHITECTURES[family], hf_config=model.config).eval()


def prompts(batch, seed=0, positions=POSITIONS):
    generator = torch.Generator().manual_seed(seed)
    clean, corrupted = torch.randint(1, zoo.VOCAB, (2, batch, positions), generator=generator)
    corrupted[:, 0] = clean[:, 0]
    return clean, corrupted


def last_difference(logits):
    return (logits[:, -1, 3] - logits[:, -1, 5]).mean()


def every_position(logits):
    """Mixes rows and positions: no mean of single prompts."""
    return logits.log_softmax(-1)[:, :, 3].sum().tanh() + logits[:, 2].max()


def per_row(logits):
    return logits[:, -1, 3] - logits[:, -1, 5]


def close(mine, theirs):
    assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
    scale = float(theirs.abs().max())
    assert scale > 1e-3, "nothing is compared"
    assert float((mine - theirs).abs().max()) <= TOLERANCE * max(scale, 1.0)


def test_attribution_patch_gives_the_library_s_result(bridge):
    clean, corrupted = prompts(3)
    mine = ours.attribution_patch(bridge, clean, corrupted, last_difference)
    theirs = tool.attribution_patch(bridge, clean, corrupted, last_difference)
    assert isinstance(mine, tool.AttributionResult)
    assert list(mine.node_scores) == list(theirs.node_scores)
    close(
        torch.tensor(list(mine.node_scores.values())),
        torch.tensor(list(theirs.node_scores.values())),
    )
    assert [node for node, _ in mine.top_nodes(3)] == [node for node, _ in theirs.top_nodes(3)]


def test_a_metric_of_several_positions_is_served(bridge):
    clean, corrupted = prompts(2)

    def metric(logits):
        return logits.log_softmax(-1)[0, 2:, 7].sum()

    mine = ours.attribution_patch(bridge, clean, corrupted, metric)
    theirs = tool.attribution_patch(bridge, clean, corrupted, metric)
    close(
        torch.tensor(list(mine.node_scores.values())),
        torch.tensor(list(theirs.node_scores.values())),
    )


def test_edges_are_the_library_s_own():
    bridge = bridged("gpt2")
    clean, corrupted = prompts(1)
    config = tool.EdgeAttributionConfig(granularity="edge")
    assert ours.attribution_patch(bridge, clean, corrupted, last_difference, config).edge_scores


SWEEPS = [name for name in vars(ours) if name.startswith("get_act_patch_")]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("metric", [last_difference, every_position])
@pytest.mark.parametrize("sweep", SWEEPS)
def test_sweeps_give_the_library_s_values(bridge, sweep, metric, batch):
    if sweep == "get_act_patch_resid_mid" and bridge.cfg.parallel_attn_mlp:
        pytest.skip("the library has no such hook there")
    clean, corrupted = prompts(batch)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(clean)
        theirs = getattr(patching, sweep)(bridge, corrupted, cache, metric)
        mine = getattr(ours, sweep)(bridge, corrupted, cache, metric)
    close(mine, theirs)


@pytest.mark.parametrize("reduce", ["mean", "none"])
@pytest.mark.parametrize(
    "sweep",
    [
        "get_act_patch_attn_head_out_by_pos",
        "get_act_patch_mlp_out",
        "get_act_patch_attn_head_by_pos_every",
        "get_act_patch_attn_head_all_pos_every",
        "get_act_patch_block_every",
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_results_carry_examples_metrics_and_the_baseline(sweep, reduce, several):
    bridge = bridged("llama")
    clean, corrupted = prompts(3)

    def negative(logits):
        return -2 * logits[:, 1, 4]

    metric = {"difference": per_row, "negative": negative} if several else per_row
    with torch.no_grad():
        _, cache = bridge.run_with_cache(clean)
        options = {"reduce": reduce, "baseline": True}
        theirs = getattr(patching, sweep)(bridge, corrupted, cache, metric, **options)
        mine = getattr(ours, sweep)(bridge, corrupted, cache, metric, **options)
    assert isinstance(mine, PatchingResult)
    close(mine.values, theirs.values)
    close(mine.baseline, theirs.baseline)
    close(mine.effect(), theirs.effect())
    for name in ("axis_names", "metric_names", "reduced", "has_metric_axis", "patch_type_names"):
        assert getattr(mine, name) == getattr(theirs, name), name
    assert mine.index_df.equals(theirs.index_df)
    assert len(mine.to_dataframe()) == len(theirs.to_dataframe())


def test_scores_stand_under_hook_names(bridge):
    clean, corrupted = prompts(2)
    pairs = PromptPairs(clean, corrupted, torch.tensor([1, 2]), torch.tensor([3, 4]))
    with ours.engine(bridge) as engine:
        kinds = tuple(ours.HOOK_NAMES)
        found = engine.attribute(
            pairs, method="atp", nodes=kinds, per_pair=True, direction="denoising"
        )
    cache = ours.to_activation_cache(found, bridge)
    assert isinstance(cache, ActivationCache)
    for short, kind in (("q", "q"), ("k", "k"), ("v", "v"), ("z", "z"), ("post", "neuron")):
        assert torch.equal(cache.stack_activation(short), found.effect[kind]), short
    for short in ("attn_out", "mlp_out", "resid_pre"):
        assert torch.equal(cache[short, 1], found.effect[short][1, :, 0])
    by_pair = ours.to_activation_cache(found, bridge, "per_pair")
    assert torch.equal(by_pair["z", 2], found.per_pair["z"][:, 2])
    contribution = ours.to_activation_cache(found, bridge, "contribution")
    assert torch.equal(contribution["q", 0], found.contribution["q"][0])


def gradients(bridge, tokens, metric):
    """Activations and gradients under every hook name, as the library's attribution patching demo caches them."""
    cache, grads = {}, {}
    bridge.reset_hooks()
    wanted = lambda name: "_input" not in name  # noqa: E731
    bridge.add_hook(wanted, lambda act, hook: cache.__setitem__(hook.name, act.detach()), "fwd")
    bridge.add_hook(wanted, lambda grad, hook: grads.__setitem__(hook.name, grad.detach()), "bwd")
    metric(bridge(tokens)).backward()
    bridge.reset_hooks()
    bridge.zero_grad(set_to_none=True)
    return cache, grads


def test_the_demo_s_steps_with_our_call_in_place_of_theirs(bridge):
    """Attribution_Patching_Demo: clean and corrupted activations and gradients, then (clean - corrupted) . gradient."""
    clean, corrupted = prompts(2)
    answers, wrong = torch.tensor([3, 9]), torch.tensor([5, 2])

    def metric(logits):
        rows = torch.arange(2)
        return (logits[rows, -1, answers] - logits[rows, -1, wrong]).sum()

    clean_values, _ = gradients(bridge, clean, metric)
    values, grads = gradients(bridge, corrupted, metric)
    with ours.engine(bridge) as engine:
        pairs = PromptPairs(clean, corrupted, answers, wrong)
        kinds = ("q", "k", "v", "z", "neuron", "attn_out", "mlp_out")
        found = engine.attribute(
            pairs, method="atp", nodes=kinds, per_pair=True, direction="denoising"
        )
    mine = ours.to_activation_cache(found, bridge, "per_pair")
    canonical = {
        "attn.hook_q": "attn.q.hook_out",
        "attn.hook_k": "attn.k.hook_out",
        "attn.hook_v": "attn.v.hook_out",
        "attn.hook_z": "attn.o.hook_in",
        "mlp.hook_post": "mlp.out.hook_in",
        "hook_attn_out": "attn.hook_out",
        "hook_mlp_out": "mlp.hook_out",
    }
    compared = 0
    for name, table in mine.items():
        block, layer, hook = name.split(".", 2)
        key = next(
            (k for k in (name, f"{block}.{layer}.{canonical[hook]}") if k in values and k in grads),
            None,
        )
        if key is None:
            continue
        product = (clean_values[key] - values[key]) * grads[key]
        if hook == "mlp.hook_post":
            theirs = product.reshape(2, POSITIONS, -1)
        elif hook.startswith("attn"):
            theirs = product.reshape(2, POSITIONS, table.shape[-1], -1).sum(-1)
        else:
            theirs = product.sum(-1)
        close(table, theirs)
        compared += 1
    assert compared >= 5 * bridge.cfg.n_layers


def test_the_bridge_is_as_it_was(bridge):
    clean, corrupted = prompts(2)
    before = [(name, type(module)) for name, module in bridge.original_model.named_modules()]
    logits, cache = bridge.run_with_cache(clean)
    ours.attribution_patch(bridge, clean, corrupted, last_difference)
    ours.get_act_patch_mlp_out(bridge, corrupted, cache, last_difference)
    with pytest.raises(RuntimeError, match="mine"), ours.unbridged(bridge):
        raise RuntimeError("mine")
    after = [(name, type(module)) for name, module in bridge.original_model.named_modules()]
    assert before == after
    again, cache_again = bridge.run_with_cache(clean)
    assert torch.equal(logits, again) and cache.keys() == cache_again.keys()
    seen = []
    bridge.run_with_hooks(
        clean, fwd_hooks=[("blocks.1.attn.hook_z", lambda act, hook: seen.append(hook.name))]
    )
    assert seen


def test_a_call_inside_sees_the_plain_model():
    bridge = bridged("llama")
    with ours.unbridged(bridge) as model:
        assert type(model.model.layers[0].self_attn).__name__ == "LlamaAttention"
        assert Engine(model).backend
    with ours.engine(bridge) as one, ours.engine(bridge) as two:
        assert one is two
    bridge.original_model.to(torch.float64)
    with ours.engine(bridge) as three:
        assert three is not one
    with ours.engine(bridge, precision="bf16") as narrow:
        assert narrow.precision == "bf16"


def test_bad_input_is_told():
    bridge = bridged("gpt2")
    clean, corrupted = prompts(2)
    _, cache = bridge.run_with_cache(clean)
    with pytest.raises(
        TypeError, match="model must be a TransformerBridge of TransformerLens 4, got "
    ):
        ours.attribution_patch(bridge.original_model, clean, corrupted, last_difference)
    with pytest.raises(ValueError, match="clean and corrupt must have the same shape"):
        ours.attribution_patch(bridge, clean, corrupted[:, 1:], last_difference)
    with pytest.raises(ValueError, match="clean must be token ids"):
        ours.attribution_patch(bridge, clean[0], corrupted[0], last_difference)
    with pytest.raises(ValueError, match=r"the metric must return a scalar, got shape \(1,\)"):
        ours.attribution_patch(bridge, clean, corrupted, per_row)
    with pytest.raises(
        ValueError, match=r"'last_difference' must return shape \(2,\) unless reduce is 'scalar'"
    ):
        ours.get_act_patch_mlp_out(bridge, corrupted, cache, last_difference, reduce="none")
    with pytest.raises(ValueError, match="reduce must be scalar, mean or none, got 'sum'"):
        ours.get_act_patch_mlp_out(bridge, corrupted, cache, last_difference, reduce="sum")
    few = ActivationCache({"blocks.0.hook_mlp_out": cache["mlp_out", 0]}, bridge)
    with pytest.raises(ValueError, match="clean_cache must hold hook_embed, or clean_tokens"):
        ours.get_act_patch_mlp_out(bridge, corrupted, few, last_difference)
    edited = ActivationCache(
        {**cache.cache_dict, "blocks.1.hook_mlp_out": 2 * cache["mlp_out", 1]}, bridge
    )
    with pytest.raises(
        ValueError, match=r"of a plain run of its prompts, blocks.1.hook_mlp_out holds other"
    ):
        ours.get_act_patch_mlp_out(bridge, corrupted, edited, last_difference)
    with pytest.raises(ValueError, match="clean_cache must hold rows of the model's embedding"):
        shifted = ActivationCache(
            {**cache.cache_dict, "hook_embed": cache["hook_embed"] + 1}, bridge
        )
        ours.get_act_patch_mlp_out(bridge, corrupted, shifted, last_difference)
    given = ours.get_act_patch_mlp_out(bridge, corrupted, few, last_difference, clean_tokens=clean)
    close(given, ours.get_act_patch_mlp_out(bridge, corrupted, cache, last_difference))
    bridge.enable_compatibility_mode()
    with pytest.raises(ValueError, match="this bridge's were folded or centred"):
        ours.attribution_patch(bridge, clean, corrupted, last_difference)


def test_the_page_s_example_runs(monkeypatch, capsys):
    import re
    from pathlib import Path

    from tokenizers_for_tests import bpe

    model = zoo.build("gpt2", dtype=torch.float32, vocab_size=5000)
    tokenizer = bpe("When Mary and John went to the store, John gave a drink to " * 2)

    def boot(name, **options):
        assert name == "gpt2"
        bridge = build_bridge_from_module(model, ARCHITECTURES["gpt2"], hf_config=model.config)
        bridge.tokenizer = tokenizer
        return bridge

    monkeypatch.setattr("transformer_lens.model_bridge.TransformerBridge.boot_transformers", boot)
    page = Path(__file__).parents[2] / "docs" / "integrations" / "transformer_lens.md"
    for example in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(example, page.name, "exec"), {})
    assert capsys.readouterr().out.splitlines()[-1].startswith("torch.Size([3, ")


def test_another_version_is_one_error(monkeypatch):
    import importlib
    import importlib.metadata

    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata,
        "version",
        lambda name: "3.8.0" if name == "transformer-lens" else real(name),
    )
    with pytest.raises(
        ImportError,
        match=r"needs transformer-lens >= 4.3, < 5, found 3.8.0: .*atp_fast\[transformer-lens\]",
    ):
        importlib.reload(ours)
