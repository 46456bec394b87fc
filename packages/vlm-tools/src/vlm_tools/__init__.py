"""See and repair what a vision-language model looks at."""

from vlm_tools.act import ACT
from vlm_tools.agla import AGLA
from vlm_tools.intervention import Run, intervene
from vlm_tools.logit_boost import LogitBoost
from vlm_tools.method import Identity, Method
from vlm_tools.models import card, create_model, list_models, method_of
from vlm_tools.pai import PAI
from vlm_tools.paint import PAINT
from vlm_tools.sinks import find_sinks, register_sinks
from vlm_tools.var import VAR
from vlm_tools.vcd import VCD

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
