"""``intervene``: a method at work in a Hugging Face model, and the model as it was afterwards.

The text decoder gets the attention implementation ``"vlm_tools"``, registered once with transformers together with the
mask function of SDPA. The function finds the run that its module belongs to, so models in different threads do not see
one another; a module without a run computes SDPA. State lives in the run and ends with it.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from vlm_tools.intervention.adapters import Adapter, adapter_of
from vlm_tools.intervention.method import AttentionCall, LayerStatistics, Method
from vlm_tools.intervention.visibility import Visibility, visibility

IMPLEMENTATION = "vlm_tools"
_RUNS: "weakref.WeakKeyDictionary[nn.Module, Run]" = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    run = _RUNS.get(module)

    def plain() -> Tensor:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )[0]

    if run is None or run.paused:
        return plain(), None
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError(
            "intervene: attention with soft-capped scores or learned sinks (softcap, s_aux) is not supported"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return run.attend(module, query, key, value, attention_mask, scale, plain).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, _attention_function)  # pyright: ignore[reportArgumentType]
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


class Run:
    """A method at work in a model; made by `intervene`.

    Attributes:
        model: the model.
        method: the method.
        adapter: what is special to the model's family.
        visual: (B, T) True at the image tokens of the current sequences.
        paused: while True, attention is ordinary.
        prompt: what the model was called with for the current sequences.
        generating: what the running ``generate`` was called with.
    """

    def __init__(self, model: PreTrainedModel, method: Method, visual: Bool[Tensor, "B T"] | None) -> None:
        self.model = model
        self.method = method
        self.adapter: Adapter = adapter_of(model)
        self.decoder: Any = model.get_decoder()
        self.given_visual = visual
        self.visual: Tensor = torch.zeros(0, 0, dtype=torch.bool)
        self.paused = False
        self.prompt: dict[str, Any] = {}
        self.generating: Mapping[str, Any] = {}
        self._past = 0
        self._fresh = True
        self._hidden: dict[int, Tensor] = {}
        self._state: dict[int, dict[str, Any]] = {}
        self._visibility: dict[tuple[int, int, int], tuple[Tensor | None, Visibility]] = {}
        self._statistics: dict[int, LayerStatistics] = {}
        self.chosen = method.chosen_layers(len(self.decoder.layers)) if method.changes_attention else frozenset()

    @property
    def text_config(self) -> Any:
        """The decoder's configuration."""
        return self.decoder.config

    def report(self) -> list[dict[str, float]]:
        """One row per layer: (query, head) pairs seen and edited, and the mass moved per edited pair."""
        return [
            {
                "layer": layer,
                "rows": found.rows,
                "edited": found.edited,
                "mass_moved": found.moved / found.edited if found.edited else 0.0,
            }
            for layer, found in sorted(self._statistics.items())
        ]

    @contextmanager
    def ordinary_attention(self) -> Iterator[None]:
        """Ordinary attention inside the block, for second streams."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: where the image tokens are."""
        if self.paused:
            return
        ids: Tensor | None = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        if ids is None and self.given_visual is None and past == 0:
            raise ValueError("intervene: the model was called without input_ids; say where the image is: "
                             "intervene(model, method, visual=mask)")  # fmt: skip
        embeds = kwargs.get("inputs_embeds")
        shape = ids.shape if ids is not None else embeds.shape[:2]  # pyright: ignore[reportOptionalMemberAccess]
        device = ids.device if ids is not None else embeds.device  # pyright: ignore[reportOptionalMemberAccess]
        new = torch.zeros(shape, dtype=torch.bool, device=device)
        if ids is not None:
            new = ids == self.adapter.image_token_id(self.model.config)
            if "input_ids" in self.generating:  # an image's token in the answer stands for no image
                new[:, max(self.generating["input_ids"].shape[1] - past, 0) :] = False
        if past == 0:
            if self.given_visual is not None:
                new = self._given(shape).to(device)
            # generate encodes images beforehand, so that its forward passes may lack the pixels
            self.prompt = {**self.generating, **{name: v for name, v in kwargs.items() if name != "past_key_values"}}
            self._check(new, self.prompt)
            self._state.clear()
            self.visual = new
        else:
            self.visual = torch.cat([self.visual[:, :past], new], dim=1)
        self._past = past
        self._fresh = past == 0 or shape[1] > 1
        self._visibility.clear()
        self._hidden.clear()

    def _given(self, shape: Sequence[int]) -> Tensor:
        given = self.given_visual
        assert given is not None
        if tuple(given.shape) != tuple(shape):
            raise ValueError(f"intervene: visual has shape {tuple(given.shape)}, the prompt {tuple(shape)}")
        return given

    def _check(self, visual: Bool[Tensor, "B T"], kwargs: Mapping[str, Any]) -> None:
        if visual.shape[1] == 0:
            raise ValueError("intervene: the prompt is empty")
        if not self.method.needs_image:
            return
        empty = (~visual.any(1)).nonzero().flatten().tolist()
        if empty:
            number = self.adapter.image_token_id(self.model.config)
            raise ValueError(
                f"intervene: row {empty[0]} of the prompt has no image token (id {number}), which "
                f"{self.method.name} needs; build the prompt with the processor's chat template"
            )
        images = self.adapter.image_count(kwargs)
        if images is not None and images > len(visual):
            raise ValueError(f"intervene: {self.method.name} works on one image per prompt, got {images} images in "
                             f"{len(visual)} prompts")  # fmt: skip

    def remember(self, layer: int, hidden: Tensor) -> None:
        """The residual stream that enters a layer."""
        if not self.paused:
            self._hidden[layer] = hidden

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        plain: Callable[[], Tensor],
    ) -> Tensor:
        """Attention of a text layer under the method."""
        layer: int = module.layer_idx  # pyright: ignore[reportAssignmentType]
        if layer not in self.chosen:
            return plain()
        queries, keys = query.shape[2], key.shape[2]
        visible = self._visible(mask, queries, keys, query.dtype)
        last_image = torch.where(self.visual, torch.arange(self.visual.shape[1], device=query.device), -1).amax(1)
        position = torch.arange(self._past, self._past + queries, device=query.device)
        call = AttentionCall(
            layer=layer,
            q=query,
            k=key,
            v=value,
            scale=scale,
            visible=visible,
            visual=self._align(self.visual, visible.keys),
            after_image=position[None] > last_image[:, None],
            prefill=self._fresh,
            hidden=self._hidden.get(layer),
            state=self._state.setdefault(layer, {}),
            statistics=self._statistics.setdefault(layer, LayerStatistics()),
            plain=plain,
            align=lambda flags: self._align(flags, visible.keys),
        )
        return self.method.attend(call)

    def _visible(self, mask: Tensor | None, queries: int, keys: int, dtype: torch.dtype) -> Visibility:
        """Worked out once for all layers that share a mask."""
        place = (id(mask), queries, keys)
        if place not in self._visibility:
            self._visibility[place] = mask, visibility(mask, queries=queries, keys=keys, dtype=dtype)
        return self._visibility[place][1]

    def _align(self, flags: Bool[Tensor, "B T"], keys: int) -> Bool[Tensor, "B M"]:
        """Flags of tokens as flags of keys: a sliding cache holds the last ones, a static one has empty places."""
        total = self.visual.shape[1]
        if flags.shape[1] < total:
            flags = nn.functional.pad(flags, (0, total - flags.shape[1]))
        flags = flags[:, :total]
        if flags.shape[0] == 1 and self.visual.shape[0] > 1:
            flags = flags.expand(self.visual.shape[0], -1)
        return flags[:, total - keys :] if keys <= total else nn.functional.pad(flags, (0, keys - total))


@contextmanager
def intervene(model: PreTrainedModel, method: Method, *, visual: Bool[Tensor, "B T"] | None = None) -> Iterator[Run]:
    """Run ``model`` under ``method`` inside the block; afterwards, also after an exception, it is as before.

    ``model.generate`` and direct calls work as usual: batches with left padding, beams, dynamic and static caches,
    grouped heads.

    Args:
        model: a Hugging Face vision-language model of a supported family.
        method: for example ``VAR()``.
        visual: True at image tokens of the prompt; needed only for calls with ``inputs_embeds`` alone.

    Yields:
        The `Run`; ``run.report()`` says what was changed.

    Raises:
        ValueError: unsupported model, a model under another method, an attention implementation without masks, a method
            that cannot work on the model; later, inside the block: no image token, several images, empty prompt.
    """
    if not isinstance(method, Method):
        raise ValueError(f"intervene: method must be a Method such as VAR(), got {method!r}")
    run = Run(model, method, visual)
    decoder = run.decoder
    before = decoder.config._attn_implementation
    if before == IMPLEMENTATION:
        raise ValueError("intervene: the model is under another method already; leave that block first")
    if before not in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys():
        raise ValueError(f"intervene: the model's attention implementation {before!r} has no mask function, so "
                         "causality and padding are lost; model.set_attn_implementation('sdpa')")  # fmt: skip
    method.bind(run)
    handles = [model.register_forward_pre_hook(run.begin, with_kwargs=True)]
    attentions = [module for module in decoder.modules() if getattr(module, "layer_idx", None) is not None]
    own_generate = model.__dict__.get("generate")
    try:
        if method.needs_hidden:
            handles += [_watch(layer, number, run) for number, layer in enumerate(decoder.layers)]
        with _LOCK:
            for module in attentions:
                _RUNS[module] = run
        decoder.set_attn_implementation(IMPLEMENTATION)
        model.__dict__["generate"] = _generating(run)
        yield run
    finally:
        decoder.set_attn_implementation(before)
        with _LOCK:
            for module in attentions:
                _RUNS.pop(module, None)
        for handle in handles:
            handle.remove()
        if own_generate is None:
            model.__dict__.pop("generate", None)
        else:
            model.__dict__["generate"] = own_generate


def _watch(layer: nn.Module, number: int, run: Run) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run.remember(number, args[0] if args else kwargs["hidden_states"])

    return layer.register_forward_pre_hook(hook, with_kwargs=True)


def _generating(run: Run) -> Callable[..., Any]:
    """``model.generate`` with the method's logits processor in front of all others."""
    generate = type(run.model).generate.__get__(run.model)  # pyright: ignore[reportAttributeAccessIssue]

    def with_method(inputs: Int[Tensor, "B T"] | None = None, **kwargs: Any) -> Any:
        prompt = dict(kwargs)
        if inputs is not None:
            prompt["input_ids"] = inputs
        processor = run.method.logits_processor(run, prompt)
        if processor is not None:
            kwargs["logits_processor"] = [processor, *(kwargs.get("logits_processor") or [])]
        run.generating = prompt
        try:
            return generate(inputs, **kwargs)
        finally:
            run.generating = {}

    return with_method
