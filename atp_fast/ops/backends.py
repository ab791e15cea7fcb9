"""Which implementation of the ops runs: "reference" (PyTorch), "cpp" (CPU), "triton" (CUDA)."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import torch

BACKENDS = ("auto", "reference", "cpp", "triton")
_MODULES = {
    "reference": "atp_fast.ops.reference",
    "cpp": "atp_fast.ops.cpp",
    "triton": "atp_fast.ops.triton",
}
_DEVICES = {"cpp": "cpu", "triton": "cuda"}
_loaded: dict[str, ModuleType] = {}
_failures: dict[str, ImportError] = {}


def load(name: str) -> ModuleType:
    """The module of a backend; the ImportError that kept it from loading is kept and raised again."""
    if name in _failures:
        raise ImportError(f"backend {name!r} is not available: {_failures[name]}") from _failures[
            name
        ]
    if name not in _loaded:
        try:
            _loaded[name] = importlib.import_module(_MODULES[name])
        except ImportError as error:
            _failures[name] = error
            return load(name)
    return _loaded[name]


def availability() -> dict[str, str]:
    """For every backend "available", or why it is not."""
    report = {}
    for name in _MODULES:
        try:
            load(name)
            report[name] = "available"
        except ImportError as error:
            report[name] = str(error)
    return report


def check_backend(backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be among {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def interpreted(module: ModuleType) -> bool:
    """Whether the Triton kernels run in Triton's interpreter, which takes CPU tensors."""
    return bool(getattr(module, "INTERPRETED", False))


def backend_for(x: torch.Tensor, backend: str = "auto") -> str:
    """The backend that a call on x uses: an explicit one or an error, never another one instead."""
    check_backend(backend)
    if backend == "auto":
        name = next((b for b, device in _DEVICES.items() if device == x.device.type), "reference")
        try:
            load(name)
        except ImportError:
            return "reference"
        return name
    module = load(backend)
    wanted = _DEVICES.get(backend, x.device.type)
    if x.device.type != wanted and not (interpreted(module) and x.device.type == "cpu"):
        kind = "CUDA" if wanted == "cuda" else wanted.upper()
        raise ValueError(f"backend {backend!r} needs {kind} tensors, got {x.device.type}")
    return backend
