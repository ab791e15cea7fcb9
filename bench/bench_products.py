"""float32 products of a linear layer on the CPU: the C++ backend's against torch's (make bench-products).

x (rows, inner) by the weights of a linear layer, as the forward pass takes them (mode "forward", weights (columns, inner))
and as the gradient by x does (mode "gradient", weights (inner, columns)). As in a model, a layer's weights come from memory:
each call multiplies by as many weights of a shape as make 80 MB. The results are compared first. Rows go to
bench/results/products.csv: operations_per_second, and how many times faster than torch's product.
`atp_fast.ops.linear.own_products_are_faster` says on which CPUs the engine takes it; this table is what it goes by.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from measure import check_environment, interleaved, write_ratios
from rows import RESULTS, RowFile
from torch import Tensor

from atp_fast.ops import cpp

ROWS = (1, 2, 8, 15, 30, 64, 128, 384, 1536)
SHAPES = ((768, 768), (768, 3072), (3072, 768))
WEIGHT_BYTES = 80e6
AGREEMENT = 1e-5
"""Largest difference of products, by the largest number."""


PROVIDERS = {"atp_fast cpp": cpp.linear, "torch": torch.matmul}
Product = Callable[[Tensor, Tensor], Tensor]


def through(product: Product, x: Tensor, weights: list[Tensor]) -> None:
    for weight in weights:
        product(x, weight)


def bench_cell(file: RowFile, rows: int, inner: int, columns: int, mode: str, rounds: int) -> None:
    count = max(1, round(WEIGHT_BYTES / (4 * inner * columns)))
    x = torch.randn(rows, inner)
    if mode == "forward":
        weights = [torch.randn(columns, inner).t() for _ in range(count)]
    else:
        weights = [torch.randn(inner, columns) for _ in range(count)]
    exact = x.double() @ weights[0].double()
    for name, product in PROVIDERS.items():
        error = float((product(x, weights[0]) - exact).abs().max() / exact.abs().max())
        if not error < AGREEMENT:
            raise RuntimeError(f"{name}: relative error {error:.2g}")
    timings = interleaved(
        {name: partial(through, product, x, weights) for name, product in PROVIDERS.items()}, rounds
    )
    shape = {"rows": rows, "inner": inner, "columns": columns}
    cell = {"op": "linear", "mode": mode, "shape": shape, "dtype": "float32"}
    operations = 2 * rows * inner * columns * count
    for name, timing in timings.items():
        rates = [operations / seconds for seconds in timing.wall]
        file.add(rates, metric="operations_per_second", provider=name, **cell)
        if name != "atp_fast cpp":
            own = timings["atp_fast cpp"]
            write_ratios(file, timing, own, of=name, provider="atp_fast cpp", **cell)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    check_environment()
    file = RowFile(RESULTS / "products.csv")
    for rows in given.rows or ROWS:
        for inner, columns in SHAPES:
            for mode in ("forward", "gradient"):
                bench_cell(file, rows, inner, columns, mode, given.rounds)


if __name__ == "__main__":
    main()
