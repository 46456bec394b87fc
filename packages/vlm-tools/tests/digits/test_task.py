"""Training of the digits-world LLaVA: a few steps learn."""

import pytest
import torch

from vlm_tools.data import EvaluationScenes, TrainingScenes
from vlm_tools.digits.task import DigitsLlavaTask, Hallucination
from vlm_tools.models.digits_world_llava import digits_world_llava


def test_model_learns_in_a_few_steps() -> None:
    torch.manual_seed(0)
    task = DigitsLlavaTask()
    data = TrainingScenes(16)
    batch = {key: torch.stack([data[i][key] for i in range(16)]) for key in data[0]}
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        loss = sum(task.loss(**batch).values())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
        losses.append(float(loss.detach()))  # type: ignore[union-attr]
    assert losses[-1] < 0.8 * losses[0]
    scenes = EvaluationScenes("val", 12)
    results = task.eval().predict(**{key: torch.stack([s[key] for s in scenes]) for key in scenes[0]})
    metric = Hallucination()
    metric.process(None, results)
    assert {"random", "adversarial", "chair_s", "recall", "cells"} <= set(metric.compute_metrics(metric.results))
    with pytest.raises(ValueError, match="width must be a multiple of heads"):
        digits_world_llava(width=97)
