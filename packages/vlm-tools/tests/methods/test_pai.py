"""PAI, PAINT, logit boost: the edits of one row, the choice of tokens, the guidance, refusals."""

import math

import pytest
import torch

from vlm_tools import PAI, PAINT, LogitBoost, intervene
from vlm_tools.methods.pai import grow, guide
from vlm_tools.methods.paint import choose_tokens, class_attention
from vlm_tools.testing.random_models import random_inputs, random_model


def test_grow_adds_a_share_of_the_size_and_keeps_hidden_keys_hidden() -> None:
    scores = torch.tensor([2.0, -4.0, -math.inf, 1.0])
    chosen = torch.tensor([True, True, True, False])
    assert grow(scores, chosen, 0.5).tolist() == [3.0, -2.0, -math.inf, 1.0]


def test_guidance_equals_its_formula() -> None:
    torch.manual_seed(0)
    z, other = torch.randn(2, 9), torch.randn(2, 9)
    with_image, without = z.log_softmax(-1), other.log_softmax(-1)
    want = 1.1 * with_image - 0.1 * without
    got = guide(z, other, 1.1, 0.1)
    kept = got.isfinite()
    torch.testing.assert_close(got[kept], want[kept])
    assert torch.equal(kept, with_image >= with_image.amax(-1, keepdim=True) + math.log(0.1))


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


def test_zero_strength_changes_nothing_and_options_count() -> None:
    torch.manual_seed(0)
    model, inputs = random_model("test_llava"), random_inputs("test_llava")

    def last(method: PAI | PAINT | LogitBoost) -> torch.Tensor:
        with torch.no_grad(), intervene(model, method):
            return model(**inputs).logits[0, -1]

    plain = model(**inputs).logits[0, -1].detach()
    for method in (PAI(0.0), PAINT(0.0, 0.0), LogitBoost(0.0)):
        torch.testing.assert_close(last(method), plain, atol=1e-5, rtol=0)
    seen = [last(PAINT()), last(PAINT(head_weights=True)), last(PAINT(local_share=0.5)), last(PAI(0.7))]
    assert all(float((a - b).abs().max()) > 1e-4 for n, a in enumerate(seen) for b in seen[:n])


def test_refusals() -> None:
    with pytest.raises(ValueError, match="alpha must not be negative"):
        PAI(-1)
    with pytest.raises(ValueError, match="plausibility must lie in"):
        PAI(plausibility=0)
    with pytest.raises(ValueError, match="alpha and beta must not be negative"):
        PAINT(beta=-1)
    with pytest.raises(ValueError, match="local_share must lie in"):
        PAINT(local_share=2)
