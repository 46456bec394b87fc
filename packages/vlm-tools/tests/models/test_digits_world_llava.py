"""The digits-world LLaVA: its size, its tokens, refusals."""

from typing import Any

import pytest
import torch

from vlm_tools.data import Words
from vlm_tools.models.digits_world_llava import digits_world_llava


def test_one_token_for_each_cell_and_the_published_size() -> None:
    torch.manual_seed(0)
    model = digits_world_llava()
    assert sum(parameter.numel() for parameter in model.parameters()) == 424_320
    ids = torch.tensor([Words().prompt("describe the image .")])
    logits = model(input_ids=ids, pixel_values=torch.rand(1, 1, 36, 36)).logits
    assert logits.shape == (1, ids.shape[1], len(Words()))
    assert int((ids == model.config.image_token_id).sum()) == 16


def test_sizes_count_and_widths_that_heads_do_not_divide_are_refused() -> None:
    small: Any = digits_world_llava(vision_width=32, width=48, layers=2, heads=2)
    assert small.config.text_config.num_hidden_layers == 2
    assert small.config.vision_config.hidden_size == 32
    assert small.config.text_config.hidden_size == 48
    assert small.config.text_config.num_key_value_heads == 1
    with pytest.raises(ValueError, match="width must be a multiple of heads"):
        digits_world_llava(width=97)
