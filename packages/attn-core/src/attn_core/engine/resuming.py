"""Optimizer and schedules of a resumed run, whose settings may have changed since."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.optim import OptimWrapper
from torch import Tensor

from attn_core.engine.checkpoint import like
from attn_core.engine.errors import ConfigError

# How torch computes, not what: versions of it add to these.
_IMPLEMENTATION = {"foreach", "fused", "maximize", "capturable", "differentiable", "decoupled_weight_decay", "params"}
_PROGRESS = {"last_step", "_global_step", "_last_value", "optimizer", "base_values", "verbose"}


def restore_optimizer(wrapper: Any, state: Mapping[str, Any]) -> bool:
    """Load moments and learning rates; what the recipe sets otherwise than the checkpoint is taken from the recipe.

    Args:
        wrapper: The run's optimizer wrapper, or a dict of several.
        state: Its state in the checkpoint.

    Returns:
        Whether a learning rate (or another scheduled value) begins elsewhere now, so that schedules must be replayed.

    Raises:
        ConfigError: if the checkpoint is of another kind of optimizer, or of other parameter groups.
    """
    if not isinstance(wrapper, OptimWrapper):
        return True in [restore_optimizer(wrapper[name], state[name]) for name in state]  # all of them
    groups = wrapper.optimizer.param_groups
    stored = state["param_groups"]
    if [_shape(group) for group in groups] != [_shape(group) for group in stored]:
        raise ConfigError(
            "resume: the checkpoint is of an optimizer of another kind or with other parameter groups; resume with the "
            "optimizer of the run, or start another run with --set load_from=RUN"
        )
    initial = [{key: group[key] for key in group if key.startswith("initial_")} for group in groups]
    scheduled = {key.removeprefix("initial_") for group in initial for key in group}
    own = [{k: v for k, v in group.items() if k != "params" and k not in scheduled} for group in groups]
    changed = any(
        key in old and old[key] != value
        for begin, old in zip(initial, stored, strict=True)
        for key, value in begin.items()
    )
    parameters = [parameter for group in groups for parameter in group["params"]]
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameters[index].shape and value.ndim:
                values[name] = like(value, parameters[index])
    wrapper.load_state_dict(dict(state))
    for group, settings in zip(wrapper.optimizer.param_groups, own, strict=True):
        group.update(settings)
    return changed


def restore_schedules(
    schedules: Sequence[Any], states: Sequence[Mapping[str, Any]], step: int, batches: int, *, changed: bool
) -> bool:
    """Bring the schedules to a step: from their states, or by replaying them where their settings have changed.

    A schedule is a recursion over the values before it, so a longer one cannot go on from the end of a shorter one: the
    values of the steps so far are computed anew, as if the run had begun with the new settings.

    Args:
        schedules: As the recipe builds them now, at their first step.
        states: What the checkpoint holds.
        step: Steps done.
        batches: Steps per epoch.
        changed: Whether the values that they begin at have changed.

    Returns:
        Whether they were replayed.
    """
    same = len(schedules) == len(states) and all(
        _settings(vars(schedule)) == _settings(state) for schedule, state in zip(schedules, states, strict=True)
    )
    if (same and not changed) or not schedules or any(not _can_replay(schedule) for schedule in schedules):
        for schedule, state in zip(schedules, states, strict=False):
            schedule.load_state_dict(dict(state))
            # mmengine warns if a scheduler steps before the optimizer, as one rightly does at the end of an epoch.
            _steps_were_made(schedule, step)
        return False
    for schedule in schedules:
        _steps_were_made(schedule, step)
        schedule.last_step, schedule._global_step = -1, -1
    for group in schedules[0].optimizer.param_groups:
        group.update(
            {key.removeprefix("initial_"): value for key, value in group.items() if key.startswith("initial_")}
        )
    for schedule in schedules:
        schedule.step()  # what the constructor does
    for done in range(1, step + 1):
        for schedule in schedules:
            if not schedule.by_epoch or done % batches == 0:
                schedule.step()
    return True


def _shape(group: Mapping[str, Any]) -> tuple[int, set[str]]:
    settings = {key for key in group if not key.startswith("initial_")}
    return len(group["params"]), settings - _IMPLEMENTATION


def _settings(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key not in _PROGRESS}


def _can_replay(schedule: Any) -> bool:
    return hasattr(schedule, "_get_value") and "Plateau" not in type(schedule).__name__


def _steps_were_made(schedule: Any, step: int) -> None:
    schedule.optimizer._global_step = max(schedule.optimizer._global_step, step - 1)
