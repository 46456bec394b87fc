"""A little bit of attention: gates of channels cheap enough for embedded processors.

Paper: Herzog, Ji, Teepe, Hörmann, Gilg, Rigoll, A Little Bit Attention Is All You Need for Person Re-Identification,
ICRA 2023, arXiv 2302.14574. No code was found, and the text at hand does not define the block: this is a reading of
its idea (channel attention of small cost, at a few places of a network), *no* reproduction. Its two gates are the
known ones: a convolution over neighboring channels (ECA, arXiv 1910.03151) or a bottleneck (SE, arXiv 1709.01507).

``start="identity"`` makes the gate 1 + tanh of a layer that starts at zero, so that a pretrained network computes what
it did before; ``"half"`` is the usual sigmoid.

Numbers are checked in ``tests/layers/test_little_attention.py`` against the equations. (B, C, Y, X) → same.
"""

# pyright: reportPrivateImportUsage=false
# (timm.layers exports these names, though it lists none)

from typing import Any, Literal

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from attn_core.catalog import Card, Entry


@register_notrace_module  # a leaf of FX graphs, as every module that is added to a network
class LittleAttention(nn.Module):
    """A gate for each channel from the channels' means. (B, dim, Y, X) → same.

    Args:
        kind: ``"conv"`` over neighboring channels, or ``"bottleneck"``.
        kernel_size: channels that a gate of ``"conv"`` sees, odd.
        reduction: how many times narrower the bottleneck is than ``dim``.
        start: ``"identity"`` or ``"half"``: what a fresh gate does.

    Raises: ValueError: an unknown kind or start, an even kernel, a reduction below 1.
    """

    def __init__(
        self,
        dim: int,
        kind: Literal["conv", "bottleneck"] = "conv",
        *,
        kernel_size: int = 3,
        reduction: int = 16,
        start: Literal["identity", "half"] = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if kind not in ("conv", "bottleneck"):
            raise ValueError(f"LittleAttention: kind must be 'conv' or 'bottleneck', got kind={kind!r}")
        if start not in ("identity", "half"):
            raise ValueError(f"LittleAttention: start must be 'identity' or 'half', got start={start!r}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"LittleAttention: kernel_size must be odd and positive, got kernel_size={kernel_size}")
        if reduction < 1:
            raise ValueError(f"LittleAttention: reduction must be positive, got reduction={reduction}")
        self.start = start
        self.kind = kind
        if kind == "conv":
            last = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False, **dd)
            self.gate = nn.Sequential(last)
        else:
            hidden = max(1, dim // reduction)
            last = nn.Linear(hidden, dim, **dd)
            self.gate = nn.Sequential(nn.Linear(dim, hidden, **dd), nn.ReLU(), last)
        if start == "identity":
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, Y, X) → same."""
        means = x.mean((2, 3))
        scores = self.gate(means[:, None])[:, 0] if self.kind == "conv" else self.gate(means)
        gates = scores.sigmoid() if self.start == "half" else 1 + scores.tanh()
        return x * gates[:, :, None, None]


CARD = Card(
    family="Little attention",
    paper="2302.14574",
    code="",
    license="",
    test="layers/test_little_attention.py",
)
ENTRIES = [Entry("little_attention", LittleAttention, CARD("Gates of channels; a reading of the paper's idea"))]
