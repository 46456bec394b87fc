"""See and repair what a vision-language model looks at."""

from typing import TYPE_CHECKING

from attn_core.deferred import deferred
from vlm_tools.models import card, create_model, list_models, method_of

if TYPE_CHECKING:
    from vlm_tools.intervention.hooking import Run, intervene
    from vlm_tools.intervention.method import Method
    from vlm_tools.methods.act import ACT
    from vlm_tools.methods.agla import AGLA
    from vlm_tools.methods.identity import Identity
    from vlm_tools.methods.logit_boost import LogitBoost
    from vlm_tools.methods.pai import PAI
    from vlm_tools.methods.paint import PAINT
    from vlm_tools.methods.sinks import find_sinks, register_sinks
    from vlm_tools.methods.var import VAR
    from vlm_tools.methods.vcd import VCD

__all__ = [
    "ACT",
    "AGLA",
    "PAI",
    "PAINT",
    "VAR",
    "VCD",
    "Identity",
    "LogitBoost",
    "Method",
    "Run",
    "card",
    "create_model",
    "find_sinks",
    "intervene",
    "list_models",
    "method_of",
    "register_sinks",
]

__getattr__, __dir__ = deferred(
    __name__,
    {
        "vlm_tools.intervention.hooking": ("Run", "intervene"),
        "vlm_tools.intervention.method": ("Method",),
        "vlm_tools.methods.act": ("ACT",),
        "vlm_tools.methods.agla": ("AGLA",),
        "vlm_tools.methods.identity": ("Identity",),
        "vlm_tools.methods.logit_boost": ("LogitBoost",),
        "vlm_tools.methods.pai": ("PAI",),
        "vlm_tools.methods.paint": ("PAINT",),
        "vlm_tools.methods.sinks": ("find_sinks", "register_sinks"),
        "vlm_tools.methods.var": ("VAR",),
        "vlm_tools.methods.vcd": ("VCD",),
    },
)
