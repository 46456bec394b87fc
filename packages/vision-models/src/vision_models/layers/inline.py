"""InLine attention: linear attention whose weights of a query sum to one, with a convolution made from the image.

Paper: Han et al., Bridging the Divide: Reconsidering Softmax and Linear Attention, NeurIPS 2024, arXiv 2412.06590.
Official code: LeapLabTHU/InLine, ``models/inline_*.py``, whose four networks each hold a copy of the attention. Here it
stands once, between the projections of ``deit.py``, ``pvt.py``, ``swin.py`` and ``cswin.py``; see ``agent.py``.

The same as there: every number. No feature map, as in all releases; each image makes its own 3×3 kernels from the mean
of the tokens that enter the attention (in CSwin: the block), class token included.

What differs: products and convolution are attn_core's, and the shift 1 − q·mean(k), a small difference of large
numbers, is taken in float32 whatever the dtype.

Numbers are checked in ``tests/layers/test_inline.py`` against the N×N form.

Shapes: q, k, v (B, N, C) → (B, N, C), N = Y·X, plus one with a class token.
"""

from typing import Any

from timm.models import register_notrace_module
from torch import Tensor, nn

from attn_core import inline_attention
from vision_models.layers.token_maps import DepthwiseConv

__all__ = ["InLineMixing"]


class InLineMixing(nn.Module):
    """q·(kᵀv)/N + (1 − q·mean(k))·mean(v) plus v under kernels of the image (eq. 5 and 7), without projections.

    Args:
        lepe: add a depthwise convolution of the values with learned kernels, as CSwin has it.

    Shapes: q, k, v (B, N, dim), source (B, N, dim) whose mean makes the kernels, grid (Y, X) → (B, N, dim).
    """

    def __init__(self, dim: int, num_heads: int, *, lepe: bool = False, **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.residual = nn.Sequential(
            nn.Conv1d(dim, dim, 1, groups=num_heads, **dd),
            nn.GELU(),
            nn.Conv1d(dim, 9 * dim, 1, groups=num_heads, **dd),
        )
        self.get_v = DepthwiseConv(dim, 3, **dd) if lepe else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, source: Tensor, grid: tuple[int, int]) -> Tensor:
        """q, k, v (B, N, C) of a ``grid`` of N tokens, ``source`` the block's input → (B, N, C)."""
        batch, tokens, dim = q.shape
        height, width = grid
        heads = (batch, tokens, self.num_heads, dim // self.num_heads)
        kernels = self.kernels(source)
        q, k = q.reshape(heads).transpose(1, 2), k.reshape(heads).transpose(1, 2)
        values = v.reshape(heads).transpose(1, 2)
        out = inline_attention(q, k, values, residual=kernels, grid=(height, width))
        out = out.transpose(1, 2).reshape(batch, tokens, dim)
        get_v = self.get_v
        if get_v is not None:
            out = out + get_v(v.reshape(batch, height, width, dim)).reshape(batch, tokens, dim)
        return out

    def kernels(self, source: Tensor) -> Tensor:
        """One 3×3 kernel for each image, head and channel: (B, N, dim) → (B, H, dim/H, 3, 3)."""
        kernels = self.residual(source.mean(1).unsqueeze(2))
        return kernels.reshape(source.shape[0], self.num_heads, source.shape[2] // self.num_heads, 3, 3)


register_notrace_module(InLineMixing)  # not as decorator, which would hide the type
