"""Refusing a run that cannot fit, before anything large is loaded."""

from __future__ import annotations

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
