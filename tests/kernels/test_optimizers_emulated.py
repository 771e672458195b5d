"""Backends `triton` and `cuda` of AdamW, Lion and SGD in the emulator: the reference's bits, no fault, bytes."""

import itertools
import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hotloop.kernels.cuda import Launch
from hotloop.kernels.dispatch import use_backend
from hotloop.kernels.optimizers import cuda, reference, tables
from hotloop.kernels.optimizers import triton as triton_backend
from hotloop.kernels.optimizers.cases import PRECISIONS, RULES, assert_same_bits
from hotloop.kernels.optimizers.update import Update
from hotloop.kernels.testing import streamed_bytes

triton = pytest.importorskip("triton", reason="triton is not installed")
emulator = pytest.importorskip("hotloop.emulator")

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "optimizers" / "elementwise.cu"
BUDGETS = Path(__file__).with_name("optimizers_budgets.json")
NVCC = {"include_dirs": [SOURCE.parents[1]], "options": ["-fmad=false"]}
TRITON_TARGETS = ("sm_80", "sm_90", "sm_120")
CUDA_TARGETS = ("sm_80", "sm_90a", "sm_100a", "sm_120")
SCHEDULES: list[dict[str, Any]] = [{"schedule": "lockstep"}, {"schedule": "random", "seed": 1}]

STORAGES = [("float32", "nearest"), *itertools.product(("bfloat16", "int8"), ("nearest", "stochastic"))]
# Odd, several blocks of a row and a part of one, whole blocks, one element, none, an odd start after an odd size.
SHAPES = [(7,), (9, 517), (4, 1280), (), (0, 5), (3, 131)]


def prepared(
    rule: str,
    precision: str,
    state_dtype: str,
    rounding: str,
    shapes: list[tuple[int, ...]] = SHAPES,
    device: str = "cpu",
) -> tuple[list[Tensor], list[Update]]:
    """All tensors and the updates of a second step. Gradients from denormal to large."""
    dtype, grad_dtype, master = PRECISIONS[precision]
    kind, options = RULES[rule]
    draw = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=draw).to(device, dtype)) for shape in shapes]
    optimizer = kind(
        params, lr=1e-2, master=master, state_dtype=state_dtype, rounding=rounding, seed=2**40 + 3, **options
    )
    for step in range(2):
        for p in params:
            if grad_dtype != dtype:
                p.grad_dtype = grad_dtype
            exponent = torch.randint(-42 if step else -6, 3, p.shape, generator=draw)
            p.grad = (torch.randn(p.shape, generator=draw) * 10.0**exponent).to(device, grad_dtype)
        if not step:
            with use_backend("reference"):
                optimizer.step()
    updates = [update for update, _ in optimizer._gather(params)[0]]
    for counter in {id(u.step): u.step for u in updates}.values():
        counter.add_(1)
    kept = [x for p in params for name, x in optimizer.state[p].items() if name != "step"]
    return [*(p.detach() for p in params), *kept], updates


def memory(update: Update) -> dict[str, Tensor]:
    lists = {"param": update.params, "master": update.masters or [], "grad": update.grads}
    lists |= {f"moment{k}": xs for k, xs in enumerate(update.moments)}
    lists |= {f"scale{k}": xs for k, xs in enumerate(update.scales)}
    return {f"{name}[{i}]": x.detach() for name, xs in lists.items() for i, x in enumerate(xs)}


@cache
def module(target: str) -> Any:
    return emulator.Module.from_cuda(SOURCE, arch=target, **NVCC)


def in_triton(rule: str, update: Update, factor: Tensor, skip: Tensor, target: str, schedule: dict[str, Any]) -> Any:
    with emulator.triton(target, **schedule) as gpu, torch.no_grad():
        gpu.memory.update(memory(update))
        getattr(triton_backend.RULES, rule)(update, factor, skip)
    return gpu


def in_cuda(rule: str, update: Update, factor: Tensor, skip: Tensor, target: str, schedule: dict[str, Any]) -> Any:
    done = []

    def run(launch: Launch, device: torch.device) -> None:
        done.append(emulated(launch, target, memory(update), schedule))

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(Launch, "run", run)
        getattr(cuda.RULES, rule)(update, factor, skip)
    return done[0]


def emulated(launch: Launch, target: str, known: dict[str, Tensor], schedule: dict[str, Any]) -> Any:
    return module(target).launch(
        launch.kernel, launch.grid, launch.block, launch.shared, launch.arguments, memory=known, **schedule
    )


PROGRAMS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "triton": (in_triton, TRITON_TARGETS),
    "cuda": (in_cuda, CUDA_TARGETS),
}


def check(program: str, rule: str, case: tuple[str, str, str], target: str, schedule: dict[str, Any]) -> None:
    run, _ = PROGRAMS[program]
    name = {"momentum": "sgd", "nesterov": "sgd"}.get(rule, rule)
    expected, updates = prepared(rule, *case)
    factor, skip = torch.tensor(0.3), torch.tensor(0.0)
    with torch.no_grad():
        for update in updates:
            getattr(reference, name)(update, factor, skip)
    found, updates = prepared(rule, *case)
    for update in updates:
        run(name, update, factor, skip, target, schedule)
    assert_same_bits(found, expected)


def cases() -> Iterator[tuple[str, str, str]]:
    """(precision, state_dtype, rounding)"""
    for precision, (state_dtype, rounding) in itertools.product(PRECISIONS, STORAGES):
        yield precision, state_dtype, rounding
    yield "bf16", "float32", "stochastic"


EVERYTHING = list(itertools.product(RULES, cases()))
# Each rule with every fifth case, beginning with another one; targets and schedules go round.
CHOSEN = [
    (program, rule, case, targets[(i + j) % len(targets)], SCHEDULES[(i + j) % len(SCHEDULES)])
    for program, (_, targets) in PROGRAMS.items()
    for i, rule in enumerate(RULES)
    for j, case in list(enumerate(cases()))[i::5]
]


@pytest.mark.parametrize(("program", "rule", "case", "target", "schedule"), CHOSEN)
def test_the_bits_of_the_reference(program, rule, case, target, schedule):
    check(program, rule, case, target, schedule)


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(("rule", "case"), EVERYTHING)
def test_the_bits_of_the_reference_everywhere(program, rule, case):
    i, targets = EVERYTHING.index((rule, case)), PROGRAMS[program][1]
    check(program, rule, case, targets[i % len(targets)], SCHEDULES[i // 2 % len(SCHEDULES)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(("rule", "case"), EVERYTHING)
def test_the_bits_of_the_reference_on_this_gpu(program, rule, case):
    name = {"momentum": "sgd", "nesterov": "sgd"}.get(rule, rule)
    results = []
    for backend, device in ((reference, "cpu"), ({"triton": triton_backend, "cuda": cuda}[program], "cuda")):
        found, updates = prepared(rule, *case, device=device)
        with torch.no_grad():
            for update in updates:
                if backend is not reference and backend.supports(update) is not None:
                    pytest.skip(str(backend.supports(update)))
                rules = backend if backend is reference else backend.RULES
                getattr(rules, name)(update, torch.tensor(0.3, device=device), torch.tensor(0.0, device=device))
        results.append([x.cpu() for x in found])
    assert_same_bits(results[1], results[0])


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_skipped_step_changes_nothing(program):
    run, targets = PROGRAMS[program]
    found, updates = prepared("adamw", "bf16, master", "int8", "stochastic")
    before = [x.clone() for x in found]
    for update in updates:
        run("adamw", update, torch.tensor(torch.nan), torch.tensor(1.0), targets[0], {})
    assert_same_bits(found, before)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("sizes", [(1, 4097, 65_536, 65_537, 0, 130_000), (63,), (3 * 65_536,)])
def test_norm(program, sizes):
    draw = torch.Generator().manual_seed(1)
    base = [torch.randn(n + 1, generator=draw).mul(10.0 ** (i % 3)) for i, n in enumerate(sizes)]
    # Every other one begins off a 128-bit boundary; both dtypes in one launch.
    grads = [(x[:-1] if i % 2 else x[1:]) if i % 3 else x[:-1].bfloat16() for i, x in enumerate(base)]
    kept = tables.DeviceTables()
    targets = PROGRAMS[program][1]
    for i, schedule in enumerate(SCHEDULES):
        target = targets[(i + len(sizes)) % len(targets)]
        known = {f"grad[{k}]": g for k, g in enumerate(grads)}
        if program == "triton":
            with emulator.triton(target, **schedule) as gpu:
                gpu.memory.update(known)
                found = triton_backend.sum_of_squares(grads, kept)
        else:
            launch = cuda.sum_launch(grads, kept)
            emulated(launch, target, known, schedule)
            found = launch.arguments["sums"][0]
        assert torch.equal(found, reference.sum_of_squares(grads))
        assert kept.get("arrived", (0,), torch.device("cpu")).item() == 0


# Counted work: bytes a parameter, see the formula of each row.
BYTES = [
    ("adamw", ("fp32", "float32", "nearest"), 28),
    ("adamw", ("bf16", "float32", "stochastic"), 22),
    ("adamw", ("bf16", "int8", "stochastic"), 10),
    ("adamw", ("bf16, master, fp32 gradients", "float32", "nearest"), 30),
    ("lion", ("fp32", "float32", "nearest"), 20),
    ("sgd", ("fp32", "float32", "nearest"), 12),
]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(("rule", "case", "bytes_each"), BYTES)
def test_each_tensor_is_read_once_and_written_once(program, rule, case, bytes_each):
    run, targets = PROGRAMS[program]
    shapes = [(64, 512)]
    _, updates = prepared(rule, *case, shapes=shapes)
    (update,) = updates
    done = run(rule, update, torch.tensor(1.0), torch.tensor(0.0), targets[0], {})
    moved = sum(streamed_bytes(done.counters, way) for way in ("load", "store"))
    assert bytes_each <= moved / (64 * 512) <= 1.02 * bytes_each


# Machine code


def machine_code(program: str, target: str, rule: str, case: tuple[str, str, str]) -> Any:
    if program == "cuda":
        name = (
            f"optimizer_{rule}{'_codes' if case[1] == 'int8' else ''}{'_stochastic' if case[2] == 'stochastic' else ''}"
        )
        return emulator.static(SOURCE, target, name=name, **NVCC)
    _, (update,) = prepared(rule, *case, shapes=[(64, 512)])
    gpu = in_triton(rule, update, torch.tensor(1.0), torch.tensor(1.0), target, {})
    return emulator.static(gpu.launches[0].compiled)


def measured() -> Iterator[tuple[str, dict[str, int]]]:
    kinds = [("adamw", ("fp32", "float32", "nearest")), ("adamw", ("bf16", "int8", "stochastic"))]
    for target, (rule, case) in itertools.product(TRITON_TARGETS, kinds):
        yield (
            f"triton {rule} {', '.join(case)}, {target}",
            machine_code("triton", target, rule, case).budget("LDG.128", "STG.128"),
        )
    for target in ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120"):
        for rule, case in kinds:
            yield (
                f"cuda {rule} {', '.join(case)}, {target}",
                machine_code("cuda", target, rule, case).budget("LDG.128", "STG.128"),
            )
        sums = emulator.static(SOURCE, target, name="optimizer_sum_of_squares", **NVCC)
        yield f"cuda sum_of_squares, {target}", sums.budget("LDG.128", "STG.128")


@pytest.mark.slow  # compiles for every target
def test_budgets():
    from hotloop.emulator import cuda as compiler

    if "release 13.0" not in compiler.version(compiler.find_nvcc()) or not triton.__version__.startswith("3.9."):
        pytest.skip(f"the budgets are of nvcc 13.0 and Triton 3.9, not of this nvcc with Triton {triton.__version__}")
    rows = dict(measured())
    assert rows == json.loads(BUDGETS.read_text())
    for name, row in rows.items():
        assert row["spills"] == row["stack"] == 0, name
        assert row.get("LDG.128", 0) > 0, name


@pytest.mark.parametrize("program", PROGRAMS)
def test_arithmetic_is_exact(program):
    """No contraction, no approximate division or root, no flushed denormals in the PTX."""
    if program == "cuda":
        from hotloop.emulator import cuda as compiler

        texts = [compiler.compile_ptx(SOURCE, "sm_90a", **NVCC)]
    else:
        _, (update,) = prepared("adamw", "bf16", "int8", "stochastic", shapes=[(64, 512)])
        gpu = in_triton("adamw", update, torch.tensor(1.0), torch.tensor(1.0), "sm_90", {})
        texts = [gpu.launches[0].compiled.asm["ptx"]]
    for text in texts:
        assert "div.rn.f32" in text
        assert "sqrt.rn.f32" in text
        assert not re.findall(r"\S*(?:\.ftz|\.approx|fma\.rn\.f32|div\.full)\S*", text)


if __name__ == "__main__":
    BUDGETS.write_text(json.dumps(dict(measured()), indent=1) + "\n")
