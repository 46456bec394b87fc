"""Where numbers stand in lists of them: who reads a block, which keys are in a group."""

import torch
from torch import Tensor

from .launch import Tile, launch, power_of_two


def inverted(index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Where each of the numbers 0…size−1 stands in the rows of ``index`` (…, P), without asking the device.

    Returns:
        order (…, P) int64 and start (…, size + 1) int32: number n stands at ``order[start[n] : start[n + 1]]``,
        ascending. Smaller numbers come before, larger ones behind.
    """
    from .tiles import starts_kernel

    found, order = torch.sort(index, dim=-1, stable=True)
    places = index.shape[-1]
    start = torch.empty((*index.shape[:-1], size + 1), dtype=torch.int32, device=index.device)
    rows = start.numel() // (size + 1)
    tile = Tile(0, 0, 4, 1)
    launch(
        starts_kernel,
        rows,
        index.device,
        tile,
        *(found, start, places, size, places.bit_length()),
        BLOCK=power_of_two(size + 1),
    )
    return order, start
