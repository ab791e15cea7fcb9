"""What is installed: versions, how the extension was built, which backends work. It opens every bug report."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform

from atp_fast._version import __version__

_PACKAGES = (
    "torch",
    "transformers",
    "triton",
    "numpy",
    "safetensors",
    "accelerate",
    "pandas",
    "plotly",
    "scipy",
)


def build_info() -> dict[str, str]:
    """Name -> value, in the order to print: versions, machine, extension, one entry per backend.

    "backend cpp" and its siblings say "available" or why not; "extension" how the CPU kernels were built.
    """
    from atp_fast.ops import availability

    info = {
        "atp_fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    info.update({name: _version(name) for name in _PACKAGES})
    info.update(_torch())
    info["extension"] = _extension()
    info.update({f"backend {name}": state for name, state in availability().items()})
    return info


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _torch() -> dict[str, str]:
    import torch

    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"torch threads": str(torch.get_num_threads()), "cuda device": cuda}


def _extension() -> str:
    """Its version and the instruction sets of this machine that it has kernels for, the one in use first."""
    try:
        extension = importlib.import_module("atp_fast._C")
    except ImportError as error:
        return f"not available: {error}"
    return f"{extension.__version__}, instruction sets {', '.join(extension.instruction_sets())}"
