"""A GPU emulator for verification: runs compiled PTX on a CPU, checks it and counts its work.

    from hotloop import emulator

    # Launches of @triton.jit kernels run here, on CPU tensors; a fault raises ReportsError.
    with emulator.triton(target="sm_80", schedule="random", seed=0) as gpu:
        softmax[(rows,)](x, y, columns, BLOCK=1024)
    print(gpu.reports, gpu.counters["warp_instructions"], gpu.counters.table())

    attention = emulator.Module.from_cuda("attention.cu", arch="sm_90a", defines={"D": 64})   # nvcc, kept by content
    attention.launch("forward", grid, (128,), shared_bytes, [q, k, v, o, T, scale], schedule="random", seed=1)

    emulator.static("attention.cu", "sm_80", name="forward").registers         # also .spills, .stack, .shared, .sass

In pytest, `from hotloop.emulator.fixture import emulated` gives a fixture under which a test runs with every schedule.
"""

if __name__ == "hotloop.emulator":
    from typing import TYPE_CHECKING

    from hotloop.emulator.arguments import Uninitialised
    from hotloop.emulator.counters import Counters
    from hotloop.emulator.errors import EmulatorError, Report, ReportsError, UnsupportedPTX
    from hotloop.emulator.launch import Launch
    from hotloop.emulator.module import Kernel, Module

    if TYPE_CHECKING:
        from hotloop.emulator.resources import static
        from hotloop.emulator.triton_driver import triton

    __all__ = [
        "Counters",
        "EmulatorError",
        "Kernel",
        "Launch",
        "Module",
        "Report",
        "ReportsError",
        "Uninitialised",
        "UnsupportedPTX",
        "static",
        "triton",
    ]

    def __getattr__(name: str) -> object:
        """The front ends are imported when they are first used: one needs Triton, the other a compiler."""
        if name == "triton":
            from hotloop.emulator.triton_driver import triton

            return triton
        if name == "static":
            from hotloop.emulator.resources import static

            return static
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

else:
    # The repository root is on sys.path, so that this folder answers to the bare name `emulator`. `transformers` probes
    # for packages by such names: raising here would break its import, and importing would register operators twice.
    __version__ = "0"

    def __getattr__(name: str) -> object:
        raise AttributeError(
            f"{name!r} was looked up in {__file__!r}, imported as {__name__!r}: "
            "this package is imported as hotloop.emulator (run `pip install -e .`, and start Python outside "
            "the repository's root or with -P)"
        )
