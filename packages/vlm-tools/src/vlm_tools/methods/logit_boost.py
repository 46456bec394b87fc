"""Logit boost: a constant added to the scores of image tokens, the simplest way to make a model look.

Adding c multiplies the odds of image against text by e^c, whatever the scores' sign, so relations inside the image stay
as they are. It is the control that PAI's α·|s| has to beat. No publication; checked in ``tests/methods/test_pai.py``.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from attn_core.catalog import Card, Entry
from vlm_tools.intervention.method import AttentionCall, Method, check_number
from vlm_tools.methods.last_row import with_last_row


class LogitBoost(Method):
    """Add a constant to the image's scores of the last prompt row and of every decoded row.

    Args:
        strength: the constant; negative values turn the model away from the image.
        layers: layers to change; all but the first by default.
    """

    name = "logit_boost"

    def __init__(self, strength: float = 1.0, *, layers: Sequence[int] | None = None) -> None:
        super().__init__(layers)
        check_number("LogitBoost", "strength", strength)
        self.strength = strength

    def default_layers(self, count: int) -> Sequence[int]:
        """All but the first."""
        return range(min(1, count), count)

    def attend(self, call: AttentionCall) -> Float[Tensor, "B N H D"]:
        """Boost the last row."""
        add = torch.where(call.visual, self.strength, 0.0)[:, None]
        return with_last_row(call, lambda scores: scores + add.to(scores.dtype))


CARD = Card(family="Logit boost", paper="2407.21771", code="", license="", test="methods/test_logit_boost.py")
ENTRIES = [
    Entry(
        "logit_boost",
        LogitBoost,
        CARD("a constant added to the image's scores of the last prompt row and of every decoded row"),
    )
]
