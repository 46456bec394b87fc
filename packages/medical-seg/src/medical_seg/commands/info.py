"""``info``: the rows about a model."""

from collections.abc import Mapping
from typing import Any

import torch

from medical_seg.models import CATALOG, create_model
from medical_seg.models.acmil import BagNetwork


def info(name: str) -> Mapping[str, object]:
    """Rows of a table about a registered model."""
    about = CATALOG.info(name)
    with torch.device("meta"):
        model: Any = create_model(name)
    if isinstance(model, BagNetwork):
        reads, gives = (
            f"bags of any number of instances with {model.in_channels} features",
            "classes of a bag, attention",
        )
    else:
        reads = f"{model.in_channels} channel, every axis divisible by {model.divisor}"
        gives = f"logits of {model.out_channels} classes on the same grid"
    return {
        **about,
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "input": reads,
        "output": gives,
    }
