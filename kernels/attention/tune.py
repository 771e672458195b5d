"""Launch configurations measured on this GPU: `hotloop tune` measures and writes them, the backend `triton` reads them.

A file for each model of GPU and version of Triton, in the user's cache folder. It is read when a process first launches
a kernel; nothing is measured then. All candidates are deterministic, and give the same bits where their tiles of keys
and rows are the same; a change of tiles changes rounding.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hotloop.kernels import gpu
from hotloop.kernels.attention import config
from hotloop.kernels.attention.config import Tile
from hotloop.kernels.attention.options import Call, Options

Timer = Callable[[Callable[[], Any]], float]
"""Milliseconds of a call."""

BLOCKS, WARPS, STAGES = (32, 64, 128), (4, 8), (1, 2, 3)
SHAPE = (4, 4096, 16, 8)
"""B, T, Hq, Hk that are measured, causal."""
HEAD_DIMS = (64, 128, 256)

_trial: dict[str, Tile] = {}


def tile(kernel: str, device: torch.device, arch: int, itemsize: int, D: int, is_rich: bool) -> Tile:
    """What was measured on this device, or else what config.py has."""
    key = key_of(kernel, itemsize, D, is_rich)
    if kernel in _trial:
        return _trial[kernel]
    return remembered(device).get(key) or config.tile(kernel, arch, itemsize, D, is_rich)


def key_of(kernel: str, itemsize: int, D: int, is_rich: bool) -> str:
    """All head_dims of a tile's width have one entry."""
    return f"{kernel}, {8 * itemsize} bits, head_dim {config.block_d(D)}" + (", rich" if is_rich else "")


def candidates(kernel: str, arch: int, itemsize: int, D: int, is_rich: bool) -> list[Tile]:
    """That of config.py first, then its neighbours: each size, warps and stages another."""
    first = config.tile(kernel, arch, itemsize, D, is_rich)
    found = [first]
    for BLOCK_M in BLOCKS:
        for BLOCK_N in BLOCKS:
            for num_warps in WARPS:
                for num_stages in STAGES:
                    other = replace(first, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=num_warps, num_stages=num_stages)
                    if other != first and 0.25 <= other.BLOCK_M * other.BLOCK_N / (first.BLOCK_M * first.BLOCK_N) <= 2:
                        found.append(other)
    return found


# --- what is remembered ---


def path_of(device: torch.device) -> Path:
    name = torch.cuda.get_device_name(device)
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hotloop" / "tuned"
    return folder / f"attention-{re.sub('[^A-Za-z0-9]+', '-', name)}-triton-{_triton_version()}.json"


def _triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


@lru_cache(maxsize=64)
def remembered(device: torch.device) -> dict[str, Tile]:
    """Empty where nothing was measured. A file of another form is an error that names it."""
    if device.type != "cuda":
        return {}
    path = path_of(device)
    if not path.exists():
        return {}
    try:
        return {key: Tile(**fields) for key, fields in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise RuntimeError(f"{path} is no file of `hotloop tune`: {error}; remove it, or tune again") from error


def remember(path: Path, tiles: dict[str, Tile]) -> None:
    """Written aside and renamed. Entries of other keys stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    entries = before | {key: asdict(tile) for key, tile in tiles.items()}
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(entries, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    remembered.cache_clear()


# --- measuring ---


def fastest(tiles: list[Tile], run: Callable[[Tile], Any], timer: Timer) -> tuple[Tile, float, float]:
    """(tile, its milliseconds, those of the first one). One must beat the first by 2%, or that one stays."""
    times: dict[Tile, float] = {}
    for candidate in tiles:
        try:
            times[candidate] = timer(partial(run, candidate))
        except Exception as failure:
            if candidate == tiles[0] or "out of resource" not in str(failure):  # Triton's words: it does not fit
                raise
    best, first = min(times, key=lambda tile: times[tile]), times[tiles[0]]
    best = best if times[best] < 0.98 * first else tiles[0]
    return best, times[best], first


@contextmanager
def trying(kernel: str, tile: Tile) -> Iterator[None]:
    _trial[kernel] = tile
    try:
        yield
    finally:
        del _trial[kernel]


def tune(
    device: torch.device, dtype: torch.dtype, D: int, timer: Timer, shape: tuple[int, int, int, int] = SHAPE
) -> Iterator[tuple[str, Tile, float, float]]:
    """(key, tile, its milliseconds, those of the one in config.py) for each kernel, causal and plain."""
    from hotloop.kernels.attention import triton

    B, T, Hq, Hk = shape
    q, do = (torch.randn(B, T, Hq, D, device=device, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(B, T, Hk, D, device=device, dtype=dtype) for _ in range(2))
    attention = Call(q, k, v, None, None, None, None, None, Options(T, T, -1, 0, D**-0.5, 0.0, 0.0))
    o, lse = triton.forward(attention)

    def gradients(*needs: bool) -> tuple[Tensor, ...]:
        return triton.backward(attention, o, lse, do, None, [*needs, False, False])

    calls = {
        "forward": lambda: triton.forward(attention),
        "dkdv": lambda: gradients(False, True, True),
        "dq": lambda: gradients(True, False, False),
    }
    for kernel, call in calls.items():

        def run(tile: Tile, kernel: str = kernel, call: Callable[[], Any] = call) -> None:
            with trying(kernel, tile):
                call()

        found = fastest(candidates(kernel, gpu.arch_of(device), dtype.itemsize, D, False), run, timer)
        yield key_of(kernel, dtype.itemsize, D, False), *found
