"""Models whose weights are put elsewhere by accelerate, and a count of what is fetched."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import accelerate
import pytest
import torch
from accelerate.utils.offload import PrefixedDataset
from torch import Tensor
from transformers import PreTrainedModel


def offload(model: PreTrainedModel, folder: Path, what: str = "disk") -> PreTrainedModel:
    """what: "disk" for its layers; "all", for embeddings and head too; "memory", to fetch its layers from there; "odd layers"."""
    cpu = torch.device("cpu")
    if what == "all":
        return accelerate.disk_offload(model, folder, execution_device=cpu)
    decoder = model.get_decoder()
    path = next(name for name, module in model.named_modules() if module is decoder)
    place: dict[str, str] = {n: "cpu" for n, m in model.named_children() if m is not decoder}
    for name, child in decoder.named_children():
        if isinstance(child, torch.nn.ModuleList):
            for i in range(len(child)):
                where = "cpu" if what == "odd layers" and i % 2 == 0 else "disk"
                place[f"{path}.{name}.{i}"] = where
        else:
            place[f"{path}.{name}"] = "cpu"
    if what == "memory":
        layers = {name: p for name, p in model.state_dict().items() if ".layers." in name}
        for name in [n for n in place if n.rsplit(".", 1)[-1].isdigit()]:
            accelerate.cpu_offload(
                model.get_submodule(name),
                execution_device=cpu,
                state_dict={
                    key.removeprefix(name + "."): x
                    for key, x in layers.items()
                    if key.startswith(name + ".")
                },
            )
        return model
    return accelerate.dispatch_model(model, place, main_device="cpu", offload_dir=folder)


def count_fetches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each weight has been fetched, by its full name, from now on."""
    counts: Counter[str] = Counter()
    own = PrefixedDataset.__getitem__

    def fetch(self: PrefixedDataset, name: str) -> Tensor:
        counts[self.prefix + name] += 1
        return own(self, name)

    monkeypatch.setattr(PrefixedDataset, "__getitem__", fetch)
    return counts


def placement(model: PreTrainedModel) -> list[object]:
    """What a call must leave as it was: weights' devices and flags, hooks and where they fetch from, functions."""
    hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
    return [
        [(name, p.device, p.requires_grad) for name, p in model.named_parameters()],
        [(id(h), getattr(h, "offload", None), id(getattr(h, "weights_map", None))) for h in hooks],
        [sorted(vars(module)) for module in model.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        model.config._attn_implementation,
    ]
