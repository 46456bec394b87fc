"""``info``: the rows about a model."""

from collections.abc import Mapping
from typing import Any

import torch

from medical_seg.models import CATALOG, create_model


def info(name: str) -> Mapping[str, object]:
    """Rows of a table about a registered model."""
    about = CATALOG.info(name)
    with torch.device("meta"):
        model: Any = create_model(name)
    return {
        **about,
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "input": f"{model.in_channels} channel, every axis divisible by {model.divisor}",
        "output": f"logits of {model.out_channels} classes on the same grid",
    }
