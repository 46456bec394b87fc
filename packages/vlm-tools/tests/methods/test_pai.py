"""PAI: the edit of one row, its guidance, refusals."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm_tools import PAI, intervene
from vlm_tools.methods.pai import grow, guide


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


def test_refusals() -> None:
    with pytest.raises(ValueError, match="alpha must not be negative"):
        PAI(-1)
    with pytest.raises(ValueError, match="plausibility must lie in"):
        PAI(plausibility=0)


def test_logits_equal_those_of_edited_dense_maps(setting: Any, check_dense: Callable[..., None]) -> None:
    def edit(scores: Tensor, layer: int, _hidden: Tensor) -> Tensor:
        out = scores.clone()
        if layer >= 2:
            chosen = setting.visual_of(scores.shape[-1])
            out[..., -1, chosen] += 0.7 * scores[..., -1, chosen].abs()
        return out.softmax(-1)

    check_dense(PAI(0.7, gamma=1.0), edit, rows=16)


def test_guidance_reads_the_prompt_without_its_image(setting: Any) -> None:
    text = setting.inputs["input_ids"][:, ~setting.visual]
    with torch.no_grad():
        seen = setting.model(**setting.inputs).logits[0, -1].log_softmax(-1)
        unseen = setting.model(input_ids=text).logits[0, -1].log_softmax(-1)
    want = (1.5 * seen - 0.5 * unseen).log_softmax(-1)
    with intervene(setting.model, PAI(0.0, gamma=1.5, plausibility=1e-9)):
        out = setting.model.generate(
            **setting.inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_scores=True
        )
    torch.testing.assert_close(out.scores[0][0].double(), want, atol=1e-5, rtol=0)
