"""Repeated augmentation: the same image several times in an epoch, each time augmented anew."""

import math
from collections.abc import Iterator, Sized

import torch
from torch.utils.data import Sampler

from attn_core.engine import rank_and_size


class RepeatedAugmentation(Sampler[int]):
    """Each epoch draws 1/``repeats`` of the images and serves each of them ``repeats`` times, one copy per process.

    An epoch is as long as without repetition. Source: Hoffer et al., CVPR 2020, arXiv 1901.09335; DeiT uses 3.

    Raises: ValueError if ``repeats`` is not positive.
    """

    def __init__(self, dataset: Sized, *, repeats: int = 3, seed: int | None = None) -> None:
        if repeats < 1:
            raise ValueError(f"RepeatedAugmentation: repeats must be positive, got repeats={repeats}")
        self.dataset = dataset
        self.repeats = repeats
        self.seed = 0 if seed is None else seed
        self.rank, self.world_size = rank_and_size()
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The next iteration draws the order that belongs to ``epoch``; the loop calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self.world_size)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.dataset), generator=generator).repeat_interleave(self.repeats)
        # Neighbors in the repeated order go to different processes; every process gets equally many.
        start = torch.arange(len(self)) * self.world_size + self.rank
        return iter(order[start % len(order)].tolist())
