"""What TorchScript runs in place of attn_core, whose functions it cannot compile: plain, with gathered keys.

timm's contract includes ``torch.jit.script``; eager code, ``torch.compile``, ``torch.export`` and ONNX never come here.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor


def scripted_window_index(height: int, width: int, region: tuple[int, int], device: torch.device) -> Tensor:
    """``attn_core.window_index`` in the subset of Python that TorchScript compiles."""
    index = torch.arange(height * width, device=device).view(height, width)
    index = F.pad(index, (0, -width % region[1], 0, -height % region[0]), value=-1.0)
    index = index.view(-1, region[0], index.shape[1] // region[1], region[1]).transpose(1, 2)
    return index.reshape(1, 1, -1, region[0] * region[1])


def scripted_block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_index: Tensor,
    kv_index: Tensor,
    table: Tensor,
    weight: Optional[Tensor],  # noqa: UP045
    scale: float,
) -> Tensor:
    """``attn_core.block_attention`` for TorchScript, which cannot call it: gathered keys, scores in full."""
    batch, heads, length, head_dim = q.shape
    regions, slots = table.shape[2], table.shape[3]
    keys = kv_index[0, 0][table.flatten()].view(batch, regions, -1)  # (B, R, K·J) token numbers, −1 outside the map
    gather = keys.clamp(min=0).view(batch, 1, -1, 1)
    k = k.gather(2, gather.expand(-1, heads, -1, head_dim)).view(batch, heads, regions, -1, head_dim)
    v = v.gather(2, gather.expand(-1, heads, -1, v.shape[3])).view(batch, heads, regions, -1, v.shape[3])
    if weight is not None:
        slot_weight = weight.repeat_interleave(keys.shape[2] // slots, dim=3).unsqueeze(4)
        k, v = slot_weight * k, slot_weight * v
    inside = q_index[0, 0].flatten()
    q = q[:, :, inside.clamp(min=0)].view(batch, heads, regions, -1, head_dim)
    scores = (q * scale) @ k.transpose(3, 4)
    scores = scores.masked_fill((keys < 0)[:, None, :, None], float("-inf"))
    out = (scores.softmax(-1) @ v).flatten(2, 3)
    visible = torch.nonzero(inside >= 0).flatten()
    return torch.zeros(batch, heads, length, v.shape[4], dtype=v.dtype, device=v.device).index_copy(
        2, inside[visible], out[:, :, visible]
    )
