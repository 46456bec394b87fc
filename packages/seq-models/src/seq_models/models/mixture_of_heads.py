"""Mixture of heads for Llama-like models: half of the heads always, and of the others those with the longest queries.

Paper: Jin et al., MoH: Multi-Head Attention as Mixture-of-Head Attention, arXiv 2410.11842. Official:
SkyworkAI/MoH, ``MoH-LLaMA3/Inference_code/modeling_llama.py``, Apache-2.0.

:func:`patch_mixture_of_heads` changes any Hugging Face model whose layers are Llama's; weights stay, and so do released
ones of MoH-LLaMA3-8B, which has no more than Llama's. :class:`MoHLlamaForCausalLM` is a Llama that is made so.

Same: the router without parameters. The score of a head is the norm of its query before rotary embedding over the
standard deviation of these norms; gates are 0 or 1, without a weight. Differs: a step of decoding computes nothing for
heads that its token left out (`attn_core.routed_heads`, from 768 keys on; the official code computes all heads and
multiplies by 0); any shares. ``router="learned"`` is that of the other MoH models (`attn_core.nn.HeadRouter`), whose
gates weigh heads and whose balance `attn_core.nn.balance_losses` collects.
Numbers are checked in ``test_mixture_of_heads.py``; the contract of patched models in ``test_patched_llamas.py``.

Shapes: input_ids (B, N) → logits (B, N, V).
"""

import sys
from typing import Any, Literal, TypeVar

import torch
from huggingface_hub.dataclasses import strict
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from attn_core import routed_heads
from attn_core.catalog import Card
from attn_core.nn import HeadRouter
from seq_models.language.language_model import causal_entries
from seq_models.layers.llama_attention import LlamaLikeAttention, decoder_layers, heads_joined

Model = TypeVar("Model", bound=PreTrainedModel)
Router = Literal["norm", "learned"]


def norm_gates(raw: Float[Tensor, "B N H D"], num_shared: int, num_routed: int) -> Float[Tensor, "B N H"]:
    """1 for the first ``num_shared`` heads and the ``num_routed`` others whose queries score best, 0 for the rest.

    The order of operations is the official one: in 16 bits many scores are equal, and rounding decides.
    """
    score = torch.norm(raw[:, :, num_shared:], p=2, dim=-1)
    gates = (score / score.std(dim=-1, keepdim=True)).softmax(-1)
    chosen = torch.zeros_like(gates).scatter(-1, gates.topk(num_routed, dim=-1).indices, 1.0)
    return torch.cat([torch.ones_like(raw[:, :, :num_shared, 0]), chosen], dim=-1)


class MoHAttention(LlamaLikeAttention):
    """A layer's attention with gated heads, in place of the host's.

    Args:
        num_shared: first heads, on for every token.
        num_routed: heads that a token chooses among the others.

    Shapes: hidden_states (B, N, C) → (B, N, C).
    """

    def __init__(self, attention: nn.Module, num_shared: int, num_routed: int, router: Router) -> None:
        super().__init__(attention, "patch_mixture_of_heads")
        self.dense_attention: Any = sys.modules[type(attention).__module__].eager_attention_forward
        self.num_shared, self.num_routed = num_shared, num_routed
        self.router = None
        if router == "learned":
            weight = self.o_proj.weight  # pyright: ignore[reportAttributeAccessIssue]
            like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
            self.router = HeadRouter(weight.shape[0], self.num_heads, num_shared, num_routed, **like)  # pyright: ignore[reportArgumentType, reportIndexIssue]

    def gates(self, x: Float[Tensor, "B N C"], raw: Float[Tensor, "B N H D"]) -> Float[Tensor, "B N H"]:
        """Gates of the heads for each token."""
        return norm_gates(raw, self.num_shared, self.num_routed) if self.router is None else self.router(x).gates

    def forward(
        self,
        hidden_states: Float[Tensor, "B N C"],
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "B N C"], None]:
        """The host's signature, and its attention where several tokens are asked for."""
        self.refuse(kwargs)
        x = self.project(hidden_states, position_embeddings)
        q, k, v = x.q, x.k, x.v
        gates = self.gates(hidden_states, x.raw)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        if q.shape[2] == 1 and not self.training and (attention_mask is None or attention_mask.ndim == 4):
            bias = attention_mask
            if bias is not None and bias.dtype == torch.bool:
                bias = torch.zeros_like(bias, dtype=q.dtype).masked_fill(~bias, -torch.inf)
            joined = heads_joined(routed_heads(q, k, v, gates, scale=self.scaling, bias=bias))
        else:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.dense_attention)
            dropout = self.attention_dropout if self.training else 0.0
            out, _ = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
            joined = (out * gates[..., None]).flatten(2)
        return self.o_proj(joined), None  # pyright: ignore[reportCallIssue]


def head_numbers(num_heads: int, shared: float, active: float) -> tuple[int, int]:
    """Shared and routed heads for shares of all heads, rounded down as officially.

    Raises:
        ValueError: shares that are out of order or leave no head to choose, or choose among one.
    """
    if not 0 <= shared < active <= 1:
        raise ValueError(
            f"patch_mixture_of_heads: 0 ≤ shared < active ≤ 1 must hold, got shared={shared}, active={active}"
        )
    always, chosen = int(num_heads * shared + 1e-9), int(num_heads * (active - shared) + 1e-9)
    if chosen < 1 or num_heads - always < 2:
        raise ValueError(
            f"patch_mixture_of_heads: of {num_heads} heads shared={shared} and active={active} leave {chosen} to "
            f"choose among {num_heads - always}; there must be 1 among 2 at least"
        )
    return always, chosen


def patch_mixture_of_heads(
    model: Model, shared: float | None = None, active: float | None = None, *, router: Router | None = None
) -> Model:
    """Let every token of a Hugging Face model leave out some heads; in place, and once more with other shares.

    Args:
        model: a Llama-like causal model, with its weights.
        shared: share of the heads that are always on; None: what ``model.config.mixture_of_heads`` holds, where this
            function leaves it for ``save_pretrained``, or the published 0.5.
        active: share of the heads that a token takes, shared ones included; None: likewise, or 0.75. 1.0 is the host.
        router: ``"norm"``, the published one, which has no parameters; ``"learned"``: with fresh weights.

    Raises:
        ValueError: another kind of model, or shares that do not fit its heads.
    """
    caller = "patch_mixture_of_heads"
    layers = decoder_layers(model, caller)
    kept = {"shared": 0.5, "active": 0.75, "router": "norm", **(getattr(model.config, "mixture_of_heads", None) or {})}
    for name, value in (("shared", shared), ("active", active), ("router", router)):
        if value is not None:
            kept[name] = value
    if kept["router"] not in ("norm", "learned"):
        raise ValueError(f"{caller}: router must be 'norm' or 'learned', got {kept['router']!r}")
    replaced = []
    for number, layer in enumerate(layers):
        host = layer.self_attn
        if isinstance(host, LlamaLikeAttention) and not isinstance(host, MoHAttention):
            raise ValueError(f"{caller}: layer {number} was changed before, into {type(host).__name__}")
        num_heads = host.config.num_attention_heads  # pyright: ignore[reportAttributeAccessIssue]
        numbers = head_numbers(num_heads, kept["shared"], kept["active"])  # pyright: ignore[reportArgumentType]
        if not isinstance(host, MoHAttention):
            host = MoHAttention(host, *numbers, kept["router"])  # pyright: ignore[reportArgumentType]
        elif (host.router is not None) != (kept["router"] == "learned") or (
            host.router is not None and (host.num_shared, host.num_routed) != numbers
        ):
            raise ValueError(f"{caller}: layer {number} has a router of its own; begin with the model it was made of")
        replaced.append((layer, host, numbers))
    for layer, host, numbers in replaced:  # all or none
        layer.self_attn = host
        host.num_shared, host.num_routed = numbers
    model.config.mixture_of_heads = kept
    return model


@strict
class MoHLlamaConfig(LlamaConfig):
    """Fields of transformers' LlamaConfig and the arguments of :func:`patch_mixture_of_heads`."""

    model_type = "attn_moh_llama"

    shared_heads: float = 0.5
    active_heads: float = 0.75
    router: Literal["norm", "learned"] = "norm"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        head_numbers(self.num_attention_heads, self.shared_heads, self.active_heads)


class MoHLlamaForCausalLM(LlamaForCausalLM):
    """Llama with a mixture of heads; MoH-LLaMA3-8B's weights have its names."""

    config_class = MoHLlamaConfig

    def __init__(self, config: MoHLlamaConfig) -> None:
        super().__init__(config)
        patch_mixture_of_heads(self, config.shared_heads, config.active_heads, router=config.router)


AutoConfig.register(MoHLlamaConfig.model_type, MoHLlamaConfig)
AutoModelForCausalLM.register(MoHLlamaConfig, MoHLlamaForCausalLM)

TINY = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "moh_llama3_8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    },
    "moh_bytes": {
        "vocab_size": 256,
        "hidden_size": 192,
        "intermediate_size": 528,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "test_moh": TINY,
    "test_moh_learned": {**TINY, "router": "learned"},
}

CARD = Card(
    family="MoH-LLaMA",
    paper="2410.11842",
    code="https://github.com/SkyworkAI/MoH",
    license="Apache-2.0",
    test="models/test_mixture_of_heads.py",
)
causal: Any = MoHLlamaForCausalLM
ENTRIES = causal_entries(causal, VARIANTS, CARD)
