"""Backend `triton` of a linear cross entropy, with its own products, without a GPU: in Triton's interpreter (fp32 and
fp16; it is wrong for bf16) and in the emulator (bf16); work that follows the rows that have a target; budgets.

The interpreter is chosen when Triton is first imported: this file runs itself in a process that has TRITON_INTERPRET.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hotloop.kernels.cross_entropy import config, linear_cross_entropy, linear_cross_entropy_plan, reference
from hotloop.kernels.cross_entropy import linear_cross_entropy_stats as with_stats
from hotloop.kernels.cross_entropy import triton as triton_backend
from hotloop.kernels.cross_entropy import triton_projection as projection
from hotloop.kernels.cross_entropy.cases import (
    EPS,
    IGNORE,
    composed,
    options,
    row_gradient,
    targets,
    value_and_gradients,
)
from hotloop.kernels.cross_entropy.config import Projection, Tile
from hotloop.kernels.cross_entropy.contract import Needs, Options, Upstream
from hotloop.kernels.dispatch import BackendError, Table, use_backend
from hotloop.kernels.testing import LAYOUTS, assert_no_worse, draw_values, lay_out, streamed_bytes

BUDGETS = Path(__file__).with_name("cross_entropy_projection_budgets.json")
TARGETS = ("sm_80", "sm_90", "sm_120")
SCHEDULES = ("one_pass", "recompute")
MACHINES: list[dict[str, Any]] = [
    {"schedule": "lockstep", "async_copies": "late"},
    {"schedule": "random", "seed": 1, "async_copies": "early"},
    {"schedule": "random", "seed": 2, "async_copies": "late"},
]


def small(rows: int, stages: int = 2) -> Projection:
    """Tiles of which small tensors hold several. wgmma wants 64 rows."""
    return Projection(
        Tile(rows, 64, 32, 4, stages), Tile(rows, 64, 32, 4, stages),
        Tile(rows, 32, 32, 4, stages), Tile(32, rows, 32, 4, stages),
    )  # fmt: skip


SMALL = {"sm_80": small(32, 3), "sm_90": small(64, 3), "sm_120": small(32)}


@contextmanager
def served(tiles: Projection | None) -> Iterator[None]:
    """Tensors on the CPU go to the backend triton, in several chunks, tiles and splits, the last of them ragged; memory
    that nobody has written is NaN."""
    sizes = {"SPLITS": 2, "PROGRAMS": 1, "GROUP": 2, "LEAST_COLUMNS": 1, "RECOMPUTE_BYTES": 1, "CHUNK_BYTES": 4 * 1500,
             "WIDE_CHUNK_BYTES": 4 * 1500, "MULTIPLE": 16, "CAPACITY_MULTIPLE": 4}  # fmt: skip
    before = torch.are_deterministic_algorithms_enabled()
    with (
        mock.patch.object(triton_backend.KERNELS, "supports", return_value=None),
        mock.patch.object(Table, "choose", lambda table, *_, **__: table["triton"]),
        mock.patch.multiple(config, **sizes if tiles else {}),
        mock.patch.object(projection, "tiles", lambda x: tiles or config.projection(90, x.dtype)),
    ):
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


def exact(shape: tuple[int, ...], size: float, *, seed: int, dtype: torch.dtype) -> Tensor:
    """Few bits: sums of products are exact in fp32, so that no order of summation is luckier than another."""
    return (draw_values(shape, seed=seed, dtype=torch.float64) * 4).round().clamp(-16, 16).to(dtype) * (size / 4)


def check(
    schedule: str,
    dtype: torch.dtype,
    seed: int,
    shape: tuple[int, int, int],
    ignored: float,
    device: str = "cpu",
    **forced: Any,
) -> None:
    """Loss and gradients are no worse than those of PyTorch's two steps; ignored rows, which are NaN, reach nothing."""
    n, v, d = shape
    draw = random.Random(seed)
    chosen = options(draw.randrange(768), n, v) | forced
    schedule = "recompute" if chosen["reduction"] == "none" else schedule
    size, layout = draw.choice([2.0**-10, 1.0, 64.0]), draw.choice(LAYOUTS)
    t = targets(n, v, seed, ignored)
    valid = t != IGNORE
    inputs = [exact((n, d), size, seed=d, dtype=dtype), exact((v, d), min(size, 8.0), seed=v, dtype=dtype)]
    if draw.random() < 0.5:
        inputs.append(exact((v,), 1.0, seed=n, dtype=dtype))
    wide = {k: x.double() if isinstance(x, Tensor) else x for k, x in chosen.items()}
    laid_out = {k: lay_out(x.to(device), layout) if isinstance(x, Tensor) else x for k, x in chosen.items()}
    truth_in = [x.double().requires_grad_() for x in inputs]
    same_in = [x.clone().requires_grad_() for x in inputs]
    poisoned = [torch.where(valid[:, None], inputs[0], math.nan), *inputs[1:]]
    ours_in = [lay_out(x.to(device), layout).requires_grad_() for x in poisoned]
    logits = F.linear(truth_in[0], truth_in[1], *truth_in[2:])
    truth = value_and_gradients(composed(logits, t, **wide), *truth_in)
    same = value_and_gradients(composed(F.linear(same_in[0], same_in[1], *same_in[2:]), t, **chosen), *same_in)
    laid_out["max_valid"] = draw.choice([None, None, int(valid.sum()) + 1])
    laid_out["linear_bias"] = ours_in[2] if inputs[2:] else None
    loss = linear_cross_entropy(ours_in[0], ours_in[1], lay_out(t.to(device), layout), schedule=schedule, **laid_out)
    ours = value_and_gradients(loss, *ours_in)
    case = f"{schedule}, seed {seed}, {shape}, {layout}: "
    rounded = 0.5 * torch.finfo(dtype).eps * truth[0].abs().max().item() if truth[0].numel() else 0.0
    assert_no_worse(ours[0], same[0].float(), truth[0], name=case + "loss", ulps=4, atol=rounded)
    # exp(x - lse) carries the rounding of lse.
    lse = logits.detach().abs().max().item() if n else 0.0
    terms = row_gradient(t, chosen) * EPS * (4 + lse)
    sums = (inputs[1].abs().sum(0), inputs[0].abs().sum(0), torch.tensor([float(n)]))
    for name, sum_of, *gradients in zip("hwb", sums, ours[1:], same[1:], truth[1:], strict=False):
        atol = terms * sum_of.double().max().item() if sum_of.numel() else 0.0
        assert_no_worse(*gradients, name=f"{case}d{name}", ulps=4, atol=atol)
    assert not ours[1].cpu()[~valid].any()


def check_infinities() -> None:
    """One logit of each row, or all of them, is NaN or infinite; also what rows say of themselves."""
    n, v, d = 33, 101, 8
    h, w = (draw_values(shape, seed=d, dtype=torch.float32).requires_grad_() for shape in ((n, d), (v, d)))
    for value, (at, target) in itertools.product(
        (math.nan, math.inf, -math.inf), (([70], 70), ([70], 2), ([3, 70], 3), (range(v), 0))
    ):
        bias, t = torch.zeros(v), torch.full((n,), target)
        bias[list(at)] = value
        for schedule in SCHEDULES if len(at) == 1 else SCHEDULES[1:]:
            x = F.linear(h, w, bias)
            expected = value_and_gradients(F.cross_entropy(x, t), h, w)
            found = with_stats(h, w, t, linear_bias=bias, schedule=schedule)
            torch.testing.assert_close(value_and_gradients(found.loss, h, w), expected, equal_nan=True)
            torch.testing.assert_close(found.lse, x.logsumexp(-1), equal_nan=True)
            assert torch.equal(found.predicted, x.argmax(-1)), (value, at, schedule)


class NoReads(TorchDispatchMode):
    """Raises where a value of a tensor is taken to the host."""

    FORBIDDEN = tuple(getattr(torch.ops.aten, name).default for name in ("_local_scalar_dense", "nonzero", "equal"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in self.FORBIDDEN, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def run_both(h: Tensor, w: Tensor, t: Tensor, **chosen: Any) -> tuple[Any, ...]:
    """Rows and gradients of `recompute` with everything differentiated, then those of `one_pass`."""
    every, numbers = Needs(True, True, True), chosen.get("options", Options())
    bias, weight, token_weight = (chosen.get(name) for name in ("bias", "weight", "token_weight"))
    given = (h, w, t, bias, weight, token_weight)
    rows = projection.recompute_forward(*given, numbers, None, True)
    upstream = Upstream(*(torch.linspace(start, 1.0, len(t)) for start in (0.5, -1.0, 0.0, 2.0)))
    gradients = projection.recompute_backward(upstream, *given, rows.lse, rows.entropy, numbers, None, every)
    return rows, gradients, projection.one_pass(*given, torch.tensor(0.3), numbers, None, True, every)


def interpret() -> None:
    shapes = [(0, 5, 4), (1, 1, 1), (2, 7, 5), (40, 33, 16), (37, 130, 40), (70, 65, 33)]
    seeds = itertools.count()
    with served(small(32)):
        for dtype, shape, schedule in itertools.product((torch.float32, torch.float16), shapes, SCHEDULES):
            for ignored in (0.3, 1.0) if shape == shapes[3] else (0.5,):
                check(schedule, dtype, next(seeds), shape, ignored)
        for reduction, schedule in (("mean", "one_pass"), ("sum", "recompute"), ("none", "recompute")):
            everything = options(255, 37, 130) | {"reduction": reduction}
            everything = {k: x for k, x in everything.items() if (k, reduction) != ("normalizer", "none")}
            check(schedule, torch.float32, next(seeds), (37, 130, 40), 0.4, **everything)
        check_infinities()
        with NoReads(), torch.no_grad():
            run_both(torch.randn(9, 5), torch.randn(7, 5), targets(9, 7, 0, 0.3))


def test_in_the_interpreter_it_is_no_worse_than_pytorch() -> None:
    pytest.importorskip("triton", reason="needs triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


# In the emulator


def emulated(target: str, **machine: Any) -> Any:
    return pytest.importorskip("hotloop.emulator").triton(target, **machine)


def case(n: int = 70, v: int = 101, d: int = 40, ignored: float = 0.4) -> dict[str, Any]:
    t = targets(n, v, 1, ignored)
    h, w, bias = (draw_values(shape, seed=i, dtype=torch.bfloat16) for i, shape in enumerate(((n, d), (v, d), (v,))))
    return {
        "h": torch.where((t != IGNORE)[:, None], h, math.nan),
        "w": w,
        "t": t,
        "bias": bias,
        "weight": draw_values((v,), seed=3, dtype=torch.float32).abs() + 0.1,
        "token_weight": draw_values((n,), seed=4, dtype=torch.float32),
        "options": Options(IGNORE, 0.1, 1e-2, 3.0, 0.7),
    }


def check_emulated(given: dict[str, Any], found: tuple[Any, ...]) -> None:
    """Results to fp32's rounding of fp64, gradients no further from it than those that PyTorch makes of bf16 logits."""
    every, numbers = Needs(True, True, True), given["options"]
    rows, gradients, (loss, again, scaled) = found
    clean = {k: x for k, x in given.items() if k != "options"}
    clean["h"] = clean["h"].nan_to_num(0.0)
    wide = [x.double() if x.is_floating_point() else x for x in clean.values()]
    exact_loss, exact_rows, _ = reference.linear_one_pass(*wide, torch.tensor(0.3).double(), numbers, None, True, every)
    assert abs(loss - exact_loss) <= 1e-2 * exact_loss.abs()
    for name in ("loss", "nll", "lse", "entropy"):
        a, b, c = (getattr(x, name) for x in (rows, again, exact_rows))
        assert (a.double() - c).abs().max() <= 16 * EPS * (1 + c.abs().max()), name
        assert (b.double() - c).abs().max() <= 2.0**-7 * (1 + c.abs().max()), name  # of logits rounded to bf16
    assert torch.equal(rows.predicted, exact_rows.predicted)

    def both(upstream: Upstream) -> tuple[Any, Any]:
        logits = F.linear(clean["h"], clean["w"], clean["bias"])
        dlogits = reference.rows_backward(
            upstream, logits, clean["t"], clean["weight"], clean["token_weight"], numbers
        ).bfloat16()
        same = dlogits @ clean["w"], dlogits.T @ clean["h"], dlogits.sum(0)
        up = Upstream(*(None if x is None else x.double() for x in upstream))
        return same, reference.linear_backward(up, *wide, exact_rows.lse, exact_rows.entropy, numbers, None, every)

    n = len(clean["t"])
    for ours, upstream in (
        (gradients, Upstream(*(torch.linspace(start, 1.0, n) for start in (0.5, -1.0, 0.0, 2.0)))),
        (scaled, Upstream(torch.tensor(0.3).expand(n))),
    ):
        for name, a, b, c in zip("hwb", ours, *both(upstream), strict=True):
            assert_no_worse(a, b, c, name=f"d{name}", ulps=2)


@pytest.mark.parametrize(("target", "machine"), [("sm_80", MACHINES[0]), ("sm_90", MACHINES[1])])
def test_bf16_with_every_option(target: str, machine: dict[str, Any]) -> None:
    given = case()
    with served(SMALL[target]), emulated(target, **machine):
        found = run_both(**given)
    check_emulated(given, found)


def flat(found: Any) -> Iterator[Tensor]:
    for x in found:
        yield from flat(x) if isinstance(x, tuple) else [x]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_the_same_bits_whatever_the_order(target: str) -> None:
    for given in (case(), case(33, 130, 64, 0.0), case(40, 70, 17, 1.0), case(70, 1, 8, 0.5)):
        found = []
        for machine in MACHINES:
            with served(SMALL[target]), emulated(target, **machine):
                found.append(run_both(**given))
        if given["w"].shape[0] > 1:
            check_emulated(given, found[0])
        for other in found[1:]:
            for a, b in zip(flat(found[0]), flat(other), strict=True):
                assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_the_tiles_that_a_gpu_gets(target: str) -> None:
    given = case(150, 300, 72, 0.4)
    with served(config.projection(int(target[3:]), torch.bfloat16)), emulated(target):
        found = run_both(**given)
    check_emulated(given, found)


@pytest.mark.slow
def test_infinities_in_the_emulator() -> None:
    """Where maxima of NaN are the hardware's."""
    with served(SMALL["sm_80"]), emulated("sm_80"):
        check_infinities()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_on_this_gpu(schedule: str, dtype: torch.dtype) -> None:
    with use_backend("triton"):
        for seed, shape in enumerate([(300, 1000, 256), (1000, 5003, 100), (130, 33, 64), (5, 1, 7)]):
            check(schedule, dtype, seed, shape, 0.5, "cuda")


# Work


def work(n: int, valid: int) -> dict[str, tuple[float, float]]:
    """Tensor-core operations (16 x 8 x 16) of what is launched for n rows, and bytes it reads of matrices."""
    v, d = 64, 64
    h, w = (draw_values(shape, seed=d, dtype=torch.bfloat16) for shape in ((n, d), (v, d)))
    t = torch.full((n,), IGNORE)
    t[torch.randperm(n, generator=torch.Generator().manual_seed(0))[:valid]] = 5
    given = (h, w, t, None, None, None)
    needs, numbers, scale = Needs(True, True, False), Options(), torch.tensor(0.3)
    tile = Tile(16, 32, 32, 4, 2)
    found = {}
    with served(Projection(tile, tile, tile, tile)), mock.patch.object(config, "CHUNK_BYTES", 1 << 20):
        with emulated("sm_80") as forward:
            rows = projection.recompute_forward(*given, numbers, None, False)
        upstream = Upstream(torch.ones(n))
        with emulated("sm_80") as backward:
            projection.recompute_backward(upstream, *given, rows.lse, rows.entropy, numbers, None, needs)
        with emulated("sm_80") as together:
            projection.one_pass(*given, scale, numbers, None, False, needs)
    for name, gpu in {"forward": forward, "backward": backward, "one_pass": together}.items():
        found[name] = (gpu.counters["mma_m16n8k16"], streamed_bytes(gpu.counters, "load"))
    return found


def test_rows_without_a_target_cost_nothing() -> None:
    """At 15 % of the rows 15 % of the products, forward and backward, in whole tiles of 16 rows; without any, none."""
    n, unit = 320, 320 * 64 * 64 // (16 * 8 * 16)
    every, some, none = (work(n, valid) for valid in (n, 48, 0))
    assert [every[name][0] for name in every] == [unit, 3 * unit, 3 * unit]
    for name in every:
        assert some[name][0] == 0.15 * every[name][0]
        assert none[name][0] == 0
        # Of matrices 0.15; targets and factors of rows lie apart then, a sector for each.
        assert 0.15 <= some[name][1] / every[name][1] <= 0.2
        assert none[name][1] == 0


# Sizes


def test_sizes() -> None:
    for made in (*config.PROJECTIONS.values(), config.WIDE_PROJECTION):
        assert made.dlogits.columns // 2 % made.dinput.columns == 0
        assert made.results.columns % 32 == 0
    assert config.projection(86, torch.bfloat16) is config.projection(120, torch.float16) is config.PROJECTIONS[120]
    assert config.projection(103, torch.bfloat16) is config.PROJECTIONS[100]
    assert config.projection(75, torch.float16) is config.PROJECTIONS[80]
    assert config.projection(90, torch.float32) is config.WIDE_PROJECTION
    tile = config.PROJECTIONS[90].results
    for n, v in itertools.product((1, 300, 8192, 1_000_000), (1, 127, 50_257, 300_000)):
        span = config.split_columns(n, v, tile)
        assert span % tile.columns == 0
        assert -(-v // span) <= max(config.SPLITS, config.PROGRAMS)
        width = config.projected_columns(n, v, 4096, torch.bfloat16, tile)
        assert width == v or width % tile.columns == 0


def test_the_plan_of_recompute_holds_no_logits() -> None:
    h, w = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((8192, 2304), (256_000, 2304)))
    with use_backend("triton"):
        plan = linear_cross_entropy_plan(h, w)
        assert plan.recompute == plan.one_pass == 8192 * 32 * 3 * 4  # three sums of 32 splits
        twice = linear_cross_entropy_plan(torch.cat((h, h)), w)
        assert twice.recompute == 2 * plan.recompute
        trained = linear_cross_entropy_plan(h.requires_grad_(), w.requires_grad_(), schedule="recompute")
        assert trained.recompute == 8192 * (4 * 2304 + 2 * trained.tile_columns)
        assert trained.recompute <= 128 << 20


def test_the_operators_refuse_what_the_backend_cannot_reach() -> None:
    h, w, t = torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.int64)
    given = (h, w, t, None, None, None, *Options(), None, False)
    pytest.importorskip("triton", reason="needs triton")
    with pytest.raises(BackendError, match="backend 'triton' serves cuda tensors, got cpu"):
        torch.ops.hotloop.linear_cross_entropy_rows(*given, "triton")


# Machine code

COUNTED = ("HMMA", "HGMMA", "UTCHMMA", "LDGSTS.128", "LDG.128", "STG.128")
NAMES = ("h", "w", "t", "bias", "weight", "token_weight")


def measured() -> dict[str, dict[str, int]]:
    """Every kernel of bf16 calls without and with all options, for what a GPU gets."""
    from hotloop import emulator

    found = {}
    for target, name in itertools.product((*TARGETS, "sm_100"), ("plain", "all")):
        given = case(64, 512, 128)
        if name == "plain":
            given = {k: given[k] for k in ("h", "w", "t")}
        tiles = config.projection(int(target[3:]), torch.bfloat16)
        with served(tiles), emulator.triton(target) as gpu:
            gpu.run = gpu.launches.append  # compiled, and not run
            projection.recompute_forward(*map(given.get, NAMES), given.get("options", Options()), None, name == "all")
            run_both(**given)
        for launch in gpu.launches:
            kernel = launch.compiled.metadata.name
            if kernel not in ("rows_kernel", "merge_kernel"):
                found.setdefault(f"{kernel}, {name}, {target}", emulator.static(launch.compiled).budget(*COUNTED))
    return found


@pytest.mark.slow  # compiles for every target
def test_budgets() -> None:
    triton = pytest.importorskip("triton", reason="needs triton")
    if not triton.__version__.startswith("3.9."):
        pytest.skip(f"the budgets are of Triton 3.9, not of {triton.__version__}")
    rows = measured()
    assert rows == json.loads(BUDGETS.read_text())
    for name, row in rows.items():
        assert row["spills"] == row["stack"] == 0, name
        if "dbias" not in name:
            assert any(row.get(mma, 0) for mma in ("HMMA", "HGMMA", "UTCHMMA")), name
            assert row["LDGSTS.128"] > 0, name


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET"):
        torch.set_num_threads(1)
        interpret()
    else:
        BUDGETS.write_text(json.dumps(measured(), indent=1) + "\n")
