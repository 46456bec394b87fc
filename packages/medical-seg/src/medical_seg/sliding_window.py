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
    device: torch.device | str = "cpu",
) -> Iterator[Float[Tensor, "K z Y X"]]:
    """Finished planes of logits in order of Z, a few at a time.

    Args:
        network: (1, C, *window) → (1, K, *window).
        read: start of a window (Z, Y, X) → (C, *window); it may reach beyond the grid.
        grid: Z, Y, X of the volume.
        window: Z, Y, X of the network's input.
        classes: K.
        step: share of a window between neighbors, at most.
        mirror: average over all flips.
        device: of the network; planes are on the CPU.

    Memory: K·window_z·Y·X numbers in float32.
    """
    weights = gaussian(window)
    starts = [window_starts(n, w, step) for n, w in zip(grid, window, strict=True)]
    depth = window[0]
    padded = [max(n, w) for n, w in zip(grid, window, strict=True)]
    sums = torch.zeros(classes, depth, *padded[1:])
    total = torch.zeros(depth, *padded[1:])
    for number, z in enumerate(starts[0]):
        for y, x in product(starts[1], starts[2]):
            image = read((z, y, x))[None].to(device)
            logits = (_mirrored(network, image) if mirror else network(image))[0].float().cpu()
            place = (slice(None), slice(y, y + window[1]), slice(x, x + window[2]))
            total[place] += weights
            for k in range(classes):  # class by class: the product needs a window, not K windows
                sums[k][place].addcmul_(logits[k], weights)
        last = number + 1 == len(starts[0])
        done = grid[0] - z if last else starts[0][number + 1] - z
        yield sums[:, :done, : grid[1], : grid[2]] / total[:done, : grid[1], : grid[2]]
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


def labels_from_planes(
    planes: Iterator[Tensor], depth: int, grid: Sequence[int]
) -> Iterator[tuple[int, Int[Tensor, "Y X"]]]:
    """Labels on another grid: each class is resized linearly by itself and compared with the best so far.

    Equal to resizing all logits and taking the argmax; holds one plane of one class at that grid.

    Args:
        planes: what `logits_by_planes` gives.
        depth: how many planes there are in all.
        grid: Z, Y, X of the labels.
    """
    held: dict[int, Tensor] = {}
    arrived = 0
    for z in range(grid[0]):
        position = min(max((z + 0.5) * depth / grid[0] - 0.5, 0.0), depth - 1.0)
        lower = min(int(position), max(0, depth - 2))
        share = position - lower
        needed = min(lower + (share > 0), depth - 1)
        while arrived <= needed:
            for plane in next(planes).unbind(1):
                held[arrived] = plane
                arrived += 1
        for old in [index for index in held if index < lower]:
            del held[old]
        best = labels = None
        for k in range(len(held[lower])):
            logit = held[lower][k] if share == 0 else torch.lerp(held[lower][k], held[lower + 1][k], share)
            if tuple(logit.shape) != tuple(grid[1:]):
                logit = F.interpolate(logit[None, None], size=tuple(grid[1:]), mode="bilinear")[0, 0]
            if best is None or labels is None:
                best, labels = logit.clone(), torch.zeros(logit.shape, dtype=torch.uint8)
            else:
                labels[logit > best] = k
                best = torch.maximum(best, logit)
        if labels is not None:
            yield z, labels
