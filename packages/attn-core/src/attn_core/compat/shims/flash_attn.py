"""flash_attn 2.x and the names of 1.x: (B, S, H, D), or sequences one behind the other (total, H, D)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from attn_core import attention


def _refuse(name: str, options: dict[str, Any]) -> None:
    """What attn_core's attention has not."""
    neutral = {"softcap": 0.0, "alibi_slopes": None, "block_table": None, "dropout_p": 0.0}
    for option, value in options.items():
        if isinstance(value, Tensor) or value != neutral[option]:
            shown = "a tensor" if isinstance(value, Tensor) else value
            raise NotImplementedError(f"{name}: {option} is not provided by this shim, got {option}={shown}")


def _window(size: Sequence[int | None]) -> tuple[int, int]:
    """(left, right), any negative number or None for an open side."""
    left, right = (-1 if side is None or side < 0 else int(side) for side in size)
    return left, right


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, window: Sequence[int | None]
) -> tuple[Tensor, Tensor]:
    """(B, S, H, D) → out of that layout, lse (B, H, S)."""
    mask = "lower_right" if causal else None
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = attention(*heads_first, scale=scale, causal=mask, window_size=_window(window))
    return out.transpose(1, 2), lse


def _attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: tuple[Tensor, Tensor],
    scale: float | None,
    causal: Literal["upper_left", "lower_right"] | None,
    window: Sequence[int | None] = (-1, -1),
) -> tuple[Tensor, Tensor]:
    """Sequences one behind the other, (total, H, D) → out, lse (H, total)."""
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    own, key_own = starts
    out, lse = attention(
        *heads_first,
        scale=scale,
        causal=causal,
        window_size=_window(window),
        cu_seqlens_q=own,
        cu_seqlens_k=key_own,
    )
    return out[0].transpose(0, 1), lse[0]


def _result(found: tuple[Tensor, Tensor], wants_probs: bool) -> Any:
    """The probabilities themselves are None, as the kernel gives them without dropout."""
    return (*found, None) if wants_probs else found[0]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Causality is aligned at the lower right; grouped heads are legal."""
    options = {"dropout_p": dropout_p, "softcap": softcap, "alibi_slopes": alibi_slopes}
    _refuse("flash_attn_func", options)
    return _result(_attend(q, k, v, softmax_scale, causal, window_size), return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """kv (B, S, 2, H, D)."""
    options = {"dropout_p": dropout_p, "softcap": softcap, "alibi_slopes": alibi_slopes}
    _refuse("flash_attn_kvpacked_func", options)
    k, v = kv.unbind(2)
    return _result(_attend(q, k, v, softmax_scale, causal, window_size), return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """qkv (B, S, 3, H, D)."""
    options = {"dropout_p": dropout_p, "softcap": softcap, "alibi_slopes": alibi_slopes}
    _refuse("flash_attn_qkvpacked_func", options)
    q, k, v = qkv.unbind(2)
    return _result(_attend(q, k, v, softmax_scale, causal, window_size), return_attn_probs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Sequences of queries and of keys one behind the other."""
    options: dict[str, Any] = {"dropout_p": dropout_p, "softcap": softcap}
    _refuse("flash_attn_varlen_func", {**options, "alibi_slopes": alibi_slopes, "block_table": block_table})
    mask = "lower_right" if causal else None
    found = _attend_packed(q, k, v, (cu_seqlens_q, cu_seqlens_k), softmax_scale, mask, window_size)
    return _result(found, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """kv (total, 2, H, D)."""
    options = {"dropout_p": dropout_p, "softcap": softcap, "alibi_slopes": alibi_slopes}
    _refuse("flash_attn_varlen_kvpacked_func", options)
    k, v = kv.unbind(1)
    mask = "lower_right" if causal else None
    found = _attend_packed(q, k, v, (cu_seqlens_q, cu_seqlens_k), softmax_scale, mask, window_size)
    return _result(found, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """qkv (total, 3, H, D)."""
    options = {"dropout_p": dropout_p, "softcap": softcap, "alibi_slopes": alibi_slopes}
    _refuse("flash_attn_varlen_qkvpacked_func", options)
    q, k, v = qkv.unbind(1)
    mask = "lower_right" if causal else None
    found = _attend_packed(q, k, v, (cu_seqlens, cu_seqlens), softmax_scale, mask, window_size)
    return _result(found, return_attn_probs)


def flash_attn_unpadded_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
    deterministic: bool = False,
) -> Any:
    """Of 1.x; its causality is aligned at the upper left."""
    _refuse("flash_attn_unpadded_func", {"dropout_p": dropout_p})
    mask = "upper_left" if causal else None
    found = _attend_packed(q, k, v, (cu_seqlens_q, cu_seqlens_k), softmax_scale, mask)
    return _result(found, return_attn_probs)


def flash_attn_unpadded_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
    deterministic: bool = False,
) -> Any:
    """Of 1.x; kv (total, 2, H, D)."""
    k, v = kv.unbind(1)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return flash_attn_unpadded_func(q, k, v, *lengths, dropout_p, softmax_scale, causal, return_attn_probs)


def flash_attn_unpadded_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
    deterministic: bool = False,
) -> Any:
    """Of 1.x; qkv (total, 3, H, D)."""
    _refuse("flash_attn_unpadded_qkvpacked_func", {"dropout_p": dropout_p})
    q, k, v = qkv.unbind(1)
    mask = "upper_left" if causal else None
    found = _attend_packed(q, k, v, (cu_seqlens, cu_seqlens), softmax_scale, mask)
    return _result(found, return_attn_probs)


def flash_attn_with_kvcache(*_: Any, **__: Any) -> Any:
    """Not provided."""
    raise NotImplementedError("flash_attn_with_kvcache is not provided by attn_core's shim of flash_attn")


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows of the first axis."""
    return input[indices]


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros with ``values`` in the rows of ``indices``."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_put((indices,), values)


def unpad(hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None) -> tuple[Any, ...]:
    """Tokens that a mask (B, S) keeps, their places, where sequences begin, the longest, and lengths without unused."""
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    used = attention_mask.sum(-1, dtype=torch.int32)
    return hidden_states.flatten(0, 1)[indices], indices, starts, longest, used


def unpad_input(hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None) -> tuple[Any, ...]:
    """Of 2.7 and later: 5 values."""
    return unpad(hidden_states, attention_mask, unused_mask)


def unpad_input_to_four(hidden_states: Tensor, attention_mask: Tensor) -> tuple[Any, ...]:
    """``unpad_input`` up to 2.6: 4 values."""
    return unpad(hidden_states, attention_mask)[:4]


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """(total, …) → (B, S, …) with zeros where no token was kept."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
