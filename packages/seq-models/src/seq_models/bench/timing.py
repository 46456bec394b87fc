"""Medians of contestants that take turns, and the training step that they are asked for."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def training_step(model: Any, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Forward, backward and update by plain gradient descent."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def in_turns(steps: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Medians in milliseconds, the contestants taking turns; the first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(values[1:]) for name, values in times.items()}
