"""Softmax attention: biases dense and by axis, masks, causality, windows, packed sequences, grouped heads."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attn_core.checks import (
    DATA_DTYPES,
    INDEX_DTYPES,
    check_boundaries,
    check_broadcastable,
    check_choice,
    check_dtype,
    check_number,
    check_rank,
    check_same,
    check_size,
    check_sizes,
    check_tensor,
    check_tensor_list,
    check_width,
    default_scale,
    remembered,
    shape,
)
from attn_core.dispatch import Backend, select, under_autocast

from . import torch_backend
from .reference import Arguments, reference

OPERATOR = "attention"
MAX_TRITON_WIDTH = 256
# Without tensor cores a wider product is unrolled into more registers than there are (seen by the ahead-of-time gate).
MAX_TRITON_WIDTH_FLOAT32 = 128
# Nor do the registers hold ranges of keys beside axis tables there.
MAX_TRITON_WIDTH_CUT_FLOAT32 = 64


def attention(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B Hk M D"],
    v: Float[Tensor, "B Hk M Dv"],
    *,
    scale: float | None = None,
    bias: Float[Tensor, "#B #H #N #M"] | None = None,
    axis_bias: Sequence[Float[Tensor, "#B #H N _"]] | None = None,
    key_mask: Bool[Tensor, "#B M"] | None = None,
    causal: Literal["upper_left", "lower_right"] | None = None,
    window_size: tuple[int, int] | None = None,
    cu_seqlens_q: Int[Tensor, " bounds"] | None = None,
    cu_seqlens_k: Int[Tensor, " bounds"] | None = None,
    backend: Backend | None = None,
) -> tuple[Float[Tensor, "B H N Dv"], Float[Tensor, "B H N"]]:
    """Softmax attention that never holds the N×M scores, with a differentiable log-sum-exp.

    s_ij = scale·q_i·k_j + bias_ij + Σ_a axis_bias[a][i, coord_a(j)];  out_i = Σ_j softmax_j(s_ij) v_j;
    lse_i = log Σ_j exp s_ij (natural logarithm). With ``axis_bias`` the keys form a row-major grid (last axis fastest)
    whose sizes are the tables' last dimensions: Plain-DETR's box relative position bias is
    ``axis_bias=(rpe_y, rpe_x)``, SAM's decomposed one likewise.

    A query that sees no key gets out = 0, lse = −inf and zero gradients. Empty B, N and M are legal.

    Sequences of several lengths are packed one behind the other along N and M, without padding: ``cu_seqlens_q`` and
    ``cu_seqlens_k`` say where each begins, and a query sees the keys of its own sequence alone. Biases and masks count
    packed tokens. These names, and those of the window, are flash_attn's, whose users are most.

    Args:
        k, v: Hk heads; H must be a multiple of Hk (grouped queries). Dv may differ from D.
        scale: factor of the dot products; D^−0.5 by default. 0.0 is legal.
        bias: broadcastable, differentiable; −inf hides a key.
        axis_bias: tables (B|1, H|1, N, n_a) with Π n_a = M, differentiable.
        key_mask: True = visible.
        causal: ``"upper_left"`` hides j > i, ``"lower_right"`` hides j > i + M − N; i, j, N and M are those of the
            sequence.
        window_size: (left, right): hides keys more than ``left`` before or ``right`` behind the diagonal, which is
            j = i with ``causal="upper_left"``, else j = i + M − N. −1 leaves a side open.
        cu_seqlens_q, cu_seqlens_k: cumulated lengths of S sequences, 0 first, the same for every image; those of the
            keys are those of the queries by default. Tokens behind the last sequence belong to none.

    Returns:
        out in the dtype of q; lse in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, dtypes or devices do not fit. TypeError: an argument is of another kind. RuntimeError: the
            requested backend cannot run.

    Source: Vaswani et al. 2017, eq. 1; axis bias: Lin et al. 2023 (arXiv 2308.01904), BoxRPB.
    """
    if axis_bias is not None:
        check_tensor_list(OPERATOR, "axis_bias", axis_bias, "one for each axis")
    q, k, v, bias, *tables = under_autocast(q, k, v, bias, *(axis_bias or ()))
    _check(q, k, v, scale, bias, tables, key_mask, causal)
    window, starts, key_starts = (), None, None
    if window_size is not None or cu_seqlens_q is not None or cu_seqlens_k is not None:
        window, starts, key_starts = _ranges(q, k, window_size, cu_seqlens_q, cu_seqlens_k)
    run = _implementation(select(OPERATOR, backend, q, lambda: triton_obstacle(q, v, tables, window, starts)))
    scale = default_scale(q) if scale is None else scale
    return run(Arguments(q, k, v, bias, key_mask, starts, key_starts, tables, scale, causal or "none", window))


def _implementation(backend: Backend) -> Callable[[Arguments], tuple[Tensor, Tensor]]:
    if backend == "triton":  # imported on first use: it costs time, and is absent where triton has no wheels
        from . import triton_backend

        return triton_backend.attention
    return reference if backend == "reference" else torch_backend.attention


def triton_obstacle(
    q: Tensor,
    v: Tensor,
    axis_bias: Sequence[Tensor] | None = None,
    window_size: tuple[int, ...] | None = None,
    cu_seqlens_q: Tensor | None = None,
    **_: Any,
) -> str | None:
    """Why the Triton kernel cannot take this call (too many head columns), or None."""
    width, limit, beside = max(q.shape[-1], v.shape[-1]), MAX_TRITON_WIDTH, ""
    if q.dtype == torch.float32:
        limit = MAX_TRITON_WIDTH_FLOAT32
        if axis_bias and (window_size or cu_seqlens_q is not None):
            limit, beside = MAX_TRITON_WIDTH_CUT_FLOAT32, " with a window or sequences beside axis_bias"
    if width > limit:
        kind = str(q.dtype).removeprefix("torch.")
        return f"the kernel holds head widths up to {limit} in {kind}{beside}, got {width}"
    return None


@remembered
def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    bias: Tensor | None,
    axis_bias: Sequence[Tensor],
    key_mask: Tensor | None,
    causal: str | None,
) -> None:
    check_rank(OPERATOR, "q", q, "B H N D")
    check_rank(OPERATOR, "k", k, "B Hk M D")
    check_rank(OPERATOR, "v", v, "B Hk M Dv")
    check_dtype(OPERATOR, "q", q, DATA_DTYPES)
    check_width(OPERATOR, "q", q)
    check_number(OPERATOR, "scale", scale, optional=True)
    tables = {f"axis_bias[{i}]": table for i, table in enumerate(axis_bias)}
    check_same(OPERATOR, q, {"k": k, "v": v, "bias": bias, **tables})
    check_same(OPERATOR, q, {"key_mask": key_mask}, dtype=False)
    batch, heads, queries, width = q.shape
    key_heads, keys = k.shape[1], k.shape[2]
    check_size(OPERATOR, "k", k, 0, batch, "the batch of q")
    check_size(OPERATOR, "k", k, 3, width, "the width of q")
    check_size(OPERATOR, "v", v, 0, batch, "the batch of q")
    check_size(OPERATOR, "v", v, 1, key_heads, "the heads of k")
    check_size(OPERATOR, "v", v, 2, keys, "the tokens of k")
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"{OPERATOR}: the heads of q must be a multiple of those of k, got {heads} and {key_heads}")
    check_choice(OPERATOR, "causal", causal, (None, "upper_left", "lower_right"))
    if bias is not None:
        check_broadcastable(OPERATOR, "bias", bias, (batch, heads, queries, keys), "B H N M")
    if key_mask is not None:
        check_dtype(OPERATOR, "key_mask", key_mask, (torch.bool,))
        check_broadcastable(OPERATOR, "key_mask", key_mask, (batch, keys), "B M")
    for name, table in tables.items():
        check_rank(OPERATOR, name, table, "B H N n")
        check_broadcastable(OPERATOR, name, table, (batch, heads, queries, table.shape[3]), "B H N n")
        check_size(OPERATOR, name, table, 2, queries, "the tokens of q")
    if tables and math.prod([table.shape[3] for table in tables.values()]) != keys:
        sizes = " × ".join(str(shape(table)[3]) for table in tables.values())
        raise ValueError(
            f"{OPERATOR}: axis_bias must span a grid of {keys} cells, the tokens of k, got axis_bias={sizes}"
        )


def _ranges(
    q: Tensor, k: Tensor, window_size: tuple[int, int] | None, starts: Tensor | None, key_starts: Tensor | None
) -> tuple[tuple[int, ...], Tensor | None, Tensor | None]:
    """The window, empty if it hides nothing, and where sequences begin (1, S + 1), both checked."""
    if window_size is not None:
        check_sizes(OPERATOR, "window_size", window_size, "(left, right)", -1)
    window = () if window_size is None or tuple(window_size) == (-1, -1) else tuple(window_size)
    if starts is None:
        if key_starts is not None:
            check_tensor(OPERATOR, "cu_seqlens_k", key_starts)
            raise ValueError(f"{OPERATOR}: cu_seqlens_k must stand beside cu_seqlens_q, got cu_seqlens_q=None")
        return window, None, None
    key_starts = starts if key_starts is None else key_starts
    for name, x, tokens, what in (("q", starts, q.shape[2], "queries"), ("k", key_starts, k.shape[2], "keys")):
        argument = f"cu_seqlens_{name}"
        check_rank(OPERATOR, argument, x, "S+1")
        check_dtype(OPERATOR, argument, x, INDEX_DTYPES)
        check_same(OPERATOR, q, {argument: x}, dtype=False)
        check_boundaries(OPERATOR, argument, x, tokens, f"the number of {what}")
    check_size(OPERATOR, "cu_seqlens_k", key_starts, 0, starts.shape[0], "one more than sequences of queries")
    return window, starts[None], key_starts[None]
