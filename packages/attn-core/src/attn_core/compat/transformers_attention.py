"""``attn_implementation="attn_core"``: the models of Hugging Face over :func:`attn_core.attention`.

Like their ``sdpa``, with the same masks, and with learned sinks (gpt-oss), which the log-sum-exp gives away: a sink's
score s takes its share of the softmax, and σ(lse − s) is left for the keys. transformers is imported when it is asked
for, never by ``import attn_core``.

Checked in ``tests/compat/test_transformers_attention.py`` and, on vision-language models, in vlm-tools.
"""

import importlib
import importlib.util
import math
from typing import Any

import torch
from torch import Tensor, nn

from attn_core.ops.attention import attention

# What other implementations of transformers understand and this one does not: each would change the scores unseen.
REFUSED = {
    "softcap": "scores cannot be soft-capped",
    "sinks": "sinks of this kind are not known",
    "cache": "paged caches of continuous batching are not read",
}


def transformers_attention(name: str = "attn_core") -> str:
    """Make ``attn_implementation=name`` known to transformers, with its masks; may be called any number of times.

    ``AutoModelForCausalLM.from_pretrained(folder, attn_implementation=transformers_attention())``

    Args:
        name: what models call it; a name that transformers itself uses is refused.

    Returns:
        ``name``.

    Raises:
        ImportError: transformers is not installed. ValueError: the name is empty or belongs to another implementation.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("transformers_attention: transformers is not installed; pip install 'transformers>=5'")
    # By name: a type checker of this package alone knows no transformers.
    modeling: Any = importlib.import_module("transformers.modeling_utils")
    masking: Any = importlib.import_module("transformers.masking_utils")
    if not isinstance(name, str) or not name:
        raise ValueError(f"transformers_attention: name must be a word such as 'attn_core', got name={name!r}")
    known = modeling.ALL_ATTENTION_FUNCTIONS
    if name == "eager" or known.get(name, forward) is not forward:
        raise ValueError(f"transformers_attention: name={name!r} is another implementation's; choose another name")
    # Without a mask function of its own a name gets no masks: causality and padding would be lost in silence.
    modeling.AttentionInterface.register(name, forward)
    masking.AttentionMaskInterface.register(name, masking.sdpa_mask)
    return name


def forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What a layer of transformers calls: query (B, H, N, D), key and value (B, Hk, M, D) → (B, N, H, D), no weights.

    Args:
        attention_mask: None, bool (True = visible) or additive, (B|1, H|1, N, M). Without one, several queries of a
            causal layer are aligned at the upper left: behind them are a static cache's empty places.
        position_bias: (B|1, H|1, N, M), added to the scores.
        s_aux: (H,), scores of learned sinks.

    Raises:
        ValueError: dropout, soft-capped scores, weights to return, a paged cache.
    """
    _check(module, dropout, others)
    queries = query.shape[2]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    # The number of queries first: while a graph is traced it may be a symbol.
    causal = queries > 1 and attention_mask is None and causal
    if causal and key.shape[2] > queries:
        key, value = key[:, :, :queries], value[:, :, :queries]
        position_bias = position_bias if position_bias is None else position_bias[..., :queries]
    bias, key_mask = position_bias, None
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        bias = attention_mask if bias is None else bias + attention_mask
    elif attention_mask is not None and attention_mask.shape[1] == attention_mask.shape[2] == 1:
        key_mask = attention_mask[:, 0, 0]  # of a decoded token: nothing of the scores' size is made
    elif attention_mask is not None:
        shown = query.new_zeros(()) if bias is None else bias
        bias = torch.where(attention_mask, shown, -math.inf)
    out, lse = attention(
        query,
        key,
        value,
        scale=scaling,
        bias=None if bias is None else bias.to(query.dtype),
        key_mask=key_mask,
        causal="upper_left" if causal else None,
    )
    if s_aux is not None:
        left = torch.sigmoid(lse - s_aux.reshape(1, -1, 1).to(lse.dtype))
        out = out * left[..., None].to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


def _check(module: nn.Module, dropout: float, others: dict[str, Any]) -> None:
    where = f"{type(module).__name__}: attn_implementation='attn_core'"
    if dropout:
        raise ValueError(f"{where}: attention weights are not dropped, got dropout={dropout}; set the configuration's "
                         "attention_dropout to 0")  # fmt: skip
    if others.get("output_attentions"):
        raise ValueError(f"{where}: there are no weights to return (output_attentions=True); use 'eager'")
    for name, reason in REFUSED.items():
        if others.get(name) is not None:
            raise ValueError(f"{where}: {reason} ({name}); use 'eager'")
