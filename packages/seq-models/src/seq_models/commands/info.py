"""``seq-models info MODEL``."""

from collections.abc import Mapping

import torch

from seq_models.models import card, create_model


def info(name: str) -> Mapping[str, object]:
    """Rows of a table about a registered model."""
    about = card(name)
    with torch.device("meta"):
        model = create_model(name)
    return {
        "model": name,
        "system": about.family,
        "what": about.summary,
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "paper": about.paper,
        "official code": f"{about.code} ({about.license})" if about.code else "none released",
        "checked in": f"tests/{about.test}",
    }
