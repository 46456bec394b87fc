"""ELA against its equations, written line by line."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vision_models.layers.ela import ELA

OPTIONS: list[dict[str, Any]] = [
    {"variant": "t"},
    {"variant": "b"},
    {"variant": "s"},
    {"variant": "l"},
    {"kernel_size": 3, "conv_groups": 1, "norm_groups": 3, "bias": True},
    {"variant": "s", "shared": False},
]


def random_weights(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.7)


def gates(lines: Tensor, state: Mapping[str, Tensor], norm_groups: int) -> Tensor:
    """(B, C, L) → same: convolution tap by tap, norm group by group."""
    weight, bias = state["conv.weight"], state.get("conv.bias")
    dim, width, kernel = weight.shape
    dense = weight.new_zeros(dim, dim, kernel)
    for c in range(dim):
        first = c // width * width  # of the channels that this one sees
        dense[c, first : first + width] = weight[c]
    out = torch.zeros_like(lines)
    for place in range(lines.shape[2]):
        for tap in range(kernel):
            at = place + tap - kernel // 2
            if 0 <= at < lines.shape[2]:
                out[:, :, place] += lines[:, :, at] @ dense[:, :, tap].T
    if bias is not None:
        out = out + bias[:, None]
    normed = []
    for group in out.split(dim // norm_groups, 1):
        centered = group - group.mean((1, 2), keepdim=True)
        normed.append(centered / (centered.square().mean((1, 2), keepdim=True) + 1e-5).sqrt())
    scaled = torch.cat(normed, 1) * state["norm.weight"][:, None] + state["norm.bias"][:, None]
    return 1 / (1 + (-scaled).exp())


def of(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(f"{prefix}."): p for n, p in module.named_parameters() if n.startswith(f"{prefix}.")}


@pytest.mark.parametrize("options", OPTIONS)
def test_output_and_gradients_equal_the_plain_form(options: dict[str, Any]) -> None:
    ela: Any = ELA(24, **options).double()
    random_weights(ela)
    groups = ela.rows.norm.num_groups
    x = torch.randn(2, 24, 3, 5, dtype=torch.float64, requires_grad=True)
    rows = gates(x.mean(3), of(ela, "rows"), groups)
    columns = gates(x.mean(2), of(ela, "rows" if options.get("shared", True) else "columns"), groups)
    plain = x * rows.unsqueeze(3) * columns.unsqueeze(2)
    out = ela(x)
    weight, leaves = torch.randn_like(out), [x, *ela.parameters()]
    torch.testing.assert_close(out, plain, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad((out * weight).sum(), leaves),
        torch.autograd.grad((plain * weight).sum(), leaves),
        rtol=1e-9,
        atol=1e-11,
    )


@pytest.mark.parametrize(("variant", "per_channel"), [("t", 5), ("b", 7), ("s", 8 * 5), ("l", 8 * 7)])
def test_parameters_follow_the_closed_form(variant: Any, per_channel: int) -> None:
    for dim in (64, 256):
        assert sum(p.numel() for p in ELA(dim, variant).parameters()) == dim * per_channel + 2 * dim


def test_constant_gates_are_the_sigmoid_of_the_norms_bias_squared() -> None:
    ela: Any = ELA(32).double()
    nn.init.zeros_(ela.rows.norm.weight)
    nn.init.normal_(ela.rows.norm.bias)
    x = torch.full((1, 32, 4, 6), 0.3, dtype=torch.float64)
    torch.testing.assert_close(ela(x), x * ela.rows.norm.bias.sigmoid().square()[:, None, None])


def test_a_turned_map_gives_the_turned_result() -> None:
    ela = ELA(32, "l").double()
    x = torch.randn(2, 32, 5, 9, dtype=torch.float64)
    torch.testing.assert_close(ela(x.mT), ela(x).mT)


def test_groups_fall_to_the_next_divisor_of_an_odd_width() -> None:
    ela: Any = ELA(44, "l")
    assert (ela.rows.conv.groups, ela.rows.norm.num_groups) == (4, 11)
    ela = ELA(7, "t")
    assert ela.rows.norm.num_groups == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "x"}, "ELA: variant must be 't', 'b', 's' or 'l', got variant='x'"),
        ({"kernel_size": 4}, "ELA: kernel_size must be odd and positive, got kernel_size=4"),
        ({"norm_groups": 5}, "ELA: norm_groups must divide dim=32, got norm_groups=5"),
        ({"conv_groups": 0}, "ELA: conv_groups must divide dim=32, got conv_groups=0"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        ELA(32, **options)
