"""selective_scan_cuda, its kin of VMamba, and the functions of ``mamba_ssm.ops.selective_scan_interface``."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_core import selective_scan

from .causal_conv1d import causal_conv1d_fn
from .recompute import gradients

# Steps of a chunk of the kernel's checkpoints ``x``, of which the last alone is filled here.
CHUNK = 2048


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    z: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output in the dtype of u, and the last state (B, D, N) in that of A."""
    if A.is_complex():
        return _complex_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, z)
    exact = torch.float64 if u.dtype == torch.float64 else torch.float32
    skip, bias = (None if x is None else x.to(exact) for x in (D, delta_bias))
    B, C = (_grouped(x, u).to(u.dtype) for x in (B, C))
    groups = max(B.shape[1], C.shape[1])
    B, C = (x if x.shape[1] == groups else x.repeat_interleave(groups // x.shape[1], 1) for x in (B, C))
    gate = None if z is None else z.to(u.dtype)
    steps = delta if delta.dtype in (u.dtype, exact) else delta.to(exact)
    return selective_scan(u, steps, A.to(exact), B, C, skip, gate, bias, delta_softplus=bool(delta_softplus))


def _grouped(x: Tensor, u: Tensor) -> Tensor:
    """(B, G, N, L) of (B, N, L), or of a constant (D, N), which makes a group of each channel."""
    if x.ndim == 2:
        return x[None, :, :, None].expand(u.shape[0], -1, -1, u.shape[2])
    return x.unsqueeze(1) if x.ndim == 3 else x


def _complex_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    z: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Step by step with all states in memory: conjugate pairs of which one is kept, so that y is twice the real part.

    B and C that depend on the step hold real and imaginary parts side by side along the sequence.
    """
    real = torch.float64 if A.dtype == torch.complex128 else torch.float32
    U, steps = u.to(real), delta.to(real)
    if delta_bias is not None:
        steps = steps + delta_bias.to(real).unsqueeze(-1)
    if delta_softplus:
        steps = F.softplus(steps)
    pairs = [x if x.ndim == 2 else _paired(_grouped_pairs(x).to(real), u.shape[1]) for x in (B, C)]
    state = A.new_zeros(u.shape[0], *A.shape)
    outputs = []
    for t in range(u.shape[2]):
        b, c = (x if x.ndim == 2 else x[..., t] for x in pairs)
        state = torch.exp(steps[:, :, t, None] * A) * state + (steps * U)[:, :, t, None] * b
        outputs.append(2 * (state * c).sum(-1).real)
    out = torch.stack(outputs, -1) if outputs else torch.zeros_like(U)
    if D is not None:
        out = out + D.to(real).unsqueeze(-1) * U
    if z is not None:
        out = out * F.silu(z.to(real))
    return out.to(u.dtype), state


def _grouped_pairs(x: Tensor) -> Tensor:
    return x.unsqueeze(1) if x.ndim == 3 else x


def _paired(x: Tensor, channels: int) -> Tensor:
    """(B, G, N, 2·L) → complex (B, D, N, L)."""
    whole = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return whole.repeat_interleave(channels // whole.shape[1], 1)


def _checkpoints(last: Tensor, steps: int) -> Tensor:
    """``x`` (B, D, chunks, 2N) of the kernels: the state behind a chunk stands in the odd places of its row."""
    last = torch.view_as_real(last).flatten(-2) if last.is_complex() else last
    x = last.new_zeros(*last.shape[:2], max(1, -(-steps // CHUNK)), 2 * last.shape[2])
    x[:, :, -1, 1::2] = last
    return x


def fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D_: Tensor | None,
    z_: Tensor | None,
    delta_bias_: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """``selective_scan_cuda.fwd``: [out before the gate, x, out·silu(z) if there is z]."""
    with torch.no_grad():
        out, last = scan(u, delta, A, B, C, D_, delta_bias_, delta_softplus)
        exact = torch.float64 if u.dtype == torch.float64 else torch.float32
        gated = [] if z_ is None else [(out.to(exact) * F.silu(z_.to(exact))).to(out.dtype)]
        return [out, _checkpoints(last, u.shape[2]), *gated]


def bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D_: Tensor | None,
    z_: Tensor | None,
    delta_bias_: Tensor | None,
    dout: Tensor,
    x_: Tensor | None,
    out_: Tensor | None,
    dz_: Tensor | None,
    delta_softplus: bool,
    recompute_out_z: bool,
) -> list[Tensor | None]:
    """``selective_scan_cuda.bwd``: du, ddelta, dA, dB, dC, dD, ddelta_bias, then dz and out_z where asked.

    dz is written into ``dz_`` if that is given; absent tensors get None.
    """
    last: list[Tensor] = []

    def forward(*tensors: Any) -> Tensor:
        u, delta, A, B, C, D, z, bias = tensors
        out = scan(u, delta, A, B, C, D, bias, delta_softplus, z)[0]
        last.append(out)
        return out

    *found, dz, dbias = gradients(forward, (u, delta, A, B, C, D_, z_, delta_bias_), (dout,))
    result: list[Tensor | None] = [*found, dbias]
    if z_ is not None:
        assert dz is not None
        if dz_ is not None:
            dz_.copy_(dz)
            dz = dz_
        result.append(dz)
    if recompute_out_z and z_ is not None:
        result.append(last[0].detach())
    return result


def fwd_oflex(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D_: Tensor | None,
    delta_bias_: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
    out_float: bool = True,
) -> list[Tensor]:
    """``selective_scan_cuda_oflex.fwd``: [out, x]; out in float32 where ``out_float``."""
    out, x = fwd(u, delta, A, B, C, D_, None, delta_bias_, delta_softplus)
    return [out.float() if out_float and out.dtype != torch.float64 else out, x]


def fwd_core(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D_: Tensor | None,
    delta_bias_: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
) -> list[Tensor]:
    """``selective_scan_cuda_core.fwd``: [out in the dtype of u, x]."""
    return fwd(u, delta, A, B, C, D_, None, delta_bias_, delta_softplus)


def bwd_core(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D_: Tensor | None,
    delta_bias_: Tensor | None,
    dout: Tensor,
    x_: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
) -> list[Tensor | None]:
    """``.bwd`` of both: du, ddelta, dA, dB, dC, dD, ddelta_bias."""
    return bwd(u, delta, A, B, C, D_, None, delta_bias_, dout, x_, None, None, delta_softplus, False)


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *_: Any,
    **__: Any,
) -> Any:
    """``selective_scan_fn`` of mamba_ssm, differentiable in the last state too; rows of kernels are ignored."""
    out, last = scan(u, delta, A, B, C, D, delta_bias, delta_softplus, z)
    return (out, last) if return_last_state else out


selective_scan_ref = selective_scan_fn


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor | None,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """Mamba's mixer between its first projection and its output: filter, projections of the step, B and C, scan, gate.

    Shapes: xz (B, 2·D, L) → (B, L, out).
    """
    if A.is_complex():
        raise NotImplementedError("mamba_inner_fn: complex A is not provided by this shim; selective_scan_fn takes it")
    rank, width = delta_proj_weight.shape[1], A.shape[1]
    x, z = xz.chunk(2, 1)
    x = causal_conv1d_fn(x, conv1d_weight.flatten(1), conv1d_bias, activation="silu")
    projected = F.linear(x.transpose(1, 2), x_proj_weight)  # (B, L, rank + …)
    sizes = [rank, *(width for given in (B, C) if given is None)]
    step, *maps = projected.split(sizes, -1)
    own_B = maps.pop(0) if B is None else None
    own_C = maps.pop(0) if C is None else None
    step = _normalized(step, dt_rms_weight, b_c_dt_rms_eps)
    delta = F.linear(step, delta_proj_weight).transpose(1, 2)
    B = _map(own_B, B_proj_bias, b_rms_weight, b_c_dt_rms_eps) if own_B is not None else B
    C = _map(own_C, C_proj_bias, c_rms_weight, b_c_dt_rms_eps) if own_C is not None else C
    assert B is not None
    assert C is not None
    y, _ = scan(x, delta, A, B, C, D, delta_bias, delta_softplus, z)
    y = y.transpose(1, 2)
    return y if out_proj_weight is None else F.linear(y, out_proj_weight, out_proj_bias)


mamba_inner_ref = mamba_inner_fn


def _map(x: Tensor, bias: Tensor | None, weight: Tensor | None, eps: float) -> Tensor:
    """(B, L, N) → (B, N, L)."""
    x = x if bias is None else x + bias.to(x.dtype)
    return _normalized(x, weight, eps).transpose(1, 2)


def _normalized(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x if weight is None else F.rms_norm(x, (x.shape[-1],), weight, eps)
