"""Launch configurations that are measured: candidates, the choice by a clock that the test holds, what is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hotloop.kernels import gpu
from hotloop.kernels.attention import config, triton, tune
from hotloop.kernels.attention.config import Tile

TILE = Tile(64, 64, 8, 2, 64, 64)
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of its own, and a GPU by name."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    tune.remembered.cache_clear()
    yield tmp_path
    tune.remembered.cache_clear()


@pytest.mark.parametrize("kernel", config.KERNELS)
def test_candidates_begin_with_the_default_and_are_the_same_each_time(kernel: str) -> None:
    found = tune.candidates(kernel, 90, 2, 128, False)
    assert found[0] == config.tile(kernel, 90, 2, 128, False)
    assert len(set(found)) == len(found) > 10
    assert found == tune.candidates(kernel, 90, 2, 128, False)
    assert {tile.BLOCK_D for tile in found} == {128}


def test_the_fastest_that_fits_is_taken() -> None:
    tiles = tune.candidates("forward", 90, 2, 64, False)
    times = {tile: 10.0 - i % 3 for i, tile in enumerate(tiles)}
    ran: list[Tile] = []

    def timer(call: Any) -> float:
        call()
        if ran[-1] == tiles[2]:
            raise RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 232448")
        return times[ran[-1]]

    assert tune.fastest(tiles, ran.append, timer) == (tiles[5], 8.0, 10.0)
    assert ran == tiles
    times = dict.fromkeys(tiles, 9.9) | {tiles[0]: 10.0}
    assert tune.fastest(tiles, ran.append, timer) == (tiles[0], 10.0, 10.0), "1% is no reason to leave the default"

    def broken(call: Any) -> float:
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        tune.fastest(tiles, ran.append, broken)


def test_each_kernel_is_measured_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is launched while a kernel's candidates are timed, and with which tile."""
    monkeypatch.setattr(gpu, "arch_of", lambda device: 90)
    launched: list[tuple[str, Any]] = []

    def note(on: Any, kernel: Any, grid: Any, arguments: dict[str, Any]) -> None:
        launched.append((kernel.__name__, arguments.get("BLOCK_M")))

    def timer(call: Any) -> float:
        call()
        return 1.0 if launched[-1][1] == 32 else 2.0

    pytest.importorskip("triton", reason="needs triton")
    monkeypatch.setattr(triton, "run", note)
    results = list(tune.tune(torch.device("cpu"), torch.bfloat16, 64, timer, shape=(1, 64, 2, 1)))
    assert [key for key, *_ in results] == [f"{name}, 16 bits, head_dim 64" for name in config.KERNELS]
    assert all(tile.BLOCK_M == 32 and (time, before) == (1.0, 2.0) for _, tile, time, before in results)
    names = [name for name, _ in launched]
    assert names[0] == "forward_kernel"
    assert set(names) == {"forward_kernel", "dkdv_kernel", "dq_kernel", "delta_kernel"}


def test_what_is_remembered_is_used(cache: Path) -> None:
    default = config.tile("forward", 90, 2, 64, False)
    assert tune.tile("forward", CUDA, 90, 2, 64, False) == default
    path = tune.path_of(CUDA)
    assert path.parent == cache / "hotloop" / "tuned"
    assert path.name.startswith("attention-NVIDIA-H100-80GB-HBM3-triton-")
    key = tune.key_of("forward", 2, 64, False)
    tune.remember(path, {key: TILE})
    tune.remember(path, {"another": TILE})
    assert set(json.loads(path.read_text())) == {key, "another"}
    assert tune.tile("forward", CUDA, 90, 2, 48, False) == TILE
    for other in (("forward", CUDA, 90, 2, 128, False), ("dq", CUDA, 90, 2, 64, False)):
        assert tune.tile(*other) == config.tile(other[0], *other[2:])
    assert tune.tile("forward", CUDA, 90, 2, 64, True) == config.tile("forward", 90, 2, 64, True)
    assert tune.tile("forward", torch.device("cpu"), 90, 2, 64, False) == default
    assert list(path.parent.iterdir()) == [path], "nothing is left beside it"


@pytest.mark.parametrize("text", ["{", "[]", '{"forward, 16 bits, head_dim 64": {"BLOCK_M": 64}}'])
def test_a_file_of_another_form_is_an_error_that_names_it(text: str) -> None:
    path = tune.path_of(CUDA)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(RuntimeError, match="is no file of `hotloop tune`"):
        tune.tile("forward", CUDA, 90, 2, 64, False)
