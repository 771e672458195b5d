from collections.abc import Sequence

def instruction_sets() -> list[str]: ...
def compiler() -> str: ...
def threads() -> int: ...
def force_instruction_set(name: str) -> None: ...
def optimizer_update(
    rule: int,
    param: int,
    grad: int,
    moment: int,
    n_moments: int,
    *,
    stochastic: bool,
    maximize: bool,
    nesterov: bool,
    seed: int,
    step: int,
    factor: float,
    scalars: Sequence[float],
    constants: Sequence[float],
    table: Sequence[int],
    threads: int,
) -> None: ...
def optimizer_sum_of_squares(table: Sequence[int], threads: int) -> float: ...
