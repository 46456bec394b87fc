"""causal_conv1d_cuda in the forms of 1.0, 1.1 to 1.5 and 1.6, and the functions of the package causal_conv1d."""

from typing import Any

import torch
from torch import Tensor

from attn_core.composites.causal_conv1d import causal_conv1d
from attn_core.composites.causal_conv1d import causal_conv1d_update as update

from .recompute import fill, gradients


def _run(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, initial: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    activation = "silu" if silu else None
    return causal_conv1d(x, weight, bias, activation=activation, initial_state=initial, sequence=seq_idx)


FORWARD = {
    4: ("x", "weight", "bias", "silu_activation"),
    7: ("x", "weight", "bias", "seq_idx", "initial_states", "final_states_out", "silu_activation"),
    8: ("x", "weight", "bias", "seq_idx", "initial_states", "out", "final_states_out", "silu_activation"),
}
_BACKWARD_HEAD = ("x", "weight", "bias", "dout", "seq_idx", "initial_states", "dfinal_states", "dx")
BACKWARD = {
    6: ("x", "weight", "bias", "dout", "dx", "silu_activation"),
    10: (*_BACKWARD_HEAD, "return_dinitial_states", "silu_activation"),
    12: (*_BACKWARD_HEAD, "dweight", "dbias", "dinitial_states", "silu_activation"),
}
UPDATE = {
    5: ("x", "conv_state", "weight", "bias", "silu_activation"),
    7: ("x", "conv_state", "weight", "bias", "silu_activation", "cache_seqlens", "conv_state_indices"),
    8: ("x", "conv_state", "weight", "bias", "out", "silu_activation", "cache_seqlens", "conv_state_indices"),
}


def _bound(
    name: str, forms: dict[int, tuple[str, ...]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments by name: the versions differ in their number."""
    form = forms.get(len(args) + len(kwargs))
    if form is None or any(key not in form for key in kwargs):
        known = ", ".join(map(str, forms))
        raise TypeError(
            f"causal_conv1d_cuda.{name}: takes {known} arguments (1.0, 1.1 to 1.5, 1.6), got "
            f"{len(args) + len(kwargs)}{''.join(f', {key}=' for key in kwargs)}"
        )
    return {**dict(zip(form, args, strict=False)), **kwargs}


def causal_conv1d_fwd(*args: Any, **kwargs: Any) -> Tensor | None:
    """(x, w, bias, silu) → y; (x, w, bias, seq_idx, initial, final_out, silu) → y; with ``out`` behind initial → None.

    Final states are written into ``final_states_out``.
    """
    a = _bound("causal_conv1d_fwd", FORWARD, args, kwargs)
    with torch.no_grad():
        y, state = _run(a["x"], a["weight"], a["bias"], a.get("seq_idx"), a.get("initial_states"), a["silu_activation"])
    if a.get("final_states_out") is not None:
        a["final_states_out"].copy_(state)
    if "out" not in a:
        return y
    a["out"].copy_(y)
    return None


def causal_conv1d_bwd(*args: Any, **kwargs: Any) -> list[Tensor | None] | None:
    """Up to 1.5 → [dx (in the given one), dweight, dbias, dinitial_states]; in 1.6 all are filled, → None."""
    a = _bound("causal_conv1d_bwd", BACKWARD, args, kwargs)
    silu, sequence = a["silu_activation"], a.get("seq_idx")

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None) -> Any:
        return _run(x, weight, bias, sequence, initial, silu)

    initial, grads = a.get("initial_states"), (a["dout"], a.get("dfinal_states"))
    wants_initial = a.get("return_dinitial_states") or a.get("dinitial_states") is not None
    if initial is None and wants_initial and sequence is None:
        initial = a["x"].new_zeros(*a["x"].shape[:2], a["weight"].shape[1] - 1)
    dx, dweight, dbias, dinitial = gradients(forward, (a["x"], a["weight"], a["bias"], initial), grads)
    if "dweight" in a:
        fill((a["dx"], a["dweight"], a["dbias"], a["dinitial_states"]), (dx, dweight, dbias, dinitial))
        return None
    if a["dx"] is not None:
        a["dx"].copy_(dx)
        dx = a["dx"]
    found = [dx, dweight, dbias]
    return found if len(args) + len(kwargs) == 6 else [*found, dinitial if wants_initial else None]


def causal_conv1d_update(*args: Any, **kwargs: Any) -> Tensor | None:
    """The next tokens; ``conv_state`` is changed in place. In 1.6 ``out`` is filled, → None."""
    a = _bound("causal_conv1d_update", UPDATE, args, kwargs)
    with torch.no_grad():
        y = causal_conv1d_update_fn(
            *(a["x"], a["conv_state"], a["weight"], a["bias"], "silu" if a["silu_activation"] else None),
            *(a.get("cache_seqlens"), a.get("conv_state_indices")),
        )
    if "out" not in a:
        return y
    a["out"].copy_(y)
    return None


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Any:
    """``causal_conv1d.causal_conv1d_fn``: x (B, D, L), weight (D, W)."""
    _check_activation("causal_conv1d_fn", activation)
    if seq_idx is not None and return_final_states:
        raise ValueError("causal_conv1d_fn: return_final_states must be False where seq_idx is given")
    y, state = _run(x, weight, bias, seq_idx, initial_states, activation is not None)
    if not return_final_states:
        return y
    if final_states_out is not None:
        state = final_states_out.copy_(state)
    return y, state


def causal_conv1d_update_fn(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """``causal_conv1d.causal_conv1d_update``: x (B, D) or (B, D, L); ``conv_state`` (B, D, S) is changed in place."""
    _check_activation("causal_conv1d_update", activation)
    whole = x.unsqueeze(-1) if x.ndim == 2 else x
    state = conv_state if conv_state_indices is None else conv_state[conv_state_indices.long()]
    act = None if activation is None else "silu"
    y = update(whole, state, weight, bias, activation=act, positions=cache_seqlens)
    if conv_state_indices is not None:
        conv_state[conv_state_indices.long()] = state
    return y.squeeze(-1) if x.ndim == 2 else y


def _check_activation(name: str, activation: str | None) -> None:
    if activation not in (None, "silu", "swish"):
        raise NotImplementedError(f"{name}: activation must be None, 'silu' or 'swish', got activation={activation!r}")
