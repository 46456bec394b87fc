# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
# Kernels are Triton, not Python: constants stand where constexpr is declared, constant conditions decide what is bound.
"""Kernel of the linear scan: tiles of BM steps × BN features, scanned in registers."""

import triton
import triton.language as tl


@triton.jit
def join(a, x, b, y):
    """First (a, x), then (b, y): h → b·(a·h + x) + y."""
    return a * b, b * x + y


@triton.jit(do_not_specialize=["GROUPS", "TILES"])
def scan_kernel(
    A, B, START, OUT,
    a_b, a_t, b_b, b_t,
    T, GROUPS, FEATURES, TILES,
    BM: tl.constexpr, BN: tl.constexpr, OWN: tl.constexpr, PREVIOUS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """One program: BN features of one image, all steps; b (B, T, GROUPS, FEATURES), a (B, T, GROUPS).

    OWN: every feature has its gate (FEATURES is 1, and the block runs over groups). PREVIOUS: a step takes
    the gate of the one before, as the gradient's scan does, which runs against the states'. START (B, GROUPS, FEATURES)
    and OUT are contiguous.
    """
    if OWN:
        across = tl.cdiv(GROUPS, BN)
    else:
        across = tl.cdiv(FEATURES, BN) * GROUPS
    b = (tl.program_id(0) // across).to(tl.int64)
    block = tl.program_id(0) % across
    i = tl.arange(0, BM)
    if OWN:
        f = block * BN + tl.arange(0, BN)
        inside_f = f < GROUPS
        gate = f
    else:
        per_group = tl.cdiv(FEATURES, BN)
        inner = block % per_group * BN + tl.arange(0, BN)
        inside_f = inner < FEATURES
        f = block // per_group * FEATURES + inner
        gate = tl.zeros([BN], tl.int32) + block // per_group
    width = GROUPS * FEATURES
    A += b * a_b
    B += b * b_b
    OUT += b * T * width
    state = tl.zeros([BN], tl.float32)
    if START is not None:
        state += tl.load(START + b * width + f, mask=inside_f, other=0.0).to(tl.float32)
    for tile in range(TILES):
        step = tile * BM + i
        inside = (step < T)[:, None] & inside_f[None, :]
        if REVERSE:
            t = (T - 1 - step).to(tl.int64)
        else:
            t = step.to(tl.int64)
        gated = inside
        at = t
        if PREVIOUS:
            gated = inside & (step > 0)[:, None]
            if REVERSE:
                at = t + 1
            else:
                at = t - 1
        terms = tl.load(B + (t[:, None] * b_t + f[None, :]), mask=inside, other=0.0).to(tl.float32)
        gates = tl.load(A + (at[:, None] * a_t + gate[None, :]), mask=gated, other=1.0).to(tl.float32)
        gates, h = tl.associative_scan((gates, terms), 0, join)
        h += gates * state[None, :]
        tl.store(OUT + (t[:, None] * width + f[None, :]), h, mask=inside)
        state = tl.sum(tl.where((i == BM - 1)[:, None], h, 0.0), 0)
