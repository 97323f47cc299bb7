"""What the processes of a tensor-parallel engine say to each other, how they meet, and how they get weights.

The first rank leads: it is the engine's own process, and tells the others every call it makes of its `EngineCore`, before it
makes it. All ranks hold the same requests and draw the same tokens, so they make the same steps; in a step they meet in the
sums of `nn.parallel`. Legend: R = ranks.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import IO, Any

import msgspec
import torch
from torch import Tensor

from miles_kernels.checksum import tensor_hashes
from miles_kernels.cuda.comm import all_gather
from miles_kernels.nn.decoder import Decoder
from miles_kernels.nn.parallel import local_part
from miles_rollout.engines.embedded.config import EmbeddedConfig
from miles_rollout.wire import GenerateRequest, TensorSpec, WeightManifest

BUCKET_BYTES = 256 << 20
"""Bytes of weights on their way at once; each rank holds that much beside its own staged part."""
READY = b""
"""What a rank writes when it has built its part."""
_ALIGN = 256
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


class Load(msgspec.Struct, frozen=True, tag=True):
    """Take the weights of a manifest from the leader."""

    manifest: WeightManifest


class Bye(msgspec.Struct, frozen=True, tag=True):
    """End."""


Message = Start | Add | Call | Load | Bye


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


def spread_weights(
    manifest: WeightManifest, whole: Mapping[str, Tensor] | None, decoder: Decoder, group: Any, rank: int, state: Sequence[int]
) -> dict[str, Tensor]:
    """Send the tensors of `manifest` from the leader (`whole`) to all ranks; the parts `decoder` holds, staged. Collective.

    Every rank hashes every tensor as it arrived. Raises ValueError on every rank alike when one of them found another hash,
    RuntimeError when the ranks' `state` (what they have computed until now) is not the same.
    """
    device, ranks, experts = decoder.embed_tokens.device, group.size(), decoder.config.num_experts
    staged: dict[str, Tensor] = {}
    wrong: list[str] = []
    for specs in _buckets(manifest.tensors):
        rooms = [_bytes(spec) + -_bytes(spec) % _ALIGN for spec in specs]
        flat = torch.zeros(sum(rooms), dtype=torch.uint8, device=device)
        views = [_view(part, spec) for spec, part in zip(specs, flat.split(rooms), strict=True)]
        if rank == 0:
            assert whole is not None
            for spec, view in zip(specs, views, strict=True):
                view.copy_(whole[spec.name])
        _broadcast(flat, group)
        found = tensor_hashes(views)
        for spec, view, hashed in zip(specs, views, found, strict=True):
            if hashed != spec.hash:
                wrong.append(f"{spec.name} hashes to {hashed} on rank {rank}, the manifest says {spec.hash}")
            part = local_part(spec.name, view, rank, ranks, experts)
            if part is not None:
                staged[spec.name] = part.clone(memory_format=torch.contiguous_format)
    answers = all_gather(torch.tensor([len(wrong), *state], dtype=torch.int64, device=device), group).tolist()
    if any(answer[1:] != answers[0][1:] for answer in answers):
        raise RuntimeError(f"the ranks have computed different things: {answers}; tokens since the last weights are in doubt")
    if any(answer[0] for answer in answers):
        told = "; ".join(wrong[:3]) or f"ranks {[i for i, answer in enumerate(answers) if answer[0]]} found other hashes"
        raise ValueError(f"weight update: {told}; the transfer is damaged, send it again")
    return staged


def put_weights(decoder: Decoder, staged: Mapping[str, Tensor]) -> None:
    """Copy staged parts over those the decoder holds."""
    held = dict(decoder.hf_state())
    assert held.keys() == staged.keys(), held.keys() ^ staged.keys()
    with torch.no_grad():
        torch._foreach_copy_(list(held.values()), [staged[name] for name in held])


def _broadcast(flat: Tensor, group: Any) -> None:
    from torch.distributed import BroadcastOptions

    options = BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    group.broadcast([flat], options).wait()


def _buckets(specs: Iterable[TensorSpec]) -> Iterator[list[TensorSpec]]:
    """Consecutive tensors of about `BUCKET_BYTES`, none cut."""
    bucket: list[TensorSpec] = []
    held = 0
    for spec in specs:
        bucket.append(spec)
        held += _bytes(spec)
        if held >= BUCKET_BYTES:
            yield bucket
            bucket, held = [], 0
    if bucket:
        yield bucket


def _bytes(spec: TensorSpec) -> int:
    size: int = torch.Size(spec.shape).numel() * getattr(torch, spec.dtype).itemsize
    return size


def _view(room: Tensor, spec: TensorSpec) -> Tensor:
    return room[: _bytes(spec)].view(getattr(torch, spec.dtype)).view(spec.shape)
