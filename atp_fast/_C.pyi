from collections.abc import Sequence

# (address, dtype: 0 float32, 1 float64, 2 bfloat16, 3 float16; strides in elements)
_Passed = tuple[int, int, tuple[int, ...]]
# batch, heads, kv_heads, queries, keys, head_dim, value_dim
_Sizes = tuple[int, int, int, int, int, int, int]
# scale, causal, window or 0, softcap or 0, address of sinks or 0, address of key_mask or 0
_Scoring = tuple[float, bool, int, float, int, int]
# addresses of z, logsumexp, top_key, loo_logsumexp, loo_z
_Stats = tuple[int, int, int, int, int]

__version__: str

def instruction_sets() -> list[str]: ...
def use_instruction_set(name: str) -> str: ...
def attention(
    sizes: _Sizes,
    scoring: _Scoring,
    q: _Passed,
    k: _Passed,
    v: _Passed,
    z: _Passed,
    stats: _Stats,
    threads: int,
) -> None: ...
def attention_backward(
    sizes: _Sizes,
    cotangents: int,
    scoring: _Scoring,
    q: _Passed,
    k: _Passed,
    v: _Passed,
    k_corrupted: _Passed,
    grad_z: _Passed,
    stats: _Stats,
    grad_q: _Passed,
    grad_k: _Passed,
    grad_v: _Passed,
    effect_k: int,
    threads: int,
) -> None: ...
def linear(
    sizes: tuple[int, int, int], x: _Passed, weight: _Passed, bias: int, out: int, threads: int
) -> None: ...
def exponential(address: int, out: int, count: int, wide: bool) -> None: ...
def node_effects(
    size: Sequence[int], delta: _Passed, grad: _Passed, weights: int, out: int, threads: int
) -> None: ...
def add_effects(
    sizes: tuple[int, int, int, int, int, int],
    grad: _Passed,
    clean: _Passed,
    corrupted: _Passed,
    weights: int,
    live: int,
    first: int,
    score: _Passed,
    effect: int,
    per_pair: _Passed,
    rows: int,
    pair_signed: bool,
    threads: int,
) -> None: ...
def norm(
    sizes: tuple[int, int, int, int, int],
    x: _Passed,
    grad: _Passed,
    out: _Passed,
    rest: tuple[int, int, int, int, int],
    eps: float,
    offset: float,
    rounded: bool,
    threads: int,
) -> None: ...
def rotate(
    sizes: tuple[int, int, int, int, int, int],
    x: _Passed,
    cos: _Passed,
    sin: _Passed,
    adjoint: bool,
    out: _Passed,
    threads: int,
) -> None: ...
def gate_vjp(
    sizes: tuple[int, int, int, int, int],
    gate: _Passed,
    up: _Passed,
    grad: _Passed,
    gelu: bool,
    grad_gate: _Passed,
    grad_up: _Passed,
    threads: int,
) -> None: ...
