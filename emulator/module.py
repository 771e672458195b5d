"""The public face: PTX text in, kernels that can be launched many times out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from hotloop.emulator.errors import EmulatorError, ReportsError
from hotloop.emulator.launch import AsyncCopies, Launch, LaunchState, Options, Schedule, Shape
from hotloop.emulator.lower import lower
from hotloop.emulator.parser import Function, Parser, Source, parameters
from hotloop.emulator.program import Program
from hotloop.emulator.syntax import Parameter


class Kernel:
    """An entry of a module. It is lowered and compiled when it is first launched."""

    def __init__(self, source: Source, function: Function) -> None:
        self._source = source
        self._function = function
        self.name = function.name
        self.target = source.target

    @property
    def parameters(self) -> list[Parameter]:
        return parameters(self._function)

    @cached_property
    def program(self) -> Program:
        return Program(lower(self._source, self._function))

    @property
    def reqntid(self) -> tuple[int, int, int] | None:
        return self.program.body.reqntid

    @property
    def static_shared(self) -> int:
        """Bytes of shared memory with a fixed size."""
        top = 0
        for v in self.program.body.shared:
            if v.size is not None:
                top = -(-top // v.align) * v.align + v.size
        return top

    def __repr__(self) -> str:
        taken = ", ".join(f"{p.name}: {p.type}" for p in self.parameters)
        return f"Kernel({self.name}({taken}) for {self.target})"


class Kernels(Mapping[str, Kernel]):
    def __init__(self, kernels: dict[str, Kernel]) -> None:
        self._kernels = kernels

    def __getitem__(self, name: str) -> Kernel:
        if name in self._kernels:
            return self._kernels[name]
        # Names of C++ kernels are mangled: a plain name means the only one that contains it.
        alike = [k for k in self._kernels if f"{len(name)}{name}" in k]
        if len(alike) == 1:
            return self._kernels[alike[0]]
        raise KeyError(f"no kernel {name!r}; the module has {', '.join(self._kernels) or 'none'}")

    def __contains__(self, name: object) -> bool:
        return name in self._kernels

    def __iter__(self) -> Iterator[str]:
        return iter(self._kernels)

    def __len__(self) -> int:
        return len(self._kernels)


class Module:
    """PTX text, parsed once. Variables in global memory keep their values between launches."""

    def __init__(self, ptx: str, name: str = "module", source_root: str | Path | None = None) -> None:
        """source_root: source files below it are named relative to it in reports, others by their last part."""
        self.name = name
        self._source = Parser(ptx, None if source_root is None else str(source_root)).parse()
        self.target = self._source.target
        self.kernels: Mapping[str, Kernel] = Kernels(
            {f.name: Kernel(self._source, f) for f in self._source.functions.values() if f.is_kernel and f.defined}
        )
        self._globals = {
            v.name: v.data.ljust(v.size or 0, b"\0") for v in self._source.variables if v.space in ("global", "const")
        }

    @classmethod
    def from_cuda(cls, path: str | Path, arch: str = "sm_80", **options: Any) -> Module:
        """Compile a .cu file with nvcc; see hotloop.emulator.cuda."""
        from hotloop.emulator.cuda import module_from_cuda

        return module_from_cuda(path, arch, **options)

    def launch(
        self,
        kernel: str,
        grid: Shape,
        block: Shape,
        shared: int,
        args: Sequence[Any] | Mapping[str, Any],
        *,
        schedule: Schedule = "lockstep",
        seed: int = 0,
        async_copies: AsyncCopies = "late",
        checks: bool = True,
        on_report: Literal["raise", "collect"] = "raise",
        memory: Mapping[str, Any] | None = None,
    ) -> Launch:
        """Run `kernel`. Tensors in `args` (CPU tensors, numpy arrays) are read and written in place.

        grid, block: an int or up to three. shared: bytes of dynamic shared memory. args: one per parameter, in order; a
        mapping names them in reports. A pointer parameter takes a tensor, or an int such as 0 for a null pointer.
        schedule, seed: see hotloop.emulator.scheduler. async_copies: cp.async lands when waited for, or at once.
        memory: tensors that the kernel reaches through addresses in integer tensors among `args`, by name.
        """
        if on_report not in ("raise", "collect"):
            raise EmulatorError(f"on_report={on_report!r}: expected 'raise' or 'collect'")
        options = Options(schedule, seed, async_copies, checks)
        program = self.kernels[kernel].program
        state = LaunchState(program, grid, block, shared, args, options, self._globals, memory or {})
        done = state.run()
        for name, offset in state.global_offsets.items():
            self._globals[name] = state.arena.data[offset : offset + len(self._globals[name])].tobytes()
        if done.reports and on_report == "raise":
            raise ReportsError(done.reports)
        return done

    def __repr__(self) -> str:
        return f"Module({self.name}, {self.target}: {', '.join(self.kernels)})"
