"""The digits-world LLaVA: 0.4 M parameters, trained in minutes on a CPU, made to hallucinate.

Architecture: ``transformers.LlavaForConditionalGeneration`` (Liu et al., Visual Instruction Tuning, NeurIPS 2023, arXiv
2304.08485) with a CLIP tower of two layers (one token for each of the 16 cells) and a Llama decoder of four. Every tool
of this package runs on it as on a released checkpoint.

Training: `vlm_tools.digits.task`.

Shapes: pixel_values (B, 1, 36, 36) in [0, 1]; 16 image tokens behind ``<bos>``.
"""

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from attn_core.catalog import Card, Entry
from vlm_tools.data.digits_world import CELL, SIZE
from vlm_tools.data.words import BOS, EOS, IMAGE, PAD, Words


def digits_world_llava(
    *, vision_width: int = 64, width: int = 96, layers: int = 4, heads: int = 4
) -> LlavaForConditionalGeneration:
    """The network with random weights.

    Raises:
        ValueError: a width that the heads do not divide.
    """
    if width % heads or vision_width % 4:
        raise ValueError(f"digits_world_llava: width must be a multiple of heads and vision_width of 4, "
                         f"got width={width}, heads={heads}, vision_width={vision_width}")  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=vision_width,
        intermediate_size=2 * vision_width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_channels=1,
        image_size=SIZE,
        patch_size=CELL,
        projection_dim=vision_width,
    )
    text = LlamaConfig(
        vocab_size=len(Words()),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_token_id=IMAGE,  # pyright: ignore[reportCallIssue]
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        pad_token_id=PAD,  # pyright: ignore[reportCallIssue]
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id = PAD
    model.generation_config.bos_token_id = BOS
    model.generation_config.eos_token_id = EOS
    return model


CARD = Card(
    family="LLaVA",
    paper="2304.08485",
    code="https://github.com/haotian-liu/LLaVA",
    license="Apache-2.0",
    test="models/test_digits_world_llava.py",
)
ENTRIES = [Entry("digits_world_llava", digits_world_llava,
                 CARD("the built-in model that hallucinates, trained by the recipe llava_digits"))]  # fmt: skip
