"""Whether torch.compile pays for the part of a layer that autograd takes cotangents through (make bench-compile).

One layer of random-weight GPT-NeoX-160M (Pythia-160M's shape), from its output to its attention's output and its input,
for 6 cotangents at once, AtP*'s average. The engine has the forward pass on a tape; the compiled function runs it
again, as every torch.compile of a vector-Jacobian product does. Rows go to bench/results/compile.csv:
  wall_seconds     "autograd, tape kept" (the engine's way), "autograd" with the forward pass, "torch.compile"
  first_seconds    the compiled function's first call of a shape, which compiles it (no cache on disk)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from cases import build
from measure import check_environment, interleaved, onednn_products, write_ratios
from random_models import NEOX_160M
from rows import RESULTS, RowFile
from torch import Tensor

COTANGENTS = 6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    check_environment()
    model, file = build(NEOX_160M), RowFile(RESULTS / "compile.csv")
    model.requires_grad_(False)
    layer = model.gpt_neox.layers[0]

    def output(x: Tensor, z: Tensor) -> Tensor:
        return x + layer.attention.dense(z) + layer.mlp(layer.post_attention_layernorm(x))

    def vjp(x: Tensor, z: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = torch.func.vmap(torch.func.vjp(output, x, z)[1])(grad)
        return found

    torch.compiler.config.force_disable_caches = True
    compiled = torch.compile(vjp)
    for positions in (32, 128, 512):
        shape = (1, positions, model.config.hidden_size)
        x, z = torch.randn(shape), torch.randn(shape)
        grad = torch.randn(COTANGENTS, *shape)
        leaves = x.clone().requires_grad_(), z.clone().requires_grad_()
        tape = output(*leaves)

        def from_tape(
            tape: Tensor = tape, leaves: tuple[Tensor, Tensor] = leaves, grad: Tensor = grad
        ) -> tuple[Tensor, ...]:
            def one(g: Tensor) -> tuple[Tensor, ...]:
                return torch.autograd.grad(tape, leaves, g, retain_graph=True)

            found: tuple[Tensor, ...] = torch.func.vmap(one)(grad)
            return found

        inputs = x, z, grad
        calls: dict[str, Callable[[], object]] = {
            "autograd, tape kept": from_tape,
            "autograd": lambda inputs=inputs: vjp(*inputs),  # type: ignore[misc]
            "torch.compile": lambda inputs=inputs: compiled(*inputs),  # type: ignore[misc]
        }
        columns = {
            "op": "layer_vjp",
            "mode": "output to z and input",
            "shape": {"model": NEOX_160M, "T": positions, "C": COTANGENTS},
            "dtype": "float32",
        }
        with onednn_products():
            began = time.perf_counter()
            found = compiled(*inputs)
            first = time.perf_counter() - began
            for mine, expected in zip(found, from_tape(), strict=True):
                torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
            timings = interleaved(calls, options.rounds)
        file.add([first], provider="torch.compile", metric="first_seconds", **columns)
        for name, timing in timings.items():
            timing.write(file, provider=name, **columns)
            if name == "torch.compile":
                write_ratios(
                    file,
                    timings["autograd, tape kept"],
                    timing,
                    of="tape",
                    provider=name,
                    **columns,
                )


if __name__ == "__main__":
    main()
