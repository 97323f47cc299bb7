"""How a process of a trainer leaves its peers: in good order, before Python ends.

gloo serves every group with threads. Having done a collective, one of them takes Python's lock to let go of its tensors (torch
2.13), and a process that ends meanwhile is aborted: "terminate called without an active exception". The threads end with their
group, but `destroy_process_group` only makes torch forget it. Others hold it still: device meshes, which are kept for good by
caches of sharded tensors; units of FSDP2; and functions of `torch.distributed.nn`, which have it as a default of theirs when they
are imported late, as the first sharded tensor does. Here all of these let go.
"""

from __future__ import annotations

import atexit
import functools
import gc
import sys
import warnings
import weakref
from types import FunctionType
from typing import Any

import torch.distributed as dist

from miles_core.memory.peers import Peers


def leave() -> list[str]:
    """End the process groups of this process and the threads that serve them; its trainers are of no use then.

    Not collective: a peer in the middle of a collective sees its connection close. Returns, with a warning, the names of groups
    that somebody still holds, whose threads therefore go on. Idempotent.
    """
    groups: dict[str, Any] = {}
    if dist.is_initialized():
        groups = {str(name): weakref.ref(group) for group, name in dist.distributed_c10d._world.pg_names.items()}
        dist.destroy_process_group()
    _let_go()
    held = [name for name, group in groups.items() if group() is not None]
    if held:
        warnings.warn(
            f"{len(held)} process group(s) are still held after they were left ({', '.join(held)}): their threads may abort this "
            "process when it ends. Let go of what holds them before",
            stacklevel=2,
        )
    return held


@functools.cache
def leave_at_exit() -> None:
    """Have this process leave its peers when it ends, also if nobody says so; for groups without NCCL, where that cannot wait."""
    if "nccl" not in dist.get_backend_config():
        atexit.register(leave)


def _let_go() -> None:
    """Take process groups out of whatever keeps them without need."""
    megatron: Any = sys.modules.get("miles_core.trainer.megatron.layout")
    if megatron is not None:
        megatron.forget_groups()
    mesh: Any = getattr(sys.modules.get("torch.distributed.device_mesh"), "DeviceMesh", ())
    unit: Any = getattr(sys.modules.get("torch.distributed.fsdp._fully_shard._fsdp_common"), "DataParallelMeshInfo", ())
    gc.collect()
    for each in gc.get_objects():
        kind = type(each)
        if kind is FunctionType:
            if each.__defaults__ and any(map(_is_group, each.__defaults__)):
                each.__defaults__ = tuple(None if _is_group(value) else value for value in each.__defaults__)
        elif issubclass(kind, Peers):
            each.close()
        elif issubclass(kind, mesh):
            getattr(each, "_pg_registry", {}).clear()
        elif issubclass(kind, unit):
            for name in [name for name, value in vars(each).items() if _is_group(value)]:
                setattr(each, name, None)
    gc.collect()


def _is_group(value: Any) -> bool:
    return issubclass(type(value), dist.ProcessGroup)
