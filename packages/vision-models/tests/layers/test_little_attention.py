"""Little attention against its two gates, channel by channel."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vision_models.layers.little_attention import LittleAttention


def plain(module: Any, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    for b in range(len(x)):
        means = torch.stack([channel.sum() / channel.numel() for channel in x[b]])
        if module.kind == "conv":
            taps = module.gate[0].weight[0, 0]
            half = len(taps) // 2
            scores = [
                sum(taps[t] * means[c + t - half] for t in range(len(taps)) if 0 <= c + t - half < len(means))
                for c in range(len(means))
            ]
        else:
            hidden = (module.gate[0].weight @ means + module.gate[0].bias).clamp(min=0)
            scores = list(module.gate[2].weight @ hidden + module.gate[2].bias)
        for c, score in enumerate(scores):
            e = torch.exp(-torch.as_tensor(score))
            gate = 1 / (1 + e) if module.start == "half" else 1 + (1 - e * e) / (1 + e * e)
            out[b, c] = x[b, c] * gate
    return out


@pytest.mark.parametrize("start", ["identity", "half"])
@pytest.mark.parametrize("options", [{}, {"kernel_size": 5}, {"kind": "bottleneck", "reduction": 4}])
def test_output_equals_the_plain_gate(options: dict[str, Any], start: Any) -> None:
    module = LittleAttention(12, **options, start=start).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 12, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(module(x), plain(module, x))


@pytest.mark.parametrize("kind", ["conv", "bottleneck"])
def test_a_fresh_module_changes_nothing_and_learns(kind: Any) -> None:
    module = LittleAttention(32, kind)
    x = torch.randn(2, 32, 4, 4)
    torch.testing.assert_close(module(x), x, rtol=0, atol=0)
    (module(x) * torch.randn_like(x)).sum().backward()
    assert any(p.grad is not None and p.grad.abs().amax() > 0 for p in module.parameters())
    # the sigmoid's gate starts near one half
    assert not torch.allclose(LittleAttention(32, kind, start="half")(x), x)


def test_parameters_follow_the_closed_form() -> None:
    assert sum(p.numel() for p in LittleAttention(64, kernel_size=5).parameters()) == 5
    bottleneck = LittleAttention(64, "bottleneck", reduction=16)
    assert sum(p.numel() for p in bottleneck.parameters()) == 2 * 64 * 4 + 4 + 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "pool"}, "LittleAttention: kind must be 'conv' or 'bottleneck', got kind='pool'"),
        ({"start": "zero"}, "LittleAttention: start must be 'identity' or 'half', got start='zero'"),
        ({"kernel_size": 2}, "LittleAttention: kernel_size must be odd and positive, got kernel_size=2"),
        ({"reduction": 0}, "LittleAttention: reduction must be positive, got reduction=0"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LittleAttention(16, **options)
