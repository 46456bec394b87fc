"""Seeded cases of ``block_attention``."""

from typing import Any

import torch
from torch import Tensor

from attn_core import block_attention, halo_index, window_index
from attn_core.testing.harness import Case, tensor


def _case(
    name: str,
    *,
    batch: int = 2,
    heads: int = 4,
    key_heads: int = 2,
    side: int = 6,
    width: int = 8,
    value_width: int = 8,
    window: int = 2,
    halo: int = 0,
    table: tuple[int, int, int] | None = None,
    holes: bool = False,
    weight: tuple[int, int] | None = None,
    grid: bool = False,
    clusters: int = 0,
    positions: bool = False,
    strided: bool = False,
    varied: bool = False,
    **options: Any,
) -> Case:
    def build(dtype: torch.dtype, device: str) -> tuple[list[Any], dict[str, Any]]:
        tokens = side * side

        def data(heads: int, width: int) -> Tensor:
            if strided:
                wide = tensor(dtype, device, batch, tokens, 3, heads, width, gradient=False)
                return wide[:, :, 1].transpose(1, 2).requires_grad_()
            return tensor(dtype, device, batch, heads, tokens, width)

        kwargs = dict(options)
        if clusters:
            q_index = torch.randint(-1 if holes else 0, max(1, tokens), (batch, heads, clusters, 5))
            kv_index = torch.randint(-1 if holes else 0, max(1, tokens), (batch, key_heads, clusters, 7))
        else:
            q_index = window_index(side, side, (window, window))
            kv_index = halo_index(side, side, (window, window), (halo, halo))
        blocks = q_index.shape[2]
        args = [data(heads, width), data(key_heads, width), data(key_heads, value_width)]
        args += [q_index.to(device), kv_index.to(device)]
        slots = 1
        if table is not None:
            slots = table[2]
            listed = torch.randint(-1 if holes else 0, blocks, (table[0], table[1], blocks, slots))
            if holes:
                listed[:, :, 0] = -1
            args.append(listed.to(device))
        if weight is not None:
            kwargs["kv_weight"] = tensor(dtype, device, *weight, blocks, slots)
        if grid:
            span = window + 2 * halo
            kwargs["axis_bias"] = [
                tensor(dtype, device, batch, 1, tokens, span),
                tensor(dtype, device, 1, heads, tokens, span),
            ]
        if positions:
            kwargs["q_pos"] = torch.randint(0, tokens, (batch, tokens)).to(device)
            kwargs["k_pos"] = torch.randint(-1, tokens, (1, tokens)).to(device)
        return args, kwargs

    return Case(block_attention, name, build, varied)


def cases() -> list[Case]:
    """Windows, halos, routing tables with holes, weights, causality, clusters; and nothing at all."""
    case = _case
    return [
        case("windows"),
        case("windows that leave the map", side=5, window=3),
        case("wide value", value_width=11),
        case("odd width", width=20, value_width=3),
        case("width 1", width=1, value_width=1),
        case("strided", strided=True, table=(2, 1, 2)),
        case("halo", halo=1),
        case("halo with axis bias", halo=1, grid=True, varied=True),
        case("routed", table=(2, 1, 3)),
        case("routed, one table for all images", table=(1, 1, 2)),
        case("routed with holes and a dead region", table=(2, 1, 3), holes=True),
        case("routed to most regions", table=(2, 1, 8)),
        case("routed per head", table=(2, 4, 2)),
        case("soft routing", table=(2, 1, 3), weight=(2, 1), varied=True),
        case("soft routing per head", table=(2, 1, 2), weight=(1, 4)),
        case("routed halo with axis bias", halo=1, table=(2, 1, 2), grid=True),
        case(
            "everything per head",
            halo=1,
            table=(1, 4, 2),
            grid=True,
            weight=(2, 4),
            causal=True,
            holes=True,
            varied=True,
        ),
        case("causal", table=(2, 1, 3), causal=True),
        case("positions", table=(2, 1, 3), causal=True, positions=True),
        case("self logit", self_logit=-3.0),
        case("clusters", clusters=4, reduce="mean", causal=True),
        case("clusters with holes", clusters=4, reduce="mean", holes=True, self_logit=-2.0, varied=True),
        case("one token", side=1, window=1),
        case("no image", batch=0),
        case("no token", side=0),
    ]
