"""PVT as a host: its own attention against all scores in full, positions, and errors."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vision_models import PVT
from vision_models.models.pvt import ReducedAttention


@pytest.mark.parametrize("ratio", [1, 2])
def test_reduced_attention_equals_all_scores_in_full(ratio: int) -> None:
    attn: Any = ReducedAttention(8, 2, ratio, True).double()
    for parameter in attn.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 5, 6, 8, dtype=torch.float64)
    small = x
    if ratio > 1:
        small = F.conv2d(x.permute(0, 3, 1, 2), attn.sr.weight, attn.sr.bias, stride=ratio).permute(0, 2, 3, 1)
        small = F.layer_norm(small, (8,), attn.norm.weight, attn.norm.bias, 1e-5)
    q, (k, v) = attn.q(x).flatten(1, 2), attn.kv(small).flatten(1, 2).chunk(2, 2)
    heads = [(q[..., i : i + 4] @ k[..., i : i + 4].mT / 2).softmax(-1) @ v[..., i : i + 4] for i in (0, 4)]
    torch.testing.assert_close(attn(x), attn.proj(torch.cat(heads, 2)).view(x.shape), rtol=1e-10, atol=1e-11)


def test_positions_of_another_image_size_are_bilinear() -> None:
    model: Any = PVT((1,), (8,), (2,), mlp_ratios=(2,), agents=(4,), sr_ratios=(1,), img_size=16)
    x = torch.randn(1, 3, 24, 28)
    table = model.stem.pos_embed.mT.view(1, 8, 4, 4)
    expected = model.stem.norm(model.stem.proj(x)) + F.interpolate(table, (6, 7), mode="bilinear")
    torch.testing.assert_close(model.stem(x), expected)


def test_another_grid_of_agents_is_used() -> None:
    options: dict[str, Any] = {"attention": "agent", "mlp_ratios": (2,), "agents": (9,), "sr_ratios": (1,)}
    plain, other = (PVT((1,), (8,), (2,), agent_shapes=shape, **options).eval() for shape in (None, ((2, 5),)))
    other.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert not torch.equal(plain(x), other(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dims": (64, 128)}, "must have one entry for each of 4 stages"),
        ({"attention": "agent", "agents": (9,)}, "must have one entry for each of 4 stages"),
        ({"num_heads": (3, 2, 5, 8)}, "num_heads must divide the width of its stage, got 3 and 64"),
        ({"img_size": 31}, "img_size must be at least 32, got img_size=31"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"PVT: .*{message}"):
        PVT(**options)
