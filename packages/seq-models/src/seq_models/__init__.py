"""Attention models for sequences, true to their papers; importing makes Hugging Face's Auto classes know them."""

from seq_models.models import card, create_model, list_models, load_official
from seq_models.models.pointer_network import PointerNetwork

__all__ = ["PointerNetwork", "card", "create_model", "list_models", "load_official"]

list_models()  # imports every family, which makes the Auto classes know it
