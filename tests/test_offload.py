"""A model larger than the memory it may use: weights on disk, one layer of them at a time in the sweep."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from atp_fast.attribution.precision import _multiplies_bfloat16
from atp_fast.results import Attribution

pytest.importorskip("accelerate")

# a CPU without bfloat16 products did not finish in ten minutes what it does in float32 in one
DTYPE = torch.bfloat16 if _multiplies_bfloat16("cpu") else torch.float32
WORKER = Path(__file__).parent / "offload_worker.py"
BIG = LlamaConfig(
    vocab_size=16384,
    hidden_size=2048,
    num_hidden_layers=12,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=7168,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)


def write_random_model(folder: Path) -> int:
    """Save a model of BIG's shape layer by layer, never whole in memory; returns its weights' bytes.

    Every tensor is a stretch of one block of random numbers, so that making half a billion of them costs a second.
    """
    with torch.device("meta"):
        model = LlamaForCausalLM(BIG)
    model.config.dtype = DTYPE
    model.config.save_pretrained(folder)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    block = torch.randn(40_000_000, generator=torch.Generator().manual_seed(0)).to(DTYPE)
    index, total = {}, 0
    part: dict[str, torch.Tensor] = {}
    for number, (name, shape) in enumerate(shapes.items()):
        size = shape.numel()
        start = number * 100_003 % (len(block) - size + 1)
        norm = torch.ones(shape, dtype=DTYPE)
        part[name] = norm if len(shape) == 1 else block[start : start + size].view(shape) * 0.02
        index[name] = f"part-{number // 9}.safetensors"
        total += DTYPE.itemsize * size
        if number % 9 == 8 or number == len(shapes) - 1:
            save_file(part, folder / index[name], {"format": "pt"})
            part = {}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    return total


def run(folder: Path, where: str) -> tuple[int, Attribution]:
    out = folder / f"{where}.safetensors"
    quiet = {**os.environ, "OMP_WAIT_POLICY": "passive", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, str(WORKER), str(folder), where, str(out)]
    done = subprocess.run(command, env=quiet, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split()[-1]), Attribution.load(out)


def test_offloaded_weights_need_not_fit_in_memory(tmp_path: Path) -> None:
    weights = write_random_model(tmp_path)
    peak, offloaded = run(tmp_path, "disk")
    assert peak < 0.4 * weights, f"peak {peak / 1e9:.2f} GB of weights {weights / 1e9:.2f} GB"
    _, resident = run(tmp_path, "memory")
    for kind, scores in resident.contribution.items():
        assert float(scores.max()) > 0
        torch.testing.assert_close(offloaded.contribution[kind], scores, rtol=0, atol=0)
