"""SpectFormer and GFNet against their official formulation: full attention scores, spectra left in float32."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vision_models.backbone import Stage, StagedBackbone
from vision_models.bench.mambaout import CONV, ViewStage
from vision_models.bench.measure import linear_row, model_rows
from vision_models.layers.spectral_gate import SpectralGate
from vision_models.layers.token_maps import Linear
from vision_models.models.spectformer import Attention, ConvMlp, SpectFormer, SpectFormerH, SplitAttention, heads_of

GATE: Any = SpectralGate


def official(model: StagedBackbone) -> StagedBackbone:
    """A copy of ``model`` with the same parameters in the official formulation, for the size it was built for."""
    peer = copy.deepcopy(model)
    kinds: dict[Any, Any] = {
        Attention: FullAttention,
        SplitAttention: FullSplitAttention,
        GATE: FixedGate,
        ConvMlp: PlainConvMlp,
        CONV: nn.Conv2d,
        Linear: nn.Linear,
        Stage: ViewStage,
        SpectFormer: OfficialSpectFormer,
        SpectFormerH: OfficialSpectFormerH,
    }
    for module in peer.modules():
        if type(module) in kinds:
            module.__class__ = kinds[type(module)]
    return peer


class OfficialSpectFormer(SpectFormer):
    """The image stays in the memory order it came in, as in the official code."""

    def prepared(self, x: Tensor) -> Tensor:
        """The images as they are."""
        return x


class OfficialSpectFormerH(SpectFormerH):
    """The same for the hierarchical network."""

    def prepared(self, x: Tensor) -> Tensor:
        """The images as they are."""
        return x


class FixedGate(GATE):
    """The gate of one size, in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, Y, X, C) → the same in float32."""
        spectrum = torch.fft.rfft2(x.to(torch.float32), dim=(1, 2), norm="ortho")
        spectrum = spectrum * torch.view_as_complex(self.complex_weight)
        return torch.fft.irfft2(spectrum, s=x.shape[1:3], dim=(1, 2), norm="ortho")


def scored(q: Tensor, k: Tensor, v: Tensor, num_heads: int, like: Tensor) -> Tensor:
    """Attention with the N×N scores in memory."""
    q, k, v = (heads_of(tokens, num_heads) for tokens in (q, k, v))
    weights = ((q @ k.transpose(-2, -1)) * q.shape[3] ** -0.5).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).reshape(like.shape)


class FullAttention(Attention):
    """Softmax over all tokens with the scores in full."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, Y, X, C) → the same."""
        return self.proj(scored(*self.projected(x), self.num_heads, x))


class FullSplitAttention(SplitAttention):
    """The same with queries projected apart."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) → the same."""
        q, k, v = self.projected(x)
        return self.proj(scored(q, k, v, self.num_heads, q))


class PlainConvMlp(ConvMlp):
    """The convolution on tokens copied into a map of channels."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, Y, X, C) → the same."""
        hidden = self.dwconv(self.fc1(x).flatten(1, 2).transpose(1, 2).unflatten(2, x.shape[1:3]))
        return self.fc2(nn.functional.gelu(hidden.permute(0, 2, 3, 1)))


def rows(name: str, ours: StagedBackbone, x: Tensor, *, compiled: bool) -> list[dict[str, Any]]:
    """Those of the model, and its linear layers by themselves."""
    found = model_rows(name, ours, official(ours), "official formulation", x, compiled=compiled)
    return found if compiled else [found[0], linear_row(name, ours, x), *found[1:]]
