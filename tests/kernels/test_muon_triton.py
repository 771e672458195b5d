"""Muon's Triton backend without a GPU: whole steps in Triton's interpreter, machine code for every target, counts.

The interpreter is wrong for bf16 products (Triton 3.9), so Newton-Schulz runs in fp32 and fp16 there. It is chosen when
Triton is first imported: this file runs itself in a process that has TRITON_INTERPRET.
"""

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hotloop.kernels.dispatch import use_backend
from hotloop.kernels.optimizers import Muon, muon_reference, muon_triton
from hotloop.kernels.optimizers.update import Update

SHAPES = [(70, 66), (66, 70), (1, 5), (5, 1), (70, 66), (33, 33)]
STORAGE: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "fp32, ascending": (torch.float32, {"nesterov": False, "maximize": True, "adjust_lr_fn": "spectral_norm"}),
    "bf16 and master": (torch.bfloat16, {"master": "float32"}),
    "bf16 stochastic": (torch.bfloat16, {"rounding": "stochastic", "state_dtype": "bfloat16"}),
    "int8 momentum": (torch.float32, {"state_dtype": "int8", "rounding": "stochastic"}),
}


# In the interpreter


class NoReads(TorchDispatchMode):
    """Raises where a value of a tensor is taken to the host."""

    FORBIDDEN = tuple(getattr(torch.ops.aten, name).default for name in ("_local_scalar_dense", "nonzero", "equal"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in self.FORBIDDEN, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def updates(storage: str) -> tuple[list[nn.Parameter], Muon, list[Update]]:
    """Those of a third step."""
    dtype, options = STORAGE[storage]
    draw = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in SHAPES]
    optimizer = Muon(params, lr=torch.tensor(0.1), ns_coefficients=(2.0, -1.5, 0.5), seed=7 * 2**40 + 5, **options)
    for step in range(3):
        draw = torch.Generator().manual_seed(step + 1)
        for p in params:
            p.grad = torch.randn(p.shape, generator=draw).to(dtype)
        if step < 2:
            with use_backend("reference"):
                optimizer.step()
    found = [update for update, _ in optimizer._gather(params)[0]]
    for counter in {id(u.step): u.step for u in found}.values():
        counter.add_(1)
    return params, optimizer, found


def tensors(optimizer: Muon, params: list[nn.Parameter]) -> dict[str, Tensor]:
    return {f"{i}.{name}": x.detach().clone() for i, p in enumerate(params) for name, x in
            {"p": p, **optimizer.state[p]}.items()}  # fmt: skip


def check_step(storage: str, skip: float, dtype: torch.dtype, tolerance: float) -> None:
    """The step of a GPU, in place and without a read, is the reference's; a skipped one changes no bit."""
    results = []
    for kernel in (muon_triton.muon, muon_reference.muon):
        params, optimizer, found = updates(storage)
        before = tensors(optimizer, params)
        with torch.no_grad(), NoReads():
            for update in found:
                how = {"dtype": dtype} if kernel is muon_triton.muon else {}
                kernel(update, torch.tensor(0.5), torch.tensor(skip), **how)
        results.append(tensors(optimizer, params))
    ours, expected = results
    for name, x in ours.items():
        if skip:
            assert torch.equal(x.view(-1).view(torch.uint8), before[name].view(-1).view(torch.uint8)), name
        elif x.dtype == torch.uint8:
            # A code on the border of two goes either way.
            assert (x != expected[name]).float().mean() < 0.01, name
        elif not (name.endswith(".p") and name.replace(".p", ".master") in ours):
            apart = (x.double() - expected[name].double()).norm() / expected[name].double().norm()
            assert apart <= max(tolerance, 2e-3 if x.dtype == torch.bfloat16 else 0.0), (storage, name, apart)
        if "master" in name and not skip:
            assert torch.equal(ours[name.replace("master", "p")], truncated(x)), name


def truncated(x: Tensor) -> Tensor:
    """What the interpreter's cast to bf16 gives: it cuts where a GPU rounds to nearest."""
    return (x.view(torch.int32) & -0x10000).view(torch.float32).bfloat16()


def check_product(shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float) -> None:
    """Every element written, symmetric to the bit."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gram, quadratic = (x.new_full((shape[0], shape[1], shape[1]), math.nan) for _ in range(2))
    muon_triton.symmetric_product(gram, x)
    exact = x.double() @ x.double().mT
    assert (gram.double() - exact).norm() <= tolerance * exact.norm()
    gram = (exact / exact.norm()).to(dtype)
    muon_triton.symmetric_product(quadratic, gram, alpha=2.0, beta=-4.75)
    exact = 2 * gram.double() @ gram.double() - 4.75 * gram.double()
    assert (quadratic.double() - exact).norm() <= tolerance * exact.norm()
    assert torch.equal(gram, gram.mT)
    assert torch.equal(quadratic, quadratic.mT)


def interpret() -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 1e-3)):
        for shape in ((2, 5, 7), (1, 1, 9), (2, 64, 64), (1, 130, 200), (2, 129, 65)):
            check_product(shape, dtype, tolerance)
    for storage in STORAGE:
        check_step(storage, 0.0, torch.float32, 1e-5)
    for storage in ("bf16 and master", "int8 momentum"):
        check_step(storage, 1.0, torch.float32, 0.0)
    check_step("fp32", 0.0, torch.float16, 1e-2)


def test_a_step_in_the_interpreter_is_the_reference() -> None:
    pytest.importorskip("triton", reason="needs triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# Machine code

ELEMENTWISE = {"R": "i32", "C": "i32", "step_pointer": "*fp32", "skip_pointer": "*fp32", "seed": "i64"}
SIGNATURES: dict[str, dict[str, str]] = {
    "symmetric_product_kernel": {
        "X": "*bf16", "A": "*bf16", "OUT": "*bf16", "M": "i32", "K": "i32", "alpha": "fp32", "beta": "fp32",
    },
    "momentum_kernel": {
        **ELEMENTWISE, "grad_table": "*i64", "buffer_table": "*i64", "start_table": "*i64", "X": "*bf16",
        "factor_pointer": "*fp32", "momentum": "fp32",
    },
    "update_kernel": {
        **ELEMENTWISE, "target_table": "*i64", "param_table": "*i64", "start_table": "*i64", "X": "*bf16",
        "rates": "*fp32",
    },
}  # fmt: skip


def compiled(kernel: str, arch: int, constants: dict[str, Any], **options: Any) -> Any:
    """Without a GPU. Sizes and addresses are multiples of 16, as of every matrix that a model has."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hotloop.kernels.optimizers import muon_kernels

    function = getattr(muon_kernels, kernel)
    types = {name: SIGNATURES[kernel].get(name, "constexpr") for name in function.arg_names}
    divisible = {(i,): [["tt.divisibility", 16]] for i, (name, kind) in enumerate(types.items())
                 if kind[0] == "*" or name in "MKRC"}  # fmt: skip
    source = ASTSource(fn=function, signature=types, constexprs=constants, attrs=divisible)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": True, **options})


def resources(binary: Any, folder: Path) -> dict[str, int]:
    """REG, STACK, LOCAL by cuobjdump, which Triton's wheel carries."""
    import triton

    path = folder / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    shown = subprocess.run([tool, "--dump-resource-usage", path], check=True, capture_output=True, text=True).stdout
    return {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", shown)}


MMA = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
SHARED_KB = {80: 163, 90: 227, 100: 227, 120: 99}


@pytest.mark.parametrize("arch", MMA)
@pytest.mark.parametrize("size", [64, 768])
def test_symmetric_product_compiles_for_tensor_cores_without_spills(arch: int, size: int, tmp_path: Path) -> None:
    """Both stores of a tile are 128 bits wide, the mirrored one too; it fits shared memory."""
    pytest.importorskip("triton", reason="needs triton")
    config = muon_triton.product_config(size)
    binary = compiled(
        "symmetric_product_kernel", arch, {"HAS_A": True, "BLOCK": config.BLOCK, "BLOCK_K": config.BLOCK_K},
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    found = resources(binary, tmp_path)
    assert found["STACK"] == found["LOCAL"] == 0
    assert binary.metadata.shared <= SHARED_KB[arch] * 1024
    ptx = binary.asm["ptx"]
    assert MMA[arch] in ptx
    per_thread = config.BLOCK**2 // (32 * config.num_warps)
    assert len(re.findall(r"st\.global\S*\.v4\.b32", ptx)) == 2 * per_thread // 8
    assert not re.search(r"st\.global\S*\.b16", ptx)


@pytest.mark.parametrize("arch", MMA)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_elementwise_kernels_compile_without_spills(arch: int, transposed: bool, dtype: str, tmp_path: Path) -> None:
    """Stochastic rounding where it is bf16. X, in bf16, is moved 128 bits a thread, transposed or not."""
    tl = pytest.importorskip("triton.language", reason="needs triton")
    kind = {"fp32": tl.float32, "bf16": tl.bfloat16}[dtype]
    common = {"STOCHASTIC": dtype == "bf16", "TRANSPOSED": transposed, "BLOCK_R": muon_triton.TILE.BLOCK_R,
              "BLOCK_C": muon_triton.TILE.BLOCK_C}  # fmt: skip
    momentum = compiled("momentum_kernel", arch, {
        **common, "MAXIMIZE": False, "NESTEROV": True, "GRAD_DTYPE": kind, "BUFFER_DTYPE": kind},
        num_warps=muon_triton.TILE.num_warps)  # fmt: skip
    update = compiled("update_kernel", arch, {
        **common, "HAS_MASTER": False, "TARGET_DTYPE": kind, "PARAM_DTYPE": kind},
        num_warps=muon_triton.TILE.num_warps)  # fmt: skip
    for binary in (momentum, update):
        found = resources(binary, tmp_path)
        assert found["STACK"] == found["LOCAL"] == 0
    assert re.search(r"st\.global\S*\.v4\.b32", momentum.asm["ptx"])
    assert re.search(r"ld\.global\S*\.v4\.b32", update.asm["ptx"])


# What is launched


def test_products_cost_about_half_their_tiles() -> None:
    """Tiles launched over tiles of a full product: (T + 1) / 2 T, 0.58 for 768 rows, towards a half."""
    shares = {}
    for rows in (768, 1024, 2048, 8192):
        tiles = -(-rows // muon_triton.product_config(rows).BLOCK)
        shares[rows] = tiles * (tiles + 1) // 2 / tiles**2
    assert shares[768] == pytest.approx(21 / 36)
    assert shares[8192] < 0.51


def test_tall_and_wide_matrices_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(8, 32), (32, 8), (8, 8), (8, 32)]
    found = [torch.empty(shape) for shape in shapes]
    assert list(muon_triton.batches(found)) == [(8, 32, [[0, 3], [1]]), (8, 8, [[2]])]
    monkeypatch.setattr(muon_triton, "BATCH", 2 * 8 * 32)
    assert list(muon_triton.batches(found)) == [(8, 32, [[0], [1]]), (8, 32, [[3]]), (8, 8, [[2]])]


def test_it_says_why_it_does_not_serve_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    update = updates("fp32")[2][0]
    expected = "serves cuda tensors, got cpu"
    if muon_triton.find_spec("triton") is None:
        expected = "needs triton, which is not installed"
    assert expected in (muon_triton.supports(update) or "")
    monkeypatch.setattr(muon_triton, "find_spec", lambda name: None)
    assert "pip install 'hotloop[triton]'" in (muon_triton.supports(update) or "")


if __name__ == "__main__":
    torch.set_num_threads(1)
    interpret()
