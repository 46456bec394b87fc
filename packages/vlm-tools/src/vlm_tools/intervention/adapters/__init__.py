"""Adapters to the families of Hugging Face models."""

from typing import Any

from vlm_tools.intervention.adapters.base import Adapter
from vlm_tools.intervention.adapters.gemma import Gemma
from vlm_tools.intervention.adapters.idefics import Idefics
from vlm_tools.intervention.adapters.internvl import InternVL
from vlm_tools.intervention.adapters.llava import Llava
from vlm_tools.intervention.adapters.llava_next import LlavaNext, LlavaOnevision
from vlm_tools.intervention.adapters.qwen_vl import QwenVL

ADAPTERS: dict[str, Adapter] = {
    name: adapter()
    for adapter in (Llava, LlavaNext, LlavaOnevision, QwenVL, Idefics, InternVL, Gemma)
    for name in adapter.model_types
}

__all__ = ["ADAPTERS", "Adapter", "adapter_of"]


def adapter_of(model: Any) -> Adapter:
    """The adapter of a model's family.

    Raises:
        ValueError: not a Hugging Face vision-language model, or of a family without adapter.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in ADAPTERS:
        what = f"model type {kind!r}" if kind else f"a {type(model).__name__}"
        raise ValueError(f"adapter_of: no adapter for {what}; there are {', '.join(sorted(ADAPTERS))}")
    return ADAPTERS[kind]
