"""Packages under hotloop.* from top-level folders, and the compiled extension hotloop.kernels._C.

The extension includes no torch header, so one build serves every torch version. Without a C++ compiler (or where the
build fails) the package still installs; `hotloop doctor` then says that the `cpu` backends are missing.

CUDA code is compiled where nvcc and a GPU are, for that GPU. The environment variable HOTLOOP_BUILD_CUDA decides
otherwise: "all" (sm_80, sm_90a, sm_100a, sm_120 and PTX for what comes), "none", or a list such as "80,90a".
"""

import os
import re
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]
ALL_ARCHITECTURES = ["80", "90a", "100a", "120"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-lineinfo", "-Xcompiler", "-fPIC", "-Icsrc"]
# The optimizers promise the same bits on every backend: nothing is contracted.
EXACT = ["-fmad=false"]


def find_nvcc():
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return next(filter(None, (shutil.which("nvcc", path=p) for p in (None, *(f"{home}/bin" for home in homes)))), None)


def cuda_architectures():
    asked = os.environ.get("HOTLOOP_BUILD_CUDA", "")
    if asked == "all":
        return ALL_ARCHITECTURES
    if asked == "none":
        return []
    if asked:
        if not re.fullmatch(r"\d+a?(,\d+a?)*", asked):
            raise SystemExit(f"HOTLOOP_BUILD_CUDA={asked!r}: expected 'all', 'none' or a list such as '80,90a'")
        return asked.split(",")
    if find_nvcc() is None or shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    capabilities = {line.replace(".", "") for line in found if re.fullmatch(r"\d+\.\d+", line)}
    return sorted(c + "a" if c in ("90", "100") else c for c in capabilities)


class BuildExt(build_ext):
    def build_extension(self, extension):
        self.force = True  # HOTLOOP_BUILD_CUDA may have changed, which no time stamp tells
        architectures = cuda_architectures()
        if architectures:
            nvcc = find_nvcc()
            if nvcc is None:
                raise SystemExit("HOTLOOP_BUILD_CUDA asks for CUDA, but nvcc is neither on PATH nor in CUDA_HOME")
            extension.extra_objects += [
                self.device_object(nvcc, file, architectures) for file in extension.cuda_sources
            ]
            extension.define_macros.append(("HOTLOOP_CUDA", f'"{",".join(architectures)}"'))
            extension.library_dirs += library_folders(nvcc)
            extension.libraries += ["cudart_static", "dl", "rt", "pthread"]
        super().build_extension(extension)

    def device_object(self, nvcc, file, architectures):
        out = Path(self.build_temp, file).with_suffix(".cu.o")
        out.parent.mkdir(parents=True, exist_ok=True)
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
        plain = [a for a in architectures if a.isdigit()]
        if plain:
            newest = max(plain, key=int)
            codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
        exact = EXACT if "optimizers" in Path(file).parts else []
        command = [nvcc, *NVCC_FLAGS, *exact, *codes, "-c", file, "-o", str(out)]
        if subprocess.run(command, check=False).returncode != 0:
            raise SystemExit(f"{' '.join(command)} failed; HOTLOOP_BUILD_CUDA=none builds without CUDA")
        return str(out)


def library_folders(nvcc):
    """Where this nvcc would look for libcudart_static."""
    command = [nvcc, "--dryrun", "-o", "a.out", "a.o"]
    plan = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    return re.findall(r'"-L([^"]+)"', plan)


extension = Pybind11Extension(
    "hotloop.kernels._C",
    sources=sorted(glob("csrc/**/*.cpp", recursive=True)),
    depends=[file for kind in ("h", "inl", "cu", "cuh") for file in glob(f"csrc/**/*.{kind}", recursive=True)],
    include_dirs=["csrc"],
    cxx_std=17,
    # -ffp-contract=off: the optimizers promise the same bits on every backend.
    # -fno-math-errno and -fno-trapping-math let loops with roots and conditions be vectorised and change no result.
    # -Wno-psabi: vectors wider than the baseline's are never arguments of a function that is not inlined.
    extra_compile_args=["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", *OPENMP],
    extra_link_args=OPENMP,
    optional=True,
)
extension.cuda_sources = sorted(glob("csrc/**/*.cu", recursive=True))

setup(
    packages=["hotloop." + name for name in find_packages(include=["kernels*", "engine*", "emulator*"])],
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExt},
)
