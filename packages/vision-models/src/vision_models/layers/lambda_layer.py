"""Lambda layer: queries read a linear map made of the content of the image, and one made of their neighborhood.

Paper: Bello, LambdaNetworks: Modeling Long-Range Interactions Without Attention, ICLR 2021, arXiv 2102.08602. The
released weights are timm's, ``timm/layers/lambda_layer.py``; names of parameters and numbers are theirs. Here because
one HaloNet of timm has two of these layers.

What differs: the convolution over positions is two-dimensional (theirs has a third axis of length 1), one image for
each channel of the values.

Numbers are checked in ``tests/models/test_halonet.py`` against timm.

Shapes: (B, dim, Y, X) → (B, dim, ⌈Y/stride⌉, ⌈X/stride⌉).
"""

from typing import Any

import torch
from torch import Tensor, nn

from vision_models.initialization import trunc_normal_
from vision_models.layers.token_maps import Linear


class LambdaLayer(nn.Module):
    """λ = Σ softmax(k)·v over the map, and over ``radius``² neighbors with learned weights; out = q·λ, for each head.

    Args:
        stride: 2 averages 2×2 results.
        head_dim: of the queries, and of the keys, which all heads share, as they do the values.
        radius: side of the neighborhood, odd.
    """

    def __init__(self, dim: int, *, stride: int, num_heads: int, head_dim: int, radius: int, **dd: Any) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.value_dim = num_heads, head_dim, dim // num_heads
        self.qkv = Linear(dim, num_heads * head_dim + head_dim + self.value_dim, bias=False, **dd)
        self.norm_q = nn.BatchNorm2d(num_heads * head_dim, **dd)
        self.norm_v = nn.BatchNorm2d(self.value_dim, **dd)
        self.conv_lambda = nn.Conv2d(1, head_dim, radius, padding=radius // 2, **dd)
        self.pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()

    def reset_parameters(self) -> None:
        """Draw projection and position kernels anew."""
        trunc_normal_(self.qkv.weight, std=self.qkv.in_features**-0.5)  # pyright: ignore[reportArgumentType, reportOperatorIssue]
        trunc_normal_(self.conv_lambda.weight, std=self.head_dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, Y, X) → (B, H·D_v, Y', X'), smaller only if the layer pools."""
        batch, _, height, width = x.shape
        qkv = self.qkv(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        q, k, v = qkv.split([self.num_heads * self.head_dim, self.head_dim, self.value_dim], dim=1)
        q = self.norm_q(q).reshape(batch, self.num_heads, self.head_dim, height * width)
        v = self.norm_v(v)
        content = k.flatten(2).softmax(-1) @ v.flatten(2).transpose(1, 2)  # (B, D, D_v)
        images = v.reshape(batch * self.value_dim, 1, height, width)
        position = self.conv_lambda(images).reshape(batch, self.value_dim, self.head_dim, height * width)
        out = torch.einsum("bhdn,bdv->bhvn", q, content) + torch.einsum("bhdn,bvdn->bhvn", q, position)
        return self.pool(out.reshape(batch, self.num_heads * self.value_dim, height, width))
