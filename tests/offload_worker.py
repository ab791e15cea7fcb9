"""Run AtP* on a model folder in this process, offloaded to disk or in memory; print its peak resident bytes beyond the libraries'.

python offload_worker.py FOLDER disk|memory OUT.safetensors
"""

import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from atp_fast import Engine, PromptPairs


def resident_bytes(name: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


folder, where, out = sys.argv[1:]
libraries = resident_bytes("VmRSS:")
place: dict[str, object] = {}
if where == "disk":
    layers = AutoConfig.from_pretrained(folder).num_hidden_layers
    kept = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    place = {
        "device_map": {
            **dict.fromkeys(kept, "cpu"),
            **{f"model.layers.{i}": "disk" for i in range(layers)},
        },
        "offload_folder": folder + "/offloaded",
    }
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **place).eval()
generator = torch.Generator().manual_seed(0)
clean = torch.randint(5, 1000, (1, 6), generator=generator)
corrupted = torch.randint(5, 1000, (1, 6), generator=generator)
corrupted[:, :2] = clean[:, :2]
pairs = PromptPairs(clean, corrupted, torch.tensor([7]), torch.tensor([11]))
Engine(model).attribute(pairs, progress=False).save(out)
print(resident_bytes("VmHWM:") - libraries)
