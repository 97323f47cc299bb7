"""How the processes of a trainer share model and batch: arithmetic only, no torch.

The world is a grid of `replicate` x `shard` x `cp` processes, the last axis varying fastest. Weights, gradients and optimizer
state are cut over the `shard` x `cp` processes of a replica; sequences are dealt to the `replicate` x `shard` data-parallel
processes and cut along their length over the `cp` processes of each. Experts live on `ep` neighbouring processes of a replica.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from miles_core.trainer.config import TrainerConfig


@dataclass(frozen=True)
class ProcessLayout:
    """Sizes of the axes. Example: ProcessLayout.of(TrainerConfig(cp=2), world_size=4).shard == 2"""

    replicate: int = 1
    shard: int = 1
    cp: int = 1
    ep: int = 1

    @classmethod
    def of(cls, config: TrainerConfig, world_size: int, num_experts: int | None = None) -> ProcessLayout:
        """The layout a configuration describes in a world of that size; `shard` unset takes what the others leave.

        Raises ValueError naming every field that does not fit, and what would. `num_experts` None: not known yet.
        """
        replicate, cp, ep = config.replicate, config.cp, config.ep
        wrong = []
        left, rest = divmod(world_size, replicate * cp)
        shard = config.shard or max(left, 1)
        if config.shard is None and (rest or not left):
            wrong.append(
                f"trainer.replicate x trainer.cp = {replicate} x {cp} = {replicate * cp} does not divide the {world_size} "
                "process(es) of the trainer; start a multiple of that many processes, or lower one of the two"
            )
        elif config.shard is not None and replicate * shard * cp != world_size:
            wrong.append(
                f"trainer.replicate x trainer.shard x trainer.cp = {replicate} x {shard} x {cp} = {replicate * shard * cp}, but "
                f"the trainer has {world_size} process(es); start that many, or leave trainer.shard unset"
            )
        if (shard * cp) % ep:
            wrong.append(
                f"trainer.ep = {ep} does not divide the {shard * cp} processes of a replica (trainer.shard x trainer.cp); "
                "choose a divisor of it"
            )
        if ep > 1 and num_experts is not None and (not num_experts or num_experts % ep):
            has = f"has {num_experts} experts" if num_experts else "has no experts"
            wrong.append(f"trainer.ep = {ep}, but the model {has}; choose a divisor of the number of experts, or 1")
        if config.gradients == "chained" and replicate != world_size:
            wrong.append(
                f'trainer.gradients = "chained" needs the whole model in each of the {world_size} processes; '
                f"set trainer.replicate = {world_size}"
            )
        if wrong:
            raise ValueError("\n".join(wrong))
        return cls(replicate, shard, cp, ep)

    @property
    def num_processes(self) -> int:
        """All of them."""
        return self.replicate * self.shard * self.cp

    @property
    def num_data(self) -> int:
        """Processes (groups of `cp`) that get different sequences."""
        return self.replicate * self.shard

    def data_rank(self, rank: int) -> int:
        """Which share of the sequences a process gets."""
        return rank // self.cp

    def context_rank(self, rank: int) -> int:
        """Which part of every sequence a process gets."""
        return rank % self.cp

    def words(self) -> str:
        """The layout in a sentence, for a person."""
        if self.num_processes == 1:
            return "1 process holds the whole model"
        copies = f"{self.replicate} replicas of the model, each" if self.replicate > 1 else "the model"
        parts = [
            f"{self.num_processes} processes: {copies} cut over {self.shard * self.cp}"
            if self.shard * self.cp > 1
            else f"{self.num_processes} processes, each with the whole model"
        ]
        parts.append(f"sequences dealt to {self.num_data}" if self.num_data > 1 else "every process sees all sequences")
        if self.cp > 1:
            parts.append(f"each cut along its length over {self.cp} (context parallel)")
        if self.ep > 1:
            parts.append(f"experts spread over {self.ep} (expert parallel)")
        return ", ".join(parts)


UNIT_ELEMENTS = 48 * 2**20
"""Weights that are gathered at once, at least, where a layer has fewer: small layers share what a gathering costs the host."""


def layers_per_unit(layer_elements: int, num_layers: int) -> int:
    """Consecutive layers, of at most so many weights, that are gathered and whose gradients are summed together; never all."""
    return max(1, min(-(-UNIT_ELEMENTS // layer_elements), num_layers // 2))


def world_size_of(environment: Mapping[str, str] | None = None) -> int:
    """Processes a launcher such as torchrun announces in the environment; 1 without one. Raises ValueError for no number."""
    text = (os.environ if environment is None else environment).get("WORLD_SIZE", "1")
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"WORLD_SIZE = {text!r} in the environment is no number of processes; start the run with torchrun")
    return int(text)
