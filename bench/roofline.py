"""Predicted bounds of the Triton kernels on an H100, from their binaries: a prediction, not a measurement.

Each shipped kernel is compiled for sm_90 as a real call would compile it, the instructions of its main loop are
counted by pipe, and the loop's trips follow from the shapes. The time of a kernel is that of its busiest resource:
tensor cores (multiply-adds of the algorithm, padding and masked halves of diagonal tiles included; float32 products
are six bfloat16 ones), instruction issue, the pipes of integer, float32 and special functions, or bytes through L2
and from memory. Latencies, bank conflicts, clocks below the data sheet's, the tail of the grid and what misses L1 when
slices of a row are read again are left out, so that a measured time can only be longer. Of several configurations for
sm_90 the one with the shortest prediction is taken.

Writes bench/results/roofline.csv; one row per kernel, and one per op as the sum of its kernels. A trip is one tile of
one head and its chunk of cotangents; its operations are of the input's dtype, its bytes come through L2. Trips through tiles on
the diagonal execute masking_instructions more.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import binaries
import rows

import compiled

# H100 SXM, data sheet and tuning guide: per SM and clock unless a unit is given
DEVICE = "H100 SXM, predicted"
SMS, CLOCK_HZ = 132, 1.83e9
BF16_FLOP, ISSUE, ALU, FMA, MUFU, LSU = 4096, 4 * 32, 64, 128, 16, 32
MEMORY_BYTES_PER_S, L2_BYTES_PER_S = 3.35e12, 5.5e12
PIPES = {
    "alu": (
        "ISETP FSETP LOP3 SEL FSEL FMNMX IADD3 VIADD LEA SHF PRMT PLOP3 P2R R2P IABS VIMNMX F2FP SGXT MOV",
        ALU,
    ),
    "fma": ("FFMA FMUL FADD IMAD CS2R", FMA),
    "mufu": ("MUFU", MUFU),
    "lsu": ("LDS STS LDSM STSM LDG STG LDGSTS SHFL LDL STL", LSU),
}
OPS = {
    "attention": ("attention",),
    "attention, no statistics": ("attention_z",),
    "attention_vjp": ("row_dots", "query_gradients", "key_gradients"),
    "query_patch_effects": ("attention", "attention", "row_dots"),
    "key_patch_effects": ("row_dots", "top_vectors", "key_effects", "top_effects"),
    "attention_vjp_effects": (
        "attention",
        "row_dots",
        "top_vectors",
        "query_gradients",
        "key_gradients",
        "key_effects",
        "top_effects",
    ),
    "node_effects": ("node_effects",),
}
FIELDS = (
    "op kernel kind dtype head_dim keys cotangents batch heads kv_heads blocks registers shared_bytes "
    "programs trips operations_per_trip bytes_per_trip matrix_instructions_per_trip instructions_per_trip masked_trips masking_instructions tensor_ms issue_ms alu_ms fma_ms mufu_ms lsu_ms l2_ms memory_ms "
    "bound predicted_ms predicted_tflops share_of_tensor_peak device commit dirty triton date"
).split()
TIMES = ("tensor", "issue", "alu", "fma", "mufu", "lsu", "l2", "memory")


def tile_pairs(keys: int, owned: int, other: int, owner: str) -> int:
    """Tiles that the owners of query or key blocks visit in a causal square of keys x keys."""
    if owner == "query":
        return sum(-(-min(start + owned, keys) // other) for start in range(0, keys, owned))
    return sum(-(-(keys - start // other * other) // other) for start in range(0, keys, owned))


def whole_pairs(keys: int, owned: int, other: int, owner: str) -> int:
    """Of these the tiles in which every query sees every key, which are not masked."""
    if owner == "query":
        return sum((start + 1) // other for start in range(0, keys, owned))
    return sum(
        start >= key + owned - 1
        for key in range(0, keys, owned)
        for start in range(key // other * other, keys, other)
    )


def trips_of(case: compiled.Case, keys: int) -> tuple[int, int]:
    """Trips through a kernel's main loops, over all programs, and how many of them are through tiles that are masked."""
    b = case.blocks
    heads = compiled.BATCH * compiled.HEADS
    if case.kernel in ("query_gradients", "key_gradients", "key_effects", "top_effects"):
        heads *= -(-compiled.COTANGENTS // b.chunk)
    if case.kernel in ("attention", "attention_z", "query_gradients"):
        tiles = keys, b.block_m, b.block_n, "query"
    elif case.kernel in ("key_gradients", "key_effects", "top_effects"):
        tiles = keys, b.block_n, b.block_m, "key"
    else:
        return 0, 0
    pairs = tile_pairs(*tiles)
    return heads * pairs, heads * (pairs - whole_pairs(*tiles))


def products(case: compiled.Case, starts: int) -> float:
    """Multiply-adds per tile element and trip, over all starts of the kernel."""
    chunk, dim = case.blocks.chunk, case.dim
    return {
        "attention": (3 if case.dtype == "f32" else 4) * dim,
        "attention_z": 2 * dim,
        "query_gradients": (1 + 2 * chunk) * dim,
        "key_gradients": (starts + 3 * chunk) * dim,
        "key_effects": (2 + chunk) * dim,
        "top_effects": chunk,
    }.get(case.kernel, 0.0)


def traffic(case: compiled.Case, keys: int, trips: int, starts: int) -> tuple[float, float]:
    """Bytes through L2 by the main loops, and bytes that memory must move at least once."""
    size = 4 if case.dtype == "f32" else 2
    b, dim, c = case.blocks, case.dim, compiled.COTANGENTS
    rows = compiled.BATCH * compiled.HEADS * keys
    columns = compiled.BATCH * compiled.KV_HEADS * keys
    tile = {
        "attention": 3 * b.block_n * dim * size,
        "attention_z": 2 * b.block_n * dim * size,
        "query_gradients": 2 * b.block_n * dim * size,
        "key_gradients": starts * (1 + b.chunk) * b.block_m * dim * size,
        "key_effects": (1 + b.chunk) * b.block_m * dim * size,
        "top_effects": b.chunk * b.block_m * 4,
    }.get(case.kernel, 0)
    grads, q, kv = c * rows * dim * size, rows * dim * size, 2 * columns * dim * size
    least = {
        "attention": q + kv + 2 * rows * dim * 4,
        "attention_z": q + kv + rows * dim * 4,
        "query_gradients": q + kv + 2 * grads,
        "key_gradients": q + kv + grads + c * kv,
        "key_effects": q + 1.5 * kv + grads,
        "top_effects": c * rows * 4,
        "top_vectors": q + 2 * rows * dim * 4,
        "row_dots": grads + 3 * rows * dim * 4 + 3 * c * rows * 4,
        "node_effects": grads + q + rows * 4,
    }[case.kernel]
    return float(trips * tile), float(least)


def predict(case: compiled.Case, keys: int) -> dict[str, object]:
    """One kernel's row."""
    starts = compiled.starts(case, keys)
    slices = -(-case.dim // case.blocks.width)
    found = [binaries.inspect(binaries.compiled(start, case.target), slices) for start in starts]
    programs, (trips, masked) = starts[0].programs, trips_of(case, keys)
    streams = case.kernel in ("row_dots", "node_effects")
    loop_trips = programs * compiled.COTANGENTS if streams else trips
    lanes = case.blocks.num_warps * 32
    counts: Counter[str] = Counter()
    for binary in found:
        loop, whole = binaries.families(binary.loop), binaries.families(binary.instructions)
        edge = binaries.families(binary.edge)
        for family in whole:
            # what lies outside the loops runs once per program
            inside = loop[family] + edge[family] if loop_trips else 0
            once = max(whole[family] - inside, 0)
            counts[family] += once * programs + loop[family] * loop_trips + edge[family] * masked
    per_second = SMS * CLOCK_HZ
    flop = 2 * products(case, len(starts)) * trips * case.blocks.block_m * case.blocks.block_n
    parts = 6 if case.dtype == "f32" or case.kernel == "top_effects" else 1
    vector = {k: n for k, n in counts.items() if not k.startswith("U")}
    l2, memory = traffic(case, keys, trips, len(starts))
    seconds = {
        "tensor": flop * parts / (BF16_FLOP * per_second),
        "issue": sum(vector.values()) * lanes / (ISSUE * per_second),
        **{
            pipe: sum(counts[name] for name in names.split()) * lanes / (rate * per_second)
            for pipe, (names, rate) in PIPES.items()
        },
        "l2": l2 / L2_BYTES_PER_S,
        "memory": memory / MEMORY_BYTES_PER_S,
    }
    bound = max(seconds, key=seconds.__getitem__)
    blocks = str(case).split("-", 4)[-1]
    return {
        "kernel": case.kernel,
        "blocks": blocks,
        "registers": max(binary.registers for binary in found),
        "shared_bytes": max(binary.shared for binary in found),
        "programs": programs,
        "trips": trips,
        "operations_per_trip": round(flop / trips) if trips else None,
        "bytes_per_trip": round(l2 / trips) if trips else None,
        "matrix_instructions_per_trip": sum(binaries.matrix_count(b.loop) for b in found),
        "instructions_per_trip": sum(b.loop.total() for b in found),
        "masked_trips": masked,
        "masking_instructions": sum(b.edge.total() for b in found),
        **{f"{name}_ms": 1e3 * seconds[name] for name in TIMES},
        "bound": bound,
        "predicted_ms": 1e3 * seconds[bound],
        "predicted_tflops": flop / seconds[bound] / 1e12,
        "share_of_tensor_peak": seconds["tensor"] / seconds[bound],
    }


def predicted(dtype: str, dim: int) -> list[compiled.Case]:
    """The shipped configurations of the kernels that OPS are made of."""
    names = {name for kernels in OPS.values() for name in kernels}
    return [c for c in compiled.cases((dtype,), (dim,), ("sm_90",)) if c.kernel in names]


def shortest(cases: list[compiled.Case], keys: int) -> dict[str, dict[str, object]]:
    """By kernel: the row of its configuration with the shortest prediction."""
    best: dict[str, dict[str, object]] = {}
    for case in cases:
        row = predict(case, keys)
        known = best.setdefault(case.kernel, row)
        if float(str(row["predicted_ms"])) < float(str(known["predicted_ms"])):
            best[case.kernel] = row
    return best


def rounded(row: dict[str, object]) -> dict[str, object]:
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}


def main() -> None:
    """Predicts every op at two lengths and writes the table."""
    path = Path(__file__).parent / "results" / "roofline.csv"
    path.parent.mkdir(exist_ok=True)
    made = rows.provenance()
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for dtype, dim in (("bf16", 64), ("bf16", 128), ("f32", 64), ("f32", 128)):
            cases = predicted(dtype, dim)
            for keys in (1024, 4096):
                common: dict[str, object] = {
                    "kind": "prediction",
                    "dtype": dtype,
                    "head_dim": dim,
                    "keys": keys,
                    "cotangents": compiled.COTANGENTS,
                    "batch": compiled.BATCH,
                    "heads": compiled.HEADS,
                    "kv_heads": compiled.KV_HEADS,
                    "device": DEVICE,
                    **{name: made[name] for name in ("commit", "dirty", "triton", "date")},
                }
                kernels = shortest(cases, keys)
                for op, names in OPS.items():
                    parts = [kernels[name] for name in names]
                    for row in parts:
                        writer.writerow(rounded({"op": op, **common, **row}))
                    sums = {
                        f"{name}_ms": sum(float(str(row[f"{name}_ms"])) for row in parts)
                        for name in (*TIMES, "predicted")
                    }
                    flop = sum(
                        float(str(row["predicted_tflops"])) * float(str(row["predicted_ms"]))
                        for row in parts
                    )
                    total = {
                        "op": op,
                        "kernel": "all",
                        **sums,
                        "bound": max(parts, key=lambda row: float(str(row["predicted_ms"])))[
                            "bound"
                        ],
                        "predicted_tflops": flop / sums["predicted_ms"],
                        "share_of_tensor_peak": sums["tensor_ms"] / sums["predicted_ms"],
                    }
                    writer.writerow(rounded({**common, **total}))
                    print(f"{op} {dtype} D{dim} T{keys}: {sums['predicted_ms']:.3g} ms, predicted")


if __name__ == "__main__":
    main()
