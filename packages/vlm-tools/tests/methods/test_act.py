"""ACT: the published edit of dense maps, planted sinks and heads, options and refusals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_core import attention
from vlm_tools import ACT, intervene
from vlm_tools.intervention.visibility import visibility
from vlm_tools.methods.act import calibrate, search_heads, sinks_of
from vlm_tools.testing.random_models import random_inputs, random_model


def calibrated_map(p: Tensor, threshold: float, beta: float) -> Tensor:
    """The paper's edit of one (N, N) causal map."""
    count = p.shape[0]
    mean = p.sum(0) / torch.arange(count, 0, -1)
    sinks = (mean > threshold).nonzero().flatten()[1:]
    out = p.clone()
    for row in range(1, count):
        mass = p[row, sinks].sum()
        if mass == 0 or mass >= 1:
            continue
        out[row] = p[row] * (1 + (1 - beta) * mass / (1 - mass))
        out[row, sinks] = beta * p[row, sinks]
    return out


@pytest.mark.parametrize("length", [5, 31])
def test_edit_equals_the_dense_formulation(length: int) -> None:
    torch.manual_seed(length)
    q, k, v = (1.5 * torch.randn(1, 4, length, 8, dtype=torch.float64) for _ in range(3))
    seen = visibility(None, queries=length, keys=length)
    p = (q @ k.transpose(-2, -1) * 8**-0.5).masked_fill(~torch.ones(length, length).tril().bool(), -torch.inf)
    p = p.softmax(-1)
    want = torch.stack([calibrated_map(one, 0.1, 0.4) for one in p[0]]) @ v[0]
    plain, lse = attention(q, k, v, scale=8**-0.5, **seen.rows())
    sinks = sinks_of(q, k, lse, seen, scale=8**-0.5, threshold=0.1)
    got, mass = calibrate(q, k, v, plain, lse, sinks, seen, scale=8**-0.5, beta=0.4)
    assert int(sinks.sum()) > 4
    assert float(mass.max()) > 0
    torch.testing.assert_close(got[0], want, atol=1e-9, rtol=0)


def test_planted_sinks_are_recovered_exactly() -> None:
    torch.manual_seed(0)
    q, k = 0.1 * torch.randn(1, 1, 40, 8), 0.1 * torch.randn(1, 1, 40, 8)
    q[..., 0] = 3.0
    k[:, :, [0, 7, 20], 0] = 5.0
    seen = visibility(None, queries=40, keys=40)
    _, lse = attention(q, k, q, scale=1.0, **seen.rows())
    sinks = sinks_of(q, k, lse, seen, scale=1.0, threshold=0.1, min_rows=8)
    assert sinks[0, 0].nonzero().flatten().tolist() == [7, 20]


def test_search_returns_the_planted_head() -> None:
    def score(method: ACT) -> float:
        return 1.0 if method.heads == {3: [2]} else 0.5

    assert search_heads(score, [2, 3], 4) == {3: [2]}


def test_only_the_chosen_heads_change_and_options_count() -> None:
    torch.manual_seed(0)
    model, inputs = random_model("test_llava"), random_inputs("test_llava")

    def edited(**options: object) -> float:
        with torch.no_grad(), intervene(model, ACT(min_rows=1, **options)) as run:  # type: ignore[arg-type]
            model(**inputs)
        return sum(row["edited"] for row in run.report())

    everything = edited(threshold=0.05)
    assert 0 < edited(threshold=0.05, heads={2: [1]}) < everything
    assert edited(threshold=0.05, heads={}) == 0
    assert edited(threshold=0.9) == 0
    assert edited(relative=1.0) > edited(relative=8.0)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="ACT: beta must lie in"):
        ACT(beta=2)
    with pytest.raises(ValueError, match="min_rows must be at least 1"):
        ACT(min_rows=0)
    model = random_model("test_llava")
    with (
        pytest.raises(ValueError, match=r"layer 2 has heads 0 … 3, got heads=\[9\]"),
        intervene(model, ACT(heads={2: [9]})),
    ):
        model(**random_inputs("test_llava"))


@pytest.mark.parametrize("heads", [(0, 2, 3), None], ids=["some heads of a layer", "all of all but two and the last"])
def test_logits_equal_those_of_edited_dense_maps(
    setting: Any, check_dense: Callable[..., None], heads: tuple[int, ...] | None
) -> None:
    threshold, beta = 0.06, 0.4
    found: dict[tuple[int, int], Tensor] = {}
    last = setting.model.config.text_config.num_hidden_layers - 1

    def edit(scores: Tensor, layer: int, _hidden: Tensor) -> Tensor:
        p = scores.softmax(-1)
        if layer != 2 if heads else not 2 <= layer < last:
            return p
        out = p.clone()
        for head in heads or range(p.shape[1]):
            rows, keys = p.shape[2:]
            if rows == keys:  # the prompt, whose sinks hold for the answer too
                readers = torch.arange(keys, 0, -1)
                mean = p[0, head].sum(0) / readers
                found[layer, head] = ((mean > threshold) & (readers >= 3)).nonzero().flatten()[1:]
            sinks = found[layer, head]
            mass = p[0, head][:, sinks].sum(-1, keepdim=True)
            grown = p[0, head] * (1 + (1 - beta) * mass / (1 - mass))
            grown[:, sinks] = beta * p[0, head][:, sinks]
            out[0, head] = torch.where((mass > 0) & (mass < 1 - 1e-6), grown, p[0, head])
        return out

    chosen = {2: heads} if heads else None
    check_dense(ACT(threshold=threshold, beta=beta, heads=chosen, min_rows=3), edit)
    assert sum(len(sinks) for sinks in found.values()) > 2


def test_rows_that_see_nothing_but_sinks_stay() -> None:
    torch.manual_seed(2)
    q, k, v = (torch.randn(1, 2, 9, 8, dtype=torch.float64) for _ in range(3))
    mask = torch.ones(9, 9).tril().bool()
    mask[4] = False
    mask[4, 1:3] = True
    seen = visibility(mask[None, None], queries=9, keys=9, dtype=torch.float64)
    sinks = torch.zeros(1, 2, 9, dtype=torch.bool)
    sinks[..., 1:3] = True
    plain, lse = attention(q, k, v, scale=8**-0.5, **seen.rows())
    got, mass = calibrate(q, k, v, plain, lse, sinks, seen, scale=8**-0.5, beta=0.4)
    torch.testing.assert_close(got[:, :, 4], plain[:, :, 4], atol=1e-12, rtol=0)
    assert not mass[:, :, 4].any()
    assert float((got - plain)[:, :, 5:].abs().amin((1, 3)).min()) > 0


def test_relative_threshold_counts_tokens_of_the_prompt(setting: Any) -> None:
    length = setting.inputs["input_ids"].shape[1]
    settings: list[dict[str, Any]] = [{"relative": 1.2}, {"threshold": 1.2 / length}]
    relative, absolute = (setting.under(ACT(min_rows=3, **options)) for options in settings)
    torch.testing.assert_close(relative, absolute, atol=1e-6, rtol=0)


def test_edit_under_a_bidirectional_prefix_equals_the_dense_formulation() -> None:
    torch.manual_seed(1)
    length, prefix = 21, 6
    q, k, v = (1.5 * torch.randn(1, 4, length, 8, dtype=torch.float64) for _ in range(3))
    mask = torch.ones(length, length).tril().bool()
    mask[:, :prefix] = True
    p = (q @ k.transpose(-2, -1) * 8**-0.5).masked_fill(~mask, -torch.inf).softmax(-1)[0]
    want = p.clone()
    for head, a in enumerate(p):
        sinks = (a.sum(0) / mask.sum(0) > 0.1).nonzero().flatten()[1:]
        mass = a[:, sinks].sum(1, keepdim=True)
        grown = a * (1 + 0.6 * mass / (1 - mass))
        grown[:, sinks] = 0.4 * a[:, sinks]
        want[head] = torch.where((mass > 0) & (mass < 1 - 1e-6), grown, a)
    seen = visibility(mask[None, None], queries=length, keys=length, dtype=torch.float64)
    assert seen.bias is not None
    plain, lse = attention(q, k, v, scale=8**-0.5, **seen.rows())
    sinks = sinks_of(q, k, lse, seen, scale=8**-0.5, threshold=0.1)
    got, _ = calibrate(q, k, v, plain, lse, sinks, seen, scale=8**-0.5, beta=0.4)
    torch.testing.assert_close(got[0], want @ v[0], atol=1e-9, rtol=0)
    assert int(sinks.sum()) > 4
