"""A few of the types that `make coverage` goes through, one for each way of being served or refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import __version__

import served_models
import tiny_models

PAGE = Path(__file__).parent.parent / "docs" / "models.md"

# the interface; own softmax: a table of masks, ALiBi, one key head; post-norm; latent attention with experts; a hybrid; a dense
# layer below experts; heads of two sizes
SERVED = "llama gpt_neo bloom falcon bert deepseek_v3 lfm3 glm4_moe gemma4_text".split()
REFUSED = {
    "mamba": "no attention heads",
    "diffllama": "computes attention 2 times",
    "inkling_text": "'position_bias' (a number of its own for each query and key)",
    "deepseek_v32": "runs self_attn.indexer.wq_b (Linear) without gradients: an indexer",
    "zaya": "layer 1 is given more of the layer before it than its hidden states",
    "qwen4_exp_text": "layer 1: self_attn.indexer (Qwen4ExpTextQSAIndexer) raises IndexError",
}


def test_some_of_the_types() -> None:
    found = {row["type"]: row for row in served_models.rows([*SERVED, *REFUSED])}
    for name in SERVED:
        assert found[name]["state"] == "served"
        assert served_models.wrong(found[name]) is None
        assert found[name]["patched"] == served_models.PATCHED
    for name, reason in REFUSED.items():
        assert found[name]["state"] == "refused"
        assert served_models.wrong(found[name]) is None
        assert reason in found[name]["reason"]


def test_what_is_wrong_is_seen() -> None:
    right = {"type": "x", "class": "X", "state": "served", "smallest": 0.1}
    right |= {"logits": 1e-12, "atp": 1e-12, "patching": 1e-12}
    assert served_models.wrong(right) is None
    for name in ("logits", "atp", "patching"):
        for error in (1e-8, float("nan")):
            assert name in str(served_models.wrong({**right, name: error}))
    assert "without effects" in str(served_models.wrong({**right, "smallest": 0.0}))
    refused = {"type": "x", "class": "X", "state": "refused"}
    assert served_models.wrong({**refused, "reason": "X is not served: why"}) is None
    assert served_models.wrong({**refused, "reason": "not enough values to unpack"})
    assert served_models.wrong({"type": "x", "state": "failed", "reason": "KeyError"})


@pytest.mark.skipif(not PAGE.exists(), reason="docs are not here")
def test_the_page_is_of_this_transformers_and_holds_every_type() -> None:
    text = PAGE.read_text(encoding="utf-8")
    if f"transformers {__version__} " not in text:
        pytest.skip(f"the page is of another transformers than {__version__}")
    named = re.findall(r"^\| ([\w.-]+) \|", text, re.MULTILINE)
    assert sorted(set(named) - {"Type"}) == list(tiny_models.TYPES)
    counts = re.search(r"Of the (\d+) .* \*\*(\d+) are served exactly", text)
    assert counts is not None
    assert int(counts[1]) == len(tiny_models.TYPES)
    readme = (PAGE.parent.parent / "README.md").read_text(encoding="utf-8")
    assert f"{counts[2]} of the {counts[1]} causal language model types" in readme
    served = text.split("## Refused")[0]
    assert int(counts[2]) == len(re.findall(r"^\| [\w.-]+ \| \w+ \|", served, re.MULTILINE)) - 1
