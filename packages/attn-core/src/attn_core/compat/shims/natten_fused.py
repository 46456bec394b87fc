"""natten from 0.20 on: fused functions and modules, heads last (B, *grid, H, D); the STRIDE is fifth."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attn_core import attention as core_attention
from attn_core import merge_attention, neighborhood_attention

from .natten_windows import Flags, Sizes, _check_rank


def _neighborhood(
    axes: int, tensors: tuple[Tensor, Tensor, Tensor], rules: dict[str, Any], extra: tuple[Any, Any], return_lse: bool
) -> Any:
    query, key, value = tensors
    _check_rank("natten.functional.na{}d", axes, query, heads_last=True)
    q, k, v = (x.movedim(-2, 1) for x in (query, key, value))
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:  # grouped heads
        k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    size = rules.pop("kernel_size")
    out, lse = neighborhood_attention(q, k, v, size, **rules)
    keys, values = extra
    if (keys is None) != (values is None):
        raise ValueError(f"na{axes}d: additional_keys and additional_values must be given together")
    if keys is not None:
        more_k, more_v = (x.transpose(1, 2) for x in (keys, values))
        grid = q.shape[2:-1]
        more, more_lse = core_attention(q.flatten(2, -2), more_k, more_v, scale=rules["scale"])
        merged, merged_lse = merge_attention([out.flatten(2, -2), more], [lse.flatten(2), more_lse])
        out, lse = merged.unflatten(2, grid), merged_lse.unflatten(2, grid)
    out = out.movedim(1, -2)
    return (out, lse.movedim(1, -1)) if return_lse else out


def _na(axes: int) -> Callable[..., Any]:
    def na(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: Sizes,
        stride: Sizes = 1,
        dilation: Sizes = 1,
        is_causal: Flags | None = False,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        backend: str | None = None,
        q_tile_shape: Any = None,
        kv_tile_shape: Any = None,
        backward_q_tile_shape: Any = None,
        backward_kv_tile_shape: Any = None,
        backward_kv_splits: Any = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: Any = None,
        torch_compile: bool = False,
        return_lse: bool = False,
        try_fuse_additional_kv: bool = False,
    ) -> Any:
        """What chooses kernels and tiles (``backend`` and all from ``q_tile_shape`` on) is taken and has no effect."""
        rules = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation, "is_causal": is_causal or False}
        rules |= {"scale": scale}
        return _neighborhood(axes, (query, key, value), rules, (additional_keys, additional_values), return_lse)

    na.__name__ = na.__qualname__ = f"na{axes}d"
    return na


na1d, na2d, na3d = (_na(axes) for axes in (1, 2, 3))


def neighborhood_attention_generic(query: Tensor, key: Tensor, value: Tensor, kernel_size: Sizes, **rules: Any) -> Any:
    """The function of the query's number of axes."""
    return _na(query.ndim - 3)(query, key, value, kernel_size, **rules)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    seqlens_Q: Any = None,
    seqlens_KV: Any = None,
    cumulative_seqlen_Q: Any = None,
    cumulative_seqlen_KV: Any = None,
    max_seqlen_Q: int | None = None,
    max_seqlen_KV: int | None = None,
    backend: str | None = None,
    q_tile_size: Any = None,
    kv_tile_size: Any = None,
    backward_q_tile_size: Any = None,
    backward_kv_tile_size: Any = None,
    backward_kv_splits: Any = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: Any = None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Any:
    """Attention of all tokens, heads last; sequences of different lengths in one batch are not provided."""
    lengths = (seqlens_Q, seqlens_KV, cumulative_seqlen_Q, cumulative_seqlen_KV, max_seqlen_Q, max_seqlen_KV)
    if any(given is not None for given in lengths):
        raise NotImplementedError("natten.attention: seqlens_* and cumulative_seqlen_* are not provided by this shim")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out, lse = core_attention(q, k, v, scale=scale, causal="upper_left" if is_causal else None)
    out = out.transpose(1, 2)
    return (out, lse.transpose(1, 2)) if return_lse else out


def merge_attentions(outputs: list[Tensor], lse_tensors: list[Tensor], torch_compile: bool = True) -> Any:
    """One output of several over disjoint keys, heads last, and its log-sum-exp."""
    outs = [out.transpose(1, 2) for out in outputs]
    merged, lse = merge_attention(outs, [lse.transpose(1, 2) for lse in lse_tensors])
    return merged.transpose(1, 2), lse.transpose(1, 2)


class _Neighborhood(nn.Module):
    axes = 0

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(
                f"NeighborhoodAttention{self.axes}D: embed_dim must be a multiple of num_heads, got "
                f"embed_dim={embed_dim} and num_heads={num_heads}"
            )
        self.na_dim, self.embed_dim, self.num_heads = self.axes, embed_dim, num_heads
        self.head_dim = embed_dim // num_heads
        self.scale = qk_scale or self.head_dim**-0.5
        self.kernel_size, self.stride, self.dilation, self.is_causal = kernel_size, stride, dilation, is_causal
        self.qkv = nn.Linear(embed_dim, embed_dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, attn_kwargs: dict[str, Any] | None = None, **_: Any) -> Tensor:
        """(B, *grid, C) → (B, *grid, C)."""
        if x.ndim != self.axes + 2:
            raise ValueError(
                f"NeighborhoodAttention{self.axes}D: the input must have {self.axes + 2} dimensions (B, *grid, C), "
                f"got shape {tuple(x.shape)}"
            )
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        rules = {"stride": self.stride, "dilation": self.dilation, "is_causal": self.is_causal, "scale": self.scale}
        out = neighborhood_attention_generic(q, k, v, self.kernel_size, **rules)
        return self.proj_drop(self.proj(out.flatten(-2)))


class NeighborhoodAttention1D(_Neighborhood):
    """Of natten from 0.20 on."""

    axes = 1


class NeighborhoodAttention2D(_Neighborhood):
    """Of natten from 0.20 on."""

    axes = 2


class NeighborhoodAttention3D(_Neighborhood):
    """Of natten from 0.20 on."""

    axes = 3


def nothing(*_: Any, **__: Any) -> None:
    """A setting of natten's kernels, without effect here."""


def never(*_: Any, **__: Any) -> bool:
    """A property of natten's kernels, which are not here."""
    return False


def has_gpu(*_: Any) -> bool:
    """Whether there is a GPU."""
    return torch.cuda.is_available()
