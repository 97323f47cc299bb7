"""GPU memory of another process on the same machine, by CUDA IPC: torch's own storage handles, written out field by field.

torch passes these between processes in a pickle (`torch.multiprocessing.reductions`); here they are bytes and integers of a
`CudaStorage`. The one who shares keeps the tensor alive, and its contents still, until the receiver is done.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miles_rollout.weights.offer import CudaStorage


def share(tensor: Tensor) -> CudaStorage:
    """The handle of a CUDA tensor's storage. Raises ValueError when the driver or the allocator cannot share it."""
    storage = tensor.untyped_storage()
    try:
        device, handle, size, offset, counter, counter_offset, event, sync = storage._share_cuda_()
    except RuntimeError as error:
        raise ValueError(f"this process cannot share GPU memory by CUDA IPC ({error}); use another sync.kind") from error
    return CudaStorage(
        device_uuid=str(torch.cuda.get_device_properties(device).uuid), handle=handle, size_bytes=size, offset_bytes=offset,
        ref_counter_handle=counter, ref_counter_offset=counter_offset, event_handle=event, event_sync_required=bool(sync),
    )  # fmt: skip


def open_shared(shared: CudaStorage) -> Tensor:
    """Another process' storage as a flat uint8 tensor. Raises ValueError when its GPU is not here or the driver refuses."""
    torch.cuda.init()
    device = _device(shared.device_uuid)
    try:
        storage = torch.UntypedStorage._new_shared_cuda(
            device, shared.handle, shared.size_bytes, shared.offset_bytes, shared.ref_counter_handle,
            shared.ref_counter_offset, shared.event_handle, shared.event_sync_required,
        )  # fmt: skip
    except RuntimeError as error:
        raise ValueError(f"GPU memory of the publisher cannot be opened by CUDA IPC: {error}") from error
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (shared.size_bytes,), (1,))


def _device(uuid: str) -> int:
    found = [n for n in range(torch.cuda.device_count()) if str(torch.cuda.get_device_properties(n).uuid) == uuid]
    if not found:
        raise ValueError(f"weight update: GPU {uuid} of the publisher is not visible here; trainer and engine must share it")
    return found[0]
