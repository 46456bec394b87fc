"""S2-Attention: Llama-like models whose heads share out the context, with dense heads and layers between.

Paper: Lin et al., Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads (later
S2-Attention), arXiv 2407.17678. Official: linxihui/dkernel, MIT License; Phi-3-small is such a model.

:func:`shard_context` changes any Hugging Face model whose layers are Llama's (Llama, Mistral, Qwen, Phi-3, OLMo, …):
the weights stay, the softmax reads what `seq_models.layers.s2_attention.ShardPattern` says, and the cache keeps what
later queries read. :class:`S2LlamaForCausalLM` is a Llama that is made so, which Auto classes load with its pattern.

Same: the pattern for every number of heads, key heads and dense heads; Phi-3-small's (blocks of 64, 16 local ones,
stride 8) is the default. Differs: blocks are counted from a row's first real token, so that padding changes nothing;
the cache forgets (the official one keeps pages of all blocks).
Numbers are checked in ``test_s2_attention.py``; the contract of patched models in ``test_patched_llamas.py``.

Shapes: input_ids (B, N) → logits (B, N, V).
"""

import warnings
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, NoReturn, TypeVar

import torch
from huggingface_hub.dataclasses import strict
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function
from transformers.modeling_utils import AttentionInterface

from attn_core import attention
from attn_core.catalog import Card
from seq_models.language.language_model import causal_entries
from seq_models.layers.llama_attention import LlamaLikeAttention, decoder_layers, heads_joined
from seq_models.layers.s2_attention import HeadShards, S2Cache, ShardedLayer, ShardPattern, sharded_attention

Model = TypeVar("Model", bound=PreTrainedModel)
IMPLEMENTATION = "s2_attention"  # what patched models have as attn_implementation


class S2Attention(LlamaLikeAttention):
    """A layer's attention under a pattern, in place of the host's.

    Args:
        shards: what its heads read; None: everything.

    Shapes: hidden_states (B, N, C) → (B, N, C).
    """

    def __init__(self, attention: nn.Module, shards: HeadShards | None) -> None:
        super().__init__(attention, "shard_context")
        self.shards = shards

    def forward(
        self,
        hidden_states: Float[Tensor, "B N C"],
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "B N C"], None]:
        """The host's signature; ``attention_mask`` is that of the padding (B, M)."""
        self.refuse(kwargs)
        if self.training and self.attention_dropout > 0:
            raise ValueError(
                f"S2Attention: attention_dropout must be 0 in training, got {self.attention_dropout}: no matrix of "
                "attention is formed whose entries could be dropped"
            )
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                f"S2Attention: attention_mask must be that of the padding (B, M), got {tuple(attention_mask.shape)}: "
                "which tokens a head reads is the pattern's"
            )
        x = self.project(hidden_states, position_embeddings)
        q, k, v = x.q, x.k, x.v
        layer = past_key_values.layers[self.layer_idx] if isinstance(past_key_values, S2Cache) else None
        if isinstance(layer, ShardedLayer):
            real = None if attention_mask is None else attention_mask[:, -q.shape[2] :]
            out = layer.attend(q, k, v, real, self.scaling)
        else:
            if past_key_values is not None:
                if past_key_values.is_compileable:
                    raise ValueError(
                        "S2Attention: the cache must hold the tokens seen and no more, got "
                        f"{type(past_key_values).__name__}; leave cache_implementation out"
                    )
                k, v = past_key_values.update(k, v, self.layer_idx)
            if self.shards is None:
                out, _ = attention(q, k, v, scale=self.scaling, causal="lower_right", key_mask=attention_mask)
            else:
                out = sharded_attention(q, k, v, self.shards, attention_mask, scale=self.scaling)  # pyright: ignore[reportCallIssue]
        return self.o_proj(heads_joined(out)), None  # pyright: ignore[reportCallIssue]


def _padding_mask(
    kv_length: int, mask_function: Any = causal_mask_function, attention_mask: Tensor | None = None, **_: Any
) -> Tensor | None:
    """The mask that transformers prepares for all layers: that of the padding, or None where there is none."""
    # While a graph is traced, transformers takes any position_ids for those of packed sequences.
    if mask_function is not causal_mask_function and not torch.compiler.is_compiling():
        raise ValueError(
            "S2Attention: only padding may hide tokens: packed sequences (position_ids that begin anew) and other "
            "masks are not offered; give each sequence a row"
        )
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask[:, -kv_length:]


def _not_sharded(module: nn.Module, *_: Any, **__: Any) -> NoReturn:
    raise ValueError(
        f"{type(module).__name__}: attn_implementation={IMPLEMENTATION!r} alone shards nothing; load the model without "
        "it and call seq_models.models.s2_attention.shard_context"
    )


AttentionMaskInterface.register(IMPLEMENTATION, _padding_mask)
AttentionInterface.register(IMPLEMENTATION, _not_sharded)


def shard_context(model: Model, pattern: ShardPattern | None = None, *, dense_layers: Iterable[int] = ()) -> Model:
    """Let the heads of a Hugging Face model share out the context; in place, and once more with another pattern.

    Args:
        model: a Llama-like causal model, with its weights.
        pattern: None: the one in ``model.config.s2_attention``, where this function leaves it for ``save_pretrained``.
        dense_layers: layers whose heads read everything, Phi-3-small's ``range(1, num_hidden_layers, 2)``.

    Returns:
        the model, whose ``generate`` and ``forward`` make an :class:`S2Cache` where they made a DynamicCache.

    Raises:
        ValueError: another kind of model, or heads or layers that the pattern does not fit.

    Warns:
        UserWarning: some blocks are read by no head of any layer (:meth:`HeadShards.coverage` below 1).
    """
    caller, config = "shard_context", model.config
    dense = sorted(set(dense_layers))
    if pattern is None:
        kept = getattr(config, "s2_attention", None)
        if kept is None:
            raise ValueError(f"{caller}: give a pattern; the config of {type(model).__name__} holds none")
        kept = dict(kept)
        dense, pattern = kept.pop("dense_layers"), ShardPattern(**kept)
    layers = decoder_layers(model, caller)
    if dense and not 0 <= dense[0] <= dense[-1] < len(layers):
        raise ValueError(f"{caller}: dense_layers must be in 0…{len(layers) - 1}, got {dense}")
    replaced = []
    for number, layer in enumerate(layers):
        host = layer.self_attn
        if isinstance(host, LlamaLikeAttention) and not isinstance(host, S2Attention):
            raise ValueError(f"{caller}: layer {number} was changed before, into {type(host).__name__}")
        changed = host if isinstance(host, S2Attention) else S2Attention(host, None)  # pyright: ignore[reportArgumentType]
        shards = None if number in dense else pattern.for_heads(changed.num_heads, changed.num_kv_heads)
        replaced.append((layer, changed, shards))
    for layer, changed, shards in replaced:  # all or none
        layer.self_attn, changed.shards = changed, shards
    covered = min((shards.coverage() for _, _, shards in replaced if shards is not None), default=1.0)
    if covered < 1 and not dense:
        warnings.warn(
            f"{caller}: {1 - covered:.0%} of the old blocks are read by no head; set head_step={1}, vert_stride to at "
            "most the number of key heads, dense heads or dense layers",
            stacklevel=2,
        )
    config.s2_attention = {**asdict(pattern), "dense_layers": dense}
    if config._attn_implementation != IMPLEMENTATION:
        config._attn_implementation = IMPLEMENTATION
        decoder: Any = model.get_decoder()
        decoder.register_forward_pre_hook(_give_cache, with_kwargs=True)
        model._supports_default_dynamic_cache = _no_default_cache  # pyright: ignore[reportArgumentType]
    return model


def _give_cache(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A cache that forgets, where the model would make one that does not."""
    use = kwargs.get("use_cache")
    use = decoder.config.use_cache if use is None else use
    if use and not decoder.training and kwargs.get("past_key_values") is None:
        kwargs["past_key_values"] = S2Cache([layer.self_attn.shards for layer in decoder.layers])
    return args, kwargs


def _no_default_cache() -> bool:
    return False  # the forward pass makes it


@strict
class S2LlamaConfig(LlamaConfig):
    """Fields of transformers' LlamaConfig, those of :class:`ShardPattern`, and one more.

    Args:
        dense_every: every so-manieth layer is dense (official ``dense_attention_every_n_layers``); 0: none.
    """

    model_type = "attn_s2_llama"

    block_size: int = 64
    local_blocks: int = 16
    vert_stride: int = 8
    num_dense_heads: int = 0
    head_step: int | None = None
    head_offset: int = 0
    dense_every: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.dense_every < 0:
            raise ValueError(f"S2LlamaConfig: dense_every must not be negative, got {self.dense_every}")
        self.shards()

    def shards(self) -> HeadShards:
        """The pattern of the layers that are not dense."""
        names = ("block_size", "local_blocks", "vert_stride", "num_dense_heads", "head_step", "head_offset")
        pattern = ShardPattern(**{name: getattr(self, name) for name in names})
        return pattern.for_heads(self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads)

    def dense_layers(self) -> list[int]:
        """Numbers of the dense layers: the last of each ``dense_every``."""
        return list(range(self.dense_every - 1, self.num_hidden_layers, self.dense_every)) if self.dense_every else []


class S2LlamaForCausalLM(LlamaForCausalLM):
    """Llama with a sharded context."""

    config_class = S2LlamaConfig

    def __init__(self, config: S2LlamaConfig) -> None:
        super().__init__(config)
        shard_context(self, config.shards().pattern, dense_layers=config.dense_layers())

    def _assisted_decoding(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise ValueError(
            f"{type(self).__name__}.generate: assisted decoding (assistant_model, prompt_lookup_num_tokens) takes "
            "tokens back, and forgotten keys do not come back; leave it out, or use num_beams"
        )


AutoConfig.register(S2LlamaConfig.model_type, S2LlamaConfig)
AutoModelForCausalLM.register(S2LlamaConfig, S2LlamaForCausalLM)

TINY = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "block_size": 2,
    "local_blocks": 2,
    "vert_stride": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "s2_llama3_8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "dense_every": 2,
    },
    "s2_bytes": {
        "vocab_size": 256,
        "hidden_size": 192,
        "intermediate_size": 528,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "tie_word_embeddings": True,
        "block_size": 16,
        "local_blocks": 2,
        "vert_stride": 6,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "test_s2": TINY,
    "test_s2_hybrid": {**TINY, "num_hidden_layers": 3, "num_dense_heads": 1, "vert_stride": 3, "dense_every": 3},
}

CARD = Card(
    family="S2-Attention",
    paper="2407.17678",
    code="https://github.com/linxihui/dkernel",
    license="MIT",
    test="models/test_s2_attention.py",
)
causal: Any = S2LlamaForCausalLM
ENTRIES = causal_entries(causal, VARIANTS, CARD)
