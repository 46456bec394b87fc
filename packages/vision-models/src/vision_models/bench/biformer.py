"""BiFormer against its official formulation, which gathers keys and holds the scores in full."""

from typing import Any

import torch
from torch import Tensor

from vision_models.backbone import StagedBackbone
from vision_models.bench.gathered import GatheredRouting, gathered
from vision_models.bench.measure import linear_row, model_rows, peak, row, step
from vision_models.layers.bilevel_routing import RoutedAttention

PEER = "gathered"
TOPKS = (1, 4, 16)
LARGE_SIDE = 224  # stage-1 map of an 896² image


def rows(name: str, ours: StagedBackbone, x: Tensor, *, compiled: bool) -> list[dict[str, Any]]:
    """Those of the model, what of its forward pass the linear layers take, and memory against top-k at 896²."""
    found = model_rows(name, ours, gathered(ours), PEER, x, compiled=compiled)
    if compiled:
        return found
    return [found[0], linear_row(name, ours, x), *found[1:], *_large_rows(x.device)]


def _large_rows(device: torch.device) -> list[dict[str, Any]]:
    """Routed attention of stage 1 at 896² (224² tokens, 7×7 regions): forward and backward of one image."""
    rows = []
    for topk in TOPKS:
        attention = RoutedAttention(64, topk=topk, n_win=7).to(device)
        peer = RoutedAttention(64, topk=topk, n_win=7).to(device)
        peer.load_state_dict(attention.state_dict())
        peer.__class__ = GatheredRouting
        x = torch.randn(1, LARGE_SIDE, LARGE_SIDE, 64, device=device)
        step(attention, x)  # parameters' one-time buffers are no part of the question
        ours = peak(lambda module=attention, x=x: step(module, x), device)
        # At 16 of 49 regions the gathered scores alone take 1024² · 16 · 2 · 4 B · 49 / 2²⁰ ≈ 6 GiB: computed, not run.
        other = peak(lambda module=peer, x=x: step(module, x), device) if topk == 1 else float("nan")
        rows.append(
            row(f"stage-1 attention at 896², top-k {topk}", PEER, "peak MiB", {"ours": ours, "peer": other}, 0.0)
        )
    return rows
