"""A second stream beside generation: another prompt or image with a cache of its own, combined with every score.

Source of the idea: VCD (DAMO-NLP-SG/VCD, ``vcd_utils/vcd_sample.py``), which patches a sampling loop that
transformers no longer has. Here it is a `transformers.LogitsProcessor`, so greedy search, sampling and beams work;
under beams the second cache follows the reordering of the first: among the rows of one prompt, those with equal tokens
have equal caches (rows of two prompts have not, however equal their tokens: their images differ).
Checked in ``tests/intervention/test_second_stream.py``.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor

if TYPE_CHECKING:
    from vlm_tools.intervention.hooking import Run

Combine = Callable[[Float[Tensor, "B V"], Float[Tensor, "B V"]], Float[Tensor, "B V"]]
_OF_GENERATION = {
    *("max_new_tokens", "max_length", "do_sample", "num_beams", "temperature", "top_p", "top_k", "generation_config"),
    *("return_dict_in_generate", "output_logits", "output_scores", "logits_processor", "cache_implementation"),
    *("num_return_sequences", "use_cache", "past_key_values", "streamer", "stopping_criteria", "min_new_tokens"),
    *("early_stopping", "repetition_penalty", "length_penalty", "eos_token_id", "pad_token_id", "labels"),
    *("output_attentions", "output_hidden_states", "synced_gpus", "tokenizer", "position_ids"),
}


class SecondStream(LogitsProcessor):
    """Scores of generation combined with those of a second prompt; results are log-probabilities up to a constant.

    Raises (when called): ValueError if generation has rows that no row of the step before could have become.

    Args:
        run: the model, whose method does not touch the second stream.
        inputs: the second prompt: what the model is called with.
        combine: (logits, second logits) → scores.
    """

    def __init__(self, run: "Run", inputs: Mapping[str, Any], combine: Combine) -> None:
        self.run = run
        self.combine = combine
        self.inputs = dict(inputs)
        self.cache: DynamicCache | None = None
        self.seen: Tensor | None = None  # tokens of the main stream so far
        self.rope_deltas: Tensor | None = None

    def __call__(self, input_ids: Int[Tensor, "B T"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """Called by ``generate`` for every token."""
        with torch.no_grad(), self.run.ordinary_attention(), self._own_positions():
            other = self._start(len(input_ids)) if self.cache is None else self._continue(input_ids)
        self.seen = input_ids
        return self.combine(scores, other.to(scores.device)).log_softmax(-1)

    def _start(self, rows: int) -> Tensor:
        cache = DynamicCache(config=self.run.model.config.get_text_config())
        self.cache = cache
        self.ids = self.inputs.pop("input_ids")
        self.mask = self.inputs.pop("attention_mask", None)
        if self.mask is None:
            self.mask = torch.ones_like(self.ids)
        logits = self._forward(first=True)
        times, rest = divmod(rows, len(logits))
        if rest:
            raise ValueError(f"second_stream: {rows} rows of generation do not belong to {len(logits)} prompts")
        self.prompt = torch.arange(rows, device=logits.device) // times  # of each row
        if times > 1:
            cache.batch_repeat_interleave(times)
            self.ids, self.mask, logits = (x.repeat_interleave(times, 0) for x in (self.ids, self.mask, logits))
            for name in ("token_type_ids", "mm_token_type_ids"):
                if name in self.inputs:
                    self.inputs[name] = self.inputs[name].repeat_interleave(times, 0)
            deltas = getattr(self.run.model.model, "rope_deltas", None)
            if deltas is not None and len(deltas) != rows:
                self.run.model.model.rope_deltas = deltas.repeat_interleave(times, 0)
        return logits

    def _continue(self, input_ids: Tensor) -> Tensor:
        assert self.seen is not None
        assert self.cache is not None
        before = input_ids[:, : self.seen.shape[1]]
        if before.shape != self.seen.shape or not torch.equal(before, self.seen):  # beams changed places
            self._reorder(before)
        new = input_ids[:, self.seen.shape[1] :]
        self.ids = torch.cat([self.ids, new], dim=1)
        self.mask = torch.nn.functional.pad(self.mask, (0, new.shape[1]), value=1)
        for name, last in (("token_type_ids", None), ("mm_token_type_ids", 0)):
            if name in self.inputs:
                types = self.inputs[name]
                added = types[:, -1:] if last is None else torch.zeros_like(types[:, -1:])
                self.inputs[name] = torch.cat([types, added.expand(-1, new.shape[1])], dim=1)
        return self._forward(first=False, count=new.shape[1])

    def _reorder(self, before: Int[Tensor, "B T"]) -> None:
        assert self.seen is not None
        assert self.cache is not None
        if before.shape != self.seen.shape:
            raise ValueError(f"second_stream: generation went from {len(self.seen)} rows to {len(before)}; "
                             "this kind of decoding is not supported")  # fmt: skip
        same = (before[:, None] == self.seen[None]).all(-1) & (self.prompt[:, None] == self.prompt[None])
        if not bool(same.any(1).all()):
            raise ValueError("second_stream: generation changed tokens that it had chosen; "
                             "this kind of decoding is not supported")  # fmt: skip
        order = same.float().argmax(1)
        self.cache.reorder_cache(order)  # pyright: ignore[reportArgumentType]
        self.ids = self.ids[order]

    def _forward(self, *, first: bool, count: int | None = None) -> Tensor:
        model: Any = self.run.model
        extra = {}
        position = (self.mask.cumsum(-1) - 1).clamp_min(0)
        if hasattr(
            model.model, "rope_deltas"
        ):  # Qwen: three axes; only a prompt with an image needs the model for them
            delta = model.model.rope_deltas
            position = position if delta is None or first else position + delta
            position = position[None].expand(3, -1, -1)
        if not first or position.dim() == 2 or "image_grid_thw" not in self.inputs:
            extra["position_ids"] = position if count is None else position[..., -count:]
        prepared = model.prepare_inputs_for_generation(
            self.ids,
            next_sequence_length=count,
            past_key_values=self.cache,
            attention_mask=self.mask,
            is_first_iteration=first,
            use_cache=True,
            **extra,
            **self.inputs,
        )
        return model(**prepared, return_dict=True).logits[:, -1].float()

    @contextmanager
    def _own_positions(self) -> Iterator[None]:
        """Qwen's models keep the offset of text positions on themselves; each stream has its own."""
        inner: Any = self.run.model.model
        if not hasattr(inner, "rope_deltas"):
            yield
            return
        main = inner.rope_deltas
        inner.rope_deltas = self.rope_deltas
        try:
            yield
        finally:
            self.rope_deltas, inner.rope_deltas = inner.rope_deltas, main


def of_prompt(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What of ``generate``'s arguments belongs to the prompt: tensors that the model is called with."""
    kept = {name: value for name, value in inputs.items() if name not in _OF_GENERATION and torch.is_tensor(value)}
    if "input_ids" not in kept:
        raise ValueError("second_stream: generate was called without input_ids, from which the second prompt is made")
    return kept


def without_image(run: "Run", inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The prompt without its image tokens and pixels, padded to the left again."""
    kept = of_prompt(inputs)
    ids: Tensor = kept["input_ids"]
    mask = kept.get("attention_mask", torch.ones_like(ids))
    stays = (ids != run.adapter.image_token_id(run.model.config)) & mask.bool()
    length = int(stays.sum(1).max())
    if length == 0:
        raise ValueError("second_stream: the prompt holds nothing but the image; add a question")
    order = stays.float().argsort(dim=1, stable=True)[:, -length:]  # what goes comes first
    taken = {
        name: kept[name].gather(1, order)
        for name in ("input_ids", "token_type_ids", "mm_token_type_ids")
        if name in kept
    }
    return {**taken, "attention_mask": stays.gather(1, order).long()}


def of_image_prompt(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """As `of_prompt`, pixels included.

    Raises:
        ValueError: there are none to replace.
    """
    kept = of_prompt(inputs)
    if "pixel_values" not in kept:
        raise ValueError("second_stream: generate was called without pixel_values, which the method replaces")
    return kept
