"""Pieces of the tile kernels: loads, visibility, logits, the exact weights of the key fix.

Every tile is float32 once it is a logit. In the loops logits and logsumexps are to the base 2: the scale takes log2(e) in, and
a weight is one fused multiply-add and the hardware's power of two. Functions that may not cancel: expm1 and tanh by polynomials
near 0, differences of sigmoids by expm1 of a fall.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


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
def store_rows(base_ptr, offs_r, limit, stride_r, x, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Rows offs_r of a matrix of DIM columns, each contiguous."""
    offs_d = tl.arange(0, BLOCK)
    offsets = offs_r.to(tl.int64)[:, None] * stride_r + offs_d[None, :]
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
def keys_seen_whole(
    start_m,
    low,
    high,
    queries,
    keys,
    window,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """[whole, rest) of keys_in_reach's [low, high): the tiles that every query from start_m on sees all keys of."""
    position = start_m + (keys - queries)
    whole = low
    rest = keys // BLOCK_N * BLOCK_N
    if CAUSAL:
        rest = tl.minimum(rest, (position + 1) // BLOCK_N * BLOCK_N)
    if window is not None:
        whole = tl.maximum(
            tl.cdiv(tl.maximum(position + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N, low
        )
    if HAS_MASK:
        whole = high
    return whole, rest


@triton.jit
def sees_whole(
    start_m,
    start_n,
    shift,
    window,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Whether every query of a tile sees all of its keys; queries and keys beyond the end count."""
    distance = start_m + shift - start_n
    whole = distance == distance
    if CAUSAL:
        whole = distance >= BLOCK_N - 1
    if window is not None:
        whole = whole & (distance + BLOCK_M - 1 < window)
    return whole


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
def hide(s, positions, mask_ptr, start_n, cols, stride_mn, keys, window, CAUSAL: tl.constexpr):
    """s, [queries, keys], with -inf where the key is not admissible to the query."""
    left = keys - start_n
    seen = visible(positions[:, None] - (start_n + cols)[None, :], window, CAUSAL)
    seen &= (cols < left)[None, :]
    if mask_ptr is not None:
        masks = mask_ptr + (start_n + cols).to(tl.int64) * stride_mn
        seen &= (tl.load(masks, mask=cols < left, other=0) != 0)[None, :]
    return tl.where(seen, s, float("-inf"))


@triton.jit
def half_a_place_up(x):
    """x and half of TF32's last place: a product drops the 13 bits below that, and takes the nearest so, halves away from 0."""
    bits = x.to(tl.int32, bitcast=True)
    # the hardware's NaN is the largest integer: the sum would carry it over into a 0
    bits = tl.minimum(bits, 0x7FFFEFFF) + 0x1000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def weigh(weights, x, acc, PRECISION: tl.constexpr):
    """acc + weights @ x, the float32 weights rounded to x's dtype.

    float16 has too little range for gradients of logits: there both go in as TF32, which holds x exactly.
    """
    if x.dtype == tl.bfloat16:
        acc = tl.dot(weights.to(tl.bfloat16), x, acc, input_precision="ieee")
    else:
        if PRECISION == "tf32":
            weights = half_a_place_up(weights)
        acc = tl.dot(weights, x.to(tl.float32), acc, input_precision=PRECISION)
    return acc


@triton.jit
def exp(x):
    """exp by the hardware's power of two, two instructions; results below 2**-126 become 0."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def binary_expm1(x):
    """2**x - 1 for |x| <= 0.722, relative error below 2**-24 before rounding: the polynomial that comes nearest."""
    y = 1.5345848e-05
    y = y * x + 0.00015524508
    y = y * x + 0.0013333316
    y = y * x + 0.009617814
    y = y * x + 0.05550411
    y = y * x + 0.24022652
    return (y * x + 0.6931472) * x


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
def binary_logits(raw, scale, softcap):
    """Logits to the base 2."""
    if softcap is None:
        return raw * (scale * LOG2_E)
    return logits(raw, scale, softcap) * LOG2_E


@triton.jit
def soften(ds, s, softcap):
    """A gradient by the logits s, to the base 2, as one by scale * q . k: times the derivative of the softcap."""
    if softcap is not None:
        squashed = s / (softcap * LOG2_E)
        ds = ds * (1.0 - squashed * squashed)
    return ds


@triton.jit
def sigmoid_difference(x, change):
    """sigmoid(x + change) - sigmoid(x) without cancellation, x up to infinity (reference.py has the forms)."""
    y = x + change
    size = tl.abs(change)
    fall = tl.where(size < 0.5, -binary_expm1(-LOG2_E * tl.minimum(size, 0.5)), 1.0 - exp(-size))
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
def binary_change(raw_patched, raw, scale, softcap):
    """logit_change to the base 2."""
    if softcap is not None:
        change = logit_change(raw_patched, raw, scale, softcap) * LOG2_E
    else:
        change = (raw_patched - raw) * (scale * LOG2_E)
    return change


@triton.jit
def key_weights(p, x, change):
    """(a' - a)/(1 - a) for keys that are not their row's largest, a = p = 2**x <= 1/2.

    x and change, the patched logit minus the clean one, are to the base 2. With r = a (2**change - 1) it is r/(1 + r); where the
    two are not close r is the difference of powers. Above 2**115 the ratio is 1 in float32, so the power is held there.
    x = -inf, an unseen key, gives 0.
    """
    far = tl.exp2(tl.minimum(x + change, 115.0)) - p
    rise = tl.where(tl.abs(change) < 0.722, p * binary_expm1(change), far)
    root = tl.rsqrt(1.0 + rise)
    return rise * root * root
