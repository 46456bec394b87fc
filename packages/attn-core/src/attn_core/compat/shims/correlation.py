"""spatial_correlation_sampler: products of each cell of a map with the cells around it in another map."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from attn_core import neighborhood_scores


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def spatial_correlation_sample(
    input1: Tensor,
    input2: Tensor,
    kernel_size: int | tuple[int, int] = 1,
    patch_size: int | tuple[int, int] = 1,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    dilation_patch: int | tuple[int, int] = 1,
) -> Tensor:
    """(B, C, H, W)² → (B, patch, patch, H', W'); zero outside the second map. ``kernel_size`` must be 1."""
    patch, steps, zeros = _pair(patch_size), _pair(stride), _pair(padding)
    if _pair(kernel_size) != (1, 1):
        raise NotImplementedError(
            f"spatial_correlation_sample: kernel_size other than 1 is not provided, got kernel_size={kernel_size}"
        )
    if any(size % 2 == 0 for size in patch):
        raise NotImplementedError(
            f"spatial_correlation_sample: an even patch_size is not provided, got patch_size={patch_size}"
        )
    maps = (F.pad(x, (zeros[1], zeros[1], zeros[0], zeros[0])) for x in (input1, input2))
    q, k = (x.permute(0, 2, 3, 1).unsqueeze(1) for x in maps)
    scores = neighborhood_scores(q, k, patch, dilation=_pair(dilation_patch), border="zero")
    scores = scores[:, 0, :: steps[0], :: steps[1]].unflatten(-1, patch)
    return scores.permute(0, 3, 4, 1, 2).contiguous()


class SpatialCorrelationSampler(nn.Module):
    """Module of :func:`spatial_correlation_sample`."""

    def __init__(
        self,
        kernel_size: int | tuple[int, int] = 1,
        patch_size: int | tuple[int, int] = 1,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        dilation_patch: int | tuple[int, int] = 1,
    ) -> None:
        super().__init__()
        self.kernel_size, self.patch_size, self.stride = kernel_size, patch_size, stride
        self.padding, self.dilation, self.dilation_patch = padding, dilation, dilation_patch

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """(B, C, H, W)² → (B, patch, patch, H', W')."""
        options = (self.kernel_size, self.patch_size, self.stride, self.padding, self.dilation, self.dilation_patch)
        return spatial_correlation_sample(input1, input2, *options)
