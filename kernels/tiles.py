"""Pieces of the tile kernels: loads, visibility, logits, the exact weights of the key fix.

Every tile is float32 once it is a logit. Functions that may not cancel: expm1 and tanh by polynomials near 0,
differences of sigmoids by expm1 of a fall.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(base_ptr, offs_r, limit, stride_r, stride_d, DIM, BLOCK: tl.constexpr):
    """Rows offs_r of a matrix, [rows, BLOCK], zeros from row `limit` and from column DIM on."""
    offs_d = tl.arange(0, BLOCK)
    offsets = offs_r.to(tl.int64)[:, None] * stride_r + offs_d.to(tl.int64)[None, :] * stride_d
    inside = (offs_r < limit)[:, None] & (offs_d < DIM)[None, :]
    return tl.load(base_ptr + offsets, mask=inside, other=0.0)


@triton.jit
def row_products(
    a,
    b,
    a_ptr,
    offs_a,
    limit_a,
    stride_a,
    stride_ad,
    b_ptr,
    offs_b,
    limit_b,
    stride_b,
    stride_bd,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """a @ b^T in float32, a and b rows of two matrices as load_rows gives them.

    With WIDTH < BLOCK the rows are read again, WIDTH columns at a time: the parts into which a float32 product
    splits its operands would not fit the registers for all columns, and a loop that is unrolled or works on what
    was loaded before would be hoisted into just that.
    """
    if WIDTH >= BLOCK:
        acc = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    else:
        acc = tl.zeros([offs_a.shape[0], offs_b.shape[0]], tl.float32)
        for start in range(0, DIM, WIDTH):
            part_a = load_rows(
                a_ptr + tl.cast(start, tl.int64) * stride_ad,
                offs_a, limit_a, stride_a, stride_ad, DIM - start, WIDTH,
            )  # fmt: skip
            part_b = load_rows(
                b_ptr + tl.cast(start, tl.int64) * stride_bd,
                offs_b, limit_b, stride_b, stride_bd, DIM - start, WIDTH,
            )  # fmt: skip
            acc = tl.dot(part_a, tl.trans(part_b), acc, input_precision=PRECISION)
    return acc


@triton.jit
def store_rows(base_ptr, offs_r, limit, x, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Rows offs_r of a contiguous matrix of DIM columns."""
    offs_d = tl.arange(0, BLOCK)
    offsets = offs_r.to(tl.int64)[:, None] * DIM + offs_d[None, :]
    inside = (offs_r < limit)[:, None] & (offs_d < DIM)[None, :]
    tl.store(base_ptr + offsets, x.to(base_ptr.dtype.element_ty), mask=inside)


@triton.jit
def queries_in_reach(
    start_n,
    queries,
    keys,
    window,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """First query, rounded down to a block, and number of query blocks that may see the keys from start_n on."""
    low = 0
    high = queries
    if CAUSAL:
        low = tl.maximum(start_n - (keys - queries), 0) // BLOCK_M * BLOCK_M
    if window is not None:
        high = tl.minimum(start_n + BLOCK_N - 1 + window - (keys - queries), queries)
    return low, tl.cdiv(tl.maximum(high - low, 0), BLOCK_M)


@triton.jit
def keys_in_reach(
    start_m,
    queries,
    keys,
    window,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """First key, rounded down to a block, and one past the last that the queries from start_m on may see."""
    low = 0
    high = keys
    if window is not None:
        low = tl.maximum(start_m + (keys - queries) - window + 1, 0) // BLOCK_N * BLOCK_N
    if CAUSAL:
        high = tl.minimum(start_m + BLOCK_M + (keys - queries), keys)
    return low, high


@triton.jit
def visible(distance, window, CAUSAL: tl.constexpr):
    """Which keys lie in reach, given query position minus key position."""
    if window is not None:
        seen = distance < window
        if CAUSAL:
            seen = seen & (distance >= 0)
    elif CAUSAL:
        seen = distance >= 0
    else:
        seen = distance == distance
    return seen


@triton.jit
def weigh(weights, x, acc, PRECISION: tl.constexpr):
    """acc + weights @ x, the float32 weights rounded to x's dtype.

    float16 has too little range for gradients of logits: there both go in as TF32, which holds x exactly.
    """
    if x.dtype == tl.bfloat16:
        acc = tl.dot(weights.to(tl.bfloat16), x, acc, input_precision="ieee")
    else:
        acc = tl.dot(weights, x.to(tl.float32), acc, input_precision=PRECISION)
    return acc


@triton.jit
def exp(x):
    """exp by the hardware's power of two, two instructions; results below 2**-126 become 0."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def small_expm1(x):
    """exp(x) - 1 for |x| < 1/2, relative error below 2**-24 before rounding."""
    y = 1.0 / 40320.0
    y = y * x + 1.0 / 5040.0
    y = y * x + 1.0 / 720.0
    y = y * x + 1.0 / 120.0
    y = y * x + 1.0 / 24.0
    y = y * x + 1.0 / 6.0
    y = y * x + 0.5
    return (y * x + 1.0) * x


@triton.jit
def tanh(x):
    """tanh by its series below 1/4 and by exponentials above, so that neither cancels."""
    e = exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    y = x * x
    series = -1382.0 / 155925.0
    series = series * y + 62.0 / 2835.0
    series = series * y - 17.0 / 315.0
    series = series * y + 2.0 / 15.0
    series = series * y - 1.0 / 3.0
    near = x + x * y * series
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + exp(-x))


@triton.jit
def logits(raw, scale, softcap):
    """Logits from raw products q . k."""
    s = raw * scale
    if softcap is not None:
        s = softcap * tanh(s / softcap)
    return s


@triton.jit
def soften(ds, s, softcap):
    """A gradient by the logits s as one by scale * q . k: times the derivative of the softcap."""
    if softcap is not None:
        squashed = s / softcap
        ds = ds * (1.0 - squashed * squashed)
    return ds


@triton.jit
def sigmoid_difference(x, change):
    """sigmoid(x + change) - sigmoid(x) without cancellation, x up to infinity (reference.py has the forms)."""
    y = x + change
    size = tl.abs(change)
    fall = tl.where(size < 0.5, -small_expm1(-tl.minimum(size, 0.5)), 1.0 - exp(-size))
    return tl.where(change > 0, sigmoid(y) * sigmoid(-x) * fall, -sigmoid(x) * sigmoid(-y) * fall)


@triton.jit
def logit_change(raw_patched, raw, scale, softcap):
    """The patched logits minus the clean ones: exactly 0 where the products agree, fused multiply or not."""
    if softcap is not None:
        change = softcap * (tanh(raw_patched * scale / softcap) - tanh(raw * scale / softcap))
    else:
        change = (raw_patched - raw) * scale
    return change


@triton.jit
def key_weights(p, x, change):
    """(a' - a)/(1 - a) for keys that are not their row's largest, a = p = exp(x) <= 1/2, x = s - logsumexp.

    change is s' - s. With E = exp(x + change) it is (E - a)/(1 - a + E); E - a = a expm1(change) where the two are
    close. Above exp(80) the ratio is 1 in float32, so E is held there. x = -inf, an unseen key, gives 0.
    """
    e = exp(tl.minimum(x + change, 80.0))
    rise = tl.where(tl.abs(change) < 0.5, p * small_expm1(change), e - p)
    return rise / (1.0 - p + e)
