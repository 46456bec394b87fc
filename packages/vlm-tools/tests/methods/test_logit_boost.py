"""Logit boost: zero changes nothing, and so do PAI's and PAINT's; options count."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlm_tools import PAI, PAINT, LogitBoost, intervene
from vlm_tools.testing.random_models import random_inputs, random_model


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


def test_logits_equal_those_of_edited_dense_maps(setting: Any, check_dense: Callable[..., None]) -> None:
    def edit(scores: Tensor, layer: int, _hidden: Tensor) -> Tensor:
        out = scores.clone()
        if layer >= 1:
            out[..., -1, :] += 1.5 * setting.visual_of(scores.shape[-1])
        return out.softmax(-1)

    check_dense(LogitBoost(1.5), edit, rows=16)
