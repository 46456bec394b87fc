"""PAINT: the choice of tokens, the class token's attention, refusals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm_tools import PAINT
from vlm_tools.methods.paint import choose_tokens, class_attention
from vlm_tools.testing.random_models import random_inputs, random_model


def test_summary_tokens_are_outliers_and_not_local() -> None:
    local, summary = torch.arange(16.0), torch.ones(16)
    summary[[3, 15]] = 50.0
    is_local, is_summary = choose_tokens(local, summary)
    assert is_summary.nonzero().flatten().tolist() == [3, 15]
    assert is_local.nonzero().flatten().tolist() == [12, 13, 14]


def test_class_attention_is_the_towers_own() -> None:
    torch.manual_seed(0)
    model = random_model("test_llava")
    pixels = random_inputs("test_llava")["pixel_values"]
    found = class_attention(model, pixels)
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    maps = tower(pixels, output_attentions=True).attentions
    for got, want in zip(found, (maps[0], maps[-2]), strict=True):
        torch.testing.assert_close(got, want[:, :, 0, 1:].sum(1), atol=1e-5, rtol=0)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="beta must not be negative"):
        PAINT(beta=-1)
    with pytest.raises(ValueError, match="local_share must lie in"):
        PAINT(local_share=2)


def test_logits_equal_those_of_edited_dense_maps(setting: Any, check_dense: Callable[..., None]) -> None:
    tower = setting.model.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        maps = tower(setting.inputs["pixel_values"], output_attentions=True).attentions
    tower.set_attn_implementation("sdpa")
    local, summary = (maps[number][0, :, 0, 1:].sum(0) for number in (0, -2))
    low, high = summary.quantile(0.25), summary.quantile(0.75)
    outlier = summary > high + 1.5 * (high - low)
    near = torch.zeros_like(outlier)
    near[local.argsort(descending=True)[: len(local) // 4]] = True
    strength = torch.zeros(len(setting.visual), dtype=torch.float64)
    strength[setting.visual] = 0.7 * (near & ~outlier).double() + 0.4 * outlier.double()

    def edit(scores: Tensor, layer: int, _hidden: Tensor) -> Tensor:
        out = scores.clone()
        if layer >= 2:
            grown = torch.nn.functional.pad(strength, (0, scores.shape[-1] - len(strength)))
            out[..., -1, :] += grown * scores[..., -1, :].abs()
        return out.softmax(-1)

    check_dense(PAINT(gamma=1.0), edit, rows=16)
