"""BiFormer against its official formulation, which gathers keys and holds the scores in full."""

from typing import Any

import torch
from torch import Tensor, nn

from vision_models.backbone import StagedBackbone
from vision_models.bilevel_routing import RoutedAttention

from .gathered import GatheredRouting, gathered
from .measure import model_rows, peak, row, times

PEER = "gathered"
TOPKS = (1, 4, 16)
LARGE_SIDE = 224  # stage-1 map of an 896² image


def rows(name: str, ours: StagedBackbone, x: Tensor, *, compiled: bool) -> list[dict[str, Any]]:
    """Those of the model, what of its forward pass the linear layers take, and memory against top-k at 896²."""
    found = model_rows(name, ours, gathered(ours), PEER, x, compiled=compiled)
    if compiled:
        return found
    share = _linear_times(ours, x, x.device)
    linear = row(found[0]["setting"], "nn.Linear", "of it linear layers, ms", share, float(found[0]["error"]))
    return [found[0], linear, *found[1:], *_large_rows(x.device)]


def _linear_times(model: nn.Module, x: Tensor, device: torch.device) -> dict[str, float]:
    """Milliseconds of the linear layers of one forward pass by themselves: the floor that attention cannot lower."""
    seen: list[tuple[nn.Module, Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda layer, args, _: seen.append((layer, torch.randn_like(args[0]))))
        for layer in model.modules()
        if isinstance(layer, nn.Linear)
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    totals = {"ours": 0.0, "peer": 0.0}
    for layer, tokens in seen:
        plain = nn.Linear(1, 1, bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias  # pyright: ignore[reportAttributeAccessIssue]

        def call(module: nn.Module, tokens: Tensor = tokens) -> None:
            with torch.no_grad():
                module(tokens)

        for side, value in times(call, {"ours": layer, "peer": plain}, device).items():
            totals[side] += value
    return totals


def _large_rows(device: torch.device) -> list[dict[str, Any]]:
    """Routed attention of stage 1 at 896² (224² tokens, 7×7 regions): forward and backward of one image."""
    rows = []
    for topk in TOPKS:
        attention = RoutedAttention(64, topk=topk, n_win=7).to(device)
        peer = RoutedAttention(64, topk=topk, n_win=7).to(device)
        peer.load_state_dict(attention.state_dict())
        peer.__class__ = GatheredRouting
        x = torch.randn(1, LARGE_SIDE, LARGE_SIDE, 64, device=device)

        def step(module: nn.Module, x: Tensor = x) -> None:
            module(x).sum().backward()
            module.zero_grad(set_to_none=True)

        step(attention)  # parameters' one-time buffers are no part of the question
        ours = peak(lambda module=attention: step(module), device)
        # At 16 of 49 regions the gathered scores alone take 1024² · 16 · 2 · 4 B · 49 / 2²⁰ ≈ 6 GiB: computed, not run.
        other = peak(lambda module=peer: step(module), device) if topk == 1 else float("nan")
        rows.append(
            row(f"stage-1 attention at 896², top-k {topk}", PEER, "peak MiB", {"ours": ours, "peer": other}, 0.0)
        )
    return rows
