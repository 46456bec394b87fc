"""Agreement on the digits world: the truth is the digit's own cell."""

from typing import Any

import pytest
import torch

from vlm_tools.data.digits_world import EvaluationScenes
from vlm_tools.digits import agreement
from vlm_tools.models.digits_world_llava import digits_world_llava

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own deprecations


def test_a_map_of_the_digits_own_cell_hits_and_its_opposite_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    data = EvaluationScenes("test", 3, start=5)
    waiting = [shown.cells.index(shown.digits[0]) for shown in data.scenes for _ in range(2)]

    def told(_model: Any, inputs: Any, rows: Any, targets: Any, *, reading: str) -> torch.Tensor:
        assert rows == [inputs["input_ids"].shape[1] - 1]
        assert len(targets) == 1
        heat = torch.rand(16) / 10
        heat[waiting.pop(0)] = 1.0
        return (heat if reading == "flow" else -heat)[None]

    monkeypatch.setattr(agreement, "explain", told)
    model = digits_world_llava(vision_width=16, width=16, layers=1, heads=2).eval()
    found = agreement.agreement_of_readings(model, data, ["flow", "rollout"], steps=2, permutations=5)
    assert found.hits == {"flow": 1.0, "rollout": 0.0, "chance": 1 / 16}
    assert set(found.areas) == {"flow", "rollout", "random order"}
    assert waiting == []


def test_steps_of_zero_leave_the_curves_out_and_k_counts() -> None:
    torch.manual_seed(0)
    model = digits_world_llava(vision_width=16, width=16, layers=1, heads=2).eval()
    data = EvaluationScenes("test", 3)
    found = agreement.agreement_of_readings(model, data, ["attention", "occlusion"], steps=0, permutations=5)
    assert found.areas == {}
    other = agreement.agreement_of_readings(model, data, ["attention", "occlusion"], k=1, steps=0, permutations=5)
    assert found.pairs["kendall"] == other.pairs["kendall"]
    assert found.pairs["top_k"] != other.pairs["top_k"]
