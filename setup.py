"""Builds atp_fast._C from csrc/ and installs kernels/ as atp_fast.kernels; the rest is in pyproject.toml."""

import os
import subprocess
import sys
import tempfile
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

os.chdir(Path(__file__).resolve().parent)
VERSION_FILE = "atp_fast/_version.py"
DEPENDS = [*sorted(glob("csrc/*.h")), VERSION_FILE, "setup.py"]
# without aligned loops the same product is up to 7 % slower, by where the linker happens to put it
FLAGS = (
    ["/O2", "/W4"]
    if sys.platform == "win32"
    else ["-O3", "-falign-loops=64", "-fvisibility=hidden", "-Wall", "-Wextra"]
)
OPENMP_PROBE = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"


class BuildExt(build_ext):
    """Passes the version to the extension, and OpenMP where the compiler and its linker have it."""

    def build_extensions(self):
        openmp = ["-fopenmp"] if self.compiler.compiler_type == "unix" and self.has_openmp() else []
        for extension in self.extensions:
            extension.define_macros.append(
                ("ATP_FAST_VERSION", f'"{self.distribution.get_version()}"')
            )
            extension.extra_compile_args += openmp
            extension.extra_link_args += openmp
        super().build_extensions()

    def has_openmp(self):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(OPENMP_PROBE)
            command = [
                *self.compiler.compiler_cxx,
                "-fopenmp",
                str(source),
                "-o",
                f"{folder}/probe",
            ]
            try:
                return subprocess.run(command, capture_output=True).returncode == 0
            except OSError:
                return False


def stale(obj, src):
    """Whether an object file is older than its source, a header, the version or these flags."""
    if not os.path.exists(obj):
        return True
    return os.path.getmtime(obj) < max(os.path.getmtime(path) for path in (src, *DEPENDS))


extension = Pybind11Extension(
    "atp_fast._C",
    sorted(glob("csrc/*.cpp")),
    depends=DEPENDS,
    cxx_std=17,
    extra_compile_args=FLAGS,
)

with ParallelCompile(needs_recompile=stale):
    setup(
        packages=[*find_packages(include=["atp_fast*"]), "atp_fast.kernels"],
        package_dir={"atp_fast.kernels": "kernels"},
        ext_modules=[extension],
        cmdclass={"build_ext": BuildExt},
    )
