"""Triton kernels of the ops, one module per op; installed as atp_fast.kernels. Reached through atp_fast.ops."""
