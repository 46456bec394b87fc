"""Training of Sparsifiner as a student of DeiT: first its guesses, then the network with the keys that they keep."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from attn_core.engine import ClassificationTask, build
from vision_models.models.deit import DeiT
from vision_models.models.sparsifiner import Sparsifiner
from vision_models.official import load_official


class SparsifinerTask(ClassificationTask):
    """A student that starts from the weights of a DeiT of its size, in two phases.

    First all keys are read, and the guesses of each block are fitted to the teacher's attention (sum of squares, mean
    over blocks). Then the keys that they keep are read, and cross-entropy is joined by the divergence from the
    teacher's classes and the distance from its last tokens. Where no trained teacher is at hand it is trained before.

    Args:
        net: The student, or its recipe.
        teacher: A DeiT, or its recipe.
        teacher_weights: File, or ``hf://owner/repo/file``, with the teacher's weights.
        teacher_steps: Steps in which the teacher is trained by cross-entropy; 0: it is trained already.
        guess_steps: Steps of the first phase.
        guess, classes, tokens: Weights of the teacher's terms.
        options: Those of :class:`attn_core.engine.ClassificationTask`.
    """

    steps: Tensor
    net: Sparsifiner  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        net: Sparsifiner | dict[str, Any],
        *,
        teacher: DeiT | dict[str, Any],
        teacher_weights: str | Path | None = None,
        teacher_steps: int = 0,
        guess_steps: int,
        guess: float = 0.01,
        classes: float = 0.5,
        tokens: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(net, **options)
        self.teacher: DeiT = build(teacher)
        if teacher_weights is not None:
            load_official(self.teacher, teacher_weights)
        self.teacher_steps, self.guess_steps = teacher_steps, guess_steps
        self.weights = {"guess": guess, "classes": classes, "tokens": tokens}
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        if teacher_steps == 0:
            self._start()

    def _start(self) -> None:
        """Give the student the teacher's weights, which do not change any more."""
        self.net.load_state_dict(self.teacher.state_dict(), strict=False)
        self.teacher.requires_grad_(False)

    def loss(self, image: Float[Tensor, "B C Y X"], label: Int[Tensor, " B"], **_: Any) -> dict[str, Tensor]:
        """The terms of the phase that the step, which this counts, belongs to."""
        step = int(self.steps)
        self.steps += 1
        partner, share = torch.arange(len(label), device=label.device), 1.0
        if self.mixup or self.cutmix:
            image, partner, share = self._mix(image)

        def entropy(logits: Tensor) -> Tensor:
            own, other = (
                F.cross_entropy(logits.float(), target, label_smoothing=self.label_smoothing)
                for target in (label, label[partner])
            )
            return share * own + (1 - share) * other

        if step < self.teacher_steps:
            return {"loss_teacher": entropy(self.teacher(image))}
        if step == self.teacher_steps > 0:
            self._start()
        self.teacher.eval()
        if step < self.teacher_steps + self.guess_steps:
            with torch.no_grad():
                maps = attention_maps(self.teacher, image)
            apart = [(g - m[:, :, 1:]).square().sum() for g, m in zip(self.net.guesses(image), maps, strict=True)]
            return {"loss_guess": self.weights["guess"] * torch.stack(apart).mean()}
        with torch.no_grad():
            theirs = self.teacher.forward_features(image)
            their_classes = self.teacher.forward_head(theirs).float().log_softmax(1)
        ours = self.net.forward_features(image)
        logits = self.net.forward_head(ours)
        apart = F.kl_div(logits.float().log_softmax(1), their_classes, reduction="batchmean", log_target=True)
        return {
            "loss": entropy(logits),
            "loss_classes": self.weights["classes"] * apart,
            "loss_tokens": self.weights["tokens"] * F.mse_loss(ours[:, 1:].float(), theirs[:, 1:].float()),
        }


def attention_maps(net: DeiT, image: Tensor) -> list[Tensor]:
    """The attention (B, heads, 1 + N, 1 + N) of each block of a DeiT with softmax attention."""
    x, grid = net.tokens(image)
    found = []
    for block in net.blocks:
        attn: Any = block.attn
        q, k, _ = attn.qkv(block.norm1(x)).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # pyright: ignore[reportCallIssue]
        found.append((q @ k.mT * q.shape[3] ** -0.5).softmax(3))
        x = block(x, grid)
    return found
