"""Backends `triton` and `cuda` of the losses in the emulator: rows and tiles against fp64, no worse than PyTorch."""

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hotloop.kernels.cross_entropy import cuda, platform
from hotloop.kernels.cross_entropy import triton as triton_backend
from hotloop.kernels.cross_entropy.cases import EPS, IGNORE, targets
from hotloop.kernels.cross_entropy.contract import Coefficients, Options, Rows
from hotloop.kernels.cuda import Launch
from hotloop.kernels.testing import assert_no_worse, draw_values, streamed_bytes

triton = pytest.importorskip("triton", reason="triton is not installed")
emulator = pytest.importorskip("hotloop.emulator")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "cross_entropy" / "cross_entropy.cu"
BUDGETS = Path(__file__).with_name("cross_entropy_budgets.json")
TARGETS = ("sm_80", "sm_90", "sm_120")
CUDA_TARGETS = {"sm_80": "sm_80", "sm_90": "sm_90a", "sm_120": "sm_120"}
BACKENDS = {"triton": triton_backend.KERNELS, "cuda": cuda.KERNELS}
programs = pytest.mark.parametrize("program", BACKENDS)
SCHEDULES: list[dict[str, Any]] = [{"schedule": "lockstep"}, {"schedule": "random", "seed": 1}]
OPTIONS: dict[str, Options] = {
    "plain": Options(),
    "smoothing": Options(label_smoothing=0.1),
    "z-loss, scale": Options(z_loss=1e-2, logit_scale=-0.7),
    "softcap": Options(softcap=3.0),
    "all": Options(-1, 0.1, 1e-2, 3.0, 0.7),
}


@cache
def module(target: str) -> Any:
    return emulator.Module.from_cuda(SOURCE, arch=target, include_dirs=[SOURCE.parents[1]])


@contextmanager
def emulated(program: str, target: str = "sm_80", shared: int = 99 << 10, **schedule: Any) -> Iterator[list[Any]]:
    """Launches of the backend run in the emulator; the counters of each. shared: bytes that a CTA may ask for."""
    counters: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BACKENDS[program], "supports", lambda logits: None)
        patch.setattr(cuda, "shared_memory", lambda device: shared)
        if program == "triton":
            with emulator.triton(target, **schedule) as gpu:
                yield counters
            counters.append(gpu.counters)
            return
        patch.setattr(Launch, "run", lambda *given: run_emulated(target, schedule, counters, *given))
        yield counters


def run_emulated(
    target: str, schedule: dict[str, Any], counters: list[Any], launch: Launch, device: torch.device
) -> None:
    given = {name: 0 if x is None else x for name, x in launch.arguments.items()}
    where = module(CUDA_TARGETS[target])
    done = where.launch(launch.kernel, launch.grid, launch.block, launch.shared, given, **schedule)
    counters.append(done.counters)


def case(v: int, dtype: torch.dtype, options: Options, *, weights: bool) -> dict[str, Any]:
    n = 4
    t = targets(n, v, v, 0.0)
    t[2] = options.ignore_index
    t[0] = v - 1
    return {
        "logits": draw_values((n, v), seed=v, dtype=dtype) * 2,
        "target": t,
        "weight": draw_values((v,), seed=1, dtype=torch.float32).abs() + 0.1 if weights else None,
        "token_weight": torch.tensor([1.0, 0.5, 2.0, 0.25]) if weights else None,
        "options": options,
    }


def in_double(x: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in x.items()}


def compare(found: Rows, same: Rows, truth: Rows, scale: float = 1.0) -> None:
    for name in ("loss", "nll", "lse", "entropy"):
        ours, theirs, exact = (getattr(rows, name) for rows in (found, same, truth))
        assert_no_worse(ours, theirs, exact, name=name, ulps=8, atol=8 * EPS * scale)
    assert torch.equal(found.predicted, truth.predicted)


# A kernel is compiled for each combination, which takes a second: here each option and dtype, the product is slow.
PAIRS = [
    (name, dtype, TARGETS[i % 3], SCHEDULES[i % 2], weights)
    for i, (name, dtype, weights) in enumerate(
        [
            ("plain", torch.bfloat16, False),
            ("plain", torch.float32, True),
            ("smoothing", torch.float16, True),
            ("z-loss, scale", torch.float32, False),
            ("softcap", torch.bfloat16, False),
            ("all", torch.bfloat16, True),
            ("all", torch.float32, False),
        ]
    )
]


@programs
@pytest.mark.parametrize(("name", "dtype", "target", "schedule", "weights"), PAIRS)
def test_rows(program, name, dtype, target, schedule, weights):
    check_rows(program, name, dtype, target, schedule, weights, [127, 9001] if name == "all" else [9001])


EVERYTHING = [
    (name, dtype, TARGETS[i % 3], [*SCHEDULES, {"schedule": "random", "seed": 2}][i % 3], i % 2 == 0)
    for i, (name, dtype) in enumerate(itertools.product(OPTIONS, DTYPES))
]


# One column, and a little more and less than a block.
@pytest.mark.slow
@programs
@pytest.mark.parametrize(("name", "dtype", "target", "schedule", "weights"), EVERYTHING[::4])
def test_rows_of_every_width(program, name, dtype, target, schedule, weights):
    check_rows(program, name, dtype, target, schedule, weights, [1, 129, 2047])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@programs
@pytest.mark.parametrize(("name", "dtype", "target", "schedule", "weights"), EVERYTHING)
def test_rows_on_this_gpu(program, name, dtype, target, schedule, weights):
    backend, dloss = BACKENDS[program], torch.tensor([1.0, -0.5, 3.0, 2.0])
    for v in (127, 9001, 50_257):
        given = case(v, dtype, OPTIONS[name], weights=weights)
        there = {k: x.cuda() if isinstance(x, Tensor) else x for k, x in given.items()}
        if backend.supports(there["logits"]) is not None:
            pytest.skip(backend.supports(there["logits"]))
        truth, same = platform.rows_forward(**in_double(given), stats=True), platform.rows_forward(**given, stats=True)
        found = backend.rows_forward(**there, stats=True)
        compare(Rows(*(x.cpu() for x in found)), same, truth)
        wide, out = in_double(given), torch.empty_like(there["logits"])
        exact, theirs = torch.empty_like(wide["logits"]), torch.empty_like(given["logits"])
        backend.rows_backward(dloss.cuda(), out=out, lse=found.lse, **there)
        platform.rows_backward(dloss.double(), out=exact, lse=truth.lse, **wide)
        platform.rows_backward(dloss, out=theirs, lse=same.lse, **given)
        assert_no_worse(out.cpu(), theirs, exact, name=f"dlogits, V {v}", ulps=4, atol=4 * EPS)


def check_rows(program, name, dtype, target, schedule, weights, widths):
    backend = BACKENDS[program]
    for v in widths:
        given = case(v, dtype, OPTIONS[name], weights=weights)
        truth = platform.rows_forward(**in_double(given), stats=True)
        same = platform.rows_forward(**given, stats=True)
        before = given["logits"].clone()
        dloss = torch.tensor([1.0, -0.5, 3.0, 2.0])
        grads = {}
        with emulated(program, target, **schedule):
            found = backend.rows_forward(**given, stats=True)
            lean = backend.rows_forward(**given, stats=False)
            assert torch.equal(given["logits"], before)
            grads["ours"] = torch.full_like(before, torch.nan)
            backend.rows_backward(dloss, out=grads["ours"], lse=found.lse, **given)
            together = {**given, "logits": before.clone()}
            scale = torch.tensor(0.5)
            again = backend.rows_forward_backward_(**together, scale=scale, stats=True)
        compare(found, same, truth)
        for a, b in zip(found, again, strict=True):
            assert torch.equal(a, b)
        for a, b in zip(found[:3], lean[:3], strict=True):
            assert torch.equal(a, b)
        wide = in_double(given)
        grads["truth"], grads["same"] = torch.empty_like(wide["logits"]), torch.empty_like(before)
        platform.rows_backward(dloss.double(), out=grads["truth"], lse=truth.lse, **wide)
        platform.rows_backward(dloss, out=grads["same"], lse=same.lse, **given)
        assert_no_worse(grads["ours"], grads["same"], grads["truth"], name=f"dlogits, V {v}", ulps=4, atol=4 * EPS)
        expected = torch.empty_like(before)
        with emulated(program, target, **schedule):
            backend.rows_backward(scale.expand(4), out=expected, lse=found.lse, **given)
        assert torch.equal(together["logits"], expected)


@programs
@pytest.mark.parametrize(("name", "dtype", "target", "schedule", "weights"), PAIRS[::2])
def test_tiles_of_the_vocabulary(program, name, dtype, target, schedule, weights):
    backend = BACKENDS[program]
    v, n = 700, 4
    given = case(v, dtype, OPTIONS[name], weights=weights)
    rows = platform.rows_forward(**in_double(given), stats=True)
    valid = given["target"] != given["options"].ignore_index
    draw = torch.Generator().manual_seed(2)
    factors = Coefficients(*(torch.where(valid, torch.randn(n, generator=draw), 0.0) for _ in range(4)))
    if not weights:
        factors = factors._replace(c=None, dentropy=None)
    t, weight, options = given["target"], given["weight"], given["options"]
    for first, width in ((0, 256), (256, 444), (699, 1)):
        tile = given["logits"][:, first : first + width]
        ours, same, truth = tile.clone(), tile.clone(), tile.double()
        lse, entropy = rows.lse.float(), rows.entropy.float() if weights else torch.empty(0)
        with emulated(program, target, **schedule):
            backend.columns_backward_(ours, first, t, factors, weight, lse, entropy, options)
        platform.columns_backward_(same, first, t, factors, weight, lse, entropy, options)
        exact = Coefficients(*(None if x is None else x.double() for x in factors))
        wide = None if weight is None else weight.double()
        platform.columns_backward_(truth, first, t, exact, wide, rows.lse, rows.entropy, options)
        assert_no_worse(ours, same, truth, name=f"tile at {first}", ulps=8, atol=8 * EPS)


@programs
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan_are_pytorchs(program, dtype):
    backend = BACKENDS[program]
    inf, nan = torch.inf, torch.nan
    x = torch.zeros(8, 300, dtype=dtype)
    x[0, 7] = inf
    x[1, 200] = nan
    x[2, :] = -inf
    x[3, :150] = -inf
    x[4, 5], x[4, 9] = inf, nan
    x[5, 0] = 1e4
    x[6, 299] = -1e4
    x[7, 3] = -inf
    t = torch.tensor([7, 0, 1, 200, 3, 0, 299, 3])
    given = {"logits": x, "target": t, "weight": None, "token_weight": None, "options": Options()}
    same = platform.rows_forward(**given, stats=True)
    with emulated(program):
        found = backend.rows_forward(**given, stats=True)
        out = torch.empty_like(x)
        backend.rows_backward(torch.ones(8), out=out, lse=found.lse, **given)
    for name in ("loss", "nll", "lse"):
        torch.testing.assert_close(getattr(found, name), getattr(same, name), rtol=1e-5, atol=1e-5, equal_nan=True)
    expected = torch.empty_like(x)
    platform.rows_backward(torch.ones(8), out=expected, lse=same.lse, **given)
    assert torch.equal(out.isnan(), expected.isnan())
    torch.testing.assert_close(out.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0), rtol=1e-2, atol=1e-6)


@programs
def test_rows_apart_columns_apart_and_offsets(program):
    """Logits that are a view: guard values around them stay, and what lies between rows is never touched."""
    backend = BACKENDS[program]
    base = draw_values((6, 2 * 333 + 9), seed=3, dtype=torch.float32)
    for view in (base[1:5, 3:336], base[1:5, 4:670:2], base.T[7:207, :4].T):
        given = {"logits": view, "target": torch.tensor([0, 5, IGNORE, 199]), "weight": None, "token_weight": None,
                 "options": Options()}  # fmt: skip
        plain = {**given, "logits": view.contiguous()}
        before = base.clone()
        out = torch.full((4, view.shape[1] + 7), 5.0)
        with emulated(program):
            found = backend.rows_forward(**given, stats=True)
            backend.rows_backward(torch.ones(4), out=out[:, 3:-4], lse=found.lse, **given)
        expected = platform.rows_forward(**plain, stats=True)
        torch.testing.assert_close(found.loss, expected.loss)
        gradient = torch.empty_like(plain["logits"])
        platform.rows_backward(torch.ones(4), out=gradient, lse=expected.lse, **plain)
        torch.testing.assert_close(out[:, 3:-4], gradient, rtol=1e-5, atol=1e-6)
        assert (out[:, :3] == 5).all()
        assert (out[:, -4:] == 5).all()
        assert torch.equal(base, before)


@programs
def test_a_target_that_is_no_class_gives_nan(program):
    backend = BACKENDS[program]
    x = torch.zeros(3, 50)
    for bad in (50, -1):
        given = {"logits": x, "target": torch.tensor([3, bad, IGNORE]), "weight": None, "token_weight": None,
                 "options": Options()}  # fmt: skip
        with emulated(program):
            loss = backend.rows_forward(**given, stats=False).loss
        assert loss.isnan().tolist() == [False, True, False]


@programs
def test_rows_too_long_for_shared_memory_are_read_again(program):
    """The same bits, and with the row in shared memory one read less."""
    given = case(9001, torch.bfloat16, OPTIONS["all"], weights=True)
    found, loads = [], []
    for shared in (99 << 10, 2 << 10):
        logits = given["logits"].clone()
        with emulated(program, shared=shared) as counters:
            rows = BACKENDS[program].rows_forward_backward_(
                **{**given, "logits": logits}, scale=torch.tensor(0.5), stats=True
            )
        found.append((*rows, logits))
        loads.append(sum(streamed_bytes(c, "load") for c in counters))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    if program == "cuda":
        # In fp32: class weights, read in both passes.
        assert loads[1] - loads[0] == pytest.approx(3 * 9001 * 2, rel=0.02)


@programs
@pytest.mark.parametrize("v", [8192, 50_257])
def test_counted_work(program, v):
    """One read of the logits, and with the gradient one write; Triton then reads the row again, out of the cache."""
    backend = BACKENDS[program]
    given = case(v, torch.bfloat16, Options(), weights=False)
    size, zeros = 2 * 3 * v, 2 * v  # one row of four is ignored: its gradient is written
    with emulated(program, "sm_90", shared=227 << 10) as forward:
        backend.rows_forward(**given, stats=False)
    with emulated(program, "sm_90", shared=227 << 10) as both:
        backend.rows_forward_backward_(**given, scale=torch.ones(()), stats=False)
    reads = 2 if program == "triton" else 1
    assert 0.99 * size <= streamed_bytes(forward[0], "load") <= 1.05 * size
    assert 0.99 * reads * size <= streamed_bytes(both[0], "load") <= 1.05 * reads * size
    assert 0.99 * (size + zeros) <= streamed_bytes(both[0], "store") <= 1.05 * (size + zeros)
    # Where rows begin anywhere, Triton moves their ends element by element.
    slack = 1.4 if program == "triton" and v % 2048 else 1.05
    assert 32 * forward[0]["global_load_sectors"] <= slack * size


def measured() -> dict[str, dict[str, int]]:
    found = {}
    for target, kernel in itertools.product(("sm_80", "sm_90a", "sm_100a", "sm_120"), ("rows", "columns")):
        r = emulator.static(SOURCE, target, name=f"cross_entropy_{kernel}_bf16", include_dirs=[SOURCE.parents[1]])
        found[f"cuda {kernel} bf16, {target}"] = r.budget("LDG.128", "STG.128")
    for target in TARGETS:
        given = case(5000, torch.bfloat16, OPTIONS["all"], weights=True)
        with pytest.MonkeyPatch.context() as patch, emulator.triton(target) as gpu:
            patch.setattr(triton_backend.KERNELS, "supports", lambda logits: None)
            triton_backend.KERNELS.rows_forward_backward_(**given, scale=torch.ones(()), stats=True)
        r = emulator.static(gpu.launches[0].compiled)
        found[f"triton rows bf16, {target}"] = r.budget("LDG.128", "STG.128")
    return found


@pytest.mark.slow  # compiles for every target
def test_budgets():
    from hotloop.emulator import cuda as compiler

    if "release 13.0" not in compiler.version(compiler.find_nvcc()) or not triton.__version__.startswith("3.9."):
        pytest.skip(f"the budgets are of nvcc 13.0 and Triton 3.9, not of this nvcc with Triton {triton.__version__}")
    rows = measured()
    assert rows == json.loads(BUDGETS.read_text())
    for name, row in rows.items():
        assert row["spills"] == row["stack"] == 0, name
        assert row.get("STG.128", 0) > 0, name


if __name__ == "__main__":
    BUDGETS.write_text(json.dumps(measured(), indent=1) + "\n")
