"""Training of the digits-world LLaVA: the tower learns to name the digit of each cell, projector and decoder the text.

The text's gradient does not reach the tower, as in LLaVA's stages, but both are trained at once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from attn_core.engine import Metric, TaskModel
from vlm_tools.data.digits_world import IMAGE_TOKENS, sees
from vlm_tools.digits.evaluation import answer_all, caption_all, scores_of
from vlm_tools.models.digits_world_llava import digits_world_llava

EMPTY_WEIGHT = 0.3  # of empty cells in the tower's loss: they are four in five


class DigitsLlavaTask(TaskModel):
    """Training of the digits-world LLaVA: cells for the tower, captions and answers for projector and decoder.

    Args:
        vision_width, width, layers, heads: sizes, as of `digits_world_llava`.
    """

    def __init__(self, *, vision_width: int = 64, width: int = 96, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.net = digits_world_llava(vision_width=vision_width, width=width, layers=layers, heads=heads)
        self.cell_head = nn.Linear(vision_width, 11)
        weight = torch.ones(11)
        weight[10] = EMPTY_WEIGHT
        self.register_buffer("cell_weight", weight, persistent=False)

    def tensor(self, image: Float[Tensor, "B 1 Y X"], **_: Any) -> Float[Tensor, "B 16 K"]:
        """Logits of the digit in each cell (10: none)."""
        return self.cell_head(self._features(image))

    def loss(
        self,
        image: Float[Tensor, "B 1 Y X"],
        cells: Int[Tensor, "B 16"],
        input_ids: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"],
        segment: Int[Tensor, "B T"],
        position_ids: Int[Tensor, "B T"],
        **_: Any,
    ) -> dict[str, Tensor]:
        """``{"loss_cells", "loss_text"}``: cross-entropies."""
        used = int((segment >= 0).sum(1).max())
        input_ids, targets, segment, position_ids = (x[:, :used] for x in (input_ids, targets, segment, position_ids))
        features = self._features(image)
        cell_loss = F.cross_entropy(self.cell_head(features).flatten(0, 1), cells.flatten(), weight=self.cell_weight)  # pyright: ignore[reportArgumentType]
        model: Any = self.net.model
        projected = model.multi_modal_projector(features.detach())
        embeds = model.get_input_embeddings()(input_ids)
        embeds = torch.cat([embeds[:, :1], projected, embeds[:, 1 + IMAGE_TOKENS :]], dim=1)
        mask = torch.zeros(1, dtype=embeds.dtype, device=image.device)
        mask = mask.where(sees(segment), torch.finfo(embeds.dtype).min)
        hidden = model.language_model(
            inputs_embeds=embeds, attention_mask=mask[:, None], position_ids=position_ids, use_cache=False
        ).last_hidden_state
        learned = targets != -100
        logits = self.net.lm_head(hidden[learned])
        return {"loss_cells": cell_loss, "loss_text": F.cross_entropy(logits.float(), targets[learned])}

    def predict(self, image: Float[Tensor, "B 1 Y X"], cells: Int[Tensor, "B 16"], **_: Any) -> list[dict[str, Any]]:
        """Per scene ``present`` and ``says``, (10,) bool, ``caption``, and ``cells``, the share of cells right."""
        says = answer_all(self.net, image)
        captions = caption_all(self.net, image)
        right = (self.tensor(image).argmax(-1) == cells).float().mean(1)
        present = torch.stack([(cells == digit).any(1) for digit in range(10)], dim=1)
        return [
            {"present": here.cpu(), "says": said.cpu(), "caption": caption, "cells": float(share)}
            for here, said, caption, share in zip(present, says, captions, right, strict=True)
        ]

    def _features(self, image: Float[Tensor, "B 1 Y X"]) -> Float[Tensor, "B 16 C"]:
        tower: Any = self.net.model.vision_tower
        return tower(image).last_hidden_state[:, 1:]


class Hallucination(Metric):
    """POPE accuracies on three kinds of questions, CHAIR and recall of captions; shares in [0, 1]."""

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:  # noqa: ARG002  mmengine's signature
        """Keep what `DigitsLlavaTask.predict` gives."""
        self.results.extend(data_samples)

    def compute_metrics(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """Of all scenes of all processes."""
        scores = scores_of(
            torch.stack([result["present"] for result in results]),
            torch.stack([result["says"] for result in results]),
            [result["caption"] for result in results],
        )
        found = {"cells": sum(result["cells"] for result in results) / len(results)}
        return {**scores.row(), **found}
