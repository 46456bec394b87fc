"""``mamba_ssm.Mamba``, with the parameters and the options of the original."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .causal_conv1d import causal_conv1d_fn, causal_conv1d_update_fn
from .mamba import scan


class Mamba(nn.Module):
    """Selective state-space mixer: (B, L, d_model) → (B, L, d_model).

    ``use_fast_path`` is taken and has no effect: there is one path.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        inner = self.d_inner
        self.in_proj = nn.Linear(d_model, inner * 2, bias=bias, **kind)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1, bias=conv_bias, **kind)
        self.activation, self.act = "silu", nn.SiLU()
        self.x_proj = nn.Linear(inner, self.dt_rank + d_state * 2, bias=False, **kind)
        self.dt_proj = nn.Linear(self.dt_rank, inner, bias=True, **kind)
        spread = self.dt_rank**-0.5 * dt_scale
        if dt_init not in ("constant", "random"):
            raise NotImplementedError(f"Mamba: dt_init must be 'constant' or 'random', got dt_init={dt_init!r}")
        if dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, spread)
        else:
            nn.init.uniform_(self.dt_proj.weight, -spread, spread)
        low, high = math.log(dt_min), math.log(dt_max)
        steps = torch.exp(torch.rand(inner, **kind) * (high - low) + low).clamp(min=dt_init_floor)
        with torch.no_grad():  # softplus of it is the step
            self.dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))
        self.dt_proj.bias._no_reinit = True  # pyright: ignore[reportAttributeAccessIssue]
        decay = torch.arange(1, d_state + 1, dtype=torch.float32, device=device).log().repeat(inner, 1)
        self.A_log = nn.Parameter(decay)
        self.D = nn.Parameter(torch.ones(inner, device=device))
        for parameter in (self.A_log, self.D):
            parameter._no_weight_decay = True  # pyright: ignore[reportAttributeAccessIssue]
        self.out_proj = nn.Linear(inner, d_model, bias=bias, **kind)

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
        """With ``inference_params`` the states are kept for :meth:`step`."""
        conv_state = ssm_state = None
        if inference_params is not None:
            conv_state, ssm_state = self._get_states_from_cache(inference_params, hidden_states.shape[0])
            if inference_params.seqlen_offset > 0:
                return self.step(hidden_states, conv_state, ssm_state)[0]
        x, z = self.in_proj(hidden_states).transpose(1, 2).chunk(2, 1)
        if conv_state is not None:
            conv_state.copy_(F.pad(x, (self.d_conv - x.shape[-1], 0)))
        x = causal_conv1d_fn(x, self.conv1d.weight.flatten(1), self.conv1d.bias, activation="silu")
        delta, B, C = self._maps(x)
        out, last = scan(x, delta, self._decay(), B, C, self.D, self.dt_proj.bias, True, z)
        if ssm_state is not None:
            ssm_state.copy_(last)
        return self.out_proj(out.transpose(1, 2))

    def _decay(self) -> Tensor:
        exact = torch.float64 if self.A_log.dtype == torch.float64 else torch.float32
        return -torch.exp(self.A_log.to(exact))

    def _maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step, input and output map of x (B, D, L), each (B, ·, L)."""
        projected = self.x_proj(x.transpose(1, 2)).split([self.dt_rank, self.d_state, self.d_state], -1)
        delta = F.linear(projected[0], self.dt_proj.weight)
        return delta.transpose(1, 2), projected[1].transpose(1, 2), projected[2].transpose(1, 2)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token (B, 1, d_model); both states are changed in place."""
        if hidden_states.shape[1] != 1:
            raise ValueError(f"Mamba.step: takes one token at a time, got {hidden_states.shape[1]}")
        x, z = self.in_proj(hidden_states[:, 0]).chunk(2, -1)
        x = causal_conv1d_update_fn(x, conv_state, self.conv1d.weight.flatten(1), self.conv1d.bias, "silu")
        delta, B, C = (m[..., 0] for m in self._maps(x.unsqueeze(-1)))
        size = F.softplus(delta + self.dt_proj.bias.to(delta.dtype))
        decay = torch.exp(size.unsqueeze(-1) * self._decay())
        ssm_state.copy_(decay * ssm_state + (size * x).unsqueeze(-1) * B.unsqueeze(1))
        y = (ssm_state.to(x.dtype) * C.unsqueeze(1)).sum(-1) + self.D.to(x.dtype) * x
        return self.out_proj(y * F.silu(z)).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """Empty states: (B, D, d_conv) and (B, D, N)."""
        device = self.out_proj.weight.device
        sizes = (batch_size, self.d_inner, self.d_conv), (batch_size, self.d_inner, self.d_state)
        conv = torch.zeros(sizes[0], dtype=dtype or self.conv1d.weight.dtype, device=device)
        return conv, torch.zeros(sizes[1], dtype=dtype or self.dt_proj.weight.dtype, device=device)

    def _get_states_from_cache(self, inference_params: Any, batch_size: int) -> tuple[Tensor, Tensor]:
        if self.layer_idx is None:
            raise ValueError("Mamba: inference_params need layer_idx, got layer_idx=None")
        cache = inference_params.key_value_memory_dict
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(batch_size, 0)
        return cache[self.layer_idx]
