"""Training of Pointer Networks."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attn_core.engine import TaskModel, build

Constraint = Literal["none", "distinct", "tour"]


class PointingTask(TaskModel):
    """Teacher-forced training of a Pointer Network; answers by beam search.

    Args:
        net: a `seq_models.PointerNetwork`, or its recipe ``dict(type=PointerNetwork, ...)``.
        constraint: which answers beam search considers; in training, which points the softmax leaves out.
        beam: width of the search.
    """

    def __init__(self, net: nn.Module | dict[str, Any], *, constraint: Constraint = "none", beam: int = 1) -> None:
        super().__init__()
        built: nn.Module = build(net)
        self.net: Any = built
        self.constraint: Constraint = constraint
        self.beam = beam

    def loss(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, points: Float[Tensor, "B N 2"], pointers: Int[Tensor, "B T"]
    ) -> dict[str, Tensor]:
        """Mean over the batch of −log p(pointers), the end counted once."""
        log_prob = self.net(points, pointers, constraint=self.constraint)
        taken = log_prob.gather(-1, pointers[..., None]).squeeze(-1)
        before = torch.cat([torch.ones_like(pointers[:, :1]), pointers[:, :-1]], dim=1)
        return {"loss": -taken.where(before > 0, 0.0).sum(1).mean()}

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, points: Float[Tensor, "B N 2"], pointers: Int[Tensor, "B T"]
    ) -> list[dict[str, Any]]:
        """Per instance ``{"points": (N, 2), "pointers": the answer, "truth": the right one}``, ends left out."""
        found = self.net.decode(points, constraint=self.constraint, beam=self.beam).pointers.cpu()
        return [
            {"points": p, "pointers": trimmed(answer), "truth": trimmed(truth)}
            for p, answer, truth in zip(points.cpu(), found.tolist(), pointers.tolist(), strict=True)
        ]


def trimmed(pointers: Sequence[int]) -> list[int]:
    """What stands before the first 0."""
    answer = list(pointers)
    return answer[: answer.index(0)] if 0 in answer else answer
