"""CUDA C++ to PTX and machine code by nvcc, kept by content in the user's cache folder."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from hotloop.emulator.errors import EmulatorError
from hotloop.emulator.module import Module

HOW_TO_GET_NVCC = (
    "no nvcc was found on PATH, in CUDA_HOME or CUDA_PATH, or in the nvidia-cuda-nvcc package; "
    "`pip install 'hotloop[test]'` brings one, or put a CUDA toolkit's bin folder on PATH"
)


def module_from_cuda(path: str | Path, arch: str = "sm_80", **options: Any) -> Module:
    """A `.cu` file as a module; `options` as for `compile_ptx`. See `Module.from_cuda`."""
    return Module(compile_ptx(path, arch, **options), name=Path(path).name)


Defines = Sequence[str] | Mapping[str, object]


def compile_ptx(
    path: str | Path,
    arch: str = "sm_80",
    *,
    include_dirs: Sequence[str | Path] = (),
    defines: Defines = (),
    options: Sequence[str] = (),
) -> str:
    """The PTX of a `.cu` file for `arch` ("sm_80", "sm_90a", ...), with line information.

    `defines` are "NAME" or "NAME=value", or a mapping; `options` go to nvcc as they are ("-fmad=false").
    """
    return build("ptx", path, arch, include_dirs, defines, options).decode()


def compile_cubin(
    path: str | Path,
    arch: str = "sm_80",
    *,
    include_dirs: Sequence[str | Path] = (),
    defines: Defines = (),
    options: Sequence[str] = (),
) -> bytes:
    """The machine code of a `.cu` file; arguments as for `compile_ptx`."""
    return build("cubin", path, arch, include_dirs, defines, options)


def build(
    product: Literal["ptx", "cubin"],
    path: str | Path,
    arch: str,
    include_dirs: Sequence[str | Path],
    defines: Defines,
    options: Sequence[str],
) -> bytes:
    """What nvcc makes, or what the cache kept of it.

    A hit needs the same source, path (the line information holds it), flags, nvcc, and the same content of every header
    that the compilation read: their hashes lie beside the product.
    """
    source = Path(path).resolve()
    if not source.is_file():
        raise EmulatorError(f"{path}: no such file; expected CUDA C++ source")
    if isinstance(defines, Mapping):
        defines = [f"{name}={value}" for name, value in defines.items()]
    nvcc = find_nvcc()
    flags = [f"-{product}", "-lineinfo", "-std=c++17", f"-arch={arch}", *options]
    flags += [f"-I{Path(folder).resolve()}" for folder in include_dirs]
    flags += [f"-D{name}" for name in defines]

    key = digest(json.dumps([version(nvcc), str(source), digest(source.read_bytes()), flags]).encode())
    entry = cache_folder() / f"{source.stem}-{arch}-{key[:32]}.json"
    kept = read_entry(entry)
    if kept is None:
        kept = run_nvcc(nvcc, source, flags)
        write_entry(entry, kept)
    return base64.b64decode(kept["product"])


def run_nvcc(nvcc: str, source: Path, flags: Sequence[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out, rule = Path(folder, "out"), Path(folder, "rule")
        command = [nvcc, *flags, "-MD", "-MF", str(rule), "-o", str(out), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise EmulatorError(f"nvcc failed:\n$ {' '.join(command)}\n{done.stderr.strip() or done.stdout.strip()}")
        read = prerequisites(rule.read_text(encoding="utf-8"))
        headers = {name: digest(Path(name).read_bytes()) for name in read if Path(name).resolve() != source}
        return {"product": base64.b64encode(out.read_bytes()).decode(), "headers": headers}


def prerequisites(rule: str) -> list[str]:
    """The files of a make rule `target : file file \\`, in which a space inside a name is written with a backslash."""
    files = rule.split(": ", 1)[1].replace("\\\n", " ")
    return [name.replace("\\ ", " ") for name in re.findall(r"(?:\\.|\S)+", files)]


def read_entry(entry: Path) -> dict[str, Any] | None:
    """What was kept, if it is whole and every header still is what it was."""
    try:
        kept = json.loads(entry.read_text(encoding="utf-8"))
        fresh = all(digest(Path(name).read_bytes()) == known for name, known in kept["headers"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kept if fresh else None


def write_entry(entry: Path, kept: Mapping[str, Any]) -> None:
    """Written aside and renamed: another process that compiles the same file sees all of it or nothing."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=entry.parent, suffix=".part")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(kept, file)
    os.replace(aside, entry)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hotloop" / "ptx"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def find_nvcc() -> str:
    """On PATH, then in a toolkit named by the environment, then in the nvidia-cuda-nvcc package."""
    toolkits = [Path(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [None, *map(str, toolkits)]  # None: PATH
    found = next(filter(None, (shutil.which("nvcc", path=folder) for folder in folders)), None) or packaged_nvcc()
    if found is None:
        raise EmulatorError(HOW_TO_GET_NVCC)
    return found


def packaged_nvcc() -> str | None:
    from importlib.metadata import PackageNotFoundError, files

    try:
        inside = files("nvidia-cuda-nvcc") or []
    except PackageNotFoundError:
        return None
    return next((str(file.locate()) for file in inside if file.name == "nvcc"), None)


@functools.cache
def version(nvcc: str) -> str:
    return subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout


def plain_name(entry: str) -> str:
    """The function's own name in a mangled one: `axpy` of `_Z4axpyPfi`, `_ZN7hotloop4axpyEPfi`, `_Z4axpyIfEvPT_i`."""
    if not entry.startswith("_Z"):
        return entry
    nested = entry.startswith("_ZN")
    rest, name = entry[2 + nested :], entry
    while found := re.match(r"L?(\d+)", rest):
        end = found.end() + int(found[1])
        rest, name = rest[end:], rest[found.end() : end]
        if not nested:
            break
    return name
