"""The digits-world magnifier: 0.2 M parameters that read the digit in a named cell from a blurred picture, or closer.

Paper: LSceneLLM, Zhi et al., CVPR 2025, arXiv 2412.01292; official code: https://github.com/Hoyyyaard/LSceneLLM. The
decoder and its plug-in are those of `vlm_tools.models.scene_magnifier`; picture and question are ours: each of the 16
cells is one coarse token of its 3×3 averages, and has P dense tokens from its 9×9 pixels. Both forms see 16 coarse
tokens and one of the question; without the magnifier nothing else.

Numbers are checked in ``tests/models/test_digits_world_magnifier.py``.

Shapes: image (B, 1, 36, 36) in [0, 1], cell (B,) in 0 … 15 → logits (B, 10).
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaModel

from attn_core.catalog import Card, Entry
from vlm_tools.data.digits_world import CELL, GRID, IMAGE_TOKENS, SIZE
from vlm_tools.models.scene_magnifier import THRESHOLD, SceneMagnifier, magnified

BLURRED = 3  # averages along a side of a cell


class DigitsWorldMagnifier(nn.Module):
    """Which digit is in a cell.

    Args:
        magnify: with dense tokens; without them the same decoder on the same tokens.
        width, layers: of the decoder; it has four heads.
        per_token: dense tokens of a cell.
        start, threshold, warm_up: as of `SceneMagnifier`.

    Raises:
        ValueError: a width that 8 does not divide, no dense token; what `SceneMagnifier` refuses.
    """

    def __init__(
        self,
        *,
        magnify: bool = True,
        width: int = 64,
        layers: int = 4,
        per_token: int = 4,
        start: int = 1,
        threshold: float = THRESHOLD,
        warm_up: float | None = 20.0,
    ) -> None:
        super().__init__()
        if width < 8 or width % 8 or per_token < 1:
            raise ValueError(
                "DigitsWorldMagnifier: width must be a multiple of 8 and per_token at least 1, got "
                f"width={width}, per_token={per_token}"
            )
        self.per_token = per_token
        self.coarse = nn.Linear(BLURRED**2, width)
        self.cells = nn.Embedding(IMAGE_TOKENS, width)
        self.asked = nn.Embedding(IMAGE_TOKENS, width)
        config: Any = LlamaConfig(
            vocab_size=1,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=IMAGE_TOKENS + 1,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.decoder = LlamaModel(config)
        self.decoder.embed_tokens.weight.requires_grad_(False)  # tokens come as vectors
        self.head = nn.Linear(width, 10)
        self.magnifier: SceneMagnifier | None = None
        if magnify:
            self.dense = nn.Sequential(
                nn.Linear(CELL**2, 2 * width), nn.GELU(), nn.Linear(2 * width, per_token * width)
            )
            self.magnifier = SceneMagnifier(self.decoder, start=start, threshold=threshold, warm_up=warm_up)

    def forward(self, image: Float[Tensor, "B 1 Y X"], cell: Int[Tensor, " B"]) -> Float[Tensor, "B 10"]:
        """Logits of the digit.

        Raises:
            ValueError: a picture of another size.
        """
        if tuple(image.shape[1:]) != (1, SIZE, SIZE):
            raise ValueError(
                f"DigitsWorldMagnifier: image must be (B, 1, {SIZE}, {SIZE}), got {tuple(image.shape)}; resize it"
            )
        pixels = image.unflatten(3, (GRID, CELL)).unflatten(2, (GRID, CELL)).permute(0, 2, 4, 1, 3, 5)
        pixels = pixels.reshape(len(image), IMAGE_TOKENS, CELL, CELL)
        blurred = F.adaptive_avg_pool2d(pixels, BLURRED).flatten(2)
        tokens = torch.cat([self.coarse(blurred) + self.cells.weight, self.asked(cell)[:, None]], 1)
        if self.magnifier is None:
            return self.head(self.decoder(inputs_embeds=tokens, use_cache=False).last_hidden_state[:, -1])
        dense = self.dense(pixels.flatten(2)).unflatten(-1, (self.per_token, -1))
        scene = torch.arange(IMAGE_TOKENS + 1, device=image.device).lt(IMAGE_TOKENS).expand(len(image), -1)
        with magnified(self.decoder, self.magnifier, dense, scene):
            return self.head(self.decoder(inputs_embeds=tokens, use_cache=False).last_hidden_state[:, -1])


CARD = Card(
    family="LSceneLLM",
    paper="2412.01292",
    code="https://github.com/Hoyyyaard/LSceneLLM",
    license="MIT",
    test="models/test_scene_magnifier.py",
)
ENTRIES = [
    Entry(
        "digits_world_magnifier",
        DigitsWorldMagnifier,
        CARD("the scene magnifier on digits; SceneMagnifier itself goes into any decoder"),
    )
]
