"""Kernels of merge_attention: one pass over all parts forward, one launch for each part backward."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["heads", "tokens", "rows"])
def merge_kernel(
    O0,
    O1,
    O2,
    O3,
    O4,
    O5,
    O6,
    O7,
    L0,
    L1,
    L2,
    L3,
    L4,
    L5,
    L6,
    L7,
    carry,
    carry_lse,
    out,
    lse,
    part_b,
    part_h,
    part_n,
    part_lse_b,
    part_lse_h,
    part_lse_n,
    out_b,
    out_h,
    out_n,
    heads,
    tokens,
    rows,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """BM queries. ``carry`` holds the result over earlier parts, in float32 and (B, H, N, D) in memory."""
    outs = (O0, O1, O2, O3, O4, O5, O6, O7)
    lses = (L0, L1, L2, L3, L4, L5, L6, L7)
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    live = row < rows
    b, h, n = row // (heads * tokens), row // tokens % heads, row % tokens
    at = b * part_b + h * part_h + n * part_n
    at_lse = b * part_lse_b + h * part_lse_h + n * part_lse_n
    top = tl.full((BM,), float("-inf"), tl.float32)
    if carry is not None:
        top = tl.load(carry_lse + row, live, other=float("-inf"))
    for s in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
        top = tl.maximum(top, tl.load(lses[s] + at_lse, live, other=float("-inf")))
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros((BM,), tl.float32)
    if carry is not None:
        total += tl.exp(tl.load(carry_lse + row, live, other=float("-inf")) - shift)
    for s in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
        total += tl.exp(tl.load(lses[s] + at_lse, live, other=float("-inf")) - shift)
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    result = tl.where(seen, shift + tl.log(total), float("-inf"))
    inverse = tl.where(seen, 1 / total, 0.0)
    for start in range(0, D, BN):
        d = start + tl.arange(0, BN)
        mask = live[:, None] & (d < D)[None, :]
        acc = tl.zeros((BM, BN), tl.float32)
        if carry is not None:
            weight = tl.exp(tl.load(carry_lse + row, live, other=float("-inf")) - shift) * inverse
            acc += weight[:, None] * tl.load(carry + row[:, None] * D + d[None, :], mask, other=0.0)
        for s in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
            weight = tl.exp(tl.load(lses[s] + at_lse, live, other=float("-inf")) - shift) * inverse
            part = tl.load(outs[s] + at[:, None] + d[None, :], mask, other=0.0).to(tl.float32)
            # 0 · inf would be NaN: a part without keys may hold anything.
            acc += tl.where((weight > 0)[:, None], weight[:, None] * part, 0.0)
        to = out + (b * out_b + h * out_h + n * out_n)[:, None] + d[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), mask)
    tl.store(lse + row, result, live)


@triton.jit(do_not_specialize=["heads", "tokens", "rows"])
def part_gradient_kernel(
    grad_out,
    grad_lse,
    out,
    lse,
    part,
    part_lse,
    d_part,
    d_part_lse,
    grad_b,
    grad_h,
    grad_n,
    out_b,
    out_h,
    out_n,
    part_b,
    part_h,
    part_n,
    part_lse_b,
    part_lse_h,
    part_lse_n,
    grad_lse_b,
    grad_lse_h,
    grad_lse_n,
    heads,
    tokens,
    rows,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """BM queries of one part; its gradients are (B, H, N, D) in memory."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    live = row < rows
    b, h, n = row // (heads * tokens), row // tokens % heads, row % tokens
    total = tl.load(lse + row, live, other=float("-inf"))
    own = tl.load(part_lse + b * part_lse_b + h * part_lse_h + n * part_lse_n, live, other=float("-inf"))
    weight = tl.exp(own - tl.where(total == float("-inf"), 0.0, total))
    slope = tl.zeros((BM,), tl.float32)
    for start in range(0, D, BN):
        d = start + tl.arange(0, BN)
        mask = live[:, None] & (d < D)[None, :]
        do = tl.load(grad_out + (b * grad_b + h * grad_h + n * grad_n)[:, None] + d[None, :], mask, other=0.0)
        do = do.to(tl.float32)
        if d_part is not None:
            to = d_part + row[:, None] * D + d[None, :]
            tl.store(to, (weight[:, None] * do).to(d_part.dtype.element_ty), mask)
        if d_part_lse is not None:
            o = tl.load(out + (b * out_b + h * out_h + n * out_n)[:, None] + d[None, :], mask, other=0.0)
            o_s = tl.load(part + (b * part_b + h * part_h + n * part_n)[:, None] + d[None, :], mask, other=0.0)
            slope += tl.sum(do * (o_s.to(tl.float32) - o.to(tl.float32)), axis=1)
    if d_part_lse is not None:
        if grad_lse is not None:
            slope += tl.load(grad_lse + b * grad_lse_b + h * grad_lse_h + n * grad_lse_n, live, other=0.0)
        tl.store(d_part_lse + row, tl.where(weight > 0, weight * slope, 0.0), live)
