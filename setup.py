"""Packages under hotloop.* from top-level folders, and the compiled extension hotloop.kernels._C.

The extension includes no torch header, so one build serves every torch version. Without a C++ compiler (or where the
build fails) the package still installs; `hotloop doctor` then says that the `cpu` backends are missing.
"""

import sys

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]

extension = Pybind11Extension(
    "hotloop.kernels._C",
    sources=["csrc/bindings.cpp", "csrc/machine/machine_cpu.cpp"],
    include_dirs=["csrc"],
    cxx_std=17,
    # -ffp-contract=off: the optimizers promise the same bits on every backend.
    extra_compile_args=["-O3", "-ffp-contract=off", *OPENMP],
    extra_link_args=OPENMP,
    optional=True,
)

setup(
    packages=["hotloop." + name for name in find_packages(include=["kernels*", "engine*", "emulator*"])],
    ext_modules=[extension],
    cmdclass={"build_ext": build_ext},
)
