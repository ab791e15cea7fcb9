"""The run that tests/test_distributed.py starts in processes of its own: python sharded.py FOLDER."""

import os
import signal
import sys
from pathlib import Path

import torch

from atp_fast import Engine, PromptPairs, load_model
from atp_fast.distributed import attribute_sharded

MODEL = str(Path(__file__).parent / "data" / "tiny_llama_2L")
OPTIONS = {"nodes": ("q", "k", "z", "neuron"), "shard_size": 2}
TROUBLED = 2  # its shard, of pairs 2 and 9, is the fourth of six


def make_engine():
    return Engine(load_model(MODEL)[0])


def make_split_engine():
    return Engine(load_model(MODEL, tensor_parallel=2)[0])


def make_half_engine():
    """Another model: the last layer writes half as much."""
    model = load_model(MODEL)[0]
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight *= 0.5
    return Engine(model)


def make_pairs(padding_side="right"):
    """Eleven pairs of 5 to 12 tokens that split at different places; pair i is answered by token 20 + i."""
    generator = torch.Generator().manual_seed(0)
    rows, width = 11, 12
    lengths = torch.randint(5, width + 1, (rows,), generator=generator)
    clean = torch.randint(20, 270, (rows, width), generator=generator)
    mask = torch.arange(width) < lengths[:, None]
    corrupted = clean.clone()
    for i, length in enumerate(lengths.tolist()):
        corrupted[i, i % (length - 1) :] = (clean[i, i % (length - 1) :] + 7) % 250 + 20
    if padding_side == "left":
        for i, length in enumerate(lengths.tolist()):
            for x in (clean, corrupted, mask):
                x[i] = x[i].roll(width - length)
    answers = torch.arange(20, 20 + rows)
    return PromptPairs(clean, corrupted, answers, answers + 100, attention_mask=mask)


def difference(logits, pairs):
    """The logit difference, but for what the environment asks for when it sees the pair TROUBLED.

    die: the process is killed; die once: only if this file was not there yet; nan: the pair's value is NaN.
    """
    seen = pairs.answer_ids == 20 + TROUBLED
    trouble, _, flag = os.environ.get("TROUBLE", "").partition(" once ")
    if bool(seen.any()) and trouble == "die" and not (flag and Path(flag).exists()):
        if flag:
            Path(flag).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    last = logits[:, -1]
    rows = torch.arange(len(pairs))
    values = last[rows, pairs.answer_ids] - last[rows, pairs.wrong_answer_ids]
    return torch.where(seen, torch.nan, values) if trouble == "nan" else values


difference.positions = "last"


if __name__ == "__main__":
    found = attribute_sharded(
        make_engine(), make_pairs(), sys.argv[1], metric=difference, **OPTIONS
    )
    found.save(Path(sys.argv[1]) / f"found_{os.environ['RANK']}.safetensors")
