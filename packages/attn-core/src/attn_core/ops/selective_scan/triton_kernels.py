# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
# Kernels are Triton, not Python: constants stand where constexpr is declared, constant conditions decide what is bound.
"""Kernels of the selective scan: tiles of BT steps × BD channels × BN state entries, scanned in registers.

Steps are numbered in the order of the walk: step i is token i, or token T − 1 − i from the right. Steps behind the end
read Δ = 0, which leaves the state as it is. The channels of a tile belong to one group. CONST_B, CONST_C: the map is
the same at every step, (C, N).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def join(a, x, b, y):
    """First (a, x), then (b, y): h → b·(a·h + x) + y."""
    return a * b, b * x + y


@triton.jit
def token(i, T, REVERSE: tl.constexpr):
    """Position of step i: counted from the end if REVERSE."""
    if REVERSE:
        t = T - 1 - i
    else:
        t = i
    return t


@triton.jit
def load_steps(base, t, inside, column, stride, columns):
    """(steps, columns) float32 tile of a tensor whose last dimension is the sequence."""
    mask = inside[:, None] & (column < columns)[None, :]
    return tl.load(base + (column[None, :] * stride + t[:, None]), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_map(base, t, inside, c, channels, n, stride_g, stride_n, N, CONST: tl.constexpr):
    """B or C of a tile: (steps, N) of its group, or the constant ones of its channels, (channels, N)."""
    if CONST:
        mask = (c < channels)[:, None] & (n < N)[None, :]
        values = tl.load(base + (c[:, None] * stride_g + n[None, :] * stride_n), mask=mask, other=0.0).to(tl.float32)
    else:
        values = load_steps(base, t, inside, n, stride_n, N)
    return values


@triton.jit
def beside(values, CONST: tl.constexpr):
    """What :func:`load_map` gave, to stand beside (steps, channels, N)."""
    if CONST:
        values = values[None, :, :]
    else:
        values = values[:, None, :]
    return values


@triton.jit
def load_delta(base, t, inside, c, stride, channels, bias, SOFTPLUS: tl.constexpr):
    """Step sizes of a tile, with bias and softplus where asked for; zeros outside."""
    delta = load_steps(base, t, inside, c, stride, channels) + bias[None, :]
    if SOFTPLUS:
        # log(1 + e^x) = max(x, 0) + log1p(e^−|x|). With u the rounded 1 + y, log1p(y) = log(u)·y/(u − 1) to the last
        # digits: what u lost of y stands below the fraction.
        y = tl.exp(-tl.abs(delta))
        u = 1.0 + y
        rest = tl.where(u == 1.0, y, tl.log(u) * (y / tl.where(u == 1.0, 1.0, u - 1.0)))
        delta = tl.maximum(delta, 0.0) + rest
    return tl.where(inside[:, None], delta, 0.0)


@triton.jit
def softplus_slope(delta):
    """The derivative of softplus where it is ``delta``: 1 − e^−Δ, for small steps by way of the logarithm as above."""
    u = tl.exp(-delta)
    near = u > 0.5
    log = tl.where(near & (u < 1.0), -tl.log(tl.where(near, u, 0.5)), 1.0)
    return tl.where(near, tl.where(u == 1.0, delta, (1.0 - u) * (delta / log)), 1.0 - u)


@triton.jit(do_not_specialize=["CHANNELS", "TILES"])
def forward_kernel(
    U, DELTA, A, B, C, SKIP, Z, BIAS, START, OUT, LAST, STATES,
    u_b, u_c, delta_b, delta_c, a_b, a_c, b_b, b_g, b_n, c_b, c_g, c_n, skip_b, z_b, z_c, bias_b, start_b, start_c,
    CHANNELS, PER_GROUP, T, TILES,
    N: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, CONST_B: tl.constexpr, CONST_C: tl.constexpr,
):  # fmt: skip
    """One program: BD channels of one image, all steps. OUT, LAST and STATES (B, tiles, C, N) are contiguous."""
    blocks = CHANNELS // BD
    b = (tl.program_id(0) // blocks).to(tl.int64)
    c0 = tl.program_id(0) % blocks * BD
    group = (c0 // PER_GROUP).to(tl.int64)
    c = c0 + tl.arange(0, BD)
    n = tl.arange(0, BN)
    i = tl.arange(0, BT)
    entry = c[:, None] * N + n[None, :]
    inside_n = (c < CHANNELS)[:, None] & (n < N)[None, :]
    decay = tl.load(A + b * a_b + (c[:, None] * a_c + n[None, :]), mask=inside_n, other=0.0) * LOG2E
    bias = tl.zeros([BD], tl.float32)
    if BIAS is not None:
        bias += tl.load(BIAS + b * bias_b + c)
    state = tl.zeros([BD, BN], tl.float32)
    if START is not None:
        state += tl.load(START + b * start_b + (c[:, None] * start_c + n[None, :]), mask=inside_n, other=0.0)
    U += b * u_b
    DELTA += b * delta_b
    B += b * b_b + (0 if CONST_B else group * b_g)
    C += b * c_b + (0 if CONST_C else group * c_g)
    OUT += b * CHANNELS * T
    for tile in range(TILES):
        step = tile * BT + i
        inside = step < T
        t = token(step, T, REVERSE)
        tl.store(STATES + (b * TILES + tile) * CHANNELS * N + entry, state, mask=inside_n)
        u = load_steps(U, t, inside, c, u_c, CHANNELS)
        delta = load_delta(DELTA, t, inside, c, delta_c, CHANNELS, bias, SOFTPLUS)
        write = load_map(B, t, inside, c, CHANNELS, n, b_g, b_n, N, CONST_B)
        read = load_map(C, t, inside, c, CHANNELS, n, c_g, c_n, N, CONST_C)
        gates = tl.exp2(delta[:, :, None] * decay[None, :, :])
        terms = (delta * u)[:, :, None] * beside(write, CONST_B)
        gates, terms = tl.associative_scan((gates, terms), 0, join)
        h = terms + gates * state[None, :, :]
        state = tl.sum(tl.where((i == BT - 1)[:, None, None], h, 0.0), 0)
        y = tl.sum(h * beside(read, CONST_C), 2)
        if SKIP is not None:
            y += tl.load(SKIP + b * skip_b + c)[None, :] * u
        if Z is not None:
            z = load_steps(Z + b * z_b, t, inside, c, z_c, CHANNELS)
            y *= z * tl.sigmoid(z)
        tl.store(OUT + (c[None, :] * T + t[:, None]), y, mask=inside[:, None])
    tl.store(LAST + b * CHANNELS * N + entry, state, mask=inside_n)


@triton.jit(do_not_specialize=["CHANNELS", "TILES"])
def backward_kernel(
    U, DELTA, A, B, C, SKIP, Z, BIAS, STATES, DOUT, DLAST, DU, DDELTA, DA, DB, DC, DSKIP, DZ, DBIAS, DSTART,
    u_b, u_c, delta_b, delta_c, a_b, a_c, b_b, b_g, b_n, c_b, c_g, c_n, skip_b, z_b, z_c, bias_b,
    do_b, do_c, dlast_b, dlast_c,
    CHANNELS, PER_GROUP, T, TILES,
    N: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, CONST_B: tl.constexpr, CONST_C: tl.constexpr,
):  # fmt: skip
    """One program: the channels of a forward program, tiles from the last to the first.

    g_i = C_i dy_i + a_{i+1} g_{i+1}; a_i h_{i−1} is h_i less its term, so that no state is shifted. DB and DC get one
    part (T, N) for each program, to be summed in a fixed order; that of a constant map is (B, C, N).
    """
    blocks = CHANNELS // BD
    b = (tl.program_id(0) // blocks).to(tl.int64)
    c0 = tl.program_id(0) % blocks * BD
    group = (c0 // PER_GROUP).to(tl.int64)
    c = c0 + tl.arange(0, BD)
    n = tl.arange(0, BN)
    i = tl.arange(0, BT)
    entry = c[:, None] * N + n[None, :]
    inside_n = (c < CHANNELS)[:, None] & (n < N)[None, :]
    rate = tl.load(A + b * a_b + (c[:, None] * a_c + n[None, :]), mask=inside_n, other=0.0)
    bias = tl.zeros([BD], tl.float32)
    if BIAS is not None:
        bias += tl.load(BIAS + b * bias_b + c)
    arriving = tl.zeros([BD, BN], tl.float32)
    if DLAST is not None:
        arriving += tl.load(DLAST + b * dlast_b + (c[:, None] * dlast_c + n[None, :]), mask=inside_n, other=0.0)
    U += b * u_b
    DELTA += b * delta_b
    B += b * b_b + (0 if CONST_B else group * b_g)
    C += b * c_b + (0 if CONST_C else group * c_g)
    DOUT += b * do_b
    DU += b * CHANNELS * T
    DDELTA += b * CHANNELS * T
    part = tl.cast(tl.program_id(0), tl.int64) * T * N
    d_rate = tl.zeros([BD, BN], tl.float32)
    if CONST_B:
        d_write = tl.zeros([BD, BN], tl.float32)
    if CONST_C:
        d_read = tl.zeros([BD, BN], tl.float32)
    d_skip = tl.zeros([BD], tl.float32)
    d_bias = tl.zeros([BD], tl.float32)
    for back in range(TILES):
        tile = TILES - 1 - back
        step = tile * BT + i
        inside = step < T
        t = token(step, T, REVERSE)
        here = inside[:, None]
        at = c[None, :] * T + t[:, None]
        start = tl.load(STATES + (b * TILES + tile) * CHANNELS * N + entry, mask=inside_n, other=0.0)
        u = load_steps(U, t, inside, c, u_c, CHANNELS)
        delta = load_delta(DELTA, t, inside, c, delta_c, CHANNELS, bias, SOFTPLUS)
        write = load_map(B, t, inside, c, CHANNELS, n, b_g, b_n, N, CONST_B)
        read = load_map(C, t, inside, c, CHANNELS, n, c_g, c_n, N, CONST_C)
        gates = tl.exp2(delta[:, :, None] * (rate * LOG2E)[None, :, :])
        terms = (delta * u)[:, :, None] * beside(write, CONST_B)
        gates, h = tl.associative_scan((gates, terms), 0, join)
        h += gates * start[None, :, :]
        dy = load_steps(DOUT, t, inside, c, do_c, CHANNELS)
        if Z is not None:
            z = load_steps(Z + b * z_b, t, inside, c, z_c, CHANNELS)
            gate = tl.sigmoid(z)
            y = tl.sum(h * beside(read, CONST_C), 2)
            if SKIP is not None:
                y += tl.load(SKIP + b * skip_b + c)[None, :] * u
            tl.store(DZ + b * CHANNELS * T + at, dy * y * gate * (1.0 + z * (1.0 - gate)), mask=here)
            dy *= z * gate
        columns = part + t[:, None].to(tl.int64) * N + n[None, :]
        mask_n = here & (n < N)[None, :]
        if CONST_C:
            d_read += tl.sum(h * dy[:, :, None], 0)  # pyright: ignore[reportOperatorIssue]
        else:
            tl.store(DC + columns, tl.sum(h * dy[:, :, None], 1), mask=mask_n)

        later = load_delta(DELTA, token(step + 1, T, REVERSE), step + 1 < T, c, delta_c, CHANNELS, bias, SOFTPLUS)
        gates = tl.exp2(later[:, :, None] * (rate * LOG2E)[None, :, :])
        gates, g = tl.associative_scan((gates, dy[:, :, None] * beside(read, CONST_C)), 0, join, reverse=True)
        g += gates * arriving[None, :, :]
        arriving = tl.sum(tl.where((i == 0)[:, None, None], g, 0.0), 0)
        if CONST_B:
            d_write += tl.sum(g * (delta * u)[:, :, None], 0)  # pyright: ignore[reportOperatorIssue]
        else:
            tl.store(DB + columns, tl.sum(g * (delta * u)[:, :, None], 1), mask=mask_n)
        w = g * (h - terms)
        d_rate += tl.sum(w * delta[:, :, None], 0)
        taken = tl.sum(g * beside(write, CONST_B), 2)
        d_delta = tl.sum(w * rate[None, :, :], 2) + u * taken
        du = delta * taken
        if SKIP is not None:
            du += tl.load(SKIP + b * skip_b + c)[None, :] * dy
            d_skip += tl.sum(dy * u, 0)
        if SOFTPLUS:
            d_delta *= softplus_slope(delta)
        d_bias += tl.sum(tl.where(here, d_delta, 0.0), 0)
        tl.store(DU + at, du, mask=here)
        tl.store(DDELTA + at, d_delta, mask=here)
    first = tl.zeros([1], tl.int32)
    delta = load_delta(DELTA, token(first, T, REVERSE), first < T, c, delta_c, CHANNELS, bias, SOFTPLUS)
    arriving *= tl.exp2(tl.sum(delta, 0)[:, None] * rate * LOG2E)
    rows = b * CHANNELS
    if CONST_B:
        tl.store(DB + rows * N + entry, d_write, mask=inside_n)
    if CONST_C:
        tl.store(DC + rows * N + entry, d_read, mask=inside_n)
    tl.store(DSTART + rows * N + entry, arriving, mask=inside_n)
    tl.store(DA + rows * N + entry, d_rate, mask=inside_n)
    tl.store(DSKIP + rows + c, d_skip)
    tl.store(DBIAS + rows + c, d_bias)
