"""CSwin as a host: its stripes against all scores in full, and errors."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vision_models import CSwin
from vision_models.models.cswin import StripeAttention


@pytest.mark.parametrize(("rows", "columns"), [(0, 2), (3, 0), (0, 0)])
def test_stripes_equal_all_scores_in_full_with_the_rest_hidden(rows: int, columns: int) -> None:
    """On 5×7 tokens stripes of two columns and three rows do not fill the map."""
    height, width, dim = 5, 7, 8
    attn: Any = StripeAttention(dim, 2, rows, columns).double()
    for parameter in attn.parameters():
        nn.init.normal_(parameter, std=0.5)
    q, k, v = torch.randn(3, 2, height * width, dim, dtype=torch.float64)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    stripe = (y // (rows or height) * width + x // (columns or width)).flatten()
    hidden = stripe[:, None] != stripe
    heads = [
        (q[..., i : i + 4] @ k[..., i : i + 4].mT / 2).masked_fill(hidden, float("-inf")).softmax(-1)
        @ v[..., i : i + 4]
        for i in (0, 4)
    ]
    local = torch.zeros(2, dim, height, width, dtype=torch.float64)
    for s in stripe.unique():  # a convolution that does not see other stripes
        inside = (stripe == s).view(height, width)
        maps = v.mT.unflatten(2, (height, width)) * inside
        local += inside * F.conv2d(maps, attn.get_v.weight, attn.get_v.bias, padding=1, groups=dim)
    expected = torch.cat(heads, 2) + local.flatten(2).mT
    torch.testing.assert_close(attn(q, k, v, q, (height, width)), expected, rtol=1e-10, atol=1e-11)


def test_a_stage_whose_map_is_one_stripe_has_one_branch() -> None:
    model: Any = CSwin((1, 1, 1, 1), 8, (2, 2, 2, 2), split=(1, 2, 14))
    assert [len(stage.blocks[0].attns) for stage in model.stages] == [2, 2, 1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": (1, 2)}, "must have one entry for each of 4 stages, split one less"),
        ({"split": (1, 2, 0)}, r"split must be positive, got split=\(1, 2, 0\)"),
        ({"num_heads": (3, 4, 8, 16)}, "num_heads must divide the width of its stage, got 3 and 64"),
        ({"num_heads": (1, 4, 8, 16)}, "num_heads must be even where there are stripes, got 1 in stage 0"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"CSwin: .*{message}"):
        CSwin(**options)
