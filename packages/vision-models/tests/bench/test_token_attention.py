"""The peers that hold scores in full and copy windows compute the same."""

from typing import Any

import pytest
import torch
from torch import nn

from vision_models import create_model
from vision_models.bench.token_attention import in_full


@pytest.mark.parametrize("name", ["test_dhvt", "test_tap_rvt", "test_tap_fan"])
def test_the_peer_computes_the_same_numbers_and_gradients(name: str) -> None:
    ours: Any = create_model(name).double().eval()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.1)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    results = []
    for net in (ours, in_full(ours)):
        logits = net(x)
        results.append([logits, *torch.autograd.grad(logits.square().sum(), list(net.parameters()), allow_unused=True)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)
