"""Process groups whose communicators can be let go while everybody sleeps, and are made again when somebody next calls.

A communicator of NCCL holds hundreds of MiB of the device for as long as it lives, and torch keeps those of its own groups until
the end. So what a trainer says over the device goes through communicators of ours, made of torch's public transports.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

_NUMBER = itertools.count()
"""Of objects made in this process; the same everywhere, as they are made collectively and in one order."""


class Peers:
    """The processes of a group of torch's, talking over communicators of their own, which are made at the first call.

    Made by all members alike. Unless `own`, this is torch's group and nothing else: `release` frees nothing. `live` is a
    torch group, whose own methods are to be called: it is in none of torch's tables. Tensors of the host, and everything
    without NCCL, go through the group of torch's, which costs no device memory; `transport` makes another one out of
    (store, rank, size), for tests.

    Example: peers = Peers(mesh.get_group(), "shard", own=True); broadcast(x, 0, peers); peers.release()
    """

    def __init__(
        self, group: Any, name: str, *, own: bool = False, transport: Callable[[Any, int, int], Any] | None = None
    ) -> None:
        self.name, self.own = name, own
        self.rank, self.size = int(group.rank()), int(group.size())
        self._group = group
        self._transport = transport or (_nccl if own and "nccl" in dist.get_backend_config() else None)
        self._place = f"miles/peers/{next(_NUMBER)}/{name}/{dist.get_process_group_ranks(group)[0]}"
        self._backend: Any = None
        self._live: Any = None
        self.num_made = 0
        """Times that communicators have been made."""

    @property
    def live(self) -> Any:
        """The torch group, made when there is none. Collective then."""
        if self._live is None:
            self._live = self._group if self._transport is None else self._make(self._transport)
        return self._live

    def release(self) -> None:
        """Give up the communicators. Collective, with nothing in flight. Idempotent; the next call makes new ones."""
        self._live = None
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.shutdown()

    def close(self) -> None:
        """Give up the communicators for good, and torch's group with them. Idempotent."""
        self.release()
        self._group = None

    def abort(self) -> None:
        """End collectives that wait for somebody who will not come, with an error for whoever waits."""
        if self._backend is not None:
            self._backend.abort()

    def _make(self, transport: Callable[[Any, int, int], Any]) -> Any:
        from torch.distributed import PrefixStore, ProcessGroup

        kinds = ProcessGroup.BackendType
        store = PrefixStore(f"{self._place}/{self.num_made}", dist.distributed_c10d._get_default_store())
        self.num_made += 1
        group = ProcessGroup(store, self.rank, self.size)
        self._backend = transport(store, self.rank, self.size)
        if self._backend.name() != "nccl":
            group._set_default_backend(kinds.GLOO)
            group._register_backend(torch.device("cpu"), kinds.GLOO, self._backend)
            return group
        group._set_default_backend(kinds.NCCL)
        group._register_backend(torch.device("cuda"), kinds.NCCL, self._backend)
        if "gloo" in dist.get_backend_config():
            group._register_backend(torch.device("cpu"), kinds.GLOO, self._group._get_backend(torch.device("cpu")))
        return group


def _nccl(store: Any, rank: int, size: int) -> Any:
    """A transport with the deadline of the world's."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cuda")).options._timeout
    return dist.ProcessGroupNCCL(store, rank, size, options)
