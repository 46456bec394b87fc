"""Medians of contestants that take turns, and the training step that they are asked for."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attn_core.bench import in_turns


def training_step(model: Any, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Forward, backward and update by plain gradient descent."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def medians(steps: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Medians in milliseconds, the contestants taking turns; a first round does not count."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {name: found.ms for name, found in in_turns(steps, device=device, rounds=repeats).items()}
