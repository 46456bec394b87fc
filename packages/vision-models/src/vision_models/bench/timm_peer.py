"""DaViT, FocalNet and HaloNet against timm's models of the same names, with the same weights."""

from typing import Any

import timm
import torch
from timm.layers.halo_attn import HaloAttn
from torch import Tensor, nn

from attn_core.weights import official_names
from vision_models.backbone import StagedBackbone
from vision_models.bench.measure import Layers, layer_rows, linear_row, model_rows
from vision_models.layers.halo_attention import HaloAttention
from vision_models.models import timm_name


def timm_peer(name: str, ours: StagedBackbone) -> nn.Module:
    """timm's model with our weights.

    Raises:
        ValueError: timm has no model of that name.
    """
    if timm_name(name) == name or not timm.is_model(name):  # our own name, or none
        raise ValueError(f"benchmark: timm has no {name} to compare with")
    peer: Any = timm.create_model(name)
    layout = "timm" if "timm" in ours.key_map else None
    names = official_names(ours, ours.key_map[layout]) if layout else {key: key for key in ours.state_dict()}
    own = ours.state_dict()
    state = {key: own[names[key]].view_as(value) for key, value in peer.state_dict().items()}
    peer.load_state_dict(state)
    return peer.to(next(ours.parameters()).device)


def rows(name: str, ours: StagedBackbone, x: Tensor, *, compiled: bool) -> list[dict[str, Any]]:
    """Those of the model, its linear layers by themselves, and HaloNet's attention layers by themselves."""
    torch.manual_seed(0)
    peer = timm_peer(name, ours)
    found = model_rows(name, ours, peer, "timm", x, compiled=compiled)
    if compiled:
        return found
    found.insert(1, linear_row(name, ours, x))
    if any(isinstance(layer, HaloAttention) for layer in ours.modules()):
        sides = {"ours": Layers(ours, HaloAttention, x), "peer": Layers(peer, HaloAttn, x)}
        found += layer_rows(name, "halo attention", "timm", sides, x)
    return found
