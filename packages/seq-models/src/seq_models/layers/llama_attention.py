"""Attention modules of Hugging Face's Llama-like models, taken over: projections stay, what lies between is replaced.

A replacement adopts the projections and norms of the module in whose place it stands under their own names, so that
state dicts, LoRA targets and shardings of the host stay as they are.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

SPLIT, FUSED = ("q_proj", "k_proj", "v_proj", "o_proj"), ("qkv_proj", "o_proj")
# What changes the softmax itself and no replacement offers: attribute of the host's module or config, and its name.
FOREIGN = {
    "sliding_window": "a sliding window",
    "sinks": "attention sinks",
    "attn_logit_softcapping": "capped scores",
    "is_cross_attention": "attention to another sequence",
}


class Projected(NamedTuple):
    """Queries as the projection gives them (B, N, H, D), and q, k, v (B, H, N, D) behind norms and rotary embedding."""

    raw: Float[Tensor, "B N H D"]
    q: Float[Tensor, "B H N D"]
    k: Float[Tensor, "B Hk N D"]
    v: Float[Tensor, "B Hk N D"]


def decoder_layers(model: nn.Module, caller: str) -> nn.ModuleList:
    """The layers of a causal model's decoder.

    Raises:
        ValueError: it has none, or its layers hold no ``self_attn``.
    """
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else model  # pyright: ignore[reportCallIssue]
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not all(hasattr(layer, "self_attn") for layer in layers):
        raise ValueError(
            f"{caller}: model must be Llama-like, a decoder whose layers have self_attn, got {type(model).__name__}"
        )
    return layers


class LlamaLikeAttention(nn.Module):
    """The projections, norms and rotary embedding of an attention module, whose softmax a subclass replaces.

    Args:
        attention: the module; its children move here.

    Raises:
        ValueError: it has other projections, no rotary embedding beside it, or what ``FOREIGN`` lists.
    """

    def __init__(self, attention: nn.Module, caller: str) -> None:
        super().__init__()
        host: Any = attention
        name = type(attention).__name__
        children = dict(attention.named_children())
        if not (all(child in children for child in SPLIT) or all(child in children for child in FUSED)):
            raise ValueError(
                f"{caller}: attention must have {', '.join(SPLIT)}, or {' and '.join(FUSED)}; "
                f"{name} has {', '.join(children)}"
            )
        for attribute, what in FOREIGN.items():
            if getattr(attention, attribute, getattr(host.config, attribute, None)) not in (None, False):
                raise ValueError(f"{caller}: {name} has {what} ({attribute}), which the replacement does not")
        rotary = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        if rotary is None:
            raise ValueError(f"{caller}: no apply_rotary_pos_emb beside {name}: only rotary models are supported")
        self.rotary: Callable[..., tuple[Tensor, Tensor]] = rotary
        for child, module in children.items():
            self.add_module(child, module)
        self.config = host.config
        self.layer_idx: int = host.layer_idx
        self.head_dim: int = host.head_dim
        self.scaling: float = host.scaling
        self.attention_dropout: float = getattr(host, "attention_dropout", 0.0)
        self.num_heads: int = host.config.num_attention_heads
        self.num_kv_heads: int = getattr(host.config, "num_key_value_heads", None) or self.num_heads
        self.num_key_value_groups = self.num_heads // self.num_kv_heads
        self.is_causal = True

    def project(self, x: Float[Tensor, "B N C"], position_embeddings: tuple[Tensor, Tensor]) -> Projected:
        """Queries, keys and values of the heads."""
        width = self.head_dim
        if hasattr(self, "qkv_proj"):
            sizes = [heads * width for heads in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
            q, k, v = self.qkv_proj(x).split(sizes, dim=-1)  # pyright: ignore[reportCallIssue]
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # pyright: ignore[reportCallIssue]
        raw = q.unflatten(-1, (-1, width))
        q, k = self._normed("q_norm", q), self._normed("k_norm", k)
        q, k, v = (t.unflatten(-1, (-1, width)).transpose(1, 2) for t in (q, k, v))
        cos, sin = position_embeddings
        q, k = self.rotary(q, k, cos, sin)
        return Projected(raw, q, k, v)

    def _normed(self, name: str, x: Tensor) -> Tensor:
        """A norm of each head (Qwen3) or of all together (OLMo 2), where the host has one."""
        norm: Any = getattr(self, name, None)
        if norm is None:
            return x
        if norm.weight.numel() == x.shape[-1]:
            return norm(x)
        return norm(x.unflatten(-1, (-1, self.head_dim))).flatten(-2)

    def refuse(self, asked: dict[str, Any]) -> None:
        """Raise ValueError where matrices of attention are asked for."""
        name = type(self).__name__
        if asked.get("output_attentions") or getattr(self.config, "output_attentions", False):
            raise ValueError(
                f"{name}: output_attentions must be None or False, got True: this layer forms no matrix of attention"
            )


def heads_joined(out: Float[Tensor, "B H N D"]) -> Float[Tensor, "B N H*D"]:
    """Results of heads side by side, as the output projection reads them."""
    return out.transpose(1, 2).flatten(2)


def real_positions(real: Tensor) -> Tensor:
    """Number of each real token among those of its row; −1 for padding."""
    return torch.where(real, real.long().cumsum(1) - 1, -1)
