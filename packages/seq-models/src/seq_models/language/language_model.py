"""The common ground of the causal language models: Hugging Face models whose cache is a state of any shape.

A family writes one layer, ``layer(x, start, state, keep) -> (x, state, auxiliary)``, for rows of **equal length without
padding**; everything else is here, once: embeddings, head, loss, Auto classes, ``generate``, padding, packing, gradient
checkpointing, reordering of the state by beam search. States are values, never attributes of a module: a forward pass
returns a new :class:`SequenceState` and leaves the one that it was given as it was, so interleaved streams and branches
of one prefix do not disturb each other.

Padding and packing cannot leak, because no layer sees them: rows (or packed sequences) of one length run together,
those of other lengths after them, and the state remembers which rows belong together. That is exact for windows,
blocks, chunks and recurrences alike; its price is one pass for each distinct length of a padded batch.

Shapes: input_ids (B, N) → logits (B, N, V).
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from attn_core.catalog import Card, Entry
from attn_core.nn import Linear

IGNORED = -100  # a label that does not count, as everywhere in transformers


class CausalConfig(PreTrainedConfig):
    """What every causal language model of this package is made with; a family adds its own fields.

    Args:
        vocab_size: tokens; bytes by default.
        hidden_size: width of the residual stream, a multiple of ``num_attention_heads``.
        initializer_range: standard deviation of linear layers and embeddings.
        tie_word_embeddings: the head is the embedding, transposed.
    """

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 256
    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Raise ValueError for sizes that do not fit; families check their own fields and call this one."""
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            self.require(getattr(self, name) >= 1, name, "must be at least 1")
        self.require(
            self.hidden_size % self.num_attention_heads == 0,
            "hidden_size",
            f"must be a multiple of num_attention_heads={self.num_attention_heads}",
        )

    def require(self, condition: bool, field: str, rule: str) -> None:
        """Raise ValueError that names the class, the field, the rule and the value."""
        if not condition:
            raise ValueError(f"{type(self).__name__}: {field} {rule}, got {field}={getattr(self, field)!r}")

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads


class Group(NamedTuple):
    """Rows of a batch that have seen equally many tokens, and what the layers keep of them (None at length 0).

    The state is a pytree whose tensors have the rows first; other leaves follow from the length alone.
    """

    rows: Int[Tensor, " b"]
    length: int
    state: Any


class SequenceState(Cache):
    """What a model keeps of the tokens seen so far, for each row of a batch; passed as ``past_key_values``.

    Args:
        groups: rows by length; together they are all rows of the batch.
    """

    def __init__(self, groups: list[Group]) -> None:
        super().__init__(layers=[])
        by_length: dict[int, list[Group]] = {}
        for group in groups:
            by_length.setdefault(group.length, []).append(group)
        self.groups = [_merged(same) for same in by_length.values()]

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return sum(len(group.rows) for group in self.groups)

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the decoding step: no, the state is a new object each time."""
        return False

    def lengths(self) -> list[int]:
        """Tokens seen, padding not counted, row by row."""
        seen = [0] * self.batch_size
        for group in self.groups:
            for row in group.rows.tolist():
                seen[row] = group.length
        return seen

    def nbytes(self) -> int:
        """Bytes of all tensors. Constant for recurrent models; grows with the length where keys are kept."""
        leaves = [leaf for group in self.groups for leaf in tree_leaves(group.state)]
        return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))

    def select(self, rows: Int[Tensor, " b"]) -> "SequenceState":
        """The state of a batch whose row i is row ``rows[i]`` of this one; rows may repeat or be missing."""
        chosen = []
        for group in self.groups:
            match = rows.to(group.rows.device)[:, None] == group.rows[None]
            position, source = match.nonzero(as_tuple=True)
            if len(position):
                chosen.append(Group(position, group.length, _rows(group.state, source)))
        return SequenceState(chosen)

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002  transformers' signature
        """Tokens of the longest row."""
        return max((group.length for group in self.groups), default=0)

    def reorder_cache(self, beam_idx: Int[Tensor, " B"]) -> None:
        """Row i becomes what row ``beam_idx[i]`` was: ``generate`` calls it after each step of beam search."""
        self.groups = self.select(beam_idx).groups

    def batch_select_indices(self, indices: Int[Tensor, " b"]) -> None:
        """Keep the listed rows."""
        self.groups = self.select(indices).groups

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times."""
        rows = torch.arange(self.batch_size, device=self.groups[0].rows.device)
        self.groups = self.select(rows.repeat_interleave(repeats)).groups

    def reset(self) -> None:
        """Forget every token."""
        self.groups = [Group(group.rows, 0, None) for group in self.groups]

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible: a recurrence does not run backwards."""
        raise ValueError(
            f"SequenceState.crop: a state cannot forget its last tokens, got tokens_to_remove={tokens_to_remove}; "
            "keep the earlier state, forward passes leave it unchanged"
        )


def _rows(state: Any, index: Tensor) -> Any:
    return tree_map(lambda leaf: leaf[index] if isinstance(leaf, Tensor) else leaf, state)


def _merged(groups: list[Group]) -> Group:
    """One group of several of the same length, its rows in order."""
    if len(groups) == 1:
        return groups[0]
    rows = torch.cat([group.rows for group in groups])
    flat = [tree_flatten(group.state) for group in groups]
    leaves = [torch.cat(x) if isinstance(x[0], Tensor) else x[0] for x in zip(*(f[0] for f in flat), strict=True)]
    state = tree_unflatten(leaves, flat[0][1])
    order = rows.argsort()
    return Group(rows[order], groups[0].length, _rows(state, order))


class Pass(NamedTuple):
    """What a stack of layers gives for rows of one length.

    Attributes:
        hidden: after the final norm.
        state: for the tokens that follow; None unless it was asked for.
        auxiliary: a loss of the model's own, such as the commitment of centroids to their tokens, or None.
        layers: the input of the first layer and the output of every one, the last behind the norm, if asked for.
    """

    hidden: Float[Tensor, "B N C"]
    state: Any
    auxiliary: Float[Tensor, ""] | None
    layers: tuple[Float[Tensor, "B N C"], ...]


@dataclass
class CausalModelOutput(BaseModelOutputWithPast):
    """transformers' output with the model's own loss."""

    auxiliary_loss: Tensor | None = None


@dataclass
class CausalLMOutput(CausalLMOutputWithPast):
    """transformers' output with the model's own loss, which ``loss`` contains."""

    auxiliary_loss: Tensor | None = None


class CausalModel(PreTrainedModel):
    """Embedding, layers, final norm. A family sets ``layers`` (and ``norm``) in its constructor, then ``post_init()``.

    A layer is called as ``layer(x, start, state, keep)``: x (b, n, C), the number of tokens before x, what it kept of
    them (None at the start), and whether it shall keep anything. It gives (x, state or None, own loss or None). Derive
    it from ``transformers.modeling_layers.GradientCheckpointingLayer`` for gradient checkpointing.
    """

    config_class = CausalConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    config: CausalConfig
    layers: nn.ModuleList

    def __init__(self, config: CausalConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.norm: nn.Module = nn.Identity()

    def embed(self, input_ids: Int[Tensor, "B N"]) -> Float[Tensor, "B N C"]:
        """Embeddings of checked tokens.

        Raises:
            ValueError: not integers of shape (B, N), no tokens, or an id outside the vocabulary (checked on the CPU).
        """
        name, vocabulary = type(self).__name__, self.config.vocab_size
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise ValueError(
                f"{name}: input_ids must be integers (B, N), got {tuple(input_ids.shape)} of {input_ids.dtype}"
            )
        if input_ids.shape[1] == 0:
            raise ValueError(
                f"{name}: input_ids holds no tokens, got shape {tuple(input_ids.shape)}; give at least one"
            )
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = int(input_ids.min()), int(input_ids.max())
            if low < 0 or high >= vocabulary:
                bad = low if low < 0 else high
                raise ValueError(f"{name}: input_ids must be in 0…{vocabulary - 1}, got {bad}")
        return self.embed_tokens(input_ids)

    def enter(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        """What the layers get of embeddings, those of tokens or of the caller: a family that scales does it here."""
        return x

    def _given(self, x: Tensor) -> Float[Tensor, "B N C"]:
        """Embeddings of the caller.

        Raises:
            ValueError: not floating-point of shape (B, N, hidden_size), or no tokens.
        """
        if x.ndim != 3 or x.shape[-1] != self.config.hidden_size or not x.is_floating_point() or x.shape[1] == 0:
            raise ValueError(
                f"{type(self).__name__}: inputs_embeds must be numbers (B, N, {self.config.hidden_size}) with N ≥ 1, "
                f"got {tuple(x.shape)} of {x.dtype}"
            )
        return x

    def run(self, x: Float[Tensor, "B N C"], start: int, state: Any, *, keep: bool, all_layers: bool = False) -> Pass:
        """The layers over rows of one length, all of whose ``start`` tokens before x are in ``state``."""
        states: list[Any] = [None] * len(self.layers) if state is None else list(state)
        seen, losses = [x], []
        for number, layer in enumerate(self.layers):
            x, states[number], loss = layer(x, start, states[number], keep)
            seen.append(x)
            if loss is not None:
                losses.append(loss)
        auxiliary = torch.stack(losses).sum() if losses else None
        seen[-1] = x = self.norm(x)
        return Pass(x, states if keep else None, auxiliary, tuple(seen) if all_layers else ())

    def forward(
        self,
        input_ids: Int[Tensor, "B N"] | None = None,
        attention_mask: Int[Tensor, "B M"] | Bool[Tensor, "B M"] | None = None,
        past_key_values: SequenceState | None = None,
        inputs_embeds: Float[Tensor, "B N C"] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Int[Tensor, " bounds"] | None = None,
    ) -> CausalModelOutput | tuple[Any, ...]:
        """Hidden states of the tokens, and the state after them.

        Args:
            attention_mask: 1 for tokens, 0 for padding, anywhere; the last N columns are those of the input (earlier
                ones, which ``generate`` passes, belong to the state). Hidden states of padding are 0.
            past_key_values: the state that an earlier call returned; left unchanged.
            inputs_embeds: in place of input_ids, what ``get_input_embeddings()`` gives for them.
            use_cache: whether to return the state; by default the config's outside training.
            output_attentions: None or False, since no layer forms a matrix of attention.
            output_hidden_states: whether to return the input of the first layer and the output of every one.
            cu_seqlens: packed sequences: B is 1, sequence s is the tokens cu_seqlens[s]…cu_seqlens[s + 1].

        Raises:
            ValueError: tokens, mask, state and boundaries that do not fit each other; ``output_attentions``.
        """
        name = type(self).__name__
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"{name}: give either input_ids or inputs_embeds")
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError(
                f"{name}: output_attentions must be None or False, got True: these layers form no matrices of "
                "attention; output_hidden_states=True gives what every layer passes on"
            )
        x: Any = self.enter(self.embed(input_ids) if input_ids is not None else self._given(inputs_embeds))  # pyright: ignore[reportArgumentType]
        batch, tokens = x.shape[:2]
        keep = bool((self.config.use_cache and not self.training) if use_cache is None else use_cache)
        all_layers = bool(self.config.output_hidden_states if output_hidden_states is None else output_hidden_states)
        if past_key_values is not None:
            if not isinstance(past_key_values, SequenceState):
                kind = type(past_key_values).__name__
                raise ValueError(f"{name}: past_key_values must be the SequenceState of an earlier call, got {kind}")
            if past_key_values.batch_size != batch:
                raise ValueError(
                    f"{name}: past_key_values is the state of {past_key_values.batch_size} rows, got {batch}; "
                    "past_key_values.select(rows) gives another batch"
                )
        if cu_seqlens is not None:
            result = self._packed(x, cu_seqlens, attention_mask, past_key_values, all_layers)
            keep = False
        else:
            real = self._real_tokens(attention_mask, batch, tokens)
            result = self._grouped(x, real, past_key_values, keep, all_layers)
        output = CausalModelOutput(
            last_hidden_state=result.hidden,
            past_key_values=result.state if keep else None,
            hidden_states=result.layers if all_layers else None,
            auxiliary_loss=result.auxiliary,
        )
        return output if return_dict is None or return_dict else output.to_tuple()

    def _real_tokens(self, mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
        if mask is None:
            return None
        if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] < tokens:
            raise ValueError(
                f"{type(self).__name__}: attention_mask must be ({batch}, at least {tokens}), got {tuple(mask.shape)}"
            )
        real = mask[:, -tokens:] != 0
        return None if bool(real.all()) else real

    def _grouped(
        self, x: Tensor, real: Tensor | None, past: SequenceState | None, keep: bool, all_layers: bool
    ) -> Pass:
        batch, tokens = x.shape[:2]
        if real is None and (past is None or len(past.groups) == 1):
            start, before = (0, None) if past is None else (past.groups[0].length, past.groups[0].state)
            result = self.run(x, start, before, keep=keep, all_layers=all_layers)
            if not keep:
                return result
            rows = torch.arange(batch, device=x.device)
            return result._replace(state=SequenceState([Group(rows, start + tokens, result.state)]))
        if real is None:
            real = x.new_ones(batch, tokens, dtype=torch.bool)
        lengths = [0] * batch if past is None else past.lengths()
        kinds: dict[tuple[int, int], list[int]] = {}
        for row, kind in enumerate(zip(lengths, real.sum(1).tolist(), strict=True)):
            kinds.setdefault(kind, []).append(row)
        pieces, after = [], []
        for (start, count), members in kinds.items():
            rows = torch.tensor(members, device=x.device)
            before = past.select(rows).groups[0].state if past is not None and start else None
            if count == 0:
                after.append(Group(rows, start, before))
                continue
            place = (rows[:, None], real[rows].nonzero()[:, 1].view(len(members), count))
            result = self.run(x[place], start, before, keep=keep, all_layers=all_layers)
            after.append(Group(rows, start + count, result.state))
            pieces.append((place, result))
        return _assembled(x, pieces, SequenceState(after) if keep else None)

    def _packed(
        self, x: Tensor, cu_seqlens: Tensor, mask: Tensor | None, past: SequenceState | None, all_layers: bool
    ) -> Pass:
        name, tokens = type(self).__name__, x.shape[1]
        bounds = cu_seqlens.tolist()
        if mask is not None or past is not None or x.shape[0] != 1:
            raise ValueError(f"{name}: cu_seqlens goes with one row, without attention_mask and past_key_values")
        if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != tokens or sorted(set(bounds)) != bounds:
            raise ValueError(f"{name}: cu_seqlens must rise from 0 to the {tokens} tokens, got {bounds}")
        starts: dict[int, list[int]] = {}
        for first, last in itertools.pairwise(bounds):
            starts.setdefault(last - first, []).append(first)
        pieces = []
        for count, firsts in starts.items():
            column = torch.tensor(firsts, device=x.device)[:, None] + torch.arange(count, device=x.device)
            place = (torch.zeros_like(column), column)
            pieces.append((place, self.run(x[place], 0, None, keep=False, all_layers=all_layers)))
        return _assembled(x, pieces, None)


def _assembled(x: Tensor, pieces: list[tuple[tuple[Tensor, Tensor], Pass]], state: SequenceState | None) -> Pass:
    """Bring the results of groups back to their places in the batch; own losses are averaged over tokens."""
    total = max(1, sum(place[1].numel() for place, _ in pieces))
    losses = [r.auxiliary * (place[1].numel() / total) for place, r in pieces if r.auxiliary is not None]

    def spread(parts: list[Tensor]) -> Tensor:
        whole = x.new_zeros(x.shape)
        for (place, _), part in zip(pieces, parts, strict=True):
            whole = whole.index_put(place, part.to(whole.dtype))
        return whole

    layers = zip(*(result.layers for _, result in pieces), strict=True)
    return Pass(
        spread([result.hidden for _, result in pieces]),
        state,
        torch.stack(losses).sum() if losses else None,
        tuple(spread(list(parts)) for parts in layers),
    )


class CausalLM(PreTrainedModel, GenerationMixin):
    """A :class:`CausalModel` with a head over the vocabulary, a loss and ``generate``.

    A family sets ``config_class`` and ``backbone_class``.
    """

    config_class = CausalConfig
    backbone_class: ClassVar[type[CausalModel]] = CausalModel
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # num_items_in_batch, for transformers' Trainer
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  transformers' own form

    config: CausalConfig

    def __init__(self, config: CausalConfig) -> None:
        super().__init__(config)
        self.model = self.backbone_class(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # our forward pass makes the state

    def _init_weights(self, module: nn.Module) -> None:
        self.model._init_weights(module)

    def _assisted_decoding(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise ValueError(
            f"{type(self).__name__}.generate: assisted decoding (assistant_model, prompt_lookup_num_tokens) takes "
            "tokens back, which a recurrent state cannot; leave it out, or use num_beams"
        )

    def forward(
        self,
        input_ids: Int[Tensor, "B N"] | None = None,
        attention_mask: Int[Tensor, "B M"] | Bool[Tensor, "B M"] | None = None,
        past_key_values: SequenceState | None = None,
        inputs_embeds: Float[Tensor, "B N C"] | None = None,
        labels: Int[Tensor, "B N"] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Int[Tensor, " L"] = 0,
        cu_seqlens: Int[Tensor, " bounds"] | None = None,
        num_items_in_batch: int | Int[Tensor, ""] | None = None,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """Logits of the next tokens, and the loss if there are labels.

        Args:
            labels: the tokens themselves (shifted here), −100 where they do not count.
            logits_to_keep: the last so many positions (0: all), or a list of them; the loss counts these alone.
            num_items_in_batch: counted tokens of all batches whose gradients are added up (transformers' Trainer gives
                it); by default those of this batch.

        Returns:
            ``loss`` is the mean cross-entropy in nats plus ``auxiliary_loss``, if the model has one and trains. With
            ``num_items_in_batch`` both are this batch's share, so that the sum over batches is the loss of all.

        Raises:
            ValueError: as :meth:`CausalModel.forward`; labels of another shape than the tokens; logits_to_keep below 0.
        """
        if isinstance(logits_to_keep, int) and logits_to_keep < 0:
            raise ValueError(f"{type(self).__name__}: logits_to_keep must not be negative, got {logits_to_keep}")
        out: Any = self.model(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            cu_seqlens=cu_seqlens,
        )
        hidden = out.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        chosen = hidden if isinstance(kept, int) else hidden[:, kept]
        logits = self.lm_head(chosen)
        loss = None
        if labels is not None:
            if labels.shape != hidden.shape[:2]:
                raise ValueError(
                    f"{type(self).__name__}: labels must be {tuple(hidden.shape[:2])}, got {tuple(labels.shape)}"
                )
            target = _next_tokens(labels, attention_mask, cu_seqlens)
            target = target if isinstance(kept, int) else target[:, kept]
            loss = _mean_loss(logits, target, out.auxiliary_loss if self.training else None, num_items_in_batch)
        output = CausalLMOutput(
            loss=loss,  # pyright: ignore[reportArgumentType]
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            auxiliary_loss=out.auxiliary_loss,
        )
        return output if return_dict is None or return_dict else output.to_tuple()


def _mean_loss(
    logits: Tensor, target: Tensor, auxiliary: Tensor | None, items: int | Tensor | None
) -> Float[Tensor, ""]:
    """Mean cross-entropy and the model's own loss; with ``items`` this batch's share of a mean over so many tokens."""
    exact = logits if logits.dtype == torch.float64 else logits.float()
    reduction = "mean" if items is None else "sum"
    loss = F.cross_entropy(exact.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction=reduction)
    if auxiliary is not None:
        loss = loss + (auxiliary if items is None else auxiliary * (target != IGNORED).sum())
    return loss if items is None else loss / items


def _next_tokens(labels: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The label of the following position; none at the end of a sequence, none of padding or behind it."""
    if cu_seqlens is not None:
        labels = labels.clone()
        labels[:, cu_seqlens[:-1]] = IGNORED
    target = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if attention_mask is None:
        return target
    padding = attention_mask[:, -labels.shape[1] :] == 0
    return target.masked_fill(padding | F.pad(padding[:, 1:], (0, 1), value=True), IGNORED)


def register_causal(config: type[CausalConfig], model: type[CausalModel], causal: type[CausalLM]) -> None:
    """Make ``AutoConfig``, ``AutoModel`` and ``AutoModelForCausalLM`` know a family."""
    AutoConfig.register(config.model_type, config)
    AutoModel.register(config, model)
    AutoModelForCausalLM.register(config, causal)


def causal_entries(
    causal: type[CausalLM], variants: Mapping[str, Mapping[str, Any]], card: Card
) -> list[Entry[nn.Module]]:
    """Catalogue entries of a family: a name and fields of the configuration for each variant."""

    config: Any = causal.config_class

    def build(variant: Mapping[str, Any], **options: Any) -> nn.Module:
        return causal(config(**{**variant, **options}))

    return [
        Entry(name, partial(build, variant), card(sizes_of(variant)), accepts=(config,))
        for name, variant in variants.items()
    ]


def sizes_of(variant: Mapping[str, Any]) -> str:
    """What a table says of a causal language model."""
    return "causal language model; " + ", ".join(f"{key}={value}" for key, value in variant.items())
