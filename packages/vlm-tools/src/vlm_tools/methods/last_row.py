"""Attention of the last query alone, with its scores changed: what PAI, PAINT and the logit boost share."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from vlm_tools.intervention.method import AttentionCall, note


def last_row_scores(call: AttentionCall) -> Float[Tensor, "B H M"]:
    """Scaled scores of the last query, −inf where a key is hidden; float32 or wider."""
    k, _ = call.visible_keys
    batch, heads, _, width = call.q.shape
    q = call.q[:, :, -1].reshape(batch, k.shape[1], heads // k.shape[1], width)
    scores = torch.matmul(q, k.transpose(-2, -1)).flatten(1, 2)
    scores = (scores if scores.dtype == torch.float64 else scores.float()) * call.scale
    seen = call.visible.dense(batch, call.q.shape[2] - 1, device=scores.device)
    return scores.masked_fill(~seen, -torch.inf)


def with_last_row(
    call: AttentionCall, edit: Callable[[Float[Tensor, "B H M"]], Float[Tensor, "B H M"]]
) -> Float[Tensor, "B N H D"]:
    """Ordinary attention whose last query has its scores changed by ``edit``; O(H·M) beside the ordinary cost."""
    before = last_row_scores(call)
    p_before, p = before.softmax(-1), edit(before).softmax(-1)
    _, v = call.visible_keys
    batch, heads = p.shape[:2]
    grouped = p.to(v.dtype).view(batch, v.shape[1], heads // v.shape[1], -1)
    row = torch.matmul(grouped, v).flatten(1, 2)
    note(call, torch.ones_like(p[..., :1], dtype=torch.bool), (p - p_before).clamp_min(0).sum(-1, keepdim=True))
    if call.q.shape[2] == 1:
        return row[:, None]
    return torch.cat([call.plain()[:, :-1], row[:, None].to(call.q.dtype)], dim=1)
