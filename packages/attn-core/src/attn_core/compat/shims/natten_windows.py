"""natten 0.14 to 0.17: window scores and values of their own, heads first (B, H, *grid, D), scores row-major."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attn_core import neighborhood_attention, neighborhood_scores, neighborhood_values

Sizes = int | Sequence[int]
Flags = bool | Sequence[bool]


def scores(
    query: Tensor, key: Tensor, bias: Tensor | None, kernel_size: Sizes, dilation: Sizes, is_causal: Flags, extra: Any
) -> Tensor:
    """Scores of the window, then those of additional keys (B, H, n, D) that every cell sees."""
    out = neighborhood_scores(query, key, kernel_size, dilation=dilation, is_causal=is_causal, rpb=bias)
    if extra is None:
        return out
    grid = query.shape[2:-1]
    more = query.flatten(2, -2) @ extra.transpose(-1, -2)
    return torch.cat([out, more.unflatten(2, grid)], -1)


def values(
    attn: Tensor, value: Tensor, kernel_size: Sizes, dilation: Sizes, is_causal: Flags, extra: Tensor | None
) -> Tensor:
    """Sums over the window, and over additional values (B, H, n, D)."""
    if extra is None:
        return neighborhood_values(attn, value, kernel_size, dilation=dilation, is_causal=is_causal)
    own, more = attn.split([attn.shape[-1] - extra.shape[2], extra.shape[2]], -1)
    out = neighborhood_values(own, value, kernel_size, dilation=dilation, is_causal=is_causal)
    return out + (more.flatten(2, -2) @ extra).unflatten(2, value.shape[2:-1])


def fused(
    axes: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Sizes,
    dilation: Sizes | None,
    is_causal: Flags | None,
    rpb: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Fused attention of 0.17, heads LAST (B, *grid, H, D)."""
    _check_rank("natten.functional.na{}d", axes, query, heads_last=True)
    q, k, v = (x.movedim(-2, 1) for x in (query, key, value))
    out, _ = neighborhood_attention(
        *(q, k, v, kernel_size), dilation=dilation or 1, is_causal=is_causal or False, scale=scale, rpb=rpb
    )
    return out.movedim(1, -2)


def _check_rank(name: str, axes: int, tensor: Tensor, *, heads_last: bool = False) -> None:
    if tensor.ndim != axes + 3:
        layout = f"(B, *{axes} axes, heads, D)" if heads_last else f"(B, heads, *{axes} axes, D)"
        raise ValueError(f"{name.format(axes)}: query must be {layout}, got shape {tuple(tensor.shape)}")


def natten1dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int) -> Tensor:
    _check_rank("natten{}dqkrpb", 1, query)
    return scores(query, key, rpb, kernel_size, dilation, False, None)


def natten2dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int) -> Tensor:
    _check_rank("natten{}dqkrpb", 2, query)
    return scores(query, key, rpb, kernel_size, dilation, False, None)


def natten3dqkrpb(
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
) -> Tensor:
    _check_rank("natten{}dqkrpb", 3, query)
    return scores(query, key, rpb, *_volume(kernel_size_d, kernel_size, dilation_d, dilation), False, None)


def natten1dqk(query: Tensor, key: Tensor, kernel_size: int, dilation: int) -> Tensor:
    return natten1dqkrpb(query, key, None, kernel_size, dilation)


def natten2dqk(query: Tensor, key: Tensor, kernel_size: int, dilation: int) -> Tensor:
    return natten2dqkrpb(query, key, None, kernel_size, dilation)


def natten3dqk(
    query: Tensor, key: Tensor, kernel_size_d: int, kernel_size: int, dilation_d: int, dilation: int
) -> Tensor:
    return natten3dqkrpb(query, key, None, kernel_size_d, kernel_size, dilation_d, dilation)


def natten1dav(attn: Tensor, value: Tensor, kernel_size: int, dilation: int) -> Tensor:
    return values(attn, value, kernel_size, dilation, False, None)


def natten2dav(attn: Tensor, value: Tensor, kernel_size: int, dilation: int) -> Tensor:
    return values(attn, value, kernel_size, dilation, False, None)


def natten3dav(
    attn: Tensor, value: Tensor, kernel_size_d: int, kernel_size: int, dilation_d: int, dilation: int
) -> Tensor:
    return values(attn, value, *_volume(kernel_size_d, kernel_size, dilation_d, dilation), False, None)


def _volume(
    kernel_size_d: int, kernel_size: int, dilation_d: int, dilation: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)


# 0.15: names of the dimension first, additional keys and values; 3-D with sizes of the depth first.


def _planar_qk(axes: int) -> Callable[..., Tensor]:
    def qk(
        query: Tensor, key: Tensor, kernel_size: int, dilation: int, additional_keys: Tensor | None = None
    ) -> Tensor:
        _check_rank("na{}d_qk", axes, query)
        return scores(query, key, None, kernel_size, dilation, False, additional_keys)

    return qk


def _planar_qk_with_bias(axes: int) -> Callable[..., Tensor]:
    def qk_with_bias(
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        kernel_size: int,
        dilation: int,
        additional_keys: Tensor | None = None,
    ) -> Tensor:
        _check_rank("na{}d_qk_with_bias", axes, query)
        return scores(query, key, bias, kernel_size, dilation, False, additional_keys)

    return qk_with_bias


def planar_av(
    attn: Tensor, value: Tensor, kernel_size: int, dilation: int, additional_values: Tensor | None = None
) -> Tensor:
    """``na1d_av`` and ``na2d_av`` of 0.15."""
    return values(attn, value, kernel_size, dilation, False, additional_values)


planar_qk = {axes: _planar_qk(axes) for axes in (1, 2)}
planar_qk_with_bias = {axes: _planar_qk_with_bias(axes) for axes in (1, 2)}


def volume_qk(
    query: Tensor,
    key: Tensor,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """``na3d_qk`` of 0.15."""
    return volume_qk_with_bias(
        query, key, None, kernel_size_d, kernel_size, dilation_d, dilation, additional_keys=additional_keys
    )


def volume_qk_with_bias(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """``na3d_qk_with_bias`` of 0.15."""
    _check_rank("na{}d_qk_with_bias", 3, query)
    sizes = _volume(kernel_size_d, kernel_size, dilation_d, dilation)
    return scores(query, key, bias, *sizes, False, additional_keys)


def volume_av(
    attn: Tensor,
    value: Tensor,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
    additional_values: Tensor | None = None,
) -> Tensor:
    """``na3d_av`` of 0.15."""
    return values(attn, value, *_volume(kernel_size_d, kernel_size, dilation_d, dilation), False, additional_values)


# 0.17: sizes may differ by axis, causal axes, rpb behind; and the fused functions with the dilation fifth.


def _qk(axes: int) -> Callable[..., Tensor]:
    def qk(
        query: Tensor,
        key: Tensor,
        kernel_size: Sizes,
        dilation: Sizes = 1,
        additional_keys: Tensor | None = None,
        is_causal: Flags | None = False,
        rpb: Tensor | None = None,
    ) -> Tensor:
        _check_rank("na{}d_qk", axes, query)
        return scores(query, key, rpb, kernel_size, dilation or 1, is_causal or False, additional_keys)

    return qk


def _av(axes: int) -> Callable[..., Tensor]:
    def av(
        attn: Tensor,
        value: Tensor,
        kernel_size: Sizes,
        dilation: Sizes = 1,
        additional_values: Tensor | None = None,
        is_causal: Flags | None = False,
    ) -> Tensor:
        _check_rank("na{}d_av", axes, value)
        return values(attn, value, kernel_size, dilation or 1, is_causal or False, additional_values)

    return av


def _na(axes: int) -> Callable[..., Tensor]:
    def na(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: Sizes,
        dilation: Sizes = 1,
        is_causal: Flags | None = False,
        rpb: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        return fused(axes, query, key, value, kernel_size, dilation, is_causal, rpb, scale)

    return na


na_qk = {axes: _qk(axes) for axes in (1, 2, 3)}
na_av = {axes: _av(axes) for axes in (1, 2, 3)}
na_fused = {axes: _na(axes) for axes in (1, 2, 3)}
