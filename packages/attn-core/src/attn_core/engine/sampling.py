"""Data loaders whose order, augmentation and position are functions of (seed, epoch, batch number)."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from mmengine.dataset import DefaultSampler
from torch.utils.data import BatchSampler, DataLoader, Dataset, default_collate

from attn_core.engine.errors import ConfigError, EngineError
from attn_core.engine.names import build, resolve
from attn_core.engine.randomness import ITEM, seed_generators


class SampleIndex(int):
    """An index that knows its epoch; it travels to loader workers, which outlive epochs."""

    epoch: int

    def __new__(cls, index: int, epoch: int) -> "SampleIndex":
        """An ``int`` that remembers its epoch."""
        self = super().__new__(cls, index)
        self.epoch = epoch
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return SampleIndex, (int(self), self.epoch)


class SeededDataset(Dataset[Any]):
    """A data set whose items draw their random numbers from (seed, epoch, index)."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        seed_generators(ITEM, self.seed, getattr(index, "epoch", 0), int(index))
        return self.dataset[int(index)]

    def __getattr__(self, name: str) -> Any:
        # Dunder names stay unknown: a forwarded __getitems__ would let the loader fetch past the seeding above.
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)


class ResumableBatchSampler:
    """Batches of indices that can start in the middle of an epoch and remember which indices a batch held.

    Args:
        batches: Iterable of index lists, restarted by each ``iter``; its ``sampler`` may have ``set_epoch``.

    Attributes:
        start: Batches to pass over, without loading them, at the next ``iter``.
        endless: Begin a further epoch when one ends, for training counted in steps.
    """

    REMEMBERED = 256  # more than loader workers prefetch

    def __init__(self, batches: Any) -> None:
        self.batches = batches
        self.start = 0
        self.endless = False
        self._epoch = 0
        self._recent: dict[int, list[int]] = {}

    @property
    def sampler(self) -> Any:
        """The sampler of single indices, where mmengine's hooks look for it."""
        return self.batches.sampler

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle and the augmentation of the next ``iter``."""
        self._epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def indices_of(self, number: int) -> list[int]:
        """Data set indices of a recent batch of this process, counted from the epoch's (or the run's) first batch."""
        return self._recent.get(number, [])

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        start, self.start = self.start, 0
        self._recent.clear()
        number, epoch = 0, self._epoch
        while True:
            self.set_epoch(epoch)
            for batch in self.batches:
                if number >= start:
                    self._recent[number] = [int(index) for index in batch]
                    self._recent.pop(number - self.REMEMBERED, None)
                    yield [SampleIndex(index, epoch) for index in batch]
                number += 1
            if not self.endless:
                return
            epoch += 1


def build_dataloader(config: Mapping[str, Any], *, seed: int, world_size: int, what: str = "dataloader") -> DataLoader:
    """A loader from a recipe's dict.

    ``batch_size`` counts over all processes and is divided among them, so that a recipe means the same on any number.
    Without ``sampler`` the order is mmengine's ``DefaultSampler``, shuffled if ``shuffle``. Without ``collate_fn``
    items are stacked by torch's ``default_collate``. Further keys go to ``torch.utils.data.DataLoader``.

    Raises:
        ConfigError: if the batch size cannot be divided.
        EngineError: if the data set is empty.
    """
    options = dict(config)
    dataset = options.pop("dataset")
    dataset = build(dataset)
    if hasattr(dataset, "full_init"):
        dataset.full_init()
    if len(dataset) == 0:
        raise EngineError(f"{what}: the data set {type(dataset).__name__} is empty")

    sampler = options.pop("sampler", None)
    shuffle = options.pop("shuffle", False)
    if sampler is None:
        sampler = DefaultSampler(dataset, shuffle=shuffle, seed=seed)
    else:
        sampler = build(dict(sampler), dataset=dataset, seed=seed)

    batch_size = per_process_batch_size(options.pop("batch_size", 1), world_size, exact=shuffle, what=what)
    drop_last = options.pop("drop_last", False)
    custom = options.pop("batch_sampler", None)
    if custom is None:
        batches: Any = BatchSampler(sampler, batch_size, drop_last)
    else:
        batches = build(dict(custom), sampler=sampler, batch_size=batch_size)
    if len(batches) == 0:
        raise ConfigError(
            f"{what}: {len(dataset)} samples give no batch of batch_size={batch_size} with drop_last; use a smaller one"
        )

    num_workers = options.setdefault("num_workers", 0)
    options.setdefault("persistent_workers", num_workers > 0)
    options.setdefault("pin_memory", torch.cuda.is_available())
    return DataLoader(
        SeededDataset(dataset, seed),
        batch_sampler=ResumableBatchSampler(batches),  # type: ignore[arg-type]  # any iterable of index lists will do
        collate_fn=_collate(options.pop("collate_fn", None)),
        generator=torch.Generator().manual_seed(seed),  # keeps the loader away from the global generator
        **options,
    )


def per_process_batch_size(batch_size: int, world_size: int, *, exact: bool, what: str) -> int:
    """Share of one process; training (``exact``) needs it without remainder, evaluation rounds up."""
    if exact and batch_size % world_size:
        better = max(1, round(batch_size / world_size)) * world_size
        raise ConfigError(
            f"{what}: batch_size={batch_size} counts over all processes and must be a multiple of their number "
            f"{world_size}; use {better}"
        )
    return math.ceil(batch_size / world_size)


def batch_sampler_of(loader: DataLoader) -> ResumableBatchSampler:
    """The resumable sampler inside a loader built here."""
    sampler = loader.batch_sampler
    if not isinstance(sampler, ResumableBatchSampler):
        raise ConfigError("Runner: give data loaders as dicts, so that a run can be resumed in mid-epoch")
    return sampler


def _collate(config: Any) -> Callable[[list[Any]], Any]:
    if config is None:
        return default_collate
    if isinstance(config, str):
        config = {"type": config}
    if callable(config):
        return config
    options = dict(config)
    function = options.pop("type")
    if isinstance(function, str):
        function = resolve(function)
    return functools.partial(function, **options)
