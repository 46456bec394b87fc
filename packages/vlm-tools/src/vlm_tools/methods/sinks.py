"""Sink dimensions: where hidden states of attention sinks are huge; known ones by model, and a search for new ones.

Source: Kang et al. 2025 (arXiv 2503.03321), seilk/VisAttnSink, ``constants.py`` for Llama-2; the values for Qwen2-VL-7B
and InternVL2-8B are reported by third parties and not checked here. The search is ours; nobody released one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vlm_tools.intervention.method import check_number

TAU = 20.0
PROMINENCE = 50.0  # times the median magnitude of the token itself


@dataclass(frozen=True)
class SinkDimensions:
    """Sink dimensions of one decoder.

    Attributes:
        dims: the dimensions.
        source: where they come from.
    """

    dims: tuple[int, ...]
    source: str


# (model type of the text decoder, hidden size, layers) → dimensions
_KNOWN: dict[tuple[str, int, int], SinkDimensions] = {
    ("llama", 4096, 32): SinkDimensions((1415, 2533), "seilk/VisAttnSink, Llama-2-7B and Vicuna-7B"),
    ("llama", 5120, 40): SinkDimensions((2100, 4743), "seilk/VisAttnSink, Llama-2-13B"),
    ("qwen2_vl_text", 3584, 28): SinkDimensions((458, 2570), "reported for Qwen2-VL-7B, unchecked"),
    ("internlm2", 4096, 32): SinkDimensions((3584,), "reported for InternVL2-8B, unchecked"),
}


def register_sinks(model_type: str, hidden_size: int, layers: int, dims: Sequence[int], *, source: str) -> None:
    """Add a decoder's sink dimensions, for example those that `find_sinks` found.

    Raises:
        ValueError: no dimension, or one outside the hidden size.
    """
    if not dims or min(dims) < 0 or max(dims) >= hidden_size:
        raise ValueError(f"register_sinks: dims must name dimensions 0 … {hidden_size - 1}, got dims={list(dims)}")
    _KNOWN[model_type, hidden_size, layers] = SinkDimensions(tuple(dims), source)


def known_sinks(text_config: Any) -> SinkDimensions | None:
    """Sink dimensions of a decoder by its configuration, or None."""
    return _KNOWN.get((text_config.model_type, text_config.hidden_size, text_config.num_hidden_layers))


def check_reachable(hidden_size: int, tau: float, caller: str) -> None:
    """Raise ValueError if no hidden state can exceed ``tau``: |x| / RMS(x) is at most the root of the width."""
    check_number(caller, "tau", tau, "be positive", lambda value: value > 0)
    if tau >= hidden_size**0.5:
        raise ValueError(
            f"{caller}: no sink dimensions found: |x|/RMS(x) is at most √{hidden_size} = {hidden_size**0.5:.1f} in a "
            f"decoder of width {hidden_size}, tau={tau:g} is out of reach; lower tau"
        )


def find_sinks(model: Any, inputs: Mapping[str, Any], *, tau: float = TAU) -> SinkDimensions:
    """Search a model's sink dimensions on a prompt.

    A dimension is one if, at any token, it exceeds max(tau, 50 × the token's median) in most layers between 25 and 75 %
    of the depth.

    Args:
        inputs: what the model is called with.
        tau: least |x| / RMS(x).

    Raises:
        ValueError: the decoder is too narrow for ``tau``, or no dimension stands out.
    """
    decoder = model.get_decoder()
    width, layers = decoder.config.hidden_size, decoder.config.num_hidden_layers
    check_reachable(width, tau, "find_sinks")
    with torch.no_grad():
        states = _entering(model, inputs)
    low, high = layers // 4, max(layers // 4 + 1, -(-3 * layers // 4))
    votes = torch.zeros(width)
    mask = inputs.get("attention_mask")
    for hidden in states[low:high]:
        size = normalized(hidden).abs()
        if mask is not None:
            size = size * mask[..., None].to(size.dtype)
        least = (PROMINENCE * size.median(-1, keepdim=True).values).clamp_min(tau)
        votes += (size > least).any(1).any(0).float().cpu()
    dims = (votes > (high - low) / 2).nonzero().flatten().tolist()
    if not dims:
        raise ValueError(
            f"find_sinks: no sink dimensions found: none exceeds {tau:g} × RMS in most of layers {low} … {high - 1}; "
            "methods that need them (VAR) cannot work on this model"
        )
    return SinkDimensions(tuple(dims), "find_sinks")


def normalized(hidden: Float[Tensor, "B N C"], eps: float = 1e-6) -> Float[Tensor, "B N C"]:
    """x / RMS(x) without learned weights, in float32 or wider."""
    wide = hidden if hidden.dtype == torch.float64 else hidden.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def _entering(model: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Residual streams that enter the layers of the decoder."""
    states: list[Tensor] = []

    def keep(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in model.get_decoder().layers]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return states
