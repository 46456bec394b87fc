# pyright: reportCallIssue=false, reportArgumentType=false
# Operands are unpacked from lists and dictionaries.
"""inline_attention against its N×N weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attn_core import inline_attention
from attn_core.testing import relative_error


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def definition(q: Tensor, k: Tensor, v: Tensor, scale: float, residual: Tensor | None, grid: tuple[int, int]) -> Tensor:
    s = scale * q @ k.mT
    weight = (s + 1 - s.mean(-1, keepdim=True)) / q.shape[2]
    out = weight @ v
    if residual is None:
        return out
    rows = []
    for image, kernels in zip(v, residual, strict=True):  # one image, one head, one channel at a time
        for head, filters in zip(image, kernels, strict=True):
            maps = head[-grid[0] * grid[1] :].mT.reshape(-1, *grid)
            local = [
                F.conv2d(m[None, None], f[None, None], padding=1).flatten() for m, f in zip(maps, filters, strict=True)
            ]
            rows.append(F.pad(torch.stack(local, -1), (0, 0, q.shape[2] - grid[0] * grid[1], 0)))
    return out + torch.stack(rows).view(out.shape)


@pytest.mark.parametrize(("grid", "extra"), [((3, 4), 0), ((4, 4), 1), ((1, 5), 2)])
@pytest.mark.parametrize("local", [False, True])
def test_output_and_gradients_equal_the_weights_in_full(grid: tuple[int, int], extra: int, local: bool) -> None:
    tokens = grid[0] * grid[1] + extra
    inputs = [random(2, 3, tokens, 4, seed=i) for i in range(2)] + [random(2, 3, tokens, 5, seed=2)]
    residual = random(2, 3, 5, 3, 3, seed=3) if local else None
    leaves = [*inputs, *([] if residual is None else [residual])]
    expected = definition(*inputs, 0.7, residual, grid)
    actual = inline_attention(*inputs, scale=0.7, residual=residual, grid=grid if local else None)
    assert relative_error(actual, expected) <= 1e-10
    weight = torch.randn_like(expected)
    pairs = zip(*(torch.autograd.grad((out * weight).sum(), leaves) for out in (actual, expected)), strict=True)
    assert all(relative_error(got, want) <= 2e-10 for got, want in pairs)


def test_weights_of_a_row_sum_to_one() -> None:
    q, k = random(1, 2, 9, 4), random(1, 2, 9, 4, seed=1)
    ones = torch.ones(1, 2, 9, 3, dtype=torch.float64)
    assert relative_error(inline_attention(q, k, ones), ones) <= 1e-12


def test_bfloat16_stays_within_its_tolerance() -> None:
    inputs = [random(2, 2, 64, 16, seed=i).detach().bfloat16() for i in range(3)]
    out = inline_attention(*inputs)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, definition(*(x.double() for x in inputs), 0.25, None, (8, 8))) <= 2e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 9, 4)}, r"inline_attention: q must have 4 dimensions \(B H N D\)"),
        ({"residual": torch.zeros(2, 3, 4, 3)}, r"residual must have 5 dimensions \(B H Dv 3 3\)"),
        ({"residual": torch.zeros(2, 3, 4, 3, 5)}, r"residual must be of shape \(2, 3, 4, 3, 3\), got"),
        ({"residual": torch.zeros(2, 3, 4, 3, 3)}, "grid must be the height and width of a map of at most 9 tokens"),
        ({"residual": torch.zeros(2, 3, 4, 3, 3), "grid": (2, 5)}, r"of at most 9 tokens, got grid=\(2, 5\)"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    arguments = {name: torch.zeros(2, 3, 9, 4) for name in "qkv"} | changes
    with pytest.raises(ValueError, match=message):
        inline_attention(**arguments)
