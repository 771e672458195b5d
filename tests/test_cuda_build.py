"""The extension with CUDA code for every target builds without a GPU, and imports on a machine without a driver."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def wheel(folder: Path, asked: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "-w",
        folder,
    ]
    environment = {**os.environ, "HOTLOOP_BUILD_CUDA": asked}
    return subprocess.run([*command, str(ROOT)], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_target_builds_and_imports_without_a_gpu(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    done = wheel(tmp_path, "all")
    assert done.returncode == 0, done.stderr[-2000:]
    (built,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as file:
        file.extractall(tmp_path)
    (library,) = (tmp_path / "hotloop" / "kernels").glob("_C*.so")
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("_C", {str(library)!r})
c = importlib.util.module_from_spec(spec)
spec.loader.exec_module(c)
print(c.cuda_architectures(), hasattr(c, "cuda_launch"))
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.stdout.split() == ["80,90a,100a,120", "True"], found.stderr


@pytest.mark.slow
def test_an_unknown_target_is_refused(tmp_path: Path) -> None:
    done = wheel(tmp_path, "sm_80")
    assert done.returncode != 0
    assert "HOTLOOP_BUILD_CUDA='sm_80': expected 'all', 'none' or a list such as '80,90a'" in done.stdout + done.stderr
