"""Attention models for sequences, true to their papers; importing makes Hugging Face's Auto classes know them."""

from seq_models.models import card, create_model, list_models
from seq_models.models.pointer_network import PointerNetwork

__all__ = ["PointerNetwork", "card", "create_model", "list_models"]
