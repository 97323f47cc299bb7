"""Leaving the other processes: no thread of theirs is left when Python ends, and no exchange when something fails in between."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from miles_core.trainer import copied
from miles_core.trainer.parallel import DataParallel

LEAVING = """
import atexit, contextlib, warnings
from pathlib import Path
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from miles_core.trainer.processes import leave, leave_at_exit

def threads():
    found = 0
    for name in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            found += "gloo" in name.read_text()
    return found

def work():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    layer = fully_shard(torch.nn.Linear(4, 4), mesh=init_device_mesh("cpu", (1, 1), mesh_dim_names=("a", "b"))["b"])
    layer(torch.ones(1, 4)).sum().backward()
    dist.all_reduce(torch.ones(1))  # a thread that has worked has its name
    assert threads() > 0
    return layer

atexit.register(lambda: print("in the end", threads()))
layer = work()  # still held while its groups end
assert leave() == [] and threads() == 0 and not dist.is_initialized(), threads()
layer, kept = work(), dist.group.WORLD
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    held = leave()
    assert len(held) == 1 and threads() > 0, (held, threads())  # somebody holds it: noticed
assert ["1 process group(s) are still held" in str(each.message) for each in said] == [True], said
del kept
assert threads() == 0
layer = work()
leave_at_exit()
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads by their names, as Linux has them")
def test_no_thread_of_a_group_is_left() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([sys.executable, "-c", LEAVING], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stdout.endswith("in the end 0\n"), done.stdout + done.stderr


class _Work:
    """An exchange that is never done unless somebody waits."""

    def __init__(self, fails: bool) -> None:
        self.fails, self.waited = fails, False

    def wait(self) -> None:
        self.waited = True
        if self.fails:
            raise RuntimeError("the connection broke")


@pytest.mark.parametrize("fails", ["at the start of the third", "while the first is waited for"])
def test_an_exchange_under_way_is_waited_for_when_another_fails(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[_Work] = []

    def all_to_all(output: Tensor, rows: Tensor, group: Any, *, async_op: bool) -> _Work:
        if len(begun) == 2:
            raise torch.OutOfMemoryError("no room")
        begun.append(_Work(fails != "at the start of the third" and not begun))
        return begun[-1]

    monkeypatch.setattr(copied, "_BUCKET_ELEMENTS", 1)
    monkeypatch.setattr(copied, "size_of", lambda group: 2)
    monkeypatch.setattr(copied, "all_to_all", all_to_all)
    monkeypatch.setattr(copied, "all_gather", lambda *given: None)
    with pytest.raises(RuntimeError, match="no room" if fails.endswith("third") else "broke"):
        copied.all_reduce_many_([torch.ones(2) for _ in range(4)], None)
    assert len(begun) == 2 and all(work.waited for work in begun)


def test_a_world_without_host_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    with pytest.raises(ValueError, match=r'initialised with cuda:nccl: .* use init_process_group\("cpu:gloo,cuda:nccl"\)'):
        DataParallel()
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cpu:gloo,cuda:nccl")
    assert DataParallel().size == 2
