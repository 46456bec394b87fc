"""Which tile each kernel of neighborhood attention uses: the shipped table, all of it through ``attn_core.aot``."""

from typing import Literal

import torch

from attn_core.kernels.launch import OLDER, Tile, at_width, for_small_memory

Pass = Literal["forward", "query", "key"]

# (kernel, with a table) → width bucket → tiles for sm_80 and for sm_90 on: queries, keys, warps, stages. Windows,
# coordinates and the test of each pair live in registers beside the scores: tiles are smaller than those of plain
# attention. More queries in a tile have a larger box of keys, of which each needs the same few.
TILES_16_BIT: dict[tuple[Pass, bool], dict[int, tuple[Tile, Tile]]] = {
    ("forward", False): {
        32: (Tile(64, 32, 4, 2), Tile(64, 32, 4, 1)),
        128: (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
        256: (Tile(32, 32, 8, 1, repeats=True), Tile(32, 32, 8, 2, repeats=True)),
    },
    ("forward", True): {
        32: (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
        64: (Tile(64, 16, 4, 2), Tile(64, 32, 8, 2, repeats=True)),
        128: (Tile(64, 32, 8, 2, repeats=True), Tile(64, 16, 4, 2)),
        256: (Tile(32, 32, 8, 1, repeats=True), Tile(32, 32, 8, 2, repeats=True)),
    },
    ("query", False): {
        128: (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
        256: (Tile(32, 32, 8, 1, repeats=True), Tile(32, 32, 4, 2, repeats=True)),
    },
    ("query", True): {
        32: (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
        128: (Tile(32, 32, 8, 2, repeats=True), Tile(64, 16, 4, 2)),
        256: (Tile(32, 32, 8, 1, repeats=True), Tile(32, 32, 4, 2, repeats=True)),
    },
    ("key", False): {
        64: (Tile(32, 64, 4, 2), Tile(32, 64, 4, 2)),
        128: (Tile(32, 64, 4, 1), Tile(16, 64, 4, 1)),
        256: (Tile(32, 32, 8, 1, repeats=True), Tile(32, 32, 8, 2, repeats=True)),
    },
    ("key", True): {
        32: (Tile(32, 64, 4, 2), Tile(32, 64, 4, 2)),
        64: (Tile(32, 32, 4, 1), Tile(16, 64, 4, 2)),
        128: (Tile(32, 32, 8, 2, repeats=True), Tile(16, 64, 4, 2)),
        256: (Tile(32, 32, 8, 1, repeats=True), Tile(32, 32, 8, 2, repeats=True)),
    },
}
# float32 is multiplied without tensor cores: small tiles, the same for every architecture.
TILES_FLOAT32: dict[Pass, dict[int, Tile]] = {
    "forward": {64: Tile(32, 32, 8, 1)},
    "query": {64: Tile(32, 32, 8, 1)},
    "key": {64: Tile(32, 32, 8, 1)},
}


def choose_tile(kernel: Pass, width: int, dtype: torch.dtype, arch: str, biased: bool) -> Tile:
    """Tile of a kernel: every entry passes ``python -m attn_core.aot`` (no spill, shared memory within the limit).

    Args:
        width: the larger padded head width, 16…256.
        biased: a table of relative positions is added to the scores, which takes registers.
    """
    if arch == "interpreter":
        return Tile(16, 32, 4, 1)
    if dtype == torch.float32:
        tile = at_width(TILES_FLOAT32[kernel], width)
    else:
        tile = at_width(TILES_16_BIT[kernel, biased], width)[0 if arch in OLDER else 1]
    return for_small_memory(tile, width, dtype, arch)
