"""How the learning rate goes: the schedules of recipes, bases that recipes share, and their fit to short runs."""

from collections.abc import Sequence
from typing import Any

from mmengine.optim import ConstantLR, CosineAnnealingLR, ExponentialLR, LinearLR, MultiStepLR, PolyLR, StepLR

__all__ = [
    "ConstantLR",
    "CosineAnnealingLR",
    "ExponentialLR",
    "LinearLR",
    "MultiStepLR",
    "PolyLR",
    "StepLR",
    "fit",
    "warmup",
    "warmup_cosine",
]

_SHARE = 5  # a warm-up that does not fit takes a fifth of the run


def warmup(length: float, *, start_factor: float = 1e-3, in_steps: bool = False) -> dict[str, Any]:
    """A linear warm-up from ``start_factor`` times the learning rate, changed at every step.

    Args:
        length: Epochs, or steps with ``in_steps``.
        start_factor: Share of the learning rate in the first step.
        in_steps: Whether the training is counted in steps.
    """
    unit = {"by_epoch": False} if in_steps else {"by_epoch": True, "convert_to_iter_based": True}
    return {"type": LinearLR, "start_factor": start_factor, "begin": 0, "end": length, **unit}


def warmup_cosine(
    length: float,
    warm: float,
    *,
    start_factor: float = 1e-3,
    eta_min: float = 1e-5,
    in_steps: bool = False,
) -> list[dict[str, Any]]:
    """``param_scheduler`` of most recipes: linear warm-up, then half a cosine down to ``eta_min``, step by step.

    Args:
        length: Epochs of the run, or steps with ``in_steps``.
        warm: Epochs (steps) of the warm-up.
        start_factor: Share of the learning rate in the first step.
        eta_min: Learning rate at the end.
        in_steps: Whether the training is counted in steps.
    """
    first = warmup(warm, start_factor=start_factor, in_steps=in_steps)
    cosine = {"type": CosineAnnealingLR, "begin": warm, "end": length, "T_max": length - warm, "eta_min": eta_min}
    units = {key: first[key] for key in ("by_epoch", "convert_to_iter_based") if key in first}
    return [first, {**cosine, **units}]


def fit(schedules: Sequence[Any], *, epochs: int, steps: int) -> tuple[list[Any], str]:
    """The schedules with a warm-up that does not fit into the run cut to a fifth of it, and a line that says so.

    Args:
        schedules: Dicts of a recipe; anything else stays as it is.
        epochs: Epochs of the run.
        steps: Steps of the run.

    Returns:
        The schedules, and the line; empty if nothing was cut.
    """
    fitted = [dict(entry) if isinstance(entry, dict) else entry for entry in schedules]
    line = ""
    for first in [entry for entry in fitted if _is_warmup(entry)]:
        total, unit = (epochs, "epochs") if first.get("by_epoch", True) else (steps, "steps")
        end = first["end"]
        after = [
            entry
            for entry in fitted
            if isinstance(entry, dict) and entry is not first and entry.get("begin", 0) == end
            and entry.get("by_epoch", True) == first.get("by_epoch", True)
        ]  # fmt: skip
        if end <= total and all(entry.get("end", total) > end for entry in after):
            continue
        short = _shortened(first, total, steps)
        for entry in after:
            last = entry.get("end", total)
            if entry.get("T_max") == last - end:
                entry["T_max"] = last - short
            entry["begin"] = short
        if short:
            first["end"] = short
        else:
            fitted.remove(first)
        line = f"warm-up of {end} {unit} cut to {short:.3g}: the run has {total}"
    return fitted, line


def _is_warmup(entry: Any) -> bool:
    """A linear rise from the first step to a stated end."""
    if not isinstance(entry, dict) or "end" not in entry or entry.get("begin", 0) != 0:
        return False
    kind = entry.get("type")
    name = kind.rsplit(".", 1)[-1] if isinstance(kind, str) else getattr(kind, "__name__", "")
    return name in ("LinearLR", "LinearParamScheduler") and entry.get("start_factor", 1 / 3) < entry.get(
        "end_factor", 1
    )


def _shortened(entry: dict[str, Any], total: int, steps: int) -> float:
    """A fifth of the run, in the unit of the schedule; 0 if it has none to spare.

    mmengine's linear rise arrives in its last step but one step is its first: one alone would never arrive, and every
    schedule after it would go on from the low rate.
    """
    converted = bool(entry.get("convert_to_iter_based"))
    short = (steps if converted else total) // _SHARE
    if short < 2:
        return 0
    # mmengine multiplies by the batches per epoch and rounds down, so stay above the whole step
    return short * total / steps + 1e-9 if converted else short
