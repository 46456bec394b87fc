"""Attention of query blocks to listed key blocks: routed regions, windows, halos, clusters, block-sparse patterns."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attn_core.checks import (
    DATA_DTYPES,
    INDEX_DTYPES,
    check_broadcastable,
    check_choice,
    check_dtype,
    check_flag,
    check_no_repeats,
    check_number,
    check_rank,
    check_same,
    check_size,
    check_tensor_list,
    check_values,
    check_width,
    default_scale,
    fail,
    remembered,
    shape,
)
from attn_core.dispatch import Backend, select, under_autocast
from attn_core.kernels.derived import derived

from . import torch_backend
from .index import halo_index, topk_route, window_index
from .reference import Arguments, reduce_rows, reference

__all__ = ["block_attention", "halo_index", "topk_route", "window_index"]

OPERATOR = "block_attention"
MAX_TRITON_WIDTH = 256
# Without tensor cores a wider product is unrolled into more registers than there are (seen by the ahead-of-time gate).
MAX_TRITON_WIDTH_FLOAT32 = 128


def block_attention(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B Hk M D"],
    v: Float[Tensor, "B Hk M Dv"],
    q_index: Int[Tensor, "#B #H R I"],
    kv_index: Int[Tensor, "#B #Hk S J"],
    table: Int[Tensor, "#B #H R K"] | None = None,
    *,
    kv_weight: Float[Tensor, "#B #H R K"] | None = None,
    axis_bias: Sequence[Float[Tensor, "#B #H N _"]] | None = None,
    causal: bool = False,
    q_pos: Int[Tensor, "#B N"] | None = None,
    k_pos: Int[Tensor, "#B M"] | None = None,
    self_logit: float | None = None,
    scale: float | None = None,
    reduce: Literal["set", "mean"] = "set",
    backend: Backend | None = None,
) -> tuple[Float[Tensor, "B H N Dv"], Float[Tensor, "B H N"]]:
    """Softmax attention of R query blocks to the key blocks that a table lists, without gathered keys or scores.

    Two levels of index: ``q_index`` and ``kv_index`` list the **token** numbers of each block, ``table`` the key blocks
    that each query block reads. −1 is a hole in all three. For a query t of block r and a key u in slot j of the key
    block in table slot c: s = scale·q_t·(w·k_u) + Σ_a axis_bias[a][t, coord_a(j)], value w·v_u, w = kv_weight[r, c].
    A block listed twice counts twice.

    ========================  =======================================  ==============================================
    model                     index                                    table
    ========================  =======================================  ==============================================
    BiFormer                  ``window_index`` for both                ``topk_route`` of the region means
    HaloNet                   ``window_index``, ``halo_index``         None (each block its own window)
    Swin, DaViT windows       ``window_index`` for both                None
    Routing Transformer       top tokens per centroid, for each head   None, ``reduce="mean"``, ``self_logit=-5e4``
    ========================  =======================================  ==============================================

    A query that sees no key, or stands in no block, gets out = 0, lse = −inf and zero gradients.

    Args:
        q_index, kv_index, table: leading dimensions 1 or B, and 1 or the heads (kv_index: 1 or Hk). ``table=None``
            means block r reads key block r, and then S = R.
        kv_weight: weight of each table slot on keys **and** values (BiFormer's soft routing), differentiable.
        axis_bias: tables (B|1, H|1, N, n_a) over the slots of a key block, Π n_a = J, differentiable.
        causal: hide keys with k_pos > q_pos. Positions are token numbers by default; memory keys, which are always
            visible, get −1.
        self_logit: replaces the logit where k_pos = q_pos (shared queries and keys: −5e4 lets a query see itself only
            when it sees nothing else).
        reduce: ``"set"`` for queries that q_index lists once at most; ``"mean"`` averages over the places of a query,
            and lse is −inf for queries in several.

    Returns:
        out in the dtype of q; lse in float32 (float64 for float64 inputs), natural logarithm.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or an index holds a number that it may not: seen on a CPU,
            on a GPU with ``ATTN_CORE_CHECK_VALUES=1`` in the environment alone. TypeError: an argument is of another
            kind. RuntimeError: the requested backend cannot run.

    Source: Zhu et al. 2023 (arXiv 2303.08810), eq. 5–8; Vaswani et al. 2021 (arXiv 2103.12731), §3.
    """
    if axis_bias is not None:
        check_tensor_list(OPERATOR, "axis_bias", axis_bias, "one for each axis")
    q, k, v, kv_weight, *tables = under_autocast(q, k, v, kv_weight, *(axis_bias or ()))
    _check(q, k, v, q_index, kv_index, table, kv_weight, tables, causal, q_pos, k_pos, self_logit, scale, reduce)
    sizes = (q.shape[2], k.shape[2], reduce)
    derived(("block_attention numbers", *sizes), functools.partial(_check_numbers, *sizes), q_index, kv_index, table)
    run = _implementation(select(OPERATOR, backend, q, lambda: triton_obstacle(q=q, v=v)))
    scale, mean = default_scale(q) if scale is None else scale, reduce == "mean"
    listed = (q_index, kv_index, table, kv_weight, q_pos, k_pos, tables)
    out, lse = run(Arguments(q, k, v, *listed, causal, self_logit, scale, mean))
    return reduce_rows(out, lse, q_index, q.shape[2], mean=True) if mean else (out, lse)


def _implementation(backend: Backend) -> Callable[[Arguments], tuple[Tensor, Tensor]]:
    if backend == "triton":  # imported on first use: it costs time, and is absent where triton has no wheels
        from . import triton_backend

        return triton_backend.block_attention
    return reference if backend == "reference" else torch_backend.block_attention


def triton_obstacle(*, q: Tensor, v: Tensor, **_: Any) -> str | None:
    width = max(q.shape[-1], v.shape[-1])
    limit = MAX_TRITON_WIDTH_FLOAT32 if q.dtype == torch.float32 else MAX_TRITON_WIDTH
    if width > limit:
        return f"the kernel holds head widths up to {limit} in {str(q.dtype).removeprefix('torch.')}, got {width}"
    return None


@remembered
def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_index: Tensor,
    kv_index: Tensor,
    table: Tensor | None,
    kv_weight: Tensor | None,
    axis_bias: Sequence[Tensor],
    causal: bool,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    self_logit: float | None,
    scale: float | None,
    reduce: str,
) -> None:
    check_flag(OPERATOR, "causal", causal)
    check_number(OPERATOR, "self_logit", self_logit, optional=True, finite=False)
    check_number(OPERATOR, "scale", scale, optional=True)
    check_rank(OPERATOR, "q", q, "B H N D")
    check_rank(OPERATOR, "k", k, "B Hk M D")
    check_rank(OPERATOR, "v", v, "B Hk M Dv")
    check_dtype(OPERATOR, "q", q, DATA_DTYPES)
    check_width(OPERATOR, "q", q)
    tables = {f"axis_bias[{i}]": bias for i, bias in enumerate(axis_bias)}
    check_same(OPERATOR, q, {"k": k, "v": v, "kv_weight": kv_weight, **tables})
    indices = {"q_index": q_index, "kv_index": kv_index, "table": table, "q_pos": q_pos, "k_pos": k_pos}
    check_same(OPERATOR, q, indices, dtype=False)
    for argument, index in indices.items():
        if index is not None:
            check_dtype(OPERATOR, argument, index, INDEX_DTYPES)
    batch, heads, queries, width = q.shape
    key_heads, keys = k.shape[1], k.shape[2]
    check_size(OPERATOR, "k", k, 0, batch, "the batch of q")
    check_size(OPERATOR, "k", k, 3, width, "the width of q")
    check_size(OPERATOR, "v", v, 0, batch, "the batch of q")
    check_size(OPERATOR, "v", v, 1, key_heads, "the heads of k")
    check_size(OPERATOR, "v", v, 2, keys, "the tokens of k")
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"{OPERATOR}: the heads of q must be a multiple of those of k, got {heads} and {key_heads}")
    check_rank(OPERATOR, "q_index", q_index, "b h R I")
    check_rank(OPERATOR, "kv_index", kv_index, "b h S J")
    blocks = q_index.shape[2]
    check_broadcastable(OPERATOR, "q_index", q_index, (batch, heads, *q_index.shape[2:]), "b h R I")
    check_broadcastable(OPERATOR, "kv_index", kv_index, (batch, key_heads, *kv_index.shape[2:]), "b h S J")
    if table is None:
        check_size(OPERATOR, "kv_index", kv_index, 2, blocks, "one key block for each query block, since table=None")
        slots = 1
    else:
        check_rank(OPERATOR, "table", table, "b h R K")
        slots = table.shape[3]
        check_broadcastable(OPERATOR, "table", table, (batch, heads, blocks, slots), "b h R K")
        check_size(OPERATOR, "table", table, 2, blocks, "the blocks of q_index")
    if kv_weight is not None:
        check_broadcastable(OPERATOR, "kv_weight", kv_weight, (batch, heads, blocks, slots), "b h R K")
        check_size(OPERATOR, "kv_weight", kv_weight, 2, blocks, "the blocks of q_index")
        check_size(OPERATOR, "kv_weight", kv_weight, 3, slots, "the slots of table")
    for argument, positions, tokens in (("q_pos", q_pos, queries), ("k_pos", k_pos, keys)):
        if positions is not None:
            check_broadcastable(OPERATOR, argument, positions, (batch, tokens), "B N")
            check_size(OPERATOR, argument, positions, 1, tokens, "one position for each token")
    for name, bias in tables.items():
        check_rank(OPERATOR, name, bias, "B H N n")
        check_broadcastable(OPERATOR, name, bias, (batch, heads, queries, bias.shape[3]), "B H N n")
        check_size(OPERATOR, name, bias, 2, queries, "the tokens of q")
    if tables and math.prod([bias.shape[3] for bias in tables.values()]) != kv_index.shape[3]:
        sizes = " × ".join(str(shape(bias)[3]) for bias in tables.values())
        fail(OPERATOR, "axis_bias", f"must span the {kv_index.shape[3]} slots of a key block", sizes)
    check_choice(OPERATOR, "reduce", reduce, ("set", "mean"))


def _check_numbers(
    queries: int, keys: int, reduce: str, q_index: Tensor, kv_index: Tensor, table: Tensor | None
) -> None:
    check_values(OPERATOR, "q_index", q_index, queries - 1, "the tokens of q")
    check_values(OPERATOR, "kv_index", kv_index, keys - 1, "the tokens of k")
    if table is not None:
        check_values(OPERATOR, "table", table, kv_index.shape[2] - 1, "the blocks of kv_index")
    if reduce == "set":
        check_no_repeats(OPERATOR, "q_index", q_index, "use reduce='mean'")
