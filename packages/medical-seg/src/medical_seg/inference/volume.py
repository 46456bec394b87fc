"""Labels of a volume on its own grid, in bounded memory."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medical_seg.data.volumes import Volume, measure_scaling, require_finite, sample_image, target_grid
from medical_seg.inference.budget import Budget, peak_memory
from medical_seg.inference.sliding_window import classes_on_grid, label_of, logits_by_planes, rows_needed

Network = Callable[[Tensor], Tensor]


Keep = Callable[[int, int, Tensor], None]


def segment_volume(
    model: Any,
    volume: Volume,
    info: dict[str, Any],
    *,
    network: Network | None = None,
    step: float = 0.5,
    mirror: bool = False,
    budget: Budget | None = None,
    keep: Keep | None = None,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Labels (Z, Y, X) on the volume's grid.

    Windows are resampled as they are read and logits are compared class by class as planes are finished: neither the
    resampled image nor the logits of the whole volume exist. If even the planes of one window's depth do not fit, the
    volume is taken in strips along Y: windows that touch two of them are computed twice, labels stay the same.

    Args:
        model: a `SegmentationTask` in eval mode.
        volume: the image.
        info: ``spacing``, ``scaling`` and ``channels`` of the training data.
        network: windows → logits; None for the model's own.
        step, mirror: as of `logits_by_planes`.
        budget: None for as much memory as it takes.
        keep: is given the logits of all classes of rows of a plane: (z, first row, (K, y, X)).
        device: of the model.

    Raises: ValueError if the channels differ from the network's, the image is not finite, or memory does not suffice.
    """
    if len(volume.data) != len(info["channels"]):
        raise ValueError(
            f"{volume.path}: {len(volume.data)} channels, the network reads {len(info['channels'])} "
            f"({', '.join(info['channels'])})"
        )
    require_finite(volume)
    scalings = [measure_scaling(channel, rule) for channel, rule in zip(volume.data, info["scaling"], strict=True)]
    network = model.tensor if network is None else network
    window = model.window
    grid = target_grid(volume, info["spacing"], window)

    def read(start: tuple[int, ...]) -> Tensor:
        return sample_image(volume, scalings, grid, start, window)

    strips = 1
    if budget is not None:
        if budget.base is None:
            with torch.no_grad():
                network(read((0, 0, 0))[None].to(device))  # pyright: ignore[reportOptionalCall]
            budget.base = peak_memory() - volume.data.nbytes
        strips = _strips(model.out_channels, window, grid, volume, budget.allowed, budget.base)
    mask = np.zeros(volume.grid, dtype=np.uint8)
    height = volume.grid[1]
    for begin, end in pairwise(round(i * height / strips) for i in range(strips + 1)):
        first, last = rows_needed((begin, end), grid[1], height)
        planes = logits_by_planes(
            network,  # pyright: ignore[reportArgumentType]
            read,
            grid,
            window,
            model.out_channels,
            step=step,
            mirror=mirror,
            rows=(first, last) if strips > 1 else None,
            device=device,
        )
        written = classes_on_grid(planes, grid[0], volume.grid, rows=(begin, end), held=(first, last, grid[1]))
        for z, classes in written:
            if keep is not None:
                logits = torch.stack(list(classes))
                keep(z, begin, logits)
                classes = iter(logits.unbind())
            mask[z, begin:end] = label_of(classes, model.order).numpy()
    return mask


def _strips(classes: int, window: Sequence[int], grid: Sequence[int], volume: Volume, allowed: int, base: int) -> int:
    """In how many strips a volume must be taken; the estimates are from above."""
    held = base + volume.data.nbytes + 4 * int(np.prod(volume.grid))  # labels, and their copies when they are written
    width, strips = max(grid[2], window[2]), 1
    while True:
        rows = -(-max(grid[1], window[1]) // strips) + 2
        # running sums, the planes that are handed over, weights; then maps of a plane on the volume's grid
        needed = held + 4 * (2 * classes + 2) * window[0] * rows * width
        needed += 4 * (classes + 6) * (-(-volume.grid[1] // strips)) * volume.grid[2]
        if needed <= allowed:
            return strips
        if rows <= max(8, window[1] // 4):
            raise ValueError(
                f"{volume.path}: needs {needed / 2**30:.2f} GiB, --max-mem allows {allowed / 2**30:.2f}; "
                "a smaller window or a coarser spacing in training needs less"
            )
        strips *= 2
