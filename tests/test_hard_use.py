"""Use that nobody planned: modes, threads, compiled and adapted models, hooks, odd metrics, broken files."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

import zoo
from atp_fast import Attribution, Engine, PromptPairs, load_model
from atp_fast.attribution.literal import literal_attribution
from atp_fast.hf import Plug
from atp_fast.nodes import Node
from tokenizers_for_tests import bpe

KINDS = ["q", "k", "v", "z", "neuron"]


def numbers(model: nn.Module, pairs: PromptPairs, **options: Any) -> dict[str, Tensor]:
    found = Engine(model, "reference").attribute(pairs, nodes=KINDS, progress=False, **options)
    return found.contribution


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], limit: float = 0.0) -> None:
    for kind, right in wanted.items():
        assert right.abs().max() > 0
        assert (found[kind] - right).abs().max() <= limit * right.abs().max(), kind


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return zoo.build("llama")


@pytest.fixture(scope="module")
def pairs(model: PreTrainedModel) -> PromptPairs:
    return zoo.random_pairs(model, 3, 8, ragged=True, shared_prefix=2)


# ---- large vocabularies


def test_a_vocabulary_of_262_144(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of logits is 2 MB here: only those that the metric looks at are made."""
    model = zoo.build("gpt2", vocab_size=2**18)
    generator = torch.Generator().manual_seed(0)
    clean, corrupted = torch.randint(250_000, 2**18, (2, 3, 9), generator=generator).unbind(0)
    answers, wrong = torch.tensor([250_001, 7, 2**18 - 1]), torch.tensor([2**18 - 2, 250_000, 0])
    pairs = PromptPairs(clean, corrupted, answers, wrong)
    made: list[int] = []
    own = Plug.logits

    def counted(plug: Plug, x: Tensor) -> Tensor:
        logits = own(plug, x)
        made.append(logits.shape[:-1].numel())
        return logits

    monkeypatch.setattr(Plug, "logits", counted)
    engine = Engine(model)
    for metric in ("logit_diff", "nll", "prob_diff", "kl"):
        made.clear()
        found = engine.attribute(pairs, metric, nodes=KINDS, progress=False)
        exact = engine.patch(pairs, found.top(5), metric, progress=False)
        assert max(made) <= 5 * len(pairs)  # a row for every patched node
        contribution, _, _ = literal_attribution(model, pairs, metric, "atp*", KINDS)
        assert_same(found.contribution, contribution, 1e-9)
        assert (exact.effect != 0).any()


# ---- modes of torch


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_modes(model: PreTrainedModel, pairs: PromptPairs, mode: Callable[[], Any]) -> None:
    """The same numbers, from an engine, pairs and results made inside; the mode is what it was afterwards."""
    nodes = [Node("k", 0, 4, 1), Node("neuron", 2, 5, 3)]
    wanted = numbers(model, pairs)
    exact = Engine(model, "reference").patch(pairs, nodes, progress=False).effect
    with mode():
        before = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        inside = zoo.random_pairs(model, 3, 8, ragged=True, shared_prefix=2)
        engine = Engine(model, "reference")
        found = engine.attribute(inside, nodes=KINDS, progress=False)
        assert_same(found.contribution, wanted)
        assert torch.equal(engine.patch(inside, nodes, progress=False).effect, exact)
        bound = engine.bound_missed(
            inside, forwards=90, probability=0.5, nodes=["z"], progress=False
        )
        assert bound.forwards > 0
        assert (torch.is_inference_mode_enabled(), torch.is_grad_enabled()) == before
    assert not found.contribution["z"].is_inference()


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = zoo.build("gpt2")
    with pytest.raises(ValueError, match=r"must be made outside torch\.inference_mode"):
        Engine(model)


def test_a_model_without_weights() -> None:
    model = zoo.build("gpt2").to("meta")
    with pytest.raises(ValueError, match="model must hold its weights, those of this GPT2LMHead"):
        Engine(model)


# ---- threads


def test_two_threads_on_one_model(model: PreTrainedModel, pairs: PromptPairs) -> None:
    """The second waits; both get the numbers of one alone, with an engine each or one for both."""
    wanted = numbers(model, pairs)
    shared = Engine(model, "reference")
    found: list[dict[str, Tensor]] = []
    failed: list[Exception] = []

    def work(engine: Engine | None) -> None:
        try:
            for _ in range(3):
                engine = engine or Engine(model, "reference")
                found.append(engine.attribute(pairs, nodes=KINDS, progress=False).contribution)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(e,)) for e in (shared, shared, None, None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    assert len(found) == 12
    for one in found:
        assert_same(one, wanted)


def test_a_thread_waits_for_the_other(model: PreTrainedModel, pairs: PromptPairs) -> None:
    """Inside the first one's metric nothing of the second's has begun."""
    events: list[str] = []
    second: list[threading.Thread] = []

    def slow(logits: Tensor) -> Tensor:
        events.append("first in")
        if not second:
            second.append(
                threading.Thread(target=lambda: other.attribute(pairs, quick, progress=False))
            )
            second[0].start()
            second[0].join(0.5)
            events.append("first out")
        return logits[:, -1, 0]

    def quick(logits: Tensor) -> Tensor:
        events.append("second")
        return logits[:, -1, 0]

    first, other = Engine(model, "reference"), Engine(model, "reference")
    first.attribute(pairs, slow, nodes=["z"], progress=False)
    second[0].join()
    assert events.index("second") > events.index("first out")
    assert "second" in events


def test_two_engines_on_one_model(model: PreTrainedModel, pairs: PromptPairs) -> None:
    wanted = numbers(model, pairs)
    engines = [Engine(model, "reference") for _ in range(2)]
    for engine in engines * 2:
        assert_same(engine.attribute(pairs, nodes=KINDS, progress=False).contribution, wanted)


# ---- models that something was done to


def whole(model: PreTrainedModel) -> nn.Module:
    return torch.compile(model)  # type: ignore[return-value]


def in_place(model: PreTrainedModel) -> nn.Module:
    model.compile()
    return model


def its_forward(model: PreTrainedModel) -> nn.Module:
    model.forward = torch.compile(model.forward)
    return model


def its_layers(model: PreTrainedModel) -> nn.Module:
    for layer in model.model.layers:
        layer.compile()
    return model


def wrapped_layers(model: PreTrainedModel) -> nn.Module:
    layers = model.model.layers
    for number, layer in enumerate(layers):
        layers[number] = torch.compile(layer)
    return model


@pytest.mark.parametrize("compiled", [whole, in_place, its_forward, its_layers, wrapped_layers])
def test_compiled_models(
    pairs: PromptPairs, model: PreTrainedModel, compiled: Callable[[PreTrainedModel], nn.Module]
) -> None:
    """They run as they were written, nothing is compiled on the way, and they are still compiled afterwards."""
    import torch._dynamo

    ours = compiled(zoo.build("llama"))
    torch._dynamo.utils.counters.clear()
    before = {
        name: (vars(m).get("forward"), m._compiled_call_impl) for name, m in ours.named_modules()
    }
    assert_same(numbers(ours, pairs), numbers(model, pairs))
    assert not torch._dynamo.utils.counters["frames"]
    after = {
        name: (vars(m).get("forward"), m._compiled_call_impl) for name, m in ours.named_modules()
    }
    assert after == before


def test_adapted_models(pairs: PromptPairs) -> None:
    """A LoRA model of peft: by itself with the adapter, as the merged weights give."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(zoo.build("llama", wide_norms=True), config).double().eval()
    trained = [p.requires_grad for p in adapted.parameters()]
    found = numbers(adapted, pairs)
    assert [p.requires_grad for p in adapted.parameters()] == trained
    assert_same(found, numbers(adapted.merge_and_unload(), pairs), 1e-9)
    plain = numbers(zoo.build("llama", wide_norms=True), pairs)
    assert (plain["z"] - found["z"]).abs().max() > 1e-3 * plain["z"].abs().max()


def test_learnt_prompts_are_refused() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(zoo.build("llama"), config).eval()
    with pytest.raises(
        NotImplementedError, match="PeftModelForCausalLM is not served: .* no tokens"
    ):
        Engine(model)


def test_tied_weights(pairs: PromptPairs) -> None:
    tied = zoo.build("llama", wide_norms=True, tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    apart = zoo.build("llama", wide_norms=True)
    apart.load_state_dict(tied.state_dict())
    assert apart.lm_head.weight is not apart.model.embed_tokens.weight
    assert_same(numbers(tied, pairs), numbers(apart, pairs))


def test_gradient_checkpointing_and_dropout(pairs: PromptPairs) -> None:
    """A model set up for training, then put into evaluation mode."""
    trained = zoo.build("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    trained.gradient_checkpointing_enable()
    trained.eval()
    assert_same(numbers(trained, pairs), numbers(zoo.build("gpt2"), pairs))
    assert trained.is_gradient_checkpointing
    trained.transformer.h[1].mlp.dropout.train()
    with pytest.raises(ValueError, match="must be in evaluation mode"):
        Engine(trained)


# ---- hooks and metrics of the user's


def test_a_hook_that_changes_a_layer_is_named(pairs: PromptPairs) -> None:
    model = zoo.build("llama")
    layer = model.model.layers[1]
    handle = layer.register_forward_hook(lambda module, args, out: out + out.square())
    with pytest.raises(
        NotImplementedError, match=r"forward hooks on LlamaDecoderLayer: do they change"
    ):
        Engine(model).attribute(pairs)
    handle.remove()
    Engine(model).attribute(pairs, nodes=["z"], progress=False)


def test_a_hook_that_only_looks_is_no_matter(model: PreTrainedModel, pairs: PromptPairs) -> None:
    seen = []
    handle = model.model.layers[1].mlp.register_forward_hook(
        lambda m, args, out: seen.append(out.shape)
    )
    try:
        wanted = numbers(model, pairs)
    finally:
        handle.remove()
    assert seen
    assert_same(numbers(model, pairs), wanted)


def test_a_hook_that_cuts_the_graph_is_refused(pairs: PromptPairs) -> None:
    """Where it cuts is named, and that a hook may have done it."""
    model = zoo.build("llama")
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, args, out: out.detach())
    with pytest.raises(
        NotImplementedError,
        match=r"layer 1: no gradient flows through mlp\.up_proj \(.*forward hooks on mlp\.up_proj",
    ):
        Engine(model)


def of_mean(logits: Tensor) -> Tensor:
    values = logits[:, -1, 3]
    return values - values.mean()


def of_neighbour(logits: Tensor) -> Tensor:
    values = logits[:, -1, 3]
    return values - torch.cat([values[:1] * 0, values[:-1]])


def in_batches(logits: Tensor, pairs: PromptPairs) -> Tensor:
    return of_mean(logits)


@pytest.mark.parametrize(
    ("verb", "metric"),
    [
        ("attribute", of_mean),
        ("attribute", of_neighbour),
        ("attribute", in_batches),
        ("patch", in_batches),
    ],
)
def test_a_metric_that_mixes_pairs(
    model: PreTrainedModel, pairs: PromptPairs, verb: str, metric: Any
) -> None:
    """Its sum has no gradient, or another one than a pair's value. Patching takes one that sees all pairs at once."""
    engine = Engine(model, "reference")
    call: Any = engine.attribute if verb == "attribute" else engine.patch
    given = () if verb == "attribute" else ([Node("z", 0, 4, 1)],)
    with pytest.raises(
        ValueError, match=f"'{metric.__name__}' must give each pair the value of its own"
    ):
        call(pairs, *given, metric=metric, progress=False)


def test_a_metric_of_one_pair_mixes_nothing(model: PreTrainedModel, pairs: PromptPairs) -> None:
    """With one pair alone there is no other, and rows that share a constant do not mix."""
    engine = Engine(model, "reference")
    found = engine.attribute(
        pairs, lambda logits: logits[:, -1, 3] + 5, nodes=["z"], progress=False
    )
    assert found.effect["z"].abs().max() > 0


@pytest.mark.parametrize(
    "metric",
    [
        lambda logits: logits[:, -1, 3].detach(),
        lambda logits: logits[:, -1].argmax(-1).double(),
        lambda logits: torch.tensor([row[-1, 3].item() for row in logits]),
    ],
    ids=["detach", "argmax", "item"],
)
def test_a_metric_without_a_gradient(
    model: PreTrainedModel, pairs: PromptPairs, metric: Any
) -> None:
    """It has no AtP score; exact patching needs no gradient."""
    engine = Engine(model, "reference")
    with pytest.raises(ValueError, match="must be differentiable in the logits"):
        engine.attribute(pairs, metric, progress=False)
    assert engine.patch(pairs, [Node("z", 0, 4, 1)], metric, progress=False).effect.shape == (3, 1)


def test_effects_that_vanish_are_said_once(model: PreTrainedModel, pairs: PromptPairs) -> None:
    """A metric whose gradient is zero, unlike one that has a gradient, and unlike prompts that do not differ."""
    engine = Engine(model, "reference")
    with pytest.warns(UserWarning, match="identical"):
        same = PromptPairs(pairs.clean_ids, pairs.clean_ids, pairs.answer_ids)
    with pytest.warns(
        UserWarning, match="every effect of k, z is 0, although .* '<lambda>'"
    ) as said:
        engine.attribute(
            pairs, lambda logits: 0 * logits[:, -1, 3], nodes=["k", "z"], progress=False
        )
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.attribute(pairs, nodes=KINDS, progress=False)
        engine.attribute(same, "nll", nodes=["k", "z"], progress=False)


def test_effects_that_may_vanish_in_a_model_of_one_layer() -> None:
    """Its last query, the only one that counts, is the same in prompts that differ before it: nothing is said."""
    model = zoo.build("llama", num_hidden_layers=1)
    clean = torch.arange(5, 12)[None]
    corrupted = clean.clone()
    corrupted[0, 3] = 40
    pairs = PromptPairs(clean, corrupted, torch.tensor([9]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Engine(model, "reference").attribute(pairs, "nll", nodes=["q", "k"], progress=False)
    assert not found.effect["q"].any() and found.effect["k"].any()


# ---- files


@pytest.fixture(scope="module")
def result(model: PreTrainedModel, pairs: PromptPairs) -> Attribution:
    return Engine(model, "reference").attribute(
        pairs[:2], nodes=["k"], per_pair=True, progress=False
    )


def everything(found: Attribution) -> list[Any]:
    tables = [found.contribution["k"], found.effect["k"], found.per_pair["k"]]
    numbers = [
        x.tolist() for x in (*tables, found.counts, found.clean_value, found.corrupted_value)
    ]
    return [*numbers, found.space, found.metadata, found.model, found.metric, found.tokens]


def test_a_changed_byte_is_an_error_or_changes_nothing(result: Attribution, tmp_path: Path) -> None:
    """Anywhere in a file: lengths, names, dtypes, texts, numbers. Blanks behind the header are nobody's."""
    path = tmp_path / "run.safetensors"
    result.save(path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    wanted = everything(Attribution.load(path))
    refused = 0
    places = [*range(0, header, 5), *range(header, len(whole), 61), len(whole) - 1]
    for place in places:
        for bit in (1, 128):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            try:
                assert everything(Attribution.load(path)) == wanted
            except ValueError as error:
                assert str(path) in str(error)
                refused += 1
    assert refused > 0.9 * 2 * len(places)


def test_results_of_before_have_no_digest(result: Attribution, tmp_path: Path) -> None:
    """Format 1 is still read; one that says it is of that format and has a digest is no such file."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / "run.safetensors"
    result.save(path)
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header["format"] = "atp_fast.attribution/1"
    save_file(tensors, path, metadata=header)
    with pytest.raises(ValueError, match="must hold atp_fast.attribution/2, got .*/1"):
        Attribution.load(path)
    del header["digest"]
    save_file(tensors, path, metadata=header)
    assert everything(Attribution.load(path)) == everything(result)


STEPS = ("touch", "save_file", "chmod", "replace")


def killed_save(found: Attribution, path: Path, step: str, when: str) -> int:
    """The signal that ended a process which saves a result and is killed before or after one step of it."""
    import safetensors.torch

    if pid := os.fork():
        return os.WTERMSIG(os.waitpid(pid, 0)[1])
    owner: Any = safetensors.torch if step == "save_file" else Path
    own = getattr(owner, step)

    def killed(*args: Any, **kwargs: Any) -> None:
        if when == "after":
            own(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, step, killed)
    try:
        found.save(path)
    finally:
        os._exit(1)


@pytest.mark.parametrize("step", STEPS)
def test_a_save_that_is_killed(result: Attribution, tmp_path: Path, step: str) -> None:
    """kill -9 before or after any step leaves the old file or the new one, never a part."""
    path = tmp_path / "run.safetensors"
    result.save(path)
    old = path.read_bytes()
    other = Attribution(**{**vars(result), "metric": "another"})
    for when in ("before", "after"):
        path.write_bytes(old)
        assert killed_save(other, path, step, when) == signal.SIGKILL
        if (step, when) == ("replace", "after"):
            assert Attribution.load(path).metric == "another"
        else:
            assert path.read_bytes() == old


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a file's size")
def test_a_full_disk(result: Attribution, tmp_path: Path) -> None:
    """The error names the file, the old one is whole, and nothing is left beside it."""
    path = tmp_path / "run.safetensors"
    result.save(path)
    old = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=f"cannot write {path}"):
            result.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_byte_order_mark(tmp_path: Path, kind: str) -> None:
    """As Windows editors put ahead of a file."""
    text = {
        "jsonl": json.dumps(
            {"clean": "When Mary went", "corrupted": "When John went", "answer": " bar"}
        )
        + "\n",
        "csv": "clean,corrupted,label\nWhen Mary went,When John went, bar\n",
    }[kind]
    read = {"jsonl": PromptPairs.from_jsonl, "csv": PromptPairs.from_csv}[kind]
    found = []
    for name, mark in (("plain", b""), ("marked", b"\xef\xbb\xbf")):
        path = tmp_path / f"{name}.{kind}"
        path.write_bytes(mark + text.encode())
        found.append(read(path, bpe()))
    assert torch.equal(found[0].clean_ids, found[1].clean_ids)
    assert found[0].digest() == found[1].digest()


# ---- model folders from strangers


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("how", ["code", "code for a known type", "tokenizer code", "pickle"])
def test_a_hostile_folder_runs_nothing(tmp_path: Path, how: str) -> None:
    folder, marker = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(Path(__file__).parent / "data" / "tiny_llama_2L", folder)
    code = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
    if how == "pickle":
        for weights in folder.glob("*.safetensors"):
            weights.unlink()
        with (folder / "pytorch_model.bin").open("wb") as file:
            pickle.dump(Bomb(marker), file)
    elif how == "tokenizer code":
        (folder / "own.py").write_text(code)
        change(
            folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Tokenizer", None]}
        )
    else:
        (folder / "own.py").write_text(code)
        auto = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
        change(folder / "config.json", auto_map=auto)
        if how == "code":
            change(folder / "config.json", model_type="own")
    if how in ("code", "pickle"):
        with pytest.raises((OSError, ValueError, pickle.UnpicklingError, RuntimeError)):
            load_model(str(folder))
    else:
        load_model(str(folder))  # by transformers' own code
    assert not marker.exists()


def change(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


# ---- configurations that nobody chose


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    layers=st.integers(1, 4),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([2, 6, 8]),
    neurons=st.integers(1, 40),
    length=st.integers(1, 64),
    window=st.sampled_from([None, 1, 2, 5, 100]),
    padding=st.sampled_from(["none", "right", "left"]),
    shared=st.integers(0, 8),
    count=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_random_configurations(
    layers: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    neurons: int,
    length: int,
    window: int | None,
    padding: str,
    shared: int,
    count: int,
    seed: int,
) -> None:
    """AtP* of any shape, prompt length, window and padding equals the literal code, by either CPU backend."""
    model = zoo.build(
        "mistral",
        wide_norms=True,
        seed=seed,
        num_hidden_layers=layers,
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        hidden_size=kv_heads * group * head_dim,
        head_dim=head_dim,
        intermediate_size=neurons,
        sliding_window=window,
        max_position_embeddings=64,
    )
    side = "left" if padding == "left" else "right"
    pairs = zoo.random_pairs(
        model, count, length, seed, padding != "none", side, min(shared, length - 1)
    )
    wanted = literal_attribution(model, pairs, "nll", nodes=KINDS)[0]
    largest = max(float(x.abs().max()) for x in wanted.values())
    for backend in ("reference", "cpp"):
        found = Engine(model, backend).attribute(pairs, "nll", nodes=KINDS, progress=False)
        for kind, right in wanted.items():
            assert (found.contribution[kind] - right).abs().max() <= 1e-9 * largest, kind
