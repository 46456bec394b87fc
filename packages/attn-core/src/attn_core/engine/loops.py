"""mmengine's training loops, able to start in the middle of an epoch."""

from collections.abc import Iterator
from typing import Any

from mmengine.dist import get_rank, get_world_size
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from torch import distributed
from torch.utils.data import DataLoader

from attn_core.engine.errors import CheckpointError, NonFiniteLossError
from attn_core.engine.randomness import STEP, seed_generators
from attn_core.engine.sampling import batch_sampler_of


class EpochLoop(EpochBasedTrainLoop):
    """Training counted in epochs."""

    def run_epoch(self) -> None:
        """Run what is left of the current epoch; nothing may be left if the run stopped before its validation."""
        start = self._iter - self._epoch * len(self.dataloader)
        if not 0 <= start <= len(self.dataloader):
            raise CheckpointError(
                f"resume: step {self._iter} is not in epoch {self._epoch + 1} of {len(self.dataloader)} batches; "
                "the data set or the batch size is not the one of the run"
            )
        sampler = batch_sampler_of(self.dataloader)
        sampler.set_epoch(self._epoch)
        sampler.start = start
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        for number, batch in enumerate(self.dataloader, start=start):
            self.run_iter(number, batch)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1

    def run_iter(self, idx: int, data_batch: Any) -> None:
        """One step, with its own random numbers."""
        seed_generators(STEP, self.runner.seed, self._iter, get_rank())
        try:
            super().run_iter(idx, data_batch)
        except NonFiniteLossError as error:
            raise _name_the_batch(self, error, idx) from None


class StepLoop(IterBasedTrainLoop):
    """Training counted in steps; the data set is repeated as often as needed."""

    def run(self) -> Any:
        """Run from the current step to the last."""
        self.dataloader_iterator = _SkippingIterator(self.dataloader, self._iter)  # type: ignore[assignment]
        return super().run()

    def run_iter(self, data_batch: Any) -> None:
        """One step, with its own random numbers."""
        seed_generators(STEP, self.runner.seed, self._iter, get_rank())
        try:
            super().run_iter(data_batch)
        except NonFiniteLossError as error:
            raise _name_the_batch(self, error, self._iter) from None


class _SkippingIterator:
    """Endless batches; the first ``skip`` are passed over without loading them.

    mmengine's loop asks for the batches before the resumed step and throws them away: these are None here.
    """

    def __init__(self, loader: DataLoader, skip: int) -> None:
        sampler = batch_sampler_of(loader)
        sampler.endless = True
        sampler.set_epoch(0)
        sampler.start = skip
        self._skip = skip
        self._iterator = iter(loader)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._skip:
            self._skip -= 1
            return None
        return next(self._iterator)


def _name_the_batch(loop: EpochLoop | StepLoop, error: NonFiniteLossError, number: int) -> NonFiniteLossError:
    """The error with step, epoch and the data set indices of the batch, of every process that is concerned."""
    own = (str(error), batch_sampler_of(loop.dataloader).indices_of(number))
    everyone: list[Any] = [own]
    if get_world_size() > 1:
        everyone = [None] * get_world_size()
        distributed.all_gather_object(everyone, own)
    where = "; ".join(
        f"{what} on samples {indices}" + (f" of process {rank}" if len(everyone) > 1 else "")
        for rank, (what, indices) in enumerate(everyone)
        if what
    )
    return NonFiniteLossError(
        f"train: step {loop.iter + 1} (epoch {loop.epoch + 1}, batch {number + 1}): {where}; the update was not made"
    )
