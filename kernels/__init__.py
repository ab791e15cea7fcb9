"""Triton kernels, installed as atp_fast.kernels; importing this package alone does not import triton."""
