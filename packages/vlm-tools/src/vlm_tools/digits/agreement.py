"""Readings of the digits world beside one another, where it is known which cell a word stands for."""

from collections.abc import Sequence
from typing import Any

import torch

from vlm_tools.agreement.compare import Agreement, areas, compare, mean_areas
from vlm_tools.data.digits_world import QUESTION, EvaluationScenes
from vlm_tools.data.words import Words
from vlm_tools.readings.explain import explain
from vlm_tools.readings.names import READINGS, Reading


def agreement_of_readings(
    model: Any,
    data: EvaluationScenes,
    readings: Sequence[Reading] = READINGS,
    *,
    k: int = 5,
    steps: int = 8,
    permutations: int = 200,
) -> Agreement:
    """Every reading of "is there a <digit>" for the first digit of each scene; its own cell is the truth.

    Args:
        k: of top-k Kendall.
        steps: of the curves; 0 leaves them out.
    """
    words = Words()
    yes = words.number["yes"]
    maps: dict[str, list[torch.Tensor]] = {name: [] for name in readings}
    truth, drawn = [], []
    for number, shown in enumerate(data.scenes):
        item = data[number]
        ids = torch.tensor([words.prompt(QUESTION.format(shown.names[0]))])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": item["image"][None]}
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        row = ids.shape[1] - 1
        for name in readings:
            maps[name].append(explain(model, inputs, [row], [yes], reading=name)[0].detach().float().cpu())
        truth.append(item["cells"] == shown.digits[0])
        if steps:
            own = {name: found[-1] for name, found in maps.items()}
            drawn.append(areas(model, inputs, row, yes, own, steps=steps, seed=number))
    stacked = {name: torch.stack(found) for name, found in maps.items()}
    result = compare(stacked, k=k, permutations=permutations, truth=torch.stack(truth))
    if drawn:
        result.areas = mean_areas(drawn)
    return result
