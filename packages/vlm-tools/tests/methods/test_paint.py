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


def tokens_of(local: Tensor, summary: Tensor) -> tuple[Tensor, Tensor]:
    """The upper quarter of the local scores without the outliers of the others, and these."""
    low, high = summary.quantile(0.25), summary.quantile(0.75)
    outlier = summary > high + 1.5 * (high - low)
    near = torch.zeros_like(outlier)
    near[local.argsort(descending=True)[: len(local) // 4]] = True
    return near & ~outlier, outlier


def grown(setting: Any, near: Tensor, outlier: Tensor, scores: Tensor, *, head_weights: bool = False) -> Tensor:
    """Scores whose last row pays more attention to both, each head by its share of the layer's visual mass."""
    strength = torch.zeros(len(setting.visual), dtype=torch.float64)
    strength[setting.visual] = 0.7 * near.double() + 0.4 * outlier.double()
    strength = torch.nn.functional.pad(strength, (0, scores.shape[-1] - len(strength)))
    last = scores[..., -1, :]
    if head_weights:
        mass = last.softmax(-1)[..., setting.visual_of(scores.shape[-1])].sum(-1)
        strength = strength * (mass / mass.mean()).clamp(max=2)[..., None]
    out = scores.clone()
    out[..., -1, :] = torch.where(last.isfinite(), last + strength * last.abs(), last)
    return out


@pytest.mark.parametrize("head_weights", [False, True])
def test_logits_equal_those_of_edited_dense_maps(
    setting: Any, check_dense: Callable[..., None], head_weights: bool
) -> None:
    tower = setting.model.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        maps = tower(setting.inputs["pixel_values"], output_attentions=True).attentions
    tower.set_attn_implementation("sdpa")
    near, outlier = tokens_of(*(maps[number][0, :, 0, 1:].sum(0) for number in (0, -2)))

    def edit(scores: Tensor, layer: int, _hidden: Tensor) -> Tensor:
        changed = grown(setting, near, outlier, scores, head_weights=head_weights) if layer >= 2 else scores
        return changed.softmax(-1)

    check_dense(PAINT(gamma=1.0, head_weights=head_weights), edit, rows=16)


def test_without_a_class_token_the_last_row_of_the_first_two_layers_chooses(
    setting: Any, check_dense: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm_tools.intervention.adapters.llava.Llava.has_class_token", lambda *_: False)
    of_layer: dict[int, Tensor] = {}

    def edit(scores: Tensor, layer: int, _hidden: Tensor) -> Tensor:
        p = scores.softmax(-1)
        if layer < 2:
            if scores.shape[2] > 1:
                of_layer[layer] = p[0, :, -1, setting.visual].sum(0)
            return p
        return grown(setting, *tokens_of(of_layer[0], of_layer[1]), scores).softmax(-1)

    check_dense(PAINT(gamma=1.0), edit, rows=16)


def test_a_decoder_of_one_layer_is_looked_at_there() -> None:
    assert PAINT().chosen_layers(1) == {0}
