"""MambaOut against its official formulation, whose blocks split one projection and concatenate, and against timm's."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_models.backbone import Stage, StagedBackbone
from vision_models.bench.measure import linear_row, model_rows
from vision_models.bench.timm_peer import timm_peer
from vision_models.layers.token_maps import DepthwiseConv, Linear
from vision_models.models.mambaout import GatedConvBlock, MambaOut

BLOCK: Any = GatedConvBlock  # timm's decorators of both classes hide their attributes from type checkers
CONV: Any = DepthwiseConv


def split(model: StagedBackbone) -> StagedBackbone:
    """A copy of ``model`` with the same parameters in the official formulation.

    Raises:
        ValueError: a network with a state-space model, which the official code has not.
    """
    if model.fixed_size:
        raise ValueError("split: the official formulation has no state-space model; build with ssm=False")
    peer = copy.deepcopy(model)
    kinds = {BLOCK: SplitBlock, CONV: nn.Conv2d, Linear: nn.Linear, Stage: ViewStage, MambaOut: SplitMambaOut}
    for module in peer.modules():
        if type(module) in kinds:
            module.__class__ = kinds[type(module)]
    return peer


class SplitMambaOut(MambaOut):
    """The image stays in the memory order it came in, as in the official code."""

    def prepared(self, x: Tensor) -> Tensor:
        """The images as they are."""
        return x


class ViewStage(Stage):
    """Permuted views instead of a copy in channels-last order."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, Y, X) → (B, dim, Y', X')."""
        return self.blocks(self.downsample(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SplitBlock(BLOCK):
    """One projection, cut in three; what is convolved and what is not, side by side in new memory."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, Y, X, C) → the same."""
        gate, identity, convolved = torch.split(self.fc1(self.norm(x)), self.parts, dim=-1)
        convolved = self.conv(convolved.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        act = F.gelu if self.act == "gelu" else F.silu
        return self.drop_path(self.ls(self.fc2(act(gate) * torch.cat((identity, convolved), dim=-1)))) + x


def rows(name: str, ours: StagedBackbone, x: Tensor, *, compiled: bool) -> list[dict[str, Any]]:
    """Those of the model beside both peers, and its linear layers by themselves."""
    found = model_rows(name, ours, split(ours), "official formulation", x, compiled=compiled)
    found += model_rows(name, ours, timm_peer(name, ours), "timm", x, compiled=compiled)
    return found if compiled else [found[0], linear_row(name, ours, x), *found[1:]]
