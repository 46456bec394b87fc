"""State-space blocks by name: one signature on (B, *grid, C), every one a file here that ends with its ``ENTRIES``."""

from typing import Any

from torch import nn

from attn_core.catalog import Catalog

BLOCKS: Catalog[nn.Module] = Catalog("medical_seg.layers.state_space", kind="block", caller="create_block")
list_blocks = BLOCKS.names


def create_block(name: str, dim: int, **options: Any) -> nn.Module:
    """A block (B, *grid, C) → same.

    Args:
        name: one of :func:`list_blocks`.
        dim: C.
        options: ``spatial_dims`` (axes of the grid, 2 by default), ``states`` (numbers that each channel remembers, 16)
            and what the block takes beside them.

    Raises: ValueError: unknown name or option, with the nearest known one; a grid the block does not scan.
    """
    return BLOCKS.create(name, dim=dim, **options)
