"""Learning rates and weight decays of Plain-DETR's parameters.

Source: https://github.com/impiga/Plain-DETR, ``util/misc.py`` (get_param_dict) and ``models/swin_transformer_v2.py``;
layer decay: Bao et al., BEiT, ICLR 2022, arXiv 2106.08254. Checked in: ``tasks/test_plain_detr_groups.py``.
"""

import re
from typing import Any

from torch import nn

from attn_core.engine import ParameterGroups
from attn_core.engine.errors import ConfigError
from detection.models.plain_detr.swin_v2 import SwinV2

NO_DECAY = ("norm", "bias", "rpb_mlp", "cpb_mlp", "logit_scale", "level_embed", "rel_pos")


class PlainDETRGroups(ParameterGroups):
    """One group per learning rate and weight decay; names with one of `NO_DECAY` in them are not decayed.

    Reads two settings of ``paramwise_cfg``: ``decay_rate`` multiplies the rate of a `SwinV2` layer once for each layer
    above it (1 for everything behind the backbone); ``custom_keys={"body.": {"lr_mult": 0.1}}`` multiplies the rate of
    parameters with that text in their name.

    Raises: ConfigError if ``decay_rate`` is set for another backbone.
    """

    def add_params(
        self,
        params: list[dict[str, Any]],
        module: nn.Module,
        prefix: str = "",  # noqa: ARG002  mmengine's signature
        is_dcn_module: Any = None,  # noqa: ARG002  mmengine's signature
    ) -> None:
        """Collect the groups of the whole model."""
        rate = self.paramwise_cfg.get("decay_rate")
        custom = self.paramwise_cfg.get("custom_keys", {})
        swin = next((part for part in module.modules() if isinstance(part, SwinV2)), None)
        if rate is not None and swin is None:
            raise ConfigError(f"PlainDETRGroups: decay_rate={rate} needs a Swin V2 backbone; use custom_keys")
        depths = [len(stage.blocks) for stage in swin.layers] if swin is not None else []  # pyright: ignore[reportArgumentType]
        groups: dict[tuple[float, float], dict[str, Any]] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            lr = self.base_lr or 0.0
            for key, setting in custom.items():
                lr *= setting.get("lr_mult", 1.0) if key in name else 1.0
            if rate is not None:
                lr *= rate ** layers_above(name, depths)
            decay = 0.0 if any(word in name for word in NO_DECAY) else self.base_wd or 0.0
            group = groups.setdefault((lr, decay), {"params": [], "lr": lr, "weight_decay": decay})
            group["params"].append(parameter)
        params.extend(groups.values())


def layers_above(name: str, depths: list[int]) -> int:
    """How many layers lie between a parameter and the end of a Swin V2 backbone with these depths; 0 behind it."""
    last = sum(depths) + 1
    if "body.patch_embed." in name:
        return last
    if match := re.search(r"body\.layers\.(\d+)\.blocks\.(\d+)\.", name):
        return last - (1 + sum(depths[: int(match[1])]) + int(match[2]))
    if match := re.search(r"body\.layers\.(\d+)\.downsample\.", name):
        return last - sum(depths[: int(match[1]) + 1])
    return 0
