"""What networks of tokens share: attention among all of them, and position tables of another grid."""

# pyright: reportPrivateImportUsage=false
# (timm.models exports these names, though it lists none)

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor

from attn_core import attention as attend


@register_notrace_function
def with_position(x: Tensor, table: Tensor, built: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Adds the table (1, 1 + N, C) of the grid ``built`` to tokens (B, 1 + N', C) of ``grid``."""
    if torch.compiler.is_exporting() or grid[0] != built[0] or grid[1] != built[1]:
        cells = table[:, 1:].transpose(1, 2).reshape(1, table.shape[2], built[0], built[1])
        cells = F.interpolate(cells, size=grid, mode="bicubic").flatten(2).transpose(1, 2)
        table = torch.cat([table[:, :1], cells], 1)
    return x + table


@register_notrace_function
def token_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Softmax attention among all tokens: (B, N, 3·C) → (B, N, C)."""
    batch, tokens, channels = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, num_heads, channels // (3 * num_heads)).permute(2, 0, 3, 1, 4).unbind(0)
    out = attend(q, k, v)[0]
    return out.transpose(1, 2).reshape(batch, tokens, channels // 3)
