"""flash_attn 2.x and the names of 1.x: (B, S, H, D), or sequences one behind the other (total, H, D)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attn_core import attention


def _refuse(name: str, options: dict[str, Any]) -> None:
    """What attn_core's attention has not."""
    neutral = {"window_size": [(-1, -1), (None, None)], "softcap": [0.0], "alibi_slopes": [None], "block_table": [None]}
    for option, value in options.items():
        given = tuple(value) if isinstance(value, (list, tuple)) else value
        if option == "dropout_p":
            if value:
                raise NotImplementedError(f"{name}: dropout_p is not provided by this shim, got dropout_p={value}")
        elif not any(
            given is allowed or (not isinstance(given, Tensor) and given == allowed) for allowed in neutral[option]
        ):
            shown = "a tensor" if isinstance(value, Tensor) else value
            raise NotImplementedError(f"{name}: {option} is not provided by this shim, got {option}={shown}")


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> tuple[Tensor, Tensor]:
    """(B, S, H, D) → out of that layout, lse (B, H, S)."""
    mask = "lower_right" if causal else None
    out, lse = attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale, causal=mask)
    return out.transpose(1, 2), lse


def _attend_each(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, scale: float | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """Sequences one by one: (total, H, D) → out, lse (H, total)."""
    ends_q, ends_k = (starts.tolist() for starts in (starts_q, starts_k))
    outs, lses = [], []
    for i in range(len(ends_q) - 1):
        rows, keys = slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
        out, lse = _attend(q[None, rows], k[None, keys], v[None, keys], scale, causal)
        outs.append(out[0])
        lses.append(lse[0])
    if not outs:
        return q.new_zeros(0, q.shape[1], v.shape[2]), q.new_zeros(q.shape[1], 0)
    return torch.cat(outs), torch.cat(lses, -1)


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
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Causality is aligned at the lower right; grouped heads are legal."""
    options = {"dropout_p": dropout_p, "window_size": window_size, "softcap": softcap, "alibi_slopes": alibi_slopes}
    _refuse("flash_attn_func", options)
    return _result(_attend(q, k, v, softmax_scale, causal), return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """kv (B, S, 2, H, D)."""
    options = {"dropout_p": dropout_p, "window_size": window_size, "softcap": softcap, "alibi_slopes": alibi_slopes}
    _refuse("flash_attn_kvpacked_func", options)
    k, v = kv.unbind(2)
    return _result(_attend(q, k, v, softmax_scale, causal), return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """qkv (B, S, 3, H, D)."""
    options = {"dropout_p": dropout_p, "window_size": window_size, "softcap": softcap, "alibi_slopes": alibi_slopes}
    _refuse("flash_attn_qkvpacked_func", options)
    q, k, v = qkv.unbind(2)
    return _result(_attend(q, k, v, softmax_scale, causal), return_attn_probs)


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
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """One call of attention for each sequence."""
    options: dict[str, Any] = {"dropout_p": dropout_p, "window_size": window_size, "softcap": softcap}
    _refuse("flash_attn_varlen_func", {**options, "alibi_slopes": alibi_slopes, "block_table": block_table})
    return _result(_attend_each(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal), return_attn_probs)


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
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """kv (total, 2, H, D)."""
    options = {"dropout_p": dropout_p, "window_size": window_size, "softcap": softcap, "alibi_slopes": alibi_slopes}
    _refuse("flash_attn_varlen_kvpacked_func", options)
    k, v = kv.unbind(1)
    return _result(_attend_each(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal), return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """qkv (total, 3, H, D)."""
    options = {"dropout_p": dropout_p, "window_size": window_size, "softcap": softcap, "alibi_slopes": alibi_slopes}
    _refuse("flash_attn_varlen_qkvpacked_func", options)
    q, k, v = qkv.unbind(1)
    return _result(_attend_each(q, k, v, cu_seqlens, cu_seqlens, softmax_scale, causal), return_attn_probs)


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
    """Of 1.x; its causality is aligned at the upper left, which is the same where lengths are equal."""
    _refuse("flash_attn_unpadded_func", {"dropout_p": dropout_p})
    if causal and not torch.equal(cu_seqlens_q.cpu(), cu_seqlens_k.cpu()):
        raise NotImplementedError("flash_attn_unpadded_func: causal=True with other lengths of keys is not provided")
    return _result(_attend_each(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal), return_attn_probs)


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
    return _result(_attend_each(q, k, v, cu_seqlens, cu_seqlens, softmax_scale, causal), return_attn_probs)


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
