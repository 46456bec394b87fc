"""Modules of natten 0.14 and 0.15 (which pad small inputs) and 0.17 (which refuses them): inputs (B, *grid, C)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_core import neighborhood_attention
from attn_core.ops.neighborhood_attention.windows import per_axis

from .natten_windows import scores, values


class _Neighborhood(nn.Module):
    """Parameters ``qkv``, ``rpb``, ``proj``; attention fused unless its weights are dropped."""

    def __init__(
        self,
        axes: int,
        dim: int,
        num_heads: int,
        kernel_size: tuple[int, ...],
        dilation: tuple[int, ...],
        is_causal: tuple[bool, ...],
        options: dict[str, Any],
    ) -> None:
        super().__init__()
        name = f"NeighborhoodAttention{axes}D"
        for size in kernel_size:
            if size <= 1 or size % 2 == 0:
                raise ValueError(f"{name}: kernel_size must be odd and greater than 1, got kernel_size={size}")
        self.axes = axes
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = options["qk_scale"] or self.head_dim**-0.5
        self._rules = kernel_size, dilation, is_causal
        self.qkv = nn.Linear(dim, dim * 3, bias=options["qkv_bias"])
        if options["bias"]:
            self.rpb = nn.Parameter(torch.zeros(num_heads, *(2 * size - 1 for size in kernel_size)))
            nn.init.trunc_normal_(self.rpb, std=0.02, mean=0.0, a=-2.0, b=2.0)
        else:
            self.register_parameter("rpb", None)
        self.attn_drop = nn.Dropout(options["attn_drop"])
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(options["proj_drop"])

    def _attend(self, x: Tensor) -> Tensor:
        """(B, *grid, C) → (B, *grid, C), before the last projection."""
        kernel_size, dilation, is_causal = self._rules
        # (B, *grid, 3·C) → 3 × (B, H, *grid, D)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).movedim(-2, 1).unbind(-2)
        rules = {"dilation": dilation, "is_causal": is_causal}
        if self.training and self.attn_drop.p > 0:
            attn = scores(q * self.scale, k, self.rpb, kernel_size, dilation, is_causal, None).softmax(-1)
            out = values(self.attn_drop(attn), v, kernel_size, dilation, is_causal, None)
        else:
            out, _ = neighborhood_attention(q, k, v, kernel_size, scale=self.scale, rpb=self.rpb, **rules)
        return out.movedim(1, -2).flatten(-2)

    def _check(self, x: Tensor) -> None:
        if x.ndim != self.axes + 2:
            raise ValueError(
                f"NeighborhoodAttention{self.axes}D: the input must have {self.axes + 2} dimensions (B, *grid, C), "
                f"got shape {tuple(x.shape)}"
            )

    def extra_repr(self) -> str:
        kernel_size, dilation, is_causal = self._rules
        return (
            f"head_dim={self.head_dim}, num_heads={self.num_heads}, kernel_size={kernel_size}, dilation={dilation}, "
            f"is_causal={is_causal}, has_bias={self.rpb is not None}"
        )


class Padding(_Neighborhood):
    """0.14 and 0.15: inputs smaller than a window get zeros at their end BEFORE the projection, whose bias they get."""

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        grid = x.shape[1:-1]
        need = [k * d for k, d in zip(*self._rules[:2], strict=True)]
        missing = [max(0, window - length) for window, length in zip(need, grid, strict=True)]
        if any(missing):
            x = F.pad(x, (0, 0, *(amount for size in reversed(missing) for amount in (0, size))))
        out = self._attend(x)
        if any(missing):
            out = out[(slice(None), *(slice(length) for length in grid))]
        return self.proj_drop(self.proj(out))


class Strict(_Neighborhood):
    """0.17: inputs smaller than a window are refused."""

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        for axis, (length, k, d) in enumerate(zip(x.shape[1:-1], *self._rules[:2], strict=True)):
            if k * d > length:
                raise ValueError(
                    f"NeighborhoodAttention{self.axes}D: kernel_size · dilation must not exceed the {length} cells of "
                    f"axis {axis}, got kernel_size={k} and dilation={d}; natten 0.14 and 0.15 pad such inputs"
                )
        return self.proj_drop(self.proj(self._attend(x)))


class PaddedNeighborhoodAttention1D(Padding):
    """``NeighborhoodAttention1D`` of natten 0.14 and 0.15."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        dilation: int | None = 1,
        bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        options = {"bias": bias, "qkv_bias": qkv_bias, "qk_scale": qk_scale}
        options |= {"attn_drop": attn_drop, "proj_drop": proj_drop}
        super().__init__(1, dim, num_heads, (kernel_size,), (dilation or 1,), (False,), options)
        self.kernel_size, self.dilation = kernel_size, dilation or 1
        self.window_size = self.kernel_size * self.dilation


class PaddedNeighborhoodAttention2D(Padding):
    """``NeighborhoodAttention2D`` of natten 0.14 and 0.15."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        dilation: int | None = 1,
        bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        options = {"bias": bias, "qkv_bias": qkv_bias, "qk_scale": qk_scale}
        options |= {"attn_drop": attn_drop, "proj_drop": proj_drop}
        super().__init__(2, dim, num_heads, (kernel_size,) * 2, (dilation or 1,) * 2, (False,) * 2, options)
        self.kernel_size, self.dilation = kernel_size, dilation or 1
        self.window_size = self.kernel_size * self.dilation


class PaddedNeighborhoodAttention3D(Padding):
    """``NeighborhoodAttention3D`` of natten 0.15; its padding leaves out the depth, ours does not."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        kernel_size_d: int | None = None,
        dilation: int | None = 1,
        dilation_d: int | None = None,
        bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        kernel_size_d, dilation = kernel_size_d or kernel_size, dilation or 1
        dilation_d = dilation_d or dilation
        options = {"bias": bias, "qkv_bias": qkv_bias, "qk_scale": qk_scale}
        options |= {"attn_drop": attn_drop, "proj_drop": proj_drop}
        sizes, steps = (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)
        super().__init__(3, dim, num_heads, sizes, steps, (False,) * 3, options)
        self.kernel_size, self.dilation = kernel_size, dilation
        self.kernel_size_d, self.dilation_d = kernel_size_d, dilation_d
        self.window_size, self.window_size_d = kernel_size * dilation, kernel_size_d * dilation_d


class _Strict(Strict):
    def __init__(
        self,
        axes: int,
        dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int],
        dilation: int | Sequence[int] | None,
        is_causal: bool | Sequence[bool],
        rel_pos_bias: bool,
        qkv_bias: bool,
        qk_scale: float | None,
        attn_drop: float,
        proj_drop: float,
    ) -> None:
        rules = per_axis(kernel_size, axes), per_axis(dilation or 1, axes), per_axis(is_causal, axes)
        if any(rules[2]) and rel_pos_bias:
            raise NotImplementedError(
                f"NeighborhoodAttention{axes}D: rel_pos_bias=True is not defined for causal axes, got "
                f"is_causal={is_causal}"
            )
        options = {"bias": rel_pos_bias, "qkv_bias": qkv_bias, "qk_scale": qk_scale}
        options |= {"attn_drop": attn_drop, "proj_drop": proj_drop}
        super().__init__(axes, dim, num_heads, *rules, options)
        self.kernel_size, self.dilation, self.is_causal = rules


class StrictNeighborhoodAttention1D(_Strict):
    """``NeighborhoodAttention1D`` of natten 0.17."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int],
        dilation: int | Sequence[int] | None = 1,
        is_causal: bool | Sequence[bool] = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(
            *(1, dim, num_heads, kernel_size, dilation, is_causal, rel_pos_bias, qkv_bias, qk_scale),
            *(attn_drop, proj_drop),
        )


class StrictNeighborhoodAttention2D(_Strict):
    """``NeighborhoodAttention2D`` of natten 0.17."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int],
        dilation: int | Sequence[int] | None = 1,
        is_causal: bool | Sequence[bool] = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(
            *(2, dim, num_heads, kernel_size, dilation, is_causal, rel_pos_bias, qkv_bias, qk_scale),
            *(attn_drop, proj_drop),
        )


class StrictNeighborhoodAttention3D(_Strict):
    """``NeighborhoodAttention3D`` of natten 0.17."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int],
        dilation: int | Sequence[int] | None = 1,
        is_causal: bool | Sequence[bool] = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(
            *(3, dim, num_heads, kernel_size, dilation, is_causal, rel_pos_bias, qkv_bias, qk_scale),
            *(attn_drop, proj_drop),
        )
