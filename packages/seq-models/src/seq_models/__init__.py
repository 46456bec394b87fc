"""Attention models for sequences, true to their papers; importing makes Hugging Face's Auto classes know them.

The command ``seq-models`` alone does that when a verb runs: its ``--help`` does without transformers.
"""

from typing import TYPE_CHECKING

from attn_core.deferred import deferred, running_command
from seq_models.models import card, create_model, list_models, load_official

if TYPE_CHECKING:
    from seq_models.models.pointer_network import PointerNetwork

__all__ = ["PointerNetwork", "card", "create_model", "list_models", "load_official"]

__getattr__, __dir__ = deferred(__name__, {"seq_models.models.pointer_network": ("PointerNetwork",)})

if running_command() != "seq-models":
    list_models()  # imports every family, which makes the Auto classes know it
