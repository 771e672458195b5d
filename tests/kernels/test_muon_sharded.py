"""Muon on two gloo processes: weights that `fully_shard` spreads by rows end where one process brings them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hotloop.kernels.dispatch import use_backend
from hotloop.kernels.optimizers import Muon

RANKS, STEPS = 2, 3
# Odd numbers of rows, fewer rows than ranks, tall and wide: no two shapes but one alike.
SHAPES = [(7, 12), (7, 12), (1, 6), (33, 5), (16, 16)]
BACKENDS = ("reference", "cpu")


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.matrices = nn.ParameterList(torch.randn(shape, generator=draw) for shape in SHAPES)
        self.vector = nn.Parameter(torch.randn(5, generator=draw))


def trained(model: Weights, backend: str) -> list[Tensor]:
    """The weights after some clipped steps; gradients are drawn for whole weights, so all layouts get the same."""
    groups = [{"params": list(model.matrices)}, {"params": [model.vector], "use_muon": False}]
    optimizer = Muon(groups, lr=0.05, max_grad_norm=1.0, state_dtype="bfloat16")
    for step in range(STEPS):
        draw = torch.Generator().manual_seed(step + 1)
        for p in (*model.matrices, model.vector):
            whole = torch.randn(p.shape, generator=draw)
            p.grad = whole if not hasattr(p, "device_mesh") else spread(whole, p)
        with use_backend("reference" if backend == "reference" else None):
            optimizer.step()
    assert optimizer.skipped_steps.item() == 0
    return [p.detach() for p in (*model.matrices, model.vector)]


def spread(whole: Tensor, p: Tensor) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, p.device_mesh, p.placements)


def work(folder: str, rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    for backend in BACKENDS:
        model = Weights()
        fully_shard(model, mesh=mesh)
        whole = [p.full_tensor() for p in trained(model, backend)]
        torch.save(whole, f"{folder}/{backend}-{rank}")
    # Leave together, and at once: taking gloo's threads down with the interpreter ends in std::terminate at times.
    dist.barrier()
    sys.stderr.flush()
    os._exit(0)


def test_sharded_matrices_are_gathered_and_every_rank_has_its_rows(tmp_path: Path) -> None:
    """The same arithmetic on the same whole matrices: within fp32 roundings of the norm, which bf16 can turn into one
    of its own."""
    if not dist.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    command = [sys.executable, __file__, str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(RANKS)]
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    for backend in BACKENDS:
        expected = trained(Weights(), backend)
        for rank in range(RANKS):
            found = torch.load(tmp_path / f"{backend}-{rank}")
            for x, y, before in zip(found, expected, (*Weights().matrices, Weights().vector), strict=True):
                moved = (y - before.detach()).norm().item()
                assert moved > 0.01
                assert (x - y).norm().item() <= (1e-5 if backend == "reference" else 2e-3) * moved, (backend, x.shape)


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]))
