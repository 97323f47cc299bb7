"""Publish weights to an engine in the same process: manifest, transfer, verification, swap."""

from __future__ import annotations

from miles_core.trainer.base import Trainer
from miles_rollout.engine import Engine
from miles_rollout.weights.stage import make_manifest
from miles_rollout.wire import WeightManifest


def manifest(trainer: Trainer, version: int) -> WeightManifest:
    """What the trainer's weights are right now: name, dtype, shape and checksum of every tensor."""
    return make_manifest(trainer.export_weights(), version=version, contract_digest=trainer.contract.digest)


async def publish(trainer: Trainer, engine: Engine, version: int) -> WeightManifest:
    """Bring the engine to the trainer's current weights as `version`; returns what was published.

    Tensors go one at a time, so the sending side holds no second copy. Raises ValueError when the contracts differ, when
    `version` does not grow, when the engine refuses a tensor, or when it does not state the new version afterwards; in the
    first three cases it keeps its old weights.
    """
    before = engine.info()
    if before.contract_digest != trainer.contract.digest:
        raise ValueError(
            f"engine and trainer disagree on the numeric contract ({before.contract_digest} and {trainer.contract.digest}): "
            "their log-probabilities would differ. Run both with the same device, dtype and kernels"
        )
    if version <= before.weight_version:
        raise ValueError(f"weight version {version} does not grow: the engine already serves version {before.weight_version}")
    stated = manifest(trainer, version)
    await engine.update_weights(stated, trainer.export_weights())
    after = engine.info()
    if after.weight_version != version or after.contract_digest != stated.contract_digest:
        raise ValueError(
            f"published weight version {version}, but the engine states version {after.weight_version} "
            f"under contract {after.contract_digest}: stop, its samples cannot be trusted"
        )
    return stated
