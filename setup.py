"""Packages under hotloop.* from top-level folders, and the compiled extension hotloop.kernels._C.

The extension includes no torch header, so one build serves every torch version. Without a C++ compiler (or where the
build fails) the package still installs; `hotloop doctor` then says that the `cpu` backends are missing.
"""

import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]

extension = Pybind11Extension(
    "hotloop.kernels._C",
    sources=["csrc/bindings.cpp", *sorted(str(path) for path in Path("csrc").glob("*/*.cpp"))],
    depends=[str(path) for suffix in ("h", "inc") for path in Path("csrc").glob(f"*/*.{suffix}")],
    include_dirs=["csrc"],
    cxx_std=17,
    # -ffp-contract=off: the optimizers promise the same bits on every backend. The two others let loops with roots and
    # conditions be vectorised and change no result: errno is not set, floating-point exceptions are not trapped.
    extra_compile_args=["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", *OPENMP],
    extra_link_args=OPENMP,
    optional=True,
)

setup(
    packages=["hotloop." + name for name in find_packages(include=["kernels*", "engine*", "emulator*"])],
    ext_modules=[extension],
    cmdclass={"build_ext": build_ext},
)
