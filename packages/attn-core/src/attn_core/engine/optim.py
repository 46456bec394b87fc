"""Optimizer wrapper: bf16 autocast on any device, and a stop before an update with nan or infinity."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.dist import get_world_size
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.optim import OptimWrapper as _OptimWrapper
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from attn_core.engine.errors import NonFiniteLossError

ParameterGroups = DefaultOptimWrapperConstructor


class OptimWrapper(_OptimWrapper):
    """mmengine's wrapper, made safe.

    Args:
        optimizer: The optimizer.
        amp: Run the forward pass in bfloat16 autocast, on CPU and GPU alike. bfloat16 has the exponent range of
            float32, so there is no loss scaling.
        accumulative_counts: Steps whose gradients are added up before an update.
        clip_grad: ``dict(max_norm=...)`` or ``dict(type="value", clip_value=...)``.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        amp: bool = False,
        accumulative_counts: int = 1,
        clip_grad: dict[str, Any] | None = None,
    ) -> None:
        # A copy, because mmengine takes "type" out of the dict.
        super().__init__(optimizer, accumulative_counts, dict(clip_grad) if clip_grad else None)
        self.amp = amp
        self.device = optimizer.param_groups[0]["params"][0].device

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Forward pass: autocast if asked for, no gradient exchange in accumulation steps."""
        with super().optim_context(model), torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            yield

    def update_params(
        self, loss: Tensor, step_kwargs: dict[str, Any] | None = None, zero_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Backward and update.

        Raises:
            NonFiniteLossError: on every process, before the backward pass, if the loss of any process is nan or inf.
        """
        _require_finite("loss", loss.detach())
        super().update_params(loss, step_kwargs, zero_kwargs)

    def _clip_grad(self) -> None:
        params = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not params or not self.clip_grad_kwargs:
            return
        norm = self.clip_func(params, **self.clip_grad_kwargs)
        if norm is None:
            return
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        _require_finite("gradient norm", norm.detach())
        self.message_hub.update_scalar(f"train/{self.grad_name}", float(norm))


class GroupedConstructor(ParameterGroups):
    """mmengine's constructor, with one parameter group per setting instead of one per parameter.

    With ``paramwise_cfg`` mmengine gives every parameter a group of its own, and torch's optimizers then make one
    call per parameter instead of one for all. It also lists a parameter that two modules share (a language model's
    embedding and head) twice, and optimizers then update it twice in each step; here it counts where it is first met.
    """

    def add_params(
        self, params: list[dict[str, Any]], module: nn.Module, prefix: str = "", is_dcn_module: Any = None
    ) -> None:
        """Collect the groups of a module and its children; the outermost call merges them."""
        super().add_params(params, module, prefix, is_dcn_module)
        if prefix:
            return
        merged: dict[str, dict[str, Any]] = {}
        met: set[int] = set()
        for group in params:
            settings = {name: value for name, value in group.items() if name != "params"}
            new = [parameter for parameter in group["params"] if id(parameter) not in met]
            met.update(map(id, new))
            if new:
                merged.setdefault(repr(sorted(settings.items())), {**settings, "params": []})["params"] += new
        params[:] = merged.values()


def _require_finite(what: str, value: Tensor) -> None:
    """Raise on all processes together if the value of any is not finite; only those concerned say why."""
    total = value.double() if value.device.type != "mps" else value.float()
    if get_world_size() > 1:
        total = total.clone()
        distributed.all_reduce(total)
    if not bool(torch.isfinite(total)):
        raise NonFiniteLossError("" if bool(torch.isfinite(value)) else f"{what} is {float(value)}")
