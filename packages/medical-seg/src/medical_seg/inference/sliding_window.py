"""Logits of a whole volume, window by window, without holding them all.

Windows overlap and are blended with Gaussian weights, as nnU-Net does (their sum is divided out, so that a plane is
final once no later window touches it). Planes leave in order of Z: the buffer is as deep as one window.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

Rows = tuple[int, int]
Read = Callable[[tuple[int, ...]], Tensor]


def window_starts(length: int, window: int, step: float) -> list[int]:
    """First positions of windows that cover an axis, evenly spread, at most ``step`` windows apart.

    Raises: ValueError unless 0 < step ≤ 1.
    """
    if not 0 < step <= 1:
        raise ValueError(f"--step must lie in (0, 1], got {step}")
    if length <= window:
        return [0]
    count = math.ceil((length - window) / max(1, window * step)) + 1
    return [round(i * (length - window) / (count - 1)) for i in range(count)]


def gaussian(window: Sequence[int]) -> Float[Tensor, "Z Y X"]:
    """Blending weights: 1 in the middle, standard deviation an eighth of the window."""
    weights = torch.ones(())
    for size in window:
        offset = torch.arange(size) - (size - 1) / 2
        weights = weights[..., None] * torch.exp(-0.5 * (offset / (size / 8)) ** 2)
    return weights.clamp(min=1e-4)


@torch.no_grad()
def logits_by_planes(
    network: Callable[[Tensor], Tensor],
    read: Read,
    grid: Sequence[int],
    window: Sequence[int],
    classes: int,
    *,
    step: float = 0.5,
    mirror: bool = False,
    rows: Rows | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[Float[Tensor, "K z y X"]]:
    """Finished planes of logits in order of Z, a few at a time.

    Args:
        network: (1, C, *window) → (1, K, *window).
        read: start of a window (Z, Y, X) → (C, *window); it may reach beyond the grid.
        grid: Z, Y, X of the volume.
        window: Z, Y, X of the network's input.
        classes: K.
        step: share of a window between neighbors, at most.
        mirror: average over all flips.
        rows: first and last row Y of the planes; windows that reach none of them are left out. None for all.
        device: of the network; planes are on the CPU.

    Memory: K·window_z·y·X numbers in float32, twice while planes are handed over.
    """
    weights = gaussian(window)
    starts = [window_starts(n, w, step) for n, w in zip(grid, window, strict=True)]
    depth, width = window[0], max(grid[2], window[2])
    top, end = (0, max(grid[1], window[1])) if rows is None else rows
    starts[1] = [y for y in starts[1] if y < end and y + window[1] > top]
    sums = torch.zeros(classes, depth, end - top, width)
    total = torch.zeros(depth, end - top, width)
    for number, z in enumerate(starts[0]):
        for y, x in product(starts[1], starts[2]):
            image = read((z, y, x))[None].to(device)
            logits = (_mirrored(network, image) if mirror else network(image))[0].float().cpu()
            low, high = max(y, top), min(y + window[1], end)
            place = (slice(None), slice(low - top, high - top), slice(x, x + window[2]))
            part = (slice(None), slice(low - y, high - y))
            total[place] += weights[part]
            for k in range(classes):  # class by class: the product needs a window, not K windows
                sums[k][place].addcmul_(logits[k][part], weights[part])
        last = number + 1 == len(starts[0])
        done = grid[0] - z if last else starts[0][number + 1] - z
        inside = (slice(done), slice(grid[1] - top), slice(grid[2]))
        for k in range(classes):
            sums[k][inside].div_(total[inside])
        yield sums[(slice(None), *inside)].clone()
        if not last:
            for buffer in (*sums, total):
                buffer[: depth - done] = buffer[done:].clone()
                buffer[depth - done :] = 0


def _mirrored(network: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    axes = [axis for axis in range(2, image.ndim) if image.shape[axis] > 1]
    flips = [
        [axis for axis, on in zip(axes, chosen, strict=True) if on] for chosen in product((0, 1), repeat=len(axes))
    ]
    total = network(image)
    for flip in flips[1:]:
        total = total + network(image.flip(flip)).flip(flip)
    return total / len(flips)


def classes_on_grid(
    planes: Iterator[Tensor],
    depth: int,
    grid: Sequence[int],
    *,
    rows: Rows | None = None,
    held: tuple[int, int, int] | None = None,
) -> Iterator[tuple[int, Iterator[Float[Tensor, "y X"]]]]:
    """Logits on another grid, linearly resized: plane by plane, in each one class after the other.

    Args:
        planes: what `logits_by_planes` gives.
        depth: how many planes there are in all.
        grid: Z, Y, X of the volume that is written.
        rows: the rows of it that are asked for; None for all.
        held: first and last row of their own grid that the planes hold, and its height; None for all.

    Yields: index of the plane, logits of its classes; these must be used up before the next plane.
    """
    waiting: dict[int, Tensor] = {}
    arrived = 0
    for z in range(grid[0]):
        lower, share = _between(z, depth, grid[0])
        while arrived <= min(lower + (share > 0), depth - 1):
            for plane in next(planes).unbind(1):
                waiting[arrived] = plane
                arrived += 1
        for old in [index for index in waiting if index < lower]:
            del waiting[old]
        pair = (waiting[lower], waiting[lower + 1]) if share else (waiting[lower],)
        yield z, (_resized(maps, share, grid, rows, held) for maps in zip(*pair, strict=True))


def label_of(classes: Iterator[Float[Tensor, "Y X"]], order: Sequence[int] = ()) -> Int[Tensor, "Y X"]:
    """Labels of a plane: the class with the greatest logit; holds two classes at a time.

    Args:
        classes: logits of one class after the other.
        order: of regions, the label that each is written as where its logit is positive, later ones over earlier ones.
    """
    best = next(classes)
    if order:
        labels = torch.where(best > 0, order[0], 0).byte()
        for label, logit in zip(order[1:], classes, strict=True):
            labels[logit > 0] = label
        return labels
    best, labels = best.clone(), torch.zeros(best.shape, dtype=torch.uint8)
    for k, logit in enumerate(classes, start=1):
        labels[logit > best] = k
        torch.maximum(best, logit, out=best)
    return labels


def labels_from_planes(
    planes: Iterator[Tensor], depth: int, grid: Sequence[int], order: Sequence[int] = ()
) -> Iterator[tuple[int, Int[Tensor, "Y X"]]]:
    """Labels on another grid, as if all logits were resized linearly before they are compared.

    Args:
        planes: what `logits_by_planes` gives.
        depth: how many planes there are in all.
        grid: Z, Y, X of the labels.
        order: as of `label_of`.
    """
    for z, classes in classes_on_grid(planes, depth, grid):
        yield z, label_of(classes, order)


def rows_needed(rows: Rows, height: int, written: int) -> Rows:
    """Rows of a grid that the rows of another one, covering the same extent, are interpolated between."""
    first, last = _between(rows[0], height, written), _between(rows[1] - 1, height, written)
    return first[0], min(last[0] + 2, height)


def _between(index: int, size: int, written: int) -> tuple[int, float]:
    """Lower neighbor of a position of another grid, and the share of the upper one."""
    position = min(max((index + 0.5) * size / written - 0.5, 0.0), size - 1.0)
    lower = min(int(position), max(0, size - 2))
    return lower, position - lower


def _resized(
    maps: Sequence[Tensor], share: float, grid: Sequence[int], rows: Rows | None, held: tuple[int, int, int] | None
) -> Tensor:
    logit = maps[0] if len(maps) == 1 else torch.lerp(maps[0], maps[1], share)
    begin, end = rows or (0, grid[1])
    first, height = (0, len(logit)) if held is None else (held[0], held[2])
    if height != grid[1]:
        places = [_between(row, height, grid[1]) for row in range(begin, end)]
        lower = torch.tensor([place for place, _ in places]) - first
        upper = (lower + 1).clamp(max=len(logit) - 1)
        shares = torch.tensor([part for _, part in places], dtype=logit.dtype)[:, None]
        logit = torch.lerp(logit[lower], logit[upper], shares)
    else:
        logit = logit[begin - first : end - first]
    if logit.shape[1] != grid[2]:
        logit = F.interpolate(logit[None], size=grid[2], mode="linear")[0]
    return logit
