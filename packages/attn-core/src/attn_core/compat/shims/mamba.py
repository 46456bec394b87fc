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
    """Output in the dtype of u, and the last state (B, D, N), complex if A is."""
    exact = torch.float64 if u.dtype == torch.float64 else torch.float32
    state = exact.to_complex() if A.is_complex() else exact
    skip, bias = (None if x is None else x.to(exact) for x in (D, delta_bias))
    B, C = (x.to(state) if x.ndim == 2 else _of_steps(x, u, state) for x in (B, C))
    groups = max((x.shape[1] for x in (B, C) if x.ndim == 4), default=1)
    B, C = (x if x.ndim == 2 else x.repeat_interleave(groups // x.shape[1], 1) for x in (B, C))
    gate = None if z is None else z.to(u.dtype)
    steps = delta if delta.dtype in (u.dtype, exact) else delta.to(exact)
    return selective_scan(u, steps, A.to(state), B, C, skip, gate, bias, delta_softplus=bool(delta_softplus))


def _of_steps(x: Tensor, u: Tensor, state: torch.dtype) -> Tensor:
    """B or C (B, G, N, L) of (B, N, L) or (B, G, N, L).

    Beside complex A they hold real and imaginary parts side by side along the sequence: (…, 2·L).
    """
    x = x.unsqueeze(1) if x.ndim == 3 else x
    if not state.is_complex:
        return x.to(u.dtype)
    if not x.is_complex():
        x = torch.view_as_complex(x.to(state.to_real()).unflatten(-1, (-1, 2)).contiguous())
    return x.to(state)


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
    rank, width = delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)
    x, z = xz.chunk(2, 1)
    x = causal_conv1d_fn(x, conv1d_weight.flatten(1), conv1d_bias, activation="silu")
    projected = F.linear(x.transpose(1, 2), x_proj_weight)  # (B, L, rank + …)
    sizes = [rank, *(width for given in (B, C) if given is None)]
    step, *maps = projected.split(sizes, -1)
    own_B = maps.pop(0) if B is None else None
    own_C = maps.pop(0) if C is None else None
    step = _normalized(step, dt_rms_weight, b_c_dt_rms_eps)
    delta = F.linear(step, delta_proj_weight).transpose(1, 2)
    B = _map(own_B, B_proj_bias, b_rms_weight, b_c_dt_rms_eps, A.is_complex()) if own_B is not None else B
    C = _map(own_C, C_proj_bias, c_rms_weight, b_c_dt_rms_eps, A.is_complex()) if own_C is not None else C
    assert B is not None
    assert C is not None
    y, _ = scan(x, delta, A, B, C, D, delta_bias, delta_softplus, z)
    y = y.transpose(1, 2)
    return y if out_proj_weight is None else F.linear(y, out_proj_weight, out_proj_bias)


mamba_inner_ref = mamba_inner_fn


def _map(x: Tensor, bias: Tensor | None, weight: Tensor | None, eps: float, pairs: bool) -> Tensor:
    """(B, L, N) → (B, N, L); with ``pairs`` complex, of (B, L, 2·N)."""
    x = x if bias is None else x + bias.to(x.dtype)
    x = _normalized(x, weight, eps)
    if pairs:
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        x = torch.view_as_complex(x.to(exact).unflatten(-1, (-1, 2)).contiguous())
    return x.transpose(1, 2)


def _normalized(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x if weight is None else F.rms_norm(x, (x.shape[-1],), weight, eps)
