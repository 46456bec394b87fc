"""Tiles of the kernels of grouped attention: the shipped table, all of it through ``python -m attn_core.aot``."""

from typing import Literal

import torch

from attn_core.kernels.launch import OLDER, Tile, at_width, for_small_memory

Pass = Literal["forward", "share", "query", "key"]

# (kernel, with factors or bias) → width bucket → tiles for sm_80 and for sm_90 on: rows, columns, warps, stages.
TILES_16_BIT: dict[tuple[Pass, bool], dict[int, tuple[Tile, Tile]]] = {
    ("forward", False): {
        64: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        128: (Tile(128, 32, 8, 1), Tile(128, 64, 8, 1)),
        256: (Tile(32, 32, 8, 1, repeats=True), Tile(32, 32, 8, 1, repeats=True)),
    },
    ("forward", True): {
        32: (Tile(64, 32, 4, 2), Tile(128, 32, 8, 2)),
        64: (Tile(64, 16, 4, 1), Tile(128, 32, 8, 2)),
        128: (Tile(64, 32, 8, 2, repeats=True), Tile(64, 16, 4, 1)),
        256: (Tile(32, 32, 8, 1, repeats=True), Tile(32, 32, 8, 1, repeats=True)),
    },
    ("share", True): {
        64: (Tile(64, 64, 8, 2, repeats=True), Tile(128, 64, 8, 1)),
        128: (Tile(64, 64, 8, 2, repeats=True), Tile(128, 64, 8, 2)),
        256: (Tile(32, 32, 8, 1, repeats=True), Tile(128, 32, 8, 1)),
    },
    ("query", False): {
        64: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        128: (Tile(128, 32, 8, 2), Tile(128, 64, 8, 2)),
        256: (Tile(32, 32, 8, 1, repeats=True), Tile(32, 32, 8, 1, repeats=True)),
    },
    ("query", True): {
        64: (Tile(128, 32, 8, 2), Tile(128, 32, 8, 1)),
        128: (Tile(128, 16, 8, 1), Tile(128, 32, 8, 2)),
        256: (Tile(32, 32, 8, 1, repeats=True), Tile(32, 32, 8, 1, repeats=True)),
    },
    ("key", False): {
        32: (Tile(64, 128, 8, 2), Tile(64, 128, 8, 2)),
        64: (Tile(32, 64, 4, 2), Tile(64, 128, 8, 2)),
        128: (Tile(16, 128, 8, 1), Tile(32, 128, 8, 1)),
        256: (Tile(32, 32, 8, 1, repeats=True), Tile(32, 32, 8, 1, repeats=True)),
    },
    ("key", True): {
        32: (Tile(32, 64, 4, 2), Tile(64, 128, 8, 2)),
        64: (Tile(16, 128, 8, 1), Tile(16, 64, 4, 1)),
        128: (Tile(32, 64, 8, 2, repeats=True), Tile(32, 64, 4, 1)),
        256: (Tile(32, 32, 8, 1, repeats=True), Tile(32, 32, 8, 1, repeats=True)),
    },
}
# float32 is multiplied without tensor cores: small tiles, the same for every architecture.
TILES_FLOAT32: dict[Pass, dict[int, Tile]] = {
    "forward": {128: Tile(32, 16, 8, 1)},
    "share": {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 8, 1)},
    "query": {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 8, 1)},
    "key": {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 8, 1)},
}


def choose_tile(kernel: Pass, width: int, dtype: torch.dtype, arch: str, laden: bool) -> Tile:
    """Tile of a kernel: every entry passes ``python -m attn_core.aot`` (no spill, shared memory within the limit).

    Args:
        width: the larger padded head width, 16…256.
        laden: shares have factors or scores a bias, which takes registers.
    """
    if arch == "interpreter":
        return Tile(16, 16, 4, 1)
    if dtype == torch.float32:
        tile = at_width(TILES_FLOAT32[kernel], width)
    else:
        tile = at_width(TILES_16_BIT[kernel, laden], width)[0 if arch in OLDER else 1]
    return for_small_memory(tile, width, dtype, arch)
