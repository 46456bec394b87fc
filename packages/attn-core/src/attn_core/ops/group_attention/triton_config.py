"""Tiles of the kernels of grouped attention: the shipped table, all of it through ``python -m attn_core.aot``."""

from typing import Literal

import torch

from attn_core.kernels.launch import OLDER, Tile, at_width, for_small_memory

Pass = Literal["forward", "share", "query", "key"]

# Kernel → width bucket → tiles for sm_80 and for sm_90 on: rows, columns, warps, stages.
TILES_16_BIT: dict[Pass, dict[int, tuple[Tile, Tile]]] = {
    "forward": {
        128: (Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
        256: (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    },
    "share": {
        128: (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
        256: (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    },
    "query": {
        64: (Tile(64, 32, 8, 2), Tile(64, 32, 4, 2)),
        128: (Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
        256: (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    },
    "key": {
        64: (Tile(32, 64, 8, 2), Tile(64, 64, 8, 2)),
        128: (Tile(32, 64, 8, 2), Tile(32, 64, 8, 2)),
        256: (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    },
}
# float32 is multiplied without tensor cores: small tiles, the same for every architecture.
TILES_FLOAT32: dict[Pass, dict[int, Tile]] = {
    "forward": {128: Tile(32, 16, 4, 1)},
    "share": {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 8, 1)},
    "query": {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 8, 1)},
    "key": {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 8, 1)},
}


def choose_tile(kernel: Pass, width: int, dtype: torch.dtype, arch: str) -> Tile:
    """Tile of a kernel: every entry passes ``python -m attn_core.aot`` (no spill, shared memory within the limit).

    Args:
        width: the larger padded head width, 16…256.
    """
    if arch == "interpreter":
        return Tile(16, 16, 4, 1)
    if dtype == torch.float32:
        tile = at_width(TILES_FLOAT32[kernel], width)
    else:
        tile = at_width(TILES_16_BIT[kernel], width)[0 if arch in OLDER else 1]
    return for_small_memory(tile, width, dtype, arch)
