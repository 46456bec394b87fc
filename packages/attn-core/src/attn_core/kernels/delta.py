"""The row sums that every backward pass of a softmax needs first."""

import math

import torch
from torch import Tensor

from .launch import Tile, launch


def row_delta(grad_out: Tensor, out: Tensor, lse: Tensor, grad_lse: Tensor | None, block: int) -> Tensor:
    """δ_i = Σ_c do_ic o_ic − dlse_i, (B, H, N); ``grad_out`` and ``out`` (B, H, N, Dv) have columns side by side.

    Args:
        block: Dv padded to a power of two.
    """
    from .tiles import delta_kernel

    batch, heads, tokens, width = out.shape
    delta = torch.empty_like(lse)
    tile = Tile(64 if block <= 64 else 16, 0, 4, 1)
    launch(
        delta_kernel,
        batch * heads * math.ceil(tokens / tile.rows),
        out.device,
        tile,
        *(grad_out, out, lse, grad_lse, delta, *grad_out.stride()[:3], *out.stride()[:3]),
        *(grad_lse.stride() if grad_lse is not None else (0, 0, 0)),
        *(heads, tokens),
        DV=width,
        BLOCK_DV=block,
        BM=tile.rows,
    )
    return delta
