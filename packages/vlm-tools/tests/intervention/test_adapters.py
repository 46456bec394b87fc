"""Adapters: the place of every image token in the picture."""

import pytest
import torch

from vlm_tools.intervention.adapters import adapter_of
from vlm_tools.readings.explain import on_picture
from vlm_tools.testing.random_models import FAMILIES, random_inputs, random_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_image_token_has_a_place_in_the_picture(name: str) -> None:
    model, inputs = random_model(name), random_inputs(name)
    adapter = adapter_of(model)
    visual = inputs["input_ids"][0] == adapter.image_token_id(model.config)
    boxes = adapter.boxes(model.config, inputs, visual, (56, 56))
    assert boxes.shape == (int(visual.sum()), 4)
    painted = on_picture(torch.ones(len(boxes)), boxes, (56, 56))
    assert bool((painted == 1).all())
