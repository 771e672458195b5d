"""Packages under hotloop.* from top-level folders, and the compiled extension hotloop.kernels._C.

The extension includes no torch header, so one build serves every torch version. Without a C++ compiler (or where the
build fails) the package still installs; `hotloop doctor` then says that the `cpu` backends are missing.
"""

import sys
from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]

extension = Pybind11Extension(
    "hotloop.kernels._C",
    sources=sorted(glob("csrc/**/*.cpp", recursive=True)),
    depends=glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.inl", recursive=True),
    include_dirs=["csrc"],
    cxx_std=17,
    # -ffp-contract=off: the optimizers promise the same bits on every backend.
    # -Wno-psabi: vectors wider than the baseline's are never arguments of a function that is not inlined.
    extra_compile_args=["-O3", "-ffp-contract=off", "-Wno-psabi", *OPENMP],
    extra_link_args=OPENMP,
    optional=True,
)

setup(
    packages=["hotloop." + name for name in find_packages(include=["kernels*", "engine*", "emulator*"])],
    ext_modules=[extension],
    cmdclass={"build_ext": build_ext},
)
