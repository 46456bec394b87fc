"""Readings: they depend on the image, their controls do not; refusals."""

from typing import Any

import pytest
import torch

from vlm_tools.readings.explain import explain, on_picture, with_answer
from vlm_tools.readings.names import READINGS
from vlm_tools.testing.random_models import random_inputs, random_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("reading", READINGS)
def test_reading_depends_on_the_image_and_the_control_does_not(reading: Any) -> None:
    torch.manual_seed(0)
    model = random_model("test_llava")
    maps = []
    for seed in (0, 1):
        inputs = random_inputs("test_llava")
        inputs["pixel_values"] = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(seed))
        row = inputs["input_ids"].shape[1] - 1
        maps.append(explain(model, inputs, [row], [5], reading=reading)[0])
        assert maps[-1].shape == (16,)
        assert not torch.allclose(maps[-1], explain(model, inputs, [row], [5], reading=reading, control=True)[0])
    assert not torch.allclose(*maps)


def test_explain_refuses() -> None:
    model, inputs = random_model("test_llava"), random_inputs("test_llava")
    with pytest.raises(ValueError, match="reading must be one of attention"):
        explain(model, inputs, [0], reading="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got rows=\\[99\\]"):
        explain(model, inputs, [99])
    with pytest.raises(ValueError, match="needs targets"):
        explain(model, inputs, [3], reading="chefer")
    with pytest.raises(ValueError, match="a batch of 2"):
        explain(model, random_inputs("test_llava", batch=2), [3])
    with pytest.raises(ValueError, match="as many boxes"):
        on_picture(torch.ones(2), torch.ones(3, 4), (4, 4))
    longer = with_answer(inputs, torch.tensor([[4, 5]]))
    assert longer["attention_mask"].shape == longer["input_ids"].shape == (1, inputs["input_ids"].shape[1] + 2)


def test_steps_and_windows_count() -> None:
    torch.manual_seed(0)
    model, inputs = random_model("test_llava"), random_inputs("test_llava")
    row = inputs["input_ids"].shape[1] - 1
    fine, coarse = (explain(model, inputs, [row], [5], reading="integrated_gradients", steps=n) for n in (8, 1))
    assert not torch.allclose(fine, coarse)
    wide = explain(model, inputs, [row], [5], reading="occlusion", window=4)[0]
    assert torch.equal(wide, wide[::4].repeat_interleave(4))
    assert len(wide.unique()) == 4
    with pytest.raises(ValueError, match="window must be at least 1"):
        explain(model, inputs, [row], [5], reading="occlusion", window=0)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        explain(model, inputs, [row], [5], reading="integrated_gradients", steps=0)
