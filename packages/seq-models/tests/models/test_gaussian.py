"""The Gaussian adaptive transformer for text: a network written out, sizes, errors."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from seq_models.models import create_model
from seq_models.models.gaussian import GaussianConfig


def turned(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding by complex numbers; x (N, D)."""
    n, width = x.shape
    angle = torch.arange(n).double()[:, None] * theta ** (-torch.arange(0, width, 2).double() / width)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def plain(state: dict[str, Tensor], ids: Tensor, config: GaussianConfig) -> Tensor:
    """Logits of one row, token by token: no layer of the package, no operator."""

    def normed(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    n, heads, width = len(ids), config.num_attention_heads, config.head_dim
    table = state["model.embed_tokens.weight"]
    x = table[ids]
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        y = normed(x, f"{name}.attention_norm")
        q, k, v = (y @ state[f"{name}.attention_qkv.weight"].T).view(n, 3, heads, width).unbind(1)
        out = torch.zeros_like(v)
        for h in range(heads):
            a, b = turned(q[:, h], config.rope_theta), turned(k[:, h], config.rope_theta)
            for i in range(n):
                out[i, h] = (b[: i + 1] @ a[i] / width**0.5).softmax(0) @ v[: i + 1, h]
        x = x + out.reshape(n, -1) @ state[f"{name}.attention_out.weight"].T
        y, add = normed(x, f"{name}.gaussian_norm"), torch.zeros_like(x)
        size = config.hidden_size // config.gaussian_heads
        for head in range(config.gaussian_heads):
            last = None if head == config.gaussian_heads - 1 else (head + 1) * size
            chunk = y[:, head * size : last]
            log = torch.zeros_like(chunk)
            for g in range(config.num_gaussians):
                offset, c = (state[f"{name}.gaussian.{part}"][head, g] for part in ("mean_offsets", "c"))
                z = (chunk - chunk.mean(1, keepdim=True) - offset) / (chunk.var(1, keepdim=True) + 1e-8).sqrt()
                log = log - z**2 / (2 * c**2)
            add[:, head * size : last] = chunk * log.softmax(1)
        x = x + add
        inner = normed(x, f"{name}.feedforward_norm") @ state[f"{name}.w1.weight"].T
        x = x + (inner * (1 + torch.erf(inner / math.sqrt(2))) / 2) @ state[f"{name}.w2.weight"].T
    return normed(x, "model.norm") @ table.T


@torch.no_grad()
def test_the_whole_network_equals_a_plain_one_written_out() -> None:
    torch.manual_seed(0)
    model: Any = create_model("test_gaussian").double().eval()
    for name, parameter in model.named_parameters():
        parameter.add_(torch.randn_like(parameter) * (0.05 if "gaussian." in name else 0.2))
    ids = torch.randint(0, 256, (13,))
    expected = plain(model.state_dict(), ids, model.config)
    assert (model(ids[None]).logits[0] - expected).abs().max() < 1e-10
    state = model(ids[None, :7], use_cache=True).past_key_values
    assert (model(ids[None, 7:], past_key_values=state).logits[0] - expected[7:]).abs().max() < 1e-10


def test_gaussians_are_two_numbers_each_and_may_be_left_out() -> None:
    sizes = {}
    for gaussians in (0, 1, 3):
        model: Any = create_model("test_gaussian", num_gaussians=gaussians)
        sizes[gaussians] = sum(p.numel() for p in model.parameters())
        assert model(torch.zeros(1, 3, dtype=torch.long)).logits.shape == (1, 3, 256)
    assert sizes[3] - sizes[1] == 2 * 2 * 3 * 2
    assert sizes[1] - sizes[0] == 2 * (2 * 3 + 2 * 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_gaussians": -1}, "GaussianConfig: num_gaussians must not be negative, got num_gaussians=-1"),
        ({"gaussian_heads": 0}, "gaussian_heads must be in 1…hidden_size=128, got gaussian_heads=0"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianConfig(**options)
