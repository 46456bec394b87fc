"""InLine attention: linear attention made injective by a shift of its weights, with a local residual."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from attn_core.checks import check_number, check_rank, check_size, check_sizes, check_width, fail, shape
from attn_core.ops.linear_attention import linear_attention

OPERATOR = "inline_attention"


def inline_attention(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H N D"],
    v: Float[Tensor, "B H N Dv"],
    *,
    scale: float | None = None,
    residual: Float[Tensor, "B H Dv 3 3"] | None = None,
    grid: tuple[int, int] | None = None,
) -> Float[Tensor, "B H N Dv"]:
    """out_i = Σ_j (s_ij + 1 − mean_m s_im)/N·v_j with s_ij = scale·q_i·k_j, plus a depth-wise convolution of v.

    Written with the D×Dv product: scale/N·q_i·(Kᵀ V) + (1 − scale·q_i·mean(k))·mean(v); no N×N scores. The weights of
    a row sum to 1. Feature maps are the caller's (the official models use none).

    Args:
        scale: D^−0.5 by default.
        residual: one 3×3 kernel for each image, head and channel, which the official models compute from the mean
            token. Applied to the last Y·X tokens, a row-major map; tokens before them (a class token) get no residual.
        grid: (Y, X) of the map, needed with ``residual``.

    Returns:
        out in the dtype of q (under autocast in its dtype).

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Source: Han et al. 2024 (arXiv 2412.06590), eqs. 4 to 7; LeapLabTHU/InLine, ``InLineAttention``.
    """
    check_rank(OPERATOR, "q", q, "B H N D")
    check_rank(OPERATOR, "k", k, "B H N D")
    check_rank(OPERATOR, "v", v, "B H N Dv")
    check_size(OPERATOR, "k", k, 2, q.shape[2], "the tokens of q")
    check_width(OPERATOR, "q", q)
    check_number(OPERATOR, "scale", scale, optional=True)
    if grid is not None:
        check_sizes(OPERATOR, "grid", grid, "(height, width)", 1)
    batch, heads, tokens, width = q.shape
    factor: float = width**-0.5 if scale is None else scale
    exporting = torch.compiler.is_exporting()  # a graph in which numbers, and groups of convolutions, are constants
    if exporting:
        out, _ = linear_attention(q, k, v / tokens, causal=False, scale=factor)
    else:
        out, _ = linear_attention(q, k, v, causal=False, scale=factor / max(tokens, 1))
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    shift = 1 - factor * torch.einsum("bhnd,bhd->bhn", q.to(dtype), k.to(dtype).mean(2)).to(dtype)
    out = (out + shift.unsqueeze(-1) * v.to(dtype).mean(2, keepdim=True)).to(out.dtype)
    if residual is None:
        return out
    check_rank(OPERATOR, "residual", residual, "B H Dv 3 3")
    expected = (batch, heads, v.shape[3], 3, 3)
    if shape(residual) != expected:
        fail(OPERATOR, "residual", f"must be of shape {expected}", shape(residual))
    if grid is None or grid[0] * grid[1] > tokens:
        fail(OPERATOR, "grid", f"must be the height and width of a map of at most {tokens} tokens", grid)
    if out.numel() == 0:
        return out  # an empty batch: a convolution knows no 0 groups
    before = tokens - grid[0] * grid[1]
    maps = v[:, :, before:].mT.reshape(1, -1, *grid)
    kernels = residual.reshape(-1, 1, 3, 3).to(maps.dtype)
    local = _shifted_sum(maps, kernels) if exporting else F.conv2d(maps, kernels, padding=1, groups=maps.shape[1])
    return out + F.pad(local.reshape(batch, heads, v.shape[3], -1).mT, (0, 0, before, 0)).to(out.dtype)


def _shifted_sum(maps: Float[Tensor, "1 C Y X"], kernels: Float[Tensor, "C 1 3 3"]) -> Float[Tensor, "1 C Y X"]:
    """The depth-wise convolution, without saying how many groups it has."""
    height, width = maps.shape[2:]
    padded = F.pad(maps, (1, 1, 1, 1))
    parts = [
        padded[:, :, i : i + height, j : j + width] * kernels[:, 0, i, j, None, None]
        for i in range(3)
        for j in range(3)
    ]
    return torch.stack(parts).sum(0)
