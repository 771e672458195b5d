"""`Module.from_cuda`: nvcc is found, its PTX kept by content, its errors shown."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest
import torch

from hotloop.emulator import EmulatorError, Module, cuda

SOURCE = """
#include "scale.cuh"
namespace inner {
__global__ void scale(const float* x, float* y, int n) { int i = threadIdx.x; if (i < n) y[i] = x[i] * SCALE; }
}
template <typename T> __global__ void fill(T* y, T value) { y[threadIdx.x] = value; }
template __global__ void fill<int>(int*, int);
extern "C" __global__ void plain(int* y) { y[threadIdx.x] = threadIdx.x; }
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A .cu file with a header, an empty cache, and an nvcc on PATH that writes a line per call to `calls`."""
    real = cuda.find_nvcc()
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(
        f'#!/bin/sh\ncase "$*" in *--version*) ;; *) echo call >> {tmp_path}/calls;; esac\nexec {real} "$@"\n'
    )
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "include dir").mkdir()
    (tmp_path / "include dir" / "scale.cuh").write_text("#ifndef SCALE\n#define SCALE 2\n#endif\n")
    (tmp_path / "scale.cu").write_text(SOURCE)
    return tmp_path / "scale.cu"


def calls(source: Path) -> int:
    log = source.parent / "calls"
    return len(log.read_text().splitlines()) if log.exists() else 0


def scaled(source: Path, **options: object) -> float:
    x, y = torch.ones(4), torch.zeros(4)
    module = Module.from_cuda(source, include_dirs=[source.parent / "include dir"], **options)
    module.launch("scale", (1,), (32,), 0, [x, y, 4])
    return y[3].item()


def test_the_cache_follows_content(source: Path):
    assert scaled(source) == 2
    assert scaled(source) == 2
    os.utime(source)
    assert scaled(source) == 2
    assert calls(source) == 1, "same content: one call of nvcc"

    assert scaled(source, defines=["SCALE=3"]) == scaled(source, defines={"SCALE": 3}) == 3
    assert calls(source) == 2, "another macro, spelt in two ways"

    header = source.parent / "include dir" / "scale.cuh"
    header.write_text(header.read_text().replace("SCALE 2", "SCALE 5"))
    assert scaled(source) == 5
    assert calls(source) == 3, "another header"

    assert ".target sm_90a" in cuda.compile_ptx(source, "sm_90a", include_dirs=[header.parent])
    assert calls(source) == 4, "another architecture"

    source.write_text(source.read_text() + "\n// \n")
    assert scaled(source) == 5
    assert calls(source) == 5, "another source"


def test_a_damaged_cache_is_made_again(source: Path):
    assert scaled(source) == 2
    (entry,) = cuda.cache_folder().iterdir()
    entry.write_text(entry.read_text()[:1000])
    assert scaled(source) == 2
    assert calls(source) == 2
    assert [path.suffix for path in cuda.cache_folder().iterdir()] == [".json"]


def test_kernels_are_launched_by_their_plain_names(source: Path):
    module = Module.from_cuda(source, include_dirs=[source.parent / "include dir"])
    y = torch.zeros(32, dtype=torch.int32)
    module.launch("plain", (1,), (32,), 0, [y])
    assert y.tolist() == list(range(32))
    module.launch("fill", (1,), (32,), 0, [y, 7])
    assert y.tolist() == [7] * 32


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ("plain", "plain"),
        ("_Z4axpyPfi", "axpy"),
        ("_ZN7hotloop4axpyEPfi", "axpy"),
        ("_Z4axpyIfEvPT_i", "axpy"),
        ("_ZL4axpyPf", "axpy"),
    ],
)
def test_plain_names(entry: str, name: str):
    assert cuda.plain_name(entry) == name


def test_nvcc_of_the_wheel_serves_where_no_toolkit_is(source: Path, monkeypatch: pytest.MonkeyPatch):
    folders = [f for f in os.environ["PATH"].split(os.pathsep) if not shutil.which("nvcc", path=f)]
    monkeypatch.setenv("PATH", os.pathsep.join(folders))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    packaged = cuda.packaged_nvcc()
    assert packaged is not None
    assert cuda.find_nvcc() == packaged
    assert scaled(source) == 2
    assert calls(source) == 0

    monkeypatch.setenv("CUDA_HOME", str(source.parent))
    assert cuda.find_nvcc() == str(source.parent / "bin" / "nvcc")
    monkeypatch.delenv("CUDA_HOME")

    monkeypatch.setattr(cuda, "packaged_nvcc", lambda: None)
    with pytest.raises(EmulatorError, match="no nvcc was found on PATH, in CUDA_HOME"):
        scaled(source)


def test_what_nvcc_says_is_shown(source: Path):
    source.write_text("__global__ void broken() { undeclared = 1; }")
    with pytest.raises(EmulatorError, match='identifier "undeclared" is undefined'):
        cuda.compile_ptx(source)
    with pytest.raises(EmulatorError, match=r"none\.cu: no such file"):
        cuda.compile_ptx(source.with_name("none.cu"))


def test_make_rules_with_spaces_and_many_lines():
    assert cuda.prerequisites("out.o : a.cu \\\n   /inc/b.h \\\n  /with\\ space/c.h\n") == [
        "a.cu",
        "/inc/b.h",
        "/with space/c.h",
    ]
