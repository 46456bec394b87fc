"""How weights start: as timm's do, and on the meta device without an operator."""

from typing import Any

import timm.layers
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vision_models.initialization import trunc_normal_


def test_weights_are_timms_and_nothing_is_drawn_without_memory() -> None:
    drawn = []
    for draw in (trunc_normal_, timm.layers.trunc_normal_):  # pyright: ignore[reportPrivateImportUsage]
        torch.manual_seed(0)
        drawn.append(draw(torch.empty(50), std=0.02, a=-0.03, b=0.03))
    torch.testing.assert_close(*drawn)
    called = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func)
            return func(*args, **(kwargs or {}))

    nothing = torch.empty(50, device="meta")
    with Recorder():
        assert trunc_normal_(nothing, std=0.02) is nothing
    assert called == []
