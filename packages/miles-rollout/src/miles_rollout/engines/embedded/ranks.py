"""What the processes of a tensor-parallel engine say to each other, and how they meet.

The first rank leads: it is the engine's own process, and tells the others every call it makes of its `EngineCore`, before it
makes it. All ranks hold the same requests and draw the same tokens, so they make the same steps; in a step they meet in the
sums of `nn.parallel`. How they get weights: `staging`.
"""

from __future__ import annotations

import struct
from datetime import timedelta
from typing import IO, Any

import msgspec
import torch

from miles_rollout.engines.embedded.config import EmbeddedConfig
from miles_rollout.wire import GenerateRequest, WeightManifest

READY = b""
"""What a rank writes when it can compute as the first one does, and goes to meet the others."""
_LENGTH = struct.Struct("<Q")


class Start(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The first message to a rank: all it needs to be one."""

    rank: int
    ranks: int
    port: int
    """Of 127.0.0.1, where the ranks meet."""
    device: str
    threads: int
    deadline_s: float
    shape: dict[str, Any]
    """Fields of the whole model's DecoderConfig."""
    contract: str
    """JSON of the leader's contract."""
    shards: int
    config: EmbeddedConfig
    num_pages: int
    tokenizer: str
    """Folder of the tokenizer, for stop strings."""
    weight_version: int


class Add(msgspec.Struct, frozen=True, tag=True):
    """Queue a request."""

    request: GenerateRequest
    arrival: int
    eos: tuple[int, ...]
    stream: bool


class Call(msgspec.Struct, frozen=True, tag=True):
    """Call a method of the core that takes nothing, a request id or memory tags."""

    name: str
    argument: str | tuple[str, ...] | None = None


class Begin(msgspec.Struct, frozen=True, tag=True):
    """Make room for the weights of a manifest."""

    manifest: WeightManifest


class Bucket(msgspec.Struct, frozen=True, tag=True):
    """Take some of its tensors from the leader, by their numbers."""

    numbers: tuple[int, ...]


class Swap(msgspec.Struct, frozen=True, tag=True):
    """Serve them, if every rank has found the hashes stated."""

    stated: tuple[str, ...]


class Bye(msgspec.Struct, frozen=True, tag=True):
    """End."""


Message = Start | Add | Call | Begin | Bucket | Swap | Bye


class Failure(msgspec.Struct, frozen=True):
    """What a rank writes before it ends in an error."""

    text: str


def write(stream: IO[bytes], message: Any) -> None:
    """One message, length first. Raises OSError when nobody reads any more."""
    write_raw(stream, msgspec.msgpack.encode(message))


def write_raw(stream: IO[bytes], content: bytes) -> None:
    """The same for bytes."""
    stream.write(framed(content))
    stream.flush()


def framed(content: bytes) -> bytes:
    """A message as it travels: its length, then itself."""
    return _LENGTH.pack(len(content)) + content


def read(stream: IO[bytes]) -> bytes | None:
    """The next message; None at the end of the stream."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    content = stream.read(length)
    return content if len(content) == length else None


def make_store(port: int, *, leads: bool, deadline_s: float) -> Any:
    """The place where ranks meet; the leader's has the port it got in `.port` (ask with port 0)."""
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", port, None, is_master=leads, timeout=timedelta(seconds=deadline_s), wait_for_workers=False)


def make_group(store: Any, rank: int, ranks: int, device: torch.device, deadline_s: float) -> Any:
    """A process group of its own, so that a trainer in this process keeps the default one to itself. Collective.

    Raises RuntimeError when the others do not come in time.
    """
    from torch.distributed import ProcessGroup

    limit = timedelta(seconds=deadline_s)
    if device.type == "cuda":
        from torch.distributed import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = limit
        backend, kind = ProcessGroupNCCL(store, rank, ranks, options), ProcessGroup.BackendType.NCCL
    else:
        from torch.distributed import ProcessGroupGloo

        backend, kind = ProcessGroupGloo(store, rank, ranks, limit), ProcessGroup.BackendType.GLOO
    group = ProcessGroup(store, rank, ranks)
    group._set_default_backend(kind)
    backend._set_sequence_number_for_group()
    group._register_backend(torch.device(device.type), kind, backend)
    return group
