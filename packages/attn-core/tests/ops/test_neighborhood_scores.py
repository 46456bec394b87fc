"""What is special to the unfused windows: together they are the fused operator; errors; memory."""

import importlib
from typing import Any

import pytest
import torch

from attn_core import explain, neighborhood_attention, neighborhood_scores, neighborhood_values
from attn_core.testing import peak_memory, tensor


@pytest.mark.parametrize(
    "rules",
    [
        {"kernel_size": 3, "dilation": 2},
        {"kernel_size": (3, 4), "is_causal": (True, False)},
        {"kernel_size": 5, "border": "truncated"},
        {"kernel_size": 7, "dilation": (1, 2), "border": "truncated", "is_causal": (False, True)},
    ],
    ids=str,
)
def test_scores_softmax_values_equal_neighborhood_attention(rules: dict[str, Any]) -> None:
    q, k, v = (tensor(torch.float64, "cpu", 2, 3, 7, 6, 5) for _ in range(3))
    sizes = rules["kernel_size"] if isinstance(rules["kernel_size"], tuple) else (rules["kernel_size"],) * 2
    rpb = tensor(torch.float64, "cpu", 3, *(2 * size - 1 for size in sizes))
    scores = neighborhood_scores(q, k, **rules, rpb=rpb)
    out = neighborhood_values(scores.softmax(-1), v, **rules)
    expected, lse = neighborhood_attention(q, k, v, **rules, scale=1.0, rpb=rpb)
    assert (out - expected).abs().max() <= 1e-12
    assert (scores.logsumexp(-1) - lse).abs().max() <= 1e-12


def test_what_stands_in_empty_slots_is_never_read() -> None:
    q = torch.randn(1, 1, 4, 4, 3)
    held = neighborhood_scores(q, q, 3, border="truncated").isfinite()
    p = torch.rand(1, 1, 4, 4, 9).masked_fill(~held, torch.nan).requires_grad_()
    out = neighborhood_values(p, q, 3, border="truncated")
    assert out.isfinite().all()
    assert torch.equal(torch.autograd.grad(out.sum(), p)[0] == 0, ~held)
    zero = neighborhood_scores(q, q, 3, border="zero")
    assert torch.equal(zero == 0, ~held)


def test_neither_holds_more_than_a_fifth_beyond_its_own_output() -> None:
    q, k = (torch.randn(1, 8, 28, 28, 32) for _ in range(2))
    p = torch.rand(1, 8, 28, 28, 49)
    neighborhood_scores(q, k, 7)  # first calls allocate tables
    neighborhood_values(p, k, 7)
    scores, values = p.numel() * 4, k.numel() * 4
    assert peak_memory(lambda: neighborhood_scores(q, k, 7)) <= 1.2 * scores
    assert peak_memory(lambda: neighborhood_values(p, k, 7)) <= 1.2 * values


def test_the_kernels_say_which_widths_they_hold() -> None:
    q = torch.zeros(1, 1, 4, 200)
    assert explain(neighborhood_scores, q, q, 3)["torch"] == "chosen automatically"
    for name, operands in (("scores", {"q": q}), ("values", {"p": q, "v": q})):
        obstacle = importlib.import_module(f"attn_core.ops.neighborhood_{name}").triton_obstacle
        assert obstacle(**operands) == "the kernel holds widths up to 128 in float32, got 200"
        assert obstacle(**{argument: x.half() for argument, x in operands.items()}) is None


ONES = torch.ones(1, 2, 4, 5, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: neighborhood_scores(ONES, ONES, 5), r"must not exceed the 4 cells of axis 0 .* use kernel_size<=4"),
        (lambda: neighborhood_scores(ONES, ONES[..., :2], 3), r"k must have the shape of q \(1, 2, 4, 5, 3\), got"),
        (lambda: neighborhood_scores(ONES, ONES, 3, rpb=torch.ones(2, 5, 4)), r"rpb must have shape \(2, 5, 5\)"),
        (lambda: neighborhood_scores(ONES, ONES, (3, 3, 3)), r"kernel_size must be one value or one for each of"),
        (lambda: neighborhood_scores(ONES[0, 0], ONES[0, 0], 3), r"q must have 4, 5 or 6 dimensions"),
        (lambda: neighborhood_scores(ONES, ONES, 3, border="open"), r"border must be one of 'shifted', 'truncated'"),  # pyright: ignore[reportArgumentType]
        (lambda: neighborhood_values(ONES, ONES, 3), r"p must have size 9 along dimension 4 \(the slots of a window\)"),
        (lambda: neighborhood_values(ONES, ONES[:, :1], 3), r"v must have the batch, heads and grid of p"),
        (lambda: neighborhood_scores(ONES[:, :, :0], ONES[:, :, :0], 1), r"q must have at least one cell"),
    ],
)
def test_bad_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^neighborhood_(scores|values): .*{message}"):
        call()
