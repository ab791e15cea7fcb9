"""The package as installed: one version, imports without side effects, and what is missing is said."""

import subprocess
import sys

import pytest

import atp_fast
from atp_fast import _C, build_info


def run_fresh(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_extension_and_package_have_one_version():
    assert _C.__version__ == atp_fast.__version__


def test_installed_metadata_has_the_same_version():
    import importlib.metadata

    assert importlib.metadata.version("atp_fast") == atp_fast.__version__


def test_kernels_are_installed_inside_the_package():
    out = run_fresh(
        "import atp_fast.kernels, sys; print(atp_fast.kernels.__name__, 'kernels' in sys.modules)"
    )
    assert out.split() == ["atp_fast.kernels", "False"]


@pytest.mark.parametrize("module", ["atp_fast", "atp_fast.cli"])
def test_import_alone_loads_no_heavy_package(module):
    out = run_fresh(
        f"import {module}, sys; print([m for m in ('torch', 'transformers', 'triton') if m in sys.modules])"
    )
    assert out.strip() == "[]"


def test_import_leaves_global_state_alone():
    """What the packages below do at import is their business, so they come first."""
    out = run_fresh(
        "import os, random, warnings, rich.table, torch, transformers.modeling_utils, typer\n"
        "def state():\n"
        "    return (dict(os.environ), random.getstate(), torch.get_rng_state().tolist(), torch.get_num_threads(),\n"
        "            torch.get_default_dtype(), torch.is_grad_enabled(), list(warnings.filters))\n"
        "before = state()\n"
        "from atp_fast import Engine, PromptPairs, metrics, ops, tasks\n"
        "import atp_fast.cli\n"
        "print(state() == before, torch.cuda.is_initialized())\n"
    )
    assert out.split() == ["True", "False"]


@pytest.mark.parametrize("name", atp_fast.__all__)
def test_public_names_resolve(name):
    assert getattr(atp_fast, name) is not None
    assert name in dir(atp_fast)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'atp_fast' has no attribute 'engines'"):
        _ = atp_fast.engines


@pytest.mark.parametrize(("missing", "backend"), [("triton", "triton"), ("atp_fast._C", "cpp")])
def test_without_a_backend_the_rest_works_and_the_reason_is_said(missing, backend):
    """A process without triton, and one without the extension: auto runs, an explicit request says what is missing."""
    out = run_fresh(
        "import sys\n"
        f"sys.modules[{missing!r}] = None\n"
        "import torch\n"
        "from atp_fast import ops\n"
        "x = torch.ones(2, 3)\n"
        "print(ops.node_effects(x, x[None]).tolist())\n"
        "try:\n"
        f"    ops.node_effects(x, x[None], backend={backend!r})\n"
        "except ImportError as error:\n"
        "    print(error)\n"
        f"print(ops.availability()[{backend!r}])\n"
    )
    result, error, availability = out.splitlines()
    assert result == "[[3.0, 3.0]]"
    assert error.startswith(f"backend '{backend}' is not available")
    assert missing in error
    assert missing in availability


def test_build_info_is_complete_text():
    info = build_info()
    assert info["atp_fast"] == atp_fast.__version__
    assert {"python", "torch", "transformers", "triton", "extension"} <= set(info)
    assert [name for name in info if name.startswith("backend ")] == [
        "backend reference",
        "backend cpp",
        "backend triton",
    ]
    assert info["backend reference"] == info["backend cpp"] == "available"
    assert "portable" in info["extension"]
    assert all(isinstance(value, str) and value for value in info.values())
