"""How much the emulator sees: one damaged instruction at a time in two attention kernels, over the gallery's shapes.

`python test_mutation.py` prints the survivors that mutation_survivors.json does not know yet.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import triton

from hotloop import emulator
from hotloop.emulator import EmulatorError, Launch, Module, UnsupportedPTX, cuda
from hotloop.emulator.triton_driver import TritonLaunch

from gallery import attention
from gallery.case import SCHEDULES, Machine, Tensors
from gallery.mutation import Mutant, mutants

SURVIVORS = Path(__file__).with_name("mutation_survivors.json")
LOCKSTEP, EARLY, _ = SCHEDULES.values()
Shape = tuple[int, int, int]
Program = Callable[[Module, Tensors, Machine], Launch]


def runs(causal: tuple[int, ...]) -> Iterator[tuple[Shape, Machine]]:
    """The likeliest to find a fault first."""
    for flag in causal:
        yield (1, 100, flag), LOCKSTEP
    for length, flag in product(attention.RAGGED, causal):
        yield (1, length, flag), LOCKSTEP
    for flag in causal:
        yield (2, 141, flag), LOCKSTEP
        yield (1, 100, flag), EARLY


def triton_program() -> tuple[str, Program]:
    """The PTX for any length that is no multiple of 16, and the launches that Triton makes of it."""

    @cache
    def recorded(shape: Shape) -> TritonLaunch:
        with emulator.triton("sm_80") as gpu:
            attention.launch_triton(attention.tensors(shape))
        return gpu.launches[0]

    def run(module: Module, t: Tensors, machine: Machine) -> Launch:
        heads, length, _ = t["q"].shape
        return recorded((heads, length, 0)).again(module, t, **machine)

    ptx = {recorded(shape).compiled.asm["ptx"] for shape, _ in runs((0,))}
    assert len(ptx) == 1
    return ptx.pop(), run


def cuda_program() -> tuple[str, Program]:
    def run(module: Module, t: Tensors, machine: Machine) -> Launch:
        return attention.launch_cuda(module, t, {**machine, "on_report": "collect"})

    return cuda.compile_ptx(Path(__file__).with_name("gallery") / "attention.cu", "sm_80"), run


PROGRAMS = {"triton sm_80": (triton_program, (0,)), "cuda sm_80": (cuda_program, (0, 1))}


def verdict(ptx: str, run: Program, causal: tuple[int, ...]) -> str | None:
    """What gave the damage away; None if nothing did."""
    module = Module(ptx)
    for shape, machine in runs(causal):
        given, got = attention.tensors(shape), attention.tensors(shape)
        try:
            launch = run(module, got, machine)
        except UnsupportedPTX:
            raise  # a rule that makes no PTX would count as found
        except EmulatorError as error:
            return str(error)
        if launch.reports:
            return launch.reports[0].kind
        try:
            attention.CASE.check(given, got)
        except AssertionError:
            return "wrong numbers"
    return None


def survivors(program: str) -> tuple[list[Mutant], int]:
    make, causal = PROGRAMS[program]
    ptx, run = make()
    assert verdict(ptx, run, causal) is None
    damaged = list(mutants(ptx))
    return [mutant for mutant in damaged if verdict(mutant.ptx, run, causal) is None], len(damaged)


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_most_damage_is_found_and_the_rest_is_explained(program: str):
    if "V13.0.88" not in cuda.version(cuda.find_nvcc()) or not triton.__version__.startswith("3.9."):
        pytest.skip(
            f"the survivors are of nvcc 13.0.88 and Triton 3.9, not of this nvcc with Triton {triton.__version__}"
        )
    alive, total = survivors(program)
    print(f"{program}: {total - len(alive)} of {total} mutants found")
    assert total - len(alive) >= 0.85 * total
    explained = json.loads(SURVIVORS.read_text())[program]
    assert {mutant.name for mutant in alive} == set(explained)
    assert all(explained.values())


if __name__ == "__main__":
    known = json.loads(SURVIVORS.read_text()) if SURVIVORS.exists() else {}
    for program in PROGRAMS:
        alive, total = survivors(program)
        print(f"{program}: {total - len(alive)} of {total} found")
        print(json.dumps({mutant.name: known.get(program, {}).get(mutant.name, "") for mutant in alive}, indent=1))
