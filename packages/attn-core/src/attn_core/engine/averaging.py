"""Exponential moving average of the weights."""

from typing import Any

import torch
from mmengine.hooks import Hook
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from attn_core.engine.checkpoint import full, like
from attn_core.engine.errors import ConfigError


class EMAHook(Hook):
    """Validate, test and save the moving average of the parameters instead of their last values.

    average ← (1 − m) · average + m · parameter, after each step. Buffers are not averaged. mmengine's hook of this
    name copies the model, which FSDP2 forbids; this one keeps a list of tensors, sharded as the model is.

    With warm-up m begins at 1 and falls as (1 + steps)^(-2/3) to ``momentum``, as timm's ``ModelEmaV3`` does: an
    average over 25,000 steps (4e-5) would otherwise hold 93 % of the initialization after 1,800 steps.

    Args:
        momentum: Weight of the newest parameters; 0.0002 averages over about 5,000 steps.
        begin_step: Steps during which the average just follows the parameters.
        warmup: Whether the average is shorter at first.
    """

    priority = "NORMAL"

    def __init__(self, momentum: float = 0.0002, *, begin_step: int = 0, warmup: bool = True) -> None:
        if not 0 < momentum < 1:
            raise ConfigError(f"EMAHook: momentum must be between 0 and 1, got {momentum}")
        if begin_step < 0:
            raise ConfigError(f"EMAHook: begin_step must not be negative, got {begin_step}")
        self.momentum = momentum
        self.begin_step = begin_step
        self.warmup = warmup
        self._average: dict[str, Tensor] | None = None

    def weight(self, step: int) -> float:
        """Weight of the parameters after so many steps, from 1 on; 1 copies them."""
        averaged = step - self.begin_step  # updates so far, this one included
        if averaged <= 0:
            return 1.0
        return max(self.momentum, averaged ** (-2 / 3)) if self.warmup else self.momentum

    def before_train(self, runner: Any) -> None:
        """Start from the parameters, unless the average was resumed."""
        if self._average is None:
            self._average = {name: value.detach().clone() for name, value in runner.bare_model.named_parameters()}

    @torch.no_grad()
    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:  # noqa: ARG002  mmengine's hook
        """Update the average."""
        assert self._average is not None
        averages = [_local(value) for value in self._average.values()]
        parameters = [_local(value.detach()) for _, value in runner.bare_model.named_parameters()]
        weight = self.weight(runner.iter + 1)
        if weight < 1:
            get_ema_multi_avg_fn(1 - weight)(averages, parameters, None)
        else:
            for average, parameter in zip(averages, parameters, strict=True):
                average.copy_(parameter)

    def before_val_epoch(self, runner: Any) -> None:
        """Put the average into the model."""
        self._swap(runner.bare_model)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:  # noqa: ARG002  mmengine's hook
        """Put the parameters back."""
        self._swap(runner.bare_model)

    def before_test_epoch(self, runner: Any) -> None:
        """Put the average into the model."""
        self._swap(runner.bare_model)

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:  # noqa: ARG002  mmengine's hook
        """Put the parameters back."""
        self._swap(runner.bare_model)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002  mmengine's hook
        """The average becomes the checkpoint's weights; the parameters go to its state."""
        if self._average is None:
            return
        weights = checkpoint["state_dict"]
        checkpoint["parameters_behind_average"] = {name: weights[name] for name in self._average}
        weights |= {name: full(value) for name, value in self._average.items()}

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Take the average and the parameters apart; weights that were not averaged start a new average."""
        parameters = checkpoint.get("parameters_behind_average")
        if parameters is None:
            self._average = None
            return
        weights = checkpoint["state_dict"]
        own = dict(runner.bare_model.named_parameters())
        self._average = {name: like(weights[name].to(own[name].device), own[name]).clone() for name in parameters}
        weights |= parameters

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        if self._average is None:
            return
        for name, value in model.named_parameters():
            average, parameter = _local(self._average[name]), _local(value.detach())
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)


def _local(value: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds, sharing its memory."""
    return value.to_local() if isinstance(value, DTensor) else value
