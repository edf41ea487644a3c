"""The order of the prompts in every epoch, found again after a resume."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler
from trl.trainer.utils import RepeatSampler


class EpochOrder(Sampler[int]):
    """TRL's sampler, whose order in epoch e does not depend on whether this process has seen the epochs before it.

    `RepeatSampler` shuffles with one generator that moves on from epoch to epoch, and a resumed run starts it anew:
    after the first epoch it would see other prompts than an uninterrupted run. `Trainer` calls `set_epoch` before each.
    """

    def __init__(self, sampler: Sampler[int]) -> None:
        assert isinstance(sampler, RepeatSampler), type(sampler)
        self.sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """Bring the generator to where it stands after `epoch` shuffles."""
        if self.sampler.shuffle and self.sampler.seed is not None:
            self.sampler.generator.manual_seed(self.sampler.seed)
            for _ in range(epoch):
                torch.randperm(self.sampler.num_samples, generator=self.sampler.generator)

    def __iter__(self) -> Iterator[int]:
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)
