"""The peers that mask what ours leaves out compute the same."""

from typing import Any

import pytest
import torch
from torch import nn

from vision_models import create_model
from vision_models.bench.masked import attention_layers, masked_peer


@pytest.mark.parametrize("name", ["test_moh_vit", "test_sparsifiner"])
def test_the_peer_computes_the_same_numbers_and_gradients(name: str) -> None:
    ours: Any = create_model(name).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.1)
    x = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    results = []
    peer = masked_peer(ours)
    layers = attention_layers(ours, x)(x)
    assert len(layers) == 4
    torch.testing.assert_close(attention_layers(peer, x)(x), layers, rtol=1e-9, atol=1e-12)
    for net in (ours, peer):
        logits = net(x)
        results.append([logits, *torch.autograd.grad(logits.square().sum(), [net.pos_embed, net.cls_token])])  # pyright: ignore[reportArgumentType, reportCallIssue]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_a_model_that_leaves_nothing_out_has_no_peer() -> None:
    with pytest.raises(ValueError, match="benchmark: DeiT without mixture of heads has no peer to compare with"):
        masked_peer(create_model("test_agent_deit"))
