"""Which tile each kernel of block attention uses: the shipped table, all of it through ``python -m attn_core.aot``."""

from typing import Literal

import torch

from attn_core.kernels.launch import OLDER, Tile, at_width, for_small_memory, power_of_two

Pass = Literal["forward", "query", "key"]

# (kernel, without axis bias) → width bucket → tiles for sm_80 and for sm_90 on: rows, columns, warps, stages.
TILES_16_BIT: dict[tuple[Pass, bool], dict[int, tuple[Tile, Tile]]] = {
    ("forward", True): {
        64: (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
        128: (Tile(64, 64, 8, 2, repeats=True), Tile(64, 32, 4, 1)),
        256: (Tile(64, 64, 8, 2, repeats=True), Tile(64, 32, 8, 2, repeats=True)),
    },
    ("forward", False): {
        64: (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
        128: (Tile(64, 64, 8, 2, repeats=True), Tile(64, 32, 4, 1)),
        256: (Tile(64, 64, 8, 2, repeats=True), Tile(64, 32, 8, 2, repeats=True)),
    },
    ("query", True): {
        64: (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
        128: (Tile(64, 32, 4, 1), Tile(64, 32, 4, 1)),
        256: (Tile(64, 32, 8, 2, repeats=True), Tile(32, 32, 4, 1, repeats=True)),
    },
    ("query", False): {
        64: (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
        128: (Tile(64, 32, 8, 2, repeats=True), Tile(64, 32, 4, 1)),
        256: (Tile(32, 32, 4, 1, repeats=True), Tile(32, 32, 8, 2, repeats=True)),
    },
    ("key", True): {
        32: (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
        64: (Tile(32, 64, 4, 2), Tile(64, 64, 4, 2)),
        128: (Tile(64, 64, 8, 2, repeats=True), Tile(32, 64, 4, 1)),
        256: (Tile(32, 64, 8, 2, repeats=True), Tile(32, 32, 4, 2, repeats=True)),
    },
    ("key", False): {
        64: (Tile(32, 64, 4, 2), Tile(64, 128, 8, 2)),
        128: (Tile(64, 64, 8, 2, repeats=True), Tile(16, 64, 4, 1)),
        256: (Tile(32, 64, 8, 2, repeats=True), Tile(32, 32, 4, 2, repeats=True)),
    },
}
# float32 is multiplied without tensor cores: small tiles. Of those tried in forward none is free of stack on sm_80 and
# on sm_100 under both Triton 3.6 and 3.9.
TILES_FLOAT32: dict[Pass, dict[int, tuple[Tile, Tile]]] = {
    "forward": {
        64: (Tile(32, 16, 4, 2), Tile(32, 16, 8, 1)),
        128: (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
    "query": {
        64: (Tile(16, 32, 4, 1), Tile(16, 32, 4, 1)),
        128: (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
    "key": {
        64: (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
        128: (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
}


def choose_tile(kernel: Pass, width: int, dtype: torch.dtype, arch: str, plain: bool, rows: int, columns: int) -> Tile:
    """Tile of a kernel: every entry passes ``python -m attn_core.aot`` (no spill, shared memory within the limit).

    Args:
        width: the larger padded head width, 16…256.
        plain: no axis bias.
        rows, columns: how many queries and keys a tile can use at most; smaller blocks get smaller tiles.
    """
    if arch == "interpreter":
        return Tile(16, 16, 4, 1)
    table = TILES_FLOAT32[kernel] if dtype == torch.float32 else TILES_16_BIT[kernel, plain]
    tile = at_width(table, width)[0 if arch in OLDER else 1]
    tile = for_small_memory(tile, width, dtype, arch)
    rows, columns = min(tile.rows, power_of_two(rows, 16)), min(tile.columns, power_of_two(columns, 16))
    if (rows, columns) == (tile.rows, tile.columns):
        return tile
    # Fewer warps where there is less to share out, and then more blocks on one multiprocessor; the key pass accumulates
    # two products.
    warps = rows * max(columns, width) // (512 if kernel == "key" else 1024)
    return Tile(rows, columns, max(1, min(tile.warps, warps)), tile.stages, tile.repeats)
