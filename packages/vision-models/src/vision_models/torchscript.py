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


def scripted_offset_logits(q: Tensor, table: Tensor, span: int) -> Tensor:
    """q·table[u − i + middle] of queries (…, I, D) → (…, I, span), offsets kept within the table."""
    offset = torch.arange(span, device=q.device) - torch.arange(q.shape[-2], device=q.device)[:, None]
    middle = table.shape[0] // 2
    rows = (offset + middle).clamp(0, table.shape[0] - 1)
    return torch.einsum("...id,iud->...iu", q, table[rows])


def scripted_halo_attention(
    q: Tensor,
    kv: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    block: int,
    halo: int,
    stride: int,
    masked: bool,
) -> Tensor:
    """``halo_attention`` for TorchScript: windows unfolded, scores in full."""
    batch, height, width, heads, dim = q.shape
    rows, columns = kv.shape[1], kv.shape[2]
    span, side = block + 2 * halo, block // stride
    down, across = (rows + block - 1) // block, (columns + block - 1) // block
    around = [0, 0, 0, 0, halo, halo + across * block - columns, halo, halo + down * block - rows]
    windows = F.pad(kv, around).unfold(1, span, block).unfold(2, span, block)  # (B, n, m, H, D + D_v, span, span)
    k, v = windows[:, :, :, :, :dim].flatten(5), windows[:, :, :, :, dim:].flatten(5)
    q = F.pad(q, [0, 0, 0, 0, 0, across * side - width, 0, down * side - height])
    q = q.view(batch, down, side, across, side, heads, dim).permute(0, 1, 3, 5, 2, 4, 6)  # (B, n, m, H, i, j, D)
    scores = ((q.flatten(4, 5) * dim**-0.5) @ k).view(batch, down, across, heads, side, side, span, span)
    by_row = scripted_offset_logits(q.transpose(4, 5), height_rel, span).transpose(4, 5)
    scores = scores + by_row.unsqueeze(7) + scripted_offset_logits(q, width_rel, span).unsqueeze(6)
    scores = scores.flatten(6).flatten(4, 5)
    if masked:
        inside = F.pad(torch.ones_like(kv[:1, :, :, 0, 0]), around[4:]).unfold(1, span, block).unfold(2, span, block)
        scores = scores.masked_fill(inside.flatten(3)[:, :, :, None, None] == 0, float("-inf"))
    out = scores.softmax(-1) @ v.transpose(-2, -1)
    out = out.view(batch, down, across, heads, side, side, v.shape[4]).permute(0, 1, 4, 2, 5, 3, 6)
    return out.reshape(batch, down * side, across * side, heads * v.shape[4])[:, :height, :width]


def scripted_bottleneck_attention(q: Tensor, k: Tensor, v: Tensor, height_rel: Tensor, width_rel: Tensor) -> Tensor:
    """``bottleneck_attention`` for TorchScript: scores in full."""
    batch, height, width, heads = q.shape[0], q.shape[1], q.shape[2], q.shape[3]
    q = q.permute(0, 3, 1, 2, 4)
    by_row = scripted_offset_logits(q.transpose(2, 3), height_rel, height).transpose(2, 3)
    bias = by_row.unsqueeze(5) + scripted_offset_logits(q, width_rel, width).unsqueeze(4)
    bias = bias.reshape(batch, heads, height * width, height * width)
    k, v = k.flatten(1, 2).transpose(1, 2), v.flatten(1, 2).transpose(1, 2)
    out = F.scaled_dot_product_attention(q.flatten(2, 3), k, v, attn_mask=bias)
    return out.transpose(1, 2).reshape(batch, height, width, heads * v.shape[3])


def scripted_rank_augmented_attention(q: Tensor, k: Tensor, v: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """``attn_core.rank_augmented_attention`` for TorchScript."""
    tokens = q.shape[2]
    q, k = F.elu(q) + 1, F.elu(k) + 1
    logits = (q.mean(2, keepdim=True) @ k.transpose(-2, -1)) * (float(q.shape[3]) ** -0.5)
    k = k * (tokens * logits.softmax(-1).transpose(-2, -1))
    denominator = q @ k.mean(2, keepdim=True).transpose(-2, -1) + 1e-6
    q = q * cos + torch.stack([-q[..., 1::2], q[..., ::2]], dim=-1).flatten(-2) * sin
    k = k * cos + torch.stack([-k[..., 1::2], k[..., ::2]], dim=-1).flatten(-2) * sin
    return (q @ ((k.transpose(-2, -1) / tokens) @ v) / denominator).to(v.dtype)
