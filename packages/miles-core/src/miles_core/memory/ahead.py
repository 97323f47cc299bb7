"""Host memory that a run's trainer will take, begun while its model is being loaded and its engine built.

Making the pages of 92 GiB took most of the 34 to 81 s before a trainer of an 8B model stood (docs/measured/memory.md).
"""

from __future__ import annotations

from collections.abc import Callable

from miles_core.config.schema import RunConfig
from miles_core.memory.homes import column_bytes
from miles_core.memory.slabs import HostSlabs
from miles_core.models import load_shape
from miles_kernels.nn.decoder import Decoder


def prepare_host(config: RunConfig, say: Callable[[str], None]) -> HostSlabs | None:
    """What the optimizer's state of a run in one process will live in; None where it lives elsewhere.

    Whoever gets it hands it to the trainer, or closes it. Raises torch.OutOfMemoryError when the host has no room for it.
    """
    if config.memory.optimizer != "host" or config.model.device == "cpu" or config.trainer.backend != "fsdp":
        return None
    shape, _ = load_shape(config.model, say)
    masters = config.model.dtype != "float32" and config.trainer.master == "float32"
    size = column_bytes([weight.numel() for weight in Decoder(shape, device="meta").parameters()])
    columns = 3 if masters else 2
    say(f'memory.optimizer = "host": {columns * size / 2**30:.1f} GiB of the host are made ready while the model is loaded')
    slabs = HostSlabs(pinned=True)
    slabs.prepare([size] * columns)
    return slabs
