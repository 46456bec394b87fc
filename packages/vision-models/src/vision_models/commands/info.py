"""The verb ``info``: what a model is, costs and takes."""

from collections.abc import Mapping
from typing import Any

import torch

from vision_models.models import card, create_model, timm_name


def info(name: str) -> Mapping[str, object]:
    """Rows of a table about a registered model."""
    from attn_core.flops import count_flops

    with torch.device("meta"):
        model = create_model(name).eval()
    cfg: Any = model.default_cfg
    about = card(name)
    channels, height, width = cfg["input_size"]

    def multiply_adds() -> str:
        with torch.device("meta"):
            return f"{count_flops(lambda: model(torch.empty(1, *cfg['input_size']))) / 2e9:.3f} G"

    return {
        "model": name,
        "in timm": timm_name(name),
        "what": about.summary,
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "multiply-adds": multiply_adds,
        "input": f"{channels}×{height}×{width}, any size from {model.min_side}×{model.min_side} works",
        "maps": ", ".join(f"{row['num_chs']} channels at 1/{row['reduction']}" for row in model.feature_info),
        "paper": f"arXiv:{about.paper}" if about.paper[:1].isdigit() else about.paper,
        "official code": f"{about.code} ({about.license or 'no licence stated'})" if about.code else "none released",
        "mean, std": f"{cfg['mean']}, {cfg['std']}",
    }
