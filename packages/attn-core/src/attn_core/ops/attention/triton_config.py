"""Which tile each kernel of attention uses: the shipped table, all of it through ``python -m attn_core.aot``."""

from typing import Literal

import torch

from attn_core.kernels.launch import OLDER, Tile, at_width, for_small_memory

Pass = Literal["forward", "query", "key", "bias"]

Load = Literal["plain", "bias", "both", "ranged"]

# (kernel, what is added to the scores) → width bucket → tiles for sm_80 and for sm_90 on: rows, columns, warps, stages.
TILES_16_BIT: dict[tuple[Pass, Load], dict[int, tuple[Tile, Tile]]] = {
    ("forward", "plain"): {
        64: (Tile(128, 64, 4, 3), Tile(128, 64, 8, 3)),
        128: (Tile(64, 64, 8, 2), Tile(128, 64, 8, 3)),
        256: (Tile(64, 64, 8, 2), Tile(128, 32, 8, 2)),
    },
    ("forward", "bias"): {
        32: (Tile(128, 64, 8, 2), Tile(128, 32, 8, 1)),
        64: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        128: (Tile(128, 32, 8, 2), Tile(128, 32, 8, 2)),
        256: (Tile(64, 64, 8, 2), Tile(32, 64, 8, 2, repeats=True)),
    },
    ("forward", "both"): {
        64: (Tile(64, 32, 8, 2, repeats=True), Tile(64, 16, 4, 2)),
        128: (Tile(64, 32, 8, 2, repeats=True), Tile(64, 16, 4, 2)),
        256: (Tile(32, 32, 8, 2, repeats=True), Tile(32, 32, 8, 2, repeats=True)),
    },
    ("forward", "ranged"): {
        64: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        128: (Tile(128, 32, 8, 2), Tile(128, 64, 8, 2)),
        256: (Tile(32, 32, 4, 2, repeats=True), Tile(32, 32, 4, 2, repeats=True)),
    },
    ("query", "plain"): {
        64: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        128: (Tile(64, 64, 8, 2), Tile(64, 64, 4, 2)),
        256: (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2, repeats=True)),
    },
    ("query", "bias"): {
        32: (Tile(128, 32, 8, 2), Tile(128, 32, 8, 2)),
        64: (Tile(128, 32, 8, 2), Tile(128, 64, 8, 2)),
        128: (Tile(128, 32, 8, 2), Tile(128, 32, 8, 2)),
        256: (Tile(32, 32, 8, 2, repeats=True), Tile(32, 32, 8, 2, repeats=True)),
    },
    ("query", "both"): {
        64: (Tile(64, 32, 8, 2, repeats=True), Tile(128, 32, 8, 2)),
        128: (Tile(32, 32, 4, 2, repeats=True), Tile(64, 16, 4, 2)),
        256: (Tile(32, 32, 8, 2, repeats=True), Tile(32, 32, 8, 2, repeats=True)),
    },
    ("query", "ranged"): {
        64: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        128: (Tile(128, 32, 8, 2), Tile(128, 64, 8, 2)),
        256: (Tile(32, 32, 4, 2, repeats=True), Tile(32, 32, 4, 2, repeats=True)),
    },
    ("key", "plain"): {
        32: (Tile(64, 128, 8, 2), Tile(64, 128, 8, 2)),
        64: (Tile(32, 64, 4, 2), Tile(64, 128, 8, 2)),
        128: (Tile(32, 64, 8, 2, repeats=True), Tile(64, 128, 8, 1)),
        256: (Tile(64, 64, 8, 2), Tile(32, 32, 4, 2, repeats=True)),
    },
    ("key", "bias"): {
        32: (Tile(32, 64, 4, 2), Tile(32, 64, 4, 1)),
        64: (Tile(16, 64, 4, 2), Tile(32, 64, 4, 2)),
        128: (Tile(64, 64, 8, 2, repeats=True), Tile(16, 64, 4, 1)),
        256: (Tile(32, 64, 8, 2, repeats=True), Tile(32, 32, 8, 2, repeats=True)),
    },
    ("key", "both"): {
        64: (Tile(32, 64, 8, 2, repeats=True), Tile(16, 64, 4, 2)),
        128: (Tile(32, 64, 8, 2, repeats=True), Tile(32, 64, 8, 2, repeats=True)),
        256: (Tile(32, 32, 8, 2, repeats=True), Tile(32, 32, 8, 2, repeats=True)),
    },
    ("key", "ranged"): {
        64: (Tile(64, 128, 8, 2), Tile(64, 128, 8, 2)),
        128: (Tile(32, 64, 8, 2, repeats=True), Tile(32, 128, 8, 2)),
        256: (Tile(32, 32, 8, 2, repeats=True), Tile(32, 32, 8, 2, repeats=True)),
    },
    ("bias", "bias"): {
        64: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        256: (Tile(64, 32, 8, 2, repeats=True), Tile(64, 32, 8, 1, repeats=True)),
    },
    ("bias", "both"): {
        64: (Tile(32, 32, 8, 2, repeats=True), Tile(32, 32, 8, 2, repeats=True)),
        128: (Tile(64, 16, 4, 1), Tile(64, 16, 4, 2)),
        256: (Tile(32, 32, 8, 1, repeats=True), Tile(32, 32, 8, 1, repeats=True)),
    },
    ("bias", "ranged"): {
        64: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        128: (Tile(128, 32, 8, 2), Tile(128, 64, 8, 2)),
        256: (Tile(32, 16, 8, 1, repeats=True), Tile(32, 16, 8, 1, repeats=True)),
    },
}
# float32 is multiplied without tensor cores: small tiles, the same for every architecture.
TILES_FLOAT32: dict[tuple[Pass, Load], dict[int, Tile]] = {
    ("forward", "plain"): {64: Tile(32, 32, 4, 2), 128: Tile(16, 16, 4, 1)},
    ("forward", "bias"): {64: Tile(32, 32, 4, 1), 128: Tile(16, 16, 4, 1)},
    ("forward", "both"): {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 8, 1)},
    ("forward", "ranged"): {64: Tile(16, 32, 4, 1), 128: Tile(16, 16, 4, 1)},
    ("query", "plain"): {64: Tile(32, 32, 8, 2), 128: Tile(32, 32, 8, 2)},
    ("query", "bias"): {64: Tile(32, 32, 8, 2), 128: Tile(32, 32, 8, 2)},
    ("query", "both"): {64: Tile(32, 32, 8, 1), 128: Tile(32, 32, 8, 2)},
    ("query", "ranged"): {64: Tile(16, 32, 4, 1), 128: Tile(32, 32, 8, 2)},
    ("key", "plain"): {64: Tile(32, 32, 8, 2), 128: Tile(16, 32, 8, 1)},
    ("key", "bias"): {64: Tile(32, 32, 8, 2), 128: Tile(16, 32, 8, 1)},
    ("key", "both"): {64: Tile(32, 32, 8, 2), 128: Tile(16, 32, 8, 1)},
    ("key", "ranged"): {64: Tile(32, 32, 8, 2), 128: Tile(16, 32, 8, 1)},
    ("bias", "bias"): {64: Tile(32, 32, 8, 2), 128: Tile(16, 16, 8, 1)},
    ("bias", "both"): {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 8, 2)},
    ("bias", "ranged"): {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 8, 2)},
}


def choose_tile(kernel: Pass, width: int, dtype: torch.dtype, arch: str, load: Load) -> Tile:
    """Tile of a kernel: every entry passes ``python -m attn_core.aot`` (no spill, shared memory within the limit).

    Args:
        width: the larger padded head width, 16…256.
        load: whether dense or axis bias is added, or both, or keys come in ranges beside them; all of them live in
            registers and need smaller tiles.
    """
    if arch == "interpreter":
        return Tile(16, 32, 4, 1)
    if dtype == torch.float32:
        tile = at_width(TILES_FLOAT32[kernel, load], width)
    else:
        tile = at_width(TILES_16_BIT[kernel, load], width)[0 if arch in OLDER else 1]
    return for_small_memory(tile, width, dtype, arch)
