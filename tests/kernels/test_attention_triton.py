"""Backend `triton` of attention without a GPU: every option in Triton's interpreter, launch configurations, refusals.

The interpreter is wrong for bf16 products (Triton 3.9): that is for test_attention_emulated.py. It is chosen when
Triton is first imported: this file runs itself in a process that has TRITON_INTERPRET.
"""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hotloop.kernels import gpu
from hotloop.kernels.attention import attention, config, platform, triton
from hotloop.kernels.attention.cases import NAMES, Case, check, draw, run
from hotloop.kernels.attention.config import Tile
from hotloop.kernels.attention.options import Call
from hotloop.kernels.dispatch import BackendError, use_backend
from hotloop.kernels.testing import LAYOUTS

# --- in the interpreter ---

CASES = (
    Case(40, 40, D=64, right=0),
    Case(33, 70, Hq=6, Hk=2, D=24, B=2),
    Case(70, 45, Hq=4, Hk=2, D=8, B=2, right=0, layout="strided"),
    Case(61, 61, D=8, left=9, right=3, scale=-0.3, layout="padded"),
    Case(20, 61, Hq=3, D=8, left=2, right=0, scale=0.0, softcap=3.0, alibi=1, has_dlse=False),
    Case(50, 41, Hq=2, Hk=2, D=40, B=2, right=5, alibi=2, sinks=True, dropout_p=0.3),
    Case(3, 35, Hq=5, D=16, softcap=1.5, sinks=True, right=0, layout="transposed"),
    Case(90, 90, Hq=4, Hk=2, D=8, cu_q=(0, 3, 3, 50, 83, 83, 83), right=0, layout="offset"),
    Case(70, 60, D=8, B=1, alibi=2, sinks=True, dropout_p=0.2, softcap=2.0, left=20, right=1,
         cu_q=(0, 9, 12, 12, 66), cu_k=(0, 3, 3, 50, 60)),
    Case(70, 60, Hq=2, Hk=2, D=8, alibi=1, cu_q=(0, 0, 70), cu_k=(0, 10, 40), has_dlse=False),
    Case(5, 0, Hq=4, Hk=2, D=8, right=0, sinks=True, alibi=1),
    Case(0, 5, Hq=4, Hk=2, D=8, right=0, sinks=True, alibi=2),
    Case(0, 5, D=8, cu_q=(0, 0, 0), cu_k=(0, 5, 5)),
)  # fmt: skip
BLOCKS = ((32, 32), (16, 32), (64, 16))


def tile(blocks: tuple[int, int], D: int, parts: bool = False) -> Tile:
    """parts: half of head_dim (16 columns at least) in a program's result, 16 columns at a time elsewhere."""
    whole = config.block_d(D)
    return Tile(*blocks, 4, 2, max(16, whole // 2), 16) if parts and whole > 16 else Tile(*blocks, 4, 2, whole, whole)


class NoReads(TorchDispatchMode):
    """Raises where a value of a tensor is taken to the host."""

    FORBIDDEN = tuple(getattr(torch.ops.aten, name).default for name in ("_local_scalar_dense", "nonzero", "equal"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in self.FORBIDDEN, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


class Watched:
    """The backend, with outputs that begin as NaN, no reads on the host, and the kernels that it launched."""

    def __init__(self) -> None:
        self.launched: list[str] = []

    def note(self, on: Tensor, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        self.launched.append(kernel.__name__)
        kernel[grid](**arguments)

    def call(self, function: Any, *arguments: Any) -> Any:
        torch.use_deterministic_algorithms(True)  # fills what is allocated
        try:
            with NoReads(), patch.object(triton, "run", self.note):
                return function(*arguments)
        finally:
            torch.use_deterministic_algorithms(False)

    def forward(self, *arguments: Any) -> Any:
        return self.call(triton.forward, *arguments)

    def backward(self, *arguments: Any) -> Any:
        return self.call(triton.backward, *arguments)


def drawn_cases(count: int) -> list[Case]:
    choose = random.Random(0).choice
    found = []
    for _ in range(count):
        Hk, G = choose((1, 2)), choose((1, 2, 3, 8))
        case = Case(
            choose((1, 7, 31, 64, 65)), choose((1, 8, 33, 64, 77)), Hk * G, Hk, D=choose((8, 24, 32)),
            left=choose((-1, -1, 0, 13)), right=choose((-1, 0, 0, 6)), softcap=choose((0.0, 2.0)), alibi=choose((0, 1)),
            sinks=choose((False, True)), dropout_p=choose((0.0, 0.0, 0.5)), layout=choose(LAYOUTS),
        )  # fmt: skip
        found.append(case)
    return found


def interpret_cases() -> None:
    watched = Watched()
    for i, case in enumerate((*CASES, *drawn_cases(5))):
        with patch.object(config, "tile", lambda *_, i=i, D=case.D: tile(BLOCKS[i % 3], D, parts=i % 2 == 0)):
            check(watched, case, (torch.float32, torch.float16)[i % 4 == 3])


def interpret_sizes() -> None:
    """The sizes that tests/kernels/test_attention.py lists, causal and not, one head."""
    for Tq, Tk in ((1, 1), (113, 203), (203, 113), (128, 217), (108, 256), (1023, 64), (64, 1023)):
        with patch.object(config, "tile", lambda *_: tile((64, 64), 64)):
            check(triton, Case(Tq, Tk, Hq=1, D=64, right=0), torch.float16)
            check(triton, Case(Tq, Tk, Hq=1, D=64), torch.float32)


def interpret_extremes() -> None:
    """Scores of 1e3 and of 1e-4, all equal, and rows of which the sink takes all or nothing."""
    with patch.object(config, "tile", lambda *_: tile(BLOCKS[0], 8)):
        for size in (1e3, 1e-4, 0.0):
            check(triton, Case(40, 50, D=8, right=0), torch.float32, size=size, same=lambda c, x: run(platform, c, x))
        case = Case(40, 40, D=8, right=0, sinks=True)
        for sink in (-200.0, 200.0):
            x = replace(draw(case, torch.float32), sinks=torch.full((2,), sink))
            o, lse, *gradients = run(triton, case, x)
            assert all(t.isfinite().all() for t in (o, lse, *gradients)), sink
            assert (lse == 200.0).all() if sink > 0 else lse.abs().max() < 20


def interpret_needs() -> None:
    """A gradient alone has the bits that it has among all, costs its own kernels alone, and the others are empty."""
    case = Case(40, 40, D=8, right=0, alibi=1, sinks=True)
    x, expected = draw(case, torch.float32), {}
    call = x.call(case.options)
    delta, dkdv, dq = "delta_kernel", "dkdv_kernel", "dq_kernel"
    costs: tuple[list[str], ...] = ([delta, dkdv, dq], [delta, dq], [delta, dkdv], [dkdv], [delta, dq], [delta], [])
    with patch.object(config, "tile", lambda *_: tile(BLOCKS[0], 8)):
        o, lse = triton.forward(call)
        for which, kernels in zip((None, 0, 1, 2, 3, 4, 5), costs, strict=True):
            needs, watched = [which in (None, i) for i in range(5)], Watched()
            found = watched.backward(call, o, lse, x.do, x.dlse, needs)
            assert watched.launched == kernels, (which, watched.launched)
            if which is None:
                expected = dict(enumerate(found))
            for i, gradient in enumerate(found):
                assert torch.equal(gradient, expected[i] if needs[i] else torch.empty(0)), NAMES[2 + i]


def interpret_isolation() -> None:
    """A document that changes, to NaN too, leaves all others' bits; so do documents before it that move it."""
    lengths = [20, 0, 33, 7, 40]
    cu = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    case = Case(100, 100, D=8, right=0, cu_q=tuple(cu), has_dlse=False)
    clean = draw(case, torch.float32)
    with patch.object(config, "tile", lambda *_: tile(BLOCKS[0], 8)):
        expected = run(triton, case, clean)
        for changed, value in ((0, float("nan")), (2, float("inf")), (3, 1e4)):
            inside = slice(cu[changed], cu[changed + 1])
            others = torch.ones(100, dtype=torch.bool)
            others[inside] = False
            altered = clean.map(Tensor.clone)
            for tensor in (altered.q, altered.k, altered.v, altered.do):
                tensor[inside] = value
            found = run(triton, case, altered)
            assert not torch.equal(found[0][inside], expected[0][inside])
            for name, a, e in zip(NAMES[:5], found, expected, strict=False):
                a, e = (t.mT if name == "lse" else t for t in (a, e))
                assert torch.equal(a[others], e[others]), f"{name} of other documents, {changed} = {value}"
        moved = Case(60, 60, D=8, right=0, cu_q=(0, 20, 60), has_dlse=False)
        rows = torch.cat([torch.arange(0, 20), torch.arange(60, 100)])
        x = replace(
            clean.map(lambda t: t[rows] if t.dim() == 3 else t),
            cu_seqlens_q=torch.tensor(moved.cu_q, dtype=torch.int32),
            cu_seqlens_k=torch.tensor(moved.cu_q, dtype=torch.int32),
        )
        for name, a, e in zip(NAMES[:5], run(triton, moved, x), expected, strict=False):
            a, e = (t.mT if name == "lse" else t for t in (a, e))
            assert torch.equal(a, e[rows]), f"{name} where documents lie elsewhere"


INTERPRETED = {
    name.removeprefix("interpret_"): function for name, function in list(globals().items())
    if name.startswith("interpret_")
}  # fmt: skip


SLOW = {"sizes"}


@pytest.mark.parametrize(
    "what", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in INTERPRETED]
)
def test_in_the_interpreter(what: str) -> None:
    pytest.importorskip("triton", reason="needs triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, __file__, what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


# --- launch configurations ---

ARCHS = {
    80: "sm_80", 86: "sm_86", 87: "sm_80", 89: "sm_86", 90: "sm_90", 100: "sm_100", 103: "sm_100", 120: "sm_120",
    121: "sm_120",
}  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
def test_every_call_has_a_tile(arch: int) -> None:
    """Powers of two that tensor cores take; parts cover head_dim, and there are parts nowhere or in both places."""
    assert config.family(arch) == ARCHS[arch]
    for kernel, itemsize, D, is_rich in itertools.product(config.KERNELS, (2, 4), range(8, 513, 8), (False, True)):
        tile = config.tile(kernel, arch, itemsize, D, is_rich)
        assert all(size >= 16 and size & (size - 1) == 0 for size in asdict(tile).values() if size > 8), tile
        assert tile.num_warps in (4, 8)
        assert tile.DEPTH <= tile.BLOCK_D <= config.block_d(D)
        assert tile.DEPTH < D or tile.DEPTH == tile.BLOCK_D == config.block_d(D), (D, tile)


def test_block_d() -> None:
    assert [config.block_d(D) for D in (8, 16, 24, 64, 96, 136, 512)] == [16, 16, 32, 64, 128, 256, 512]


def test_sections_keep_keys_and_values_in_the_cache() -> None:
    """4 MiB of k and v a head in bf16: of sm_90's 50 MiB half; one head at least, and no more than there are."""
    assert config.section(90, 64, 8192, 128, 2) == 6
    assert config.section(90, 64, 1 << 20, 128, 2) == 1
    assert config.section(90, 4, 128, 128, 2) == 4
    assert config.section(90, 4, 0, 128, 2) == 4


def test_windows_that_reach_past_everything_are_none() -> None:
    q = torch.zeros(1, 10, 2, 8)
    for left, right, expected in ((9, 9, (-1, -1)), (8, 8, (8, 8)), (2**31 - 1, 0, (-1, 0)), (-1, -1, (-1, -1))):
        options = Case(10, 10, left=left, right=right).options
        arguments = triton.Problem(Call(q, q, q, *[None] * 5, options)).arguments()
        assert (arguments["window_left"], arguments["window_right"]) == expected
        assert (arguments["HAS_LEFT"], arguments["HAS_RIGHT"]) == tuple(side >= 0 for side in expected)


# --- what is refused ---


def test_it_says_why_it_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(x: Tensor) -> str:
        return triton.supports(Call(x, x, x, *[None] * 5, Case(4, 4).options), False) or ""

    x = torch.zeros(1, 4, 1, 8)
    if triton.find_spec("triton") is not None:
        assert reason(x) == "serves cuda tensors, got cpu"
        assert "not torch.float64" in reason(_on_cuda(x.double()))
        assert "counts query rows" in reason(_on_cuda(torch.empty(1, 2**31, 1, 8, device="meta")))
        with use_backend("triton"), pytest.raises(BackendError, match="serves cuda tensors, got cpu"):
            attention(x, x, x)
    monkeypatch.setattr(triton, "find_spec", lambda name: None)
    assert "pip install 'hotloop[triton]'" in reason(x)


def _on_cuda(x: Tensor) -> Any:
    """What `supports` reads of a tensor, as if it were on a GPU."""
    return SimpleNamespace(device=torch.device("cuda"), dtype=x.dtype, shape=x.shape)


if __name__ == "__main__":
    torch.set_num_threads(1)
    gpu.arch_of = lambda device: 80
    INTERPRETED[sys.argv[1]]()
