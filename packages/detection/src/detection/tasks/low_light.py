"""Detectors in the dark, for recipes. Checked in: ``layers/test_featenhancer.py``."""

from typing import Any

from torch import nn

from attn_core.engine import build
from detection.layers.featenhancer import Enhanced, FeatEnHancer


def enhanced_detector(
    detector: nn.Module | dict[str, Any], *, enhance: bool = True, width: int = 32, blocks: int = 8
) -> nn.Module:
    """A detector, or its recipe ``dict(type=..., ...)``, behind a new `FeatEnHancer`; or without it, as it is.

    Raises: ValueError as `FeatEnHancer` and `Enhanced`.
    """
    net: nn.Module = build(detector)
    return Enhanced(net, FeatEnHancer(width=width, blocks=blocks)) if enhance else net
