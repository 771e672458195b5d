"""Launches of `@triton.jit` kernels on CPU tensors, compiled for a GPU and run by the emulator.

Triton asks one object, its active driver, for everything it wants of a GPU: the target to compile for, the device's
limits, and a launcher for each compiled kernel. `triton(...)` makes a driver of ours the active one for as long as its
block lasts. Binding of arguments, specialisation, heuristics, autotuning and compilation stay Triton's own code; our
launcher gives the PTX that came out of them to a `Module`.

Triton is imported inside the functions, so that this module can be imported without it.
"""

from __future__ import annotations

import inspect
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hotloop.emulator.counters import Counters
from hotloop.emulator.errors import EmulatorError, Report, ReportsError, UnsupportedPTX
from hotloop.emulator.launch import Launch
from hotloop.emulator.module import Kernel, Module


@dataclass(frozen=True)
class Device:
    """What Triton and launch heuristics ask of a GPU: the largest model of a compute capability."""

    capability: int
    multiprocessors: int
    shared_kib: int  # per block, opt-in

    def properties(self) -> dict[str, int]:
        return {
            "max_shared_mem": self.shared_kib * 1024,
            "max_num_regs": 65536,
            "multiprocessor_count": self.multiprocessors,
            "warpSize": 32,
            "sm_clock_rate": 1_000_000,
            "mem_clock_rate": 1_000_000,
            "mem_bus_width": 4096,
        }


DEVICES = {
    "sm_80": Device(80, 108, 163),
    "sm_86": Device(86, 84, 99),
    "sm_89": Device(89, 142, 99),
    "sm_90": Device(90, 132, 227),
    "sm_100": Device(100, 148, 227),
    "sm_120": Device(120, 188, 99),
}


class Session:
    """What `with triton(...) as gpu` gives: the reports and counters of every launch inside the block."""

    def __init__(self, target: str, on_report: str, configs: Mapping[str, int], machine: Mapping[str, Any]) -> None:
        self.target = target
        self.reports: list[Report] = []
        self.counters = Counters()
        self.launches: list[TritonLaunch] = []
        self.memory: dict[str, Any] = {}  # tensors that kernels reach through tables of addresses, by name
        self._on_report = on_report
        self._machine = machine
        self._tuning = Tuning(configs)
        self._turn = threading.RLock()

    def run(self, launch: TritonLaunch) -> None:
        self._tuning.check()
        with self._turn:
            self.launches.append(launch)
            done = launch.run(memory=self.memory, **self._machine)
            self.reports += done.reports
            self.counters = self.counters + done.counters
        if done.reports and self._on_report == "raise":
            raise ReportsError(done.reports)


@dataclass(frozen=True)
class Compiled:
    """A kernel out of Triton's compiler. `asm` holds its "ptx" and "cubin", as that of Triton's own CompiledKernel."""

    metadata: Any
    asm: Mapping[str, Any]
    module: Module

    @property
    def kernel(self) -> Kernel:
        (kernel,) = self.module.kernels.values()
        return kernel


@dataclass(frozen=True)
class TritonLaunch:
    """What Triton asked the GPU to do: enough to do it again, with the same tensors or with others."""

    compiled: Compiled
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int  # bytes
    arguments: Mapping[str, Any]  # tensors, and the bytes of scalars

    def run(self, **machine: Any) -> Launch:
        return self.again(self.compiled.module, {}, **machine)

    def again(self, module: Module, tensors: Mapping[str, Any], **machine: Any) -> Launch:
        """The same launch of the one kernel in `module`, with `tensors` in place of the arguments of these names."""
        (name,) = module.kernels
        arguments = {name: tensors.get(name, value) for name, value in self.arguments.items()}
        return module.launch(name, self.grid, self.block, self.shared, arguments, on_report="collect", **machine)


class Tuning:
    """Autotuning without time: of each kernel's configurations the chosen one is best, by default the first.

    A choice made here would otherwise stay in the kernel for the life of the process, and on a GPU it would be wrong.
    So the block's end takes it back.
    """

    def __init__(self, configs: Mapping[str, int]) -> None:
        self.configs = configs
        self.before: dict[Any, dict[Any, Any]] = {}  # Autotuner -> the choices it came with
        self.missing: dict[str, int] = {}

    def benchmark(self, kernel_call: Callable[[], object], **quantiles: object) -> list[float]:
        """Triton's stop-watch; `kernel_call` is Triton's closure over the autotuner and one configuration."""
        tried = inspect.getclosurevars(kernel_call).nonlocals
        autotuner, config = tried["self"], tried["config"]
        self.before.setdefault(autotuner, dict(autotuner.cache))
        name = autotuner.base_fn.__name__
        if name not in self.configs:
            return [0.0] * 3  # all equal: the first wins
        index = self.configs[name]
        if not 0 <= index < len(autotuner.configs):
            raise EmulatorError(f"configs[{name!r}] is {index}: {name} has {len(autotuner.configs)} configurations")
        if config == autotuner.configs[index]:
            self.missing.pop(name, None)
            return [0.0] * 3
        self.missing.setdefault(name, index)
        return [math.inf] * 3

    def check(self) -> None:
        for name, index in self.missing.items():
            raise EmulatorError(
                f"configs[{name!r}] is {index}: the kernel's own pruning has dropped that configuration"
            )

    def undo(self) -> None:
        for autotuner, choices in self.before.items():
            autotuner.cache.clear()
            autotuner.cache.update(choices)
            vars(autotuner).pop("do_bench", None)  # a cached property, which holds our stop-watch


class Launcher:
    """A compiled kernel, as Triton calls it. Triton keeps it, so the session is looked up at each call."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.names = tuple(source.signature)
        self.types = tuple(source.signature.values())
        self.compiled = load(metadata.hash, metadata)

    def __call__(
        self,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        stream: int,
        function: object,
        packed_metadata: object,
        launch_metadata: object,
        enter: Callable[[object], object] | None,
        leave: Callable[[object], object] | None,
        *values: Any,
    ) -> None:
        session = active_session()
        grid = (grid_x, grid_y, grid_z)
        if 0 in grid:
            return
        arguments = dict(bind(self.names, self.types, values))
        # Two pointers of Triton's own follow: memory per CTA for descriptors made on the device, and for profiling.
        for scratch in ("global_scratch", "profile_scratch")[: len(self.compiled.kernel.parameters) - len(arguments)]:
            size = getattr(self.compiled.metadata, f"{scratch}_size") * math.prod(grid)
            arguments[f"<{scratch}>"] = np.zeros(size, np.uint8) if size else 0
        if enter is not None:
            enter(launch_metadata)
        metadata = self.compiled.metadata
        session.run(TritonLaunch(self.compiled, grid, (32 * metadata.num_warps, 1, 1), metadata.shared, arguments))
        if leave is not None:
            leave(launch_metadata)


class Driver:
    """The part of `triton.backends.driver.DriverBase` that a launch uses. Nothing here touches a GPU."""

    launcher_cls = Launcher

    def __init__(self, session: Session) -> None:
        self.session = session
        self.utils = self

    def get_current_device(self) -> str:
        """The key of Triton's table of compiled kernels: one per target, apart from those of real devices."""
        return f"emulated {self.session.target}"

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", DEVICES[self.session.target].capability, 32)

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., list[float]]:
        return self.session._tuning.benchmark

    def get_device_properties(self, device: str) -> dict[str, int]:
        return DEVICES[self.session.target].properties()

    def load_binary(self, name: str, binary: bytes, shared: int, device: str) -> tuple[None, None, int, int, int]:
        """Module, function, registers, spills, threads. No module: nothing is there to unload after the block."""
        return None, None, 0, 0, 1024


def active_session() -> Session:
    from triton.runtime import driver

    if not isinstance(driver.active, Driver):
        raise EmulatorError("a kernel compiled for the emulator was launched outside its `with triton(...)` block")
    return driver.active.session


_loaded: dict[str, Compiled] = {}


def load(key: str, metadata: Any) -> Compiled:
    """A kernel that Triton has just compiled, out of its cache. It makes a launcher per launch: read once."""
    from triton.runtime.cache import get_cache_manager

    if key not in _loaded:
        files = get_cache_manager(key).get_group(f"{metadata.name[:150]}.json") or {}
        asm = {Path(name).suffix[1:]: Path(path) for name, path in files.items()}
        if "ptx" not in asm:
            raise EmulatorError(f"{metadata.name}: no PTX in Triton's cache; unset TRITON_STORE_BINARY_ONLY")
        ptx = asm["ptx"].read_text(encoding="utf-8")
        module = Module(ptx, name=metadata.name)
        _loaded[key] = Compiled(metadata, {"ptx": ptx, "cubin": asm["cubin"].read_bytes()}, module)
    return _loaded[key]


def bind(names: Sequence[str], types: Sequence[Any], values: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """The arguments that are parameters of the PTX: tuples flattened; constants, None and specialised 1 left out."""
    for name, kind, value in zip(names, types, values, strict=True):
        if isinstance(kind, tuple):
            yield from bind([f"{name}[{i}]" for i in range(len(kind))], kind, value)
        elif kind != "constexpr":
            yield name, argument(name, kind, value)


def argument(name: str, kind: str, value: Any) -> Any:
    """A pointer's tensor, or the bytes of a scalar as Triton's CUDA launcher would pass them."""
    if kind.startswith("*"):
        tensor = getattr(value, "base", value) if type(value).__name__ == "TensorWrapper" else value
        where = getattr(getattr(tensor, "device", None), "type", "cpu")
        if where != "cpu":
            raise EmulatorError(
                f"{name}: a tensor on {where} was given; the emulator's memory is the CPU's, pass .cpu()"
            )
        return tensor
    if kind.startswith(("tensordesc", "nvTmaDesc")):
        raise UnsupportedPTX(f"{name}: a tensor descriptor (TMA); pass a pointer and strides")
    if kind == "bf16":  # Triton's launcher cuts a float32 off, it does not round
        return np.float32(value).tobytes()[2:]
    if kind in FLOATS:
        return FLOATS[kind](value).tobytes()
    size = max(int(kind.lstrip("iu")) // 8, 1)
    return (int(value) % (1 << 8 * size)).to_bytes(size, "little")


FLOATS: dict[str, Any] = {"fp16": np.float16, "fp32": np.float32, "f32": np.float32, "fp64": np.float64}

_in_use = threading.Lock()


@contextmanager
def triton(
    target: str = "sm_80",
    *,
    schedule: str = "lockstep",
    seed: int = 0,
    async_copies: str = "late",
    checks: bool = True,
    on_report: str = "raise",
    configs: Mapping[str, int] | None = None,
) -> Iterator[Session]:
    """Inside the block, launches of `@triton.jit` kernels on CPU tensors run in the emulator.

    target        "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"
    schedule, seed, async_copies, checks      as for `Module.launch`
    on_report     "raise" a ReportsError at the end of a launch that broke a rule, or "collect" in `gpu.reports`
    configs       index of the configuration that an autotuned kernel takes, by its name; the first where not named

    Kernels that read addresses from a table reach only what `gpu.memory` names: `gpu.memory["p"] = p`.

    The block is the process's: launches of other threads run in it too, one at a time, and a second block is refused
    until the first has ended.
    """
    from triton import knobs
    from triton.runtime import driver

    if target not in DEVICES:
        raise EmulatorError(f"target {target!r}: expected one of {', '.join(DEVICES)}")
    if on_report not in ("raise", "collect"):
        raise EmulatorError(f"on_report {on_report!r}: expected 'raise' or 'collect'")
    if knobs.runtime.interpret:
        raise EmulatorError("TRITON_INTERPRET is set, so that kernels would never be compiled: unset it")
    if not _in_use.acquire(blocking=False):
        raise EmulatorError("another `with triton(...)` block is active in this process: end it first")
    machine = {"schedule": schedule, "seed": seed, "async_copies": async_copies, "checks": checks}
    session = Session(target, on_report, configs or {}, machine)
    before = driver._active  # not `driver.active`, which raises where there is no GPU
    try:
        with knobs.cache.scope():
            # A folder of its own: timings of configurations that never ran must not reach a GPU's runs.
            knobs.cache.dir = os.path.join(knobs.cache.dir, "emulator")
            driver.set_active(Driver(session))
            yield session
    finally:
        driver.set_active(before)
        session._tuning.undo()
        _in_use.release()
