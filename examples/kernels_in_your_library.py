"""The kernels without the engine: exact effects of patching every key of one attention layer, for a library of your own.

You have q, k, v of a clean run, k of a corrupted one, and the gradient of your metric by the attention's output z. One
call gives the effect of every key at once; the same for one key by the definition: put it in, run the softmax again.

    python examples/kernels_in_your_library.py
"""

import torch

from atp_fast import ops

batch, heads, kv_heads, positions, head_dim = 1, 8, 2, 64, 32
q = 3 * torch.randn(batch, heads, positions, head_dim)  # sharp softmax rows
k, v, k_corrupted = torch.randn(3, batch, kv_heads, positions, head_dim)
grad_z = torch.randn(
    1, batch, heads, positions, head_dim
)  # leading axis: several gradients at once

z, stats = ops.attention(q, k, v)
effects = ops.key_patch_effects(q, k, v, k_corrupted=k_corrupted, grad_z=grad_z, stats=stats)
print(
    "effects of all keys:", tuple(effects.shape), "(gradients, batch, positions, key/value heads)"
)

position, head = 20, 1
patched = k.clone()
patched[:, head, position] = k_corrupted[:, head, position]
z_patched, _ = ops.attention(q, patched, v)
by_hand = (grad_z[0] * (z_patched - z)).sum()
print(f"one of them: {effects[0, 0, position, head]:.6f}, by hand: {by_hand:.6f}")
torch.testing.assert_close(effects[0, 0, position, head], by_hand, rtol=1e-3, atol=1e-4)
