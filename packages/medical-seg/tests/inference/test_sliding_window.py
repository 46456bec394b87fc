"""Logits window by window."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medical_seg.inference.sliding_window import gaussian, labels_from_planes, logits_by_planes, window_starts


def network(x: Tensor) -> Tensor:
    """Depends on the place in the window, as a network with padding does."""
    ramp = torch.linspace(0.5, 1.5, x.shape[-1])
    return torch.cat([x * ramp, -x, x.square() - 1], 1)


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("grid", [(9, 10, 7), (3, 4, 20)])
def test_streamed_labels_equal_the_argmax_of_everything(grid: tuple[int, ...], mirror: bool) -> None:
    torch.manual_seed(0)
    image = torch.randn(1, *grid)
    window, written = (4, 6, 4), (13, 8, 11)

    def read(start: tuple[int, ...]) -> Tensor:
        padded = F.pad(image, [0, 8, 0, 8, 0, 8])
        return padded[(slice(None), *(slice(a, a + n) for a, n in zip(start, window, strict=True)))]

    total, weight = torch.zeros(3, *(n + 8 for n in grid)), torch.zeros(*(n + 8 for n in grid))
    for z in window_starts(grid[0], 4, 0.5):
        for y in window_starts(grid[1], 6, 0.5):
            for x in window_starts(grid[2], 4, 0.5):
                part = read((z, y, x))[None]
                flips = [[a for a in (2, 3, 4) if bits >> a & 1] for bits in range(0, 32, 4)] if mirror else [[]]
                logits = torch.stack([network(part.flip(f)).flip(f) for f in flips]).mean(0)[0]
                place = (slice(z, z + 4), slice(y, y + 6), slice(x, x + 4))
                total[(slice(None), *place)] += logits * gaussian(window)
                weight[place] += gaussian(window)
    whole = (total / weight)[:, : grid[0], : grid[1], : grid[2]]
    planes = list(logits_by_planes(network, read, grid, window, 3, mirror=mirror))
    assert torch.allclose(torch.cat(planes, 1), whole, atol=1e-5)
    expected = F.interpolate(whole[None], size=written, mode="trilinear")[0].argmax(0)
    found = torch.stack([labels for _, labels in labels_from_planes(iter(planes), grid[0], written)])
    assert (found == expected).float().mean() > 0.999
