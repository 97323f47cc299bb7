"""Refusing a run that cannot fit: before anything large is loaded, or while it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from miles_core.config.schema import RunConfig
from miles_core.memory.jobs import Mode, device_of_run, job_of_run
from miles_core.memory.plan import make_plan
from miles_core.memory.shapes import Device
from miles_core.memory.show import verdict
from miles_kernels.nn.config import DecoderConfig


def require_room(config: RunConfig, shape: DecoderConfig, mode: Mode, device: Device | None = None) -> None:
    """Raise ValueError, with what would make it fit, when the plan exceeds the device that the run would use.

    On the CPU nothing is refused: its memory can be extended by the operating system, and costs nothing until touched.
    """
    device = device or device_of_run(config)
    if device.is_host:
        return
    plan = make_plan(job_of_run(config, shape, mode, device, config.num_trainers))
    if not plan.fits:
        raise ValueError("\n".join([*verdict(plan), "See the whole plan with: miles plan"]))


@contextmanager
def while_building() -> Iterator[None]:
    """Around what loads weights and makes engine and trainer: memory that runs out there is one OutOfRoom."""
    from miles_core.memory.ladder import OutOfRoom, is_out_of_memory  # with torch, which loading brings anyway

    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfRoom) or not is_out_of_memory(error):
            raise
        raise OutOfRoom(
            f"out of memory while model, engine and trainer are made: {str(error).splitlines()[0]}\n"
            "miles plan, with the same arguments, says what they hold and what would make them fit"
        ) from None
