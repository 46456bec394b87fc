"""Random small siblings of the eleven supported families, with inputs that fit, for tests."""

# pyright: reportCallIssue=false, reportArgumentType=false
# (transformers fills the fields of its configurations in at run time)

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

VOCABULARY, IMAGE, WIDTH = 100, 99, 32
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
_ROPE: dict[str, Any] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}


def _clip(side: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(**_VISION, image_size=side, patch_size=7, projection_dim=16)


def _llava() -> LlavaForConditionalGeneration:
    text = {"model_type": "llama", **_TEXT}
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=_clip(28), text_config=text, image_token_id=IMAGE, vision_feature_layer=-2)
    )


def _llava_next() -> LlavaNextForConditionalGeneration:
    text = {"model_type": "mistral", **_TEXT, "sliding_window": None}
    config = LlavaNextConfig(
        vision_config=_clip(28),
        text_config=text,
        image_token_id=IMAGE,
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
    )
    return LlavaNextForConditionalGeneration(config)


def _llava_onevision() -> LlavaOnevisionForConditionalGeneration:
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**_VISION, image_size=28, patch_size=7, vision_use_head=False),
        text_config={"model_type": "qwen2", **_TEXT},
        image_token_id=IMAGE,
        video_token_id=98,
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
    )
    return LlavaOnevisionForConditionalGeneration(config)


def _qwen_tokens() -> dict[str, int]:
    return {"image_token_id": IMAGE, "video_token_id": 98, "vision_start_token_id": 97, "vision_end_token_id": 96}


def _qwen2_vl() -> Qwen2VLForConditionalGeneration:
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2, "patch_size": 7}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(vision_config=vision, text_config={**_TEXT, "rope_parameters": _ROPE}, **_qwen_tokens())
    )


def _qwen2_5_vl() -> Qwen2_5_VLForConditionalGeneration:
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "out_hidden_size": WIDTH,
        "num_heads": 2,
        "intermediate_size": 32,
        "patch_size": 7,
        "window_size": 28,
        "fullatt_block_indexes": [1],
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(vision_config=vision, text_config={**_TEXT, "rope_parameters": _ROPE}, **_qwen_tokens())
    )


def _qwen3_vl() -> Qwen3VLForConditionalGeneration:
    vision = {
        "depth": 3,
        "hidden_size": 16,
        "out_hidden_size": WIDTH,
        "num_heads": 2,
        "intermediate_size": 32,
        "patch_size": 7,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    text = {**_TEXT, "head_dim": 8, "rope_parameters": _ROPE}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(vision_config=vision, text_config=text, **_qwen_tokens()))


def _smolvlm() -> SmolVLMForConditionalGeneration:
    vision = SmolVLMVisionConfig(**_VISION, image_size=28, patch_size=7)
    text = {"model_type": "llama", **_TEXT}
    return SmolVLMForConditionalGeneration(
        SmolVLMConfig(vision_config=vision, text_config=text, scale_factor=2, image_token_id=IMAGE, pad_token_id=0)
    )


def _idefics3() -> Idefics3ForConditionalGeneration:
    vision = Idefics3VisionConfig(**_VISION, image_size=28, patch_size=7)
    text = {"model_type": "llama", **_TEXT}
    return Idefics3ForConditionalGeneration(
        Idefics3Config(vision_config=vision, text_config=text, scale_factor=2, image_token_id=IMAGE, pad_token_id=0)
    )


def _internvl() -> InternVLForConditionalGeneration:
    vision = {**_VISION, "image_size": [28, 28], "patch_size": [7, 7], "use_absolute_position_embeddings": True}
    config = InternVLConfig(
        vision_config=vision,
        text_config={"model_type": "qwen2", **_TEXT},
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    return InternVLForConditionalGeneration(config)


def _siglip() -> dict[str, Any]:
    return {"model_type": "siglip_vision_model", **_VISION, "image_size": 28, "patch_size": 7, "vision_use_head": False}


def _paligemma() -> PaliGemmaForConditionalGeneration:
    text = {"model_type": "gemma", **_TEXT, "head_dim": 8}
    config = PaliGemmaConfig(
        vision_config={**_siglip(), "projection_dim": WIDTH},
        text_config=text,
        image_token_id=IMAGE,
        projection_dim=WIDTH,
    )
    return PaliGemmaForConditionalGeneration(config)


def _gemma3() -> Gemma3ForConditionalGeneration:
    text = {"model_type": "gemma3_text", **_TEXT, "head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 64,
            "layer_types": ["sliding_attention", "full_attention"] * 2}  # fmt: skip
    config = Gemma3Config(
        vision_config=_siglip(),
        text_config=text,
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        boi_token_index=97,
        eoi_token_index=96,
        mm_tokens_per_image=4,
    )
    return Gemma3ForConditionalGeneration(config)


# name → builder, image tokens of a prompt, extra tokens around the image
_FAMILIES: dict[str, tuple[Callable[[], PreTrainedModel], int]] = {
    "test_llava": (_llava, 16),
    "test_llava_next": (_llava_next, 88),
    "test_llava_onevision": (_llava_onevision, 88),
    "test_qwen2_vl": (_qwen2_vl, 6),
    "test_qwen2_5_vl": (_qwen2_5_vl, 6),
    "test_qwen3_vl": (_qwen3_vl, 6),
    "test_smolvlm": (_smolvlm, 4),
    "test_idefics3": (_idefics3, 4),
    "test_internvl": (_internvl, 4),
    "test_paligemma": (_paligemma, 16),
    "test_gemma3": (_gemma3, 4),
}
FAMILIES = tuple(_FAMILIES)


def random_model(name: str) -> PreTrainedModel:
    """A random sibling with fewer than 0.5 M parameters.

    Args:
        name: one of ``FAMILIES``.

    Raises:
        ValueError: unknown name.
    """
    if name not in _FAMILIES:
        raise ValueError(f"random_model: unknown family {name!r}; there are {', '.join(FAMILIES)}")
    model = _FAMILIES[name][0]()
    with torch.no_grad():  # released initializations give nearly equal logits, in which nothing could be seen
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model.eval()


def random_inputs(name: str, *, batch: int = 1, words: int = 6, padding: int = 0, seed: int = 0) -> dict[str, Any]:
    """A prompt for `random_model`: ``<bos>``, a word, the image, ``words`` words.

    Args:
        batch: prompts, each with its own image.
        padding: tokens of padding to the left of every prompt but the first, which gets as many further words.

    Shapes: input_ids, attention_mask (batch, T); pixel_values as the family has them.
    Raises: ValueError as `random_model`.
    """
    if name not in _FAMILIES:
        raise ValueError(f"random_inputs: unknown family {name!r}; there are {', '.join(FAMILIES)}")
    generator = torch.Generator().manual_seed(seed)
    image = [IMAGE] * _FAMILIES[name][1]
    qwen = name.startswith("test_qwen")
    if qwen:
        image = [97, *image, 96]
    if name == "test_gemma3":
        image = [97, *image, 96]
    rows = []
    for row in range(batch):
        extra = padding if row == 0 else 0
        text = torch.randint(3, 90, (words + extra + 1,), generator=generator).tolist()
        head = image if name == "test_paligemma" else [1, text[0], *image]
        tail = [1, *text] if name == "test_paligemma" else text[1:]
        rows.append([0] * (padding - extra if row else 0) + head + tail)
    ids = torch.tensor(rows)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if qwen:
        patches, width = 24, 3 * 2 * 7 * 7  # a grid of 4×6 patches
        inputs["pixel_values"] = torch.randn(batch * patches, width, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 6]] * batch)
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    elif name in ("test_llava_next", "test_llava_onevision"):
        inputs["pixel_values"] = torch.randn(batch, 5, 3, 28, 28, generator=generator)
        inputs["image_sizes"] = torch.tensor([[56, 56]] * batch)
    elif name in ("test_smolvlm", "test_idefics3"):
        inputs["pixel_values"] = torch.randn(batch, 1, 3, 28, 28, generator=generator)
    else:
        inputs["pixel_values"] = torch.randn(batch, 3, 28, 28, generator=generator)
    if name == "test_gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).long()
    if name == "test_paligemma":
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return inputs


def batched(*prompts: Mapping[str, Any]) -> dict[str, Any]:
    """Prompts of `random_inputs` for one family as one batch, padded to the left.

    Raises:
        ValueError: no prompt.
    """
    if not prompts:
        raise ValueError("batched: there is no prompt")
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    joined: dict[str, Any] = {}
    for name in prompts[0]:
        rows = [prompt[name] for prompt in prompts]
        if name.endswith(("_ids", "_mask")):
            rows = [torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows]
        joined[name] = torch.cat(rows)
    return joined
