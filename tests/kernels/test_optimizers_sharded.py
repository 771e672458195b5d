"""Shard(0) and FSDP2 over 1, 2 and 3 gloo processes: the bits of one process, checkpoints across world sizes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hotloop.kernels.optimizers import SGD, AdamW, Lion

# Rows that no number of ranks divides, fewer rows than ranks, odd row lengths (shards begin inside a Philox call).
SHAPES = [(130, 67), (2, 5), (7,), (100, 300)]
OPTIMIZERS: list[tuple[Any, dict[str, Any]]] = [
    (AdamW, {"state_dtype": "float32"}),
    (AdamW, {"state_dtype": "int8", "rounding": "stochastic"}),
    (Lion, {"state_dtype": "bfloat16", "rounding": "stochastic"}),
    (SGD, {"momentum": 0.9, "state_dtype": "int8"}),
]


def draws(step: int, dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=draw).to(dtype) for shape in SHAPES]


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def steps(params: list[Any], optimizer: Any, numbers: range) -> None:
    for step in numbers:
        for p, grad in zip(params, draws(step, p_dtype(params)), strict=True):
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad
        optimizer.step()


def p_dtype(params: list[Any]) -> torch.dtype:
    return params[0].dtype


def results(params: list[Any], optimizer: Any) -> list[Tensor]:
    kept = [whole(x) for p in params for _, x in sorted(optimizer.state[p].items())]
    return [*(whole(p.detach()) for p in params), *kept, optimizer.grad_norm]


def one_process(kind: Any, options: dict[str, Any], dtype: torch.dtype, numbers: range) -> list[Tensor]:
    params = [nn.Parameter(x) for x in draws(100, dtype)]
    optimizer = kind(params, lr=1e-2, weight_decay=0.1, max_grad_norm=5.0, **options)
    steps(params, optimizer, numbers)
    return results(params, optimizer)


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(*(x.reshape(-1).contiguous().view(torch.uint8) for x in (a, b))), a.shape


def begin(rank: int, ranks: int, file: str) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    return init_device_mesh("cpu", (ranks,))


def same_bits(rank: int, ranks: int, folder: str) -> None:
    mesh = begin(rank, ranks, f"{folder}/meet")
    for dtype in (torch.float32, torch.bfloat16):
        for kind, options in OPTIMIZERS:
            params = [nn.Parameter(distribute_tensor(x, mesh, [Shard(0)])) for x in draws(100, dtype)]
            optimizer = kind(params, lr=1e-2, weight_decay=0.1, max_grad_norm=5.0, **options)
            steps(params, optimizer, range(3))
            assert_same_bits(results(params, optimizer), one_process(kind, options, dtype, range(3)))
    with pytest.raises(ValueError, match=r"parameter 'w' of group 0 \(shape \(4, 6\)\) is placed as .*Shard\(dim=1\)"):
        AdamW([("w", nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(1)])))])
    copied = nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Replicate()]))
    copied.grad = distribute_tensor(torch.ones(4, 6), mesh, [Replicate()])
    optimizer = AdamW([copied])
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(24**0.5)
    end()


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(65, 130), nn.GELU(), nn.Linear(130, 67)).to(dtype)


def fsdp_steps(network: nn.Module, optimizer: Any, numbers: range) -> None:
    for step in numbers:
        x = torch.randn(8, 65, generator=torch.Generator().manual_seed(step)).to(next(network.parameters()).dtype)
        network(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


FSDP_OPTIONS: dict[str, Any] = {
    "lr": 1e-2, "state_dtype": "int8", "master": "float32", "rounding": "stochastic", "max_grad_norm": 1.0
}  # fmt: skip


def end() -> None:
    """Leave together, and at once: taking gloo's threads down with the interpreter ends in std::terminate at times."""
    dist.barrier()
    sys.stderr.flush()
    os._exit(0)


def save(rank: int, ranks: int, folder: str) -> None:
    mesh = begin(rank, ranks, f"{folder}/meet")
    network = model(torch.bfloat16)
    fully_shard(network, mesh=mesh)
    optimizer = AdamW(network.parameters(), **FSDP_OPTIONS)
    fsdp_steps(network, optimizer, range(2))
    state = {"model": network.state_dict(), "optimizer": get_optimizer_state_dict(network, optimizer)}
    dcp.save(state, checkpoint_id=f"{folder}/checkpoint")
    kept = results(list(network.parameters()), optimizer)
    if rank == 0:
        torch.save(kept, f"{folder}/kept.pt")
    end()


def load(rank: int, ranks: int, folder: str) -> None:
    mesh = begin(rank, ranks, f"{folder}/meet-again")
    network = model(torch.bfloat16)
    fully_shard(network, mesh=mesh)
    optimizer = AdamW(network.parameters(), **FSDP_OPTIONS)
    state = {"model": network.state_dict(), "optimizer": get_optimizer_state_dict(network, optimizer)}
    dcp.load(state, checkpoint_id=f"{folder}/checkpoint")
    network.load_state_dict(state["model"])
    set_optimizer_state_dict(network, optimizer, state["optimizer"])
    found, expected = results(list(network.parameters()), optimizer), torch.load(f"{folder}/kept.pt")
    assert_same_bits(found[:-1], expected[:-1])
    assert {x.dtype for p in optimizer._parameters() for x in optimizer.state[p].values()} == {
        torch.float32, torch.uint8
    }  # fmt: skip
    fsdp_steps(network, optimizer, range(2, 3))
    end()


def in_processes(task: str, ranks: int, folder: Path) -> None:
    """Run a function of this file in `ranks` fresh processes."""
    processes = [
        subprocess.Popen([sys.executable, __file__, task, str(rank), str(ranks), str(folder)],
                         stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]  # fmt: skip
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_layout_gives_the_bits_of_one_process(ranks: int, tmp_path: Path) -> None:
    in_processes("same_bits", ranks, tmp_path)


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(2, 3), (3, 1)])
def test_fsdp_checkpoints_move_to_another_world_size(saved_by: int, loaded_by: int, tmp_path: Path) -> None:
    in_processes("save", saved_by, tmp_path)
    in_processes("load", loaded_by, tmp_path)


if __name__ == "__main__":
    {"same_bits": same_bits, "save": save, "load": load}[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
