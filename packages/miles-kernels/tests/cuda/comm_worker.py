"""One rank of the tensor-parallel test: reads inputs, writes what it computed. Arguments: rank, ranks, folder."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from miles_kernels.cuda.comm import all_reduce, column_parallel_linear, row_parallel_linear


def main(rank: int, ranks: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    data = torch.load(folder / "inputs.pt", weights_only=True)
    x = data["x"].requires_grad_()
    up = data["up"].chunk(ranks)[rank].clone().requires_grad_()
    down = data["down"].chunk(ranks, 1)[rank].clone().requires_grad_()
    group = dist.group.WORLD
    out = row_parallel_linear(column_parallel_linear(x, up, group), down, group)
    dx, d_up, d_down = torch.autograd.grad(out, (x, up, down), data["grad"])
    # the control: each rank's partial product, summed by the library
    plain = torch.nn.functional.linear(torch.nn.functional.linear(x, up).detach(), down.detach())
    dist.all_reduce(plain)
    summed = all_reduce(data["x"].detach() * (rank + 1), group)
    torch.save(
        {"out": out.detach(), "dx": dx, "d_up": d_up, "d_down": d_down, "plain": plain, "summed": summed}, folder / f"{rank}.pt"
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
