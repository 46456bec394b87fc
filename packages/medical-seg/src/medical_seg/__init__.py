"""Attention networks for medical image segmentation: from a folder of NIfTI to masks."""

from medical_seg.models import card, create_model, list_models, load_official

__all__ = ["card", "create_model", "list_models", "load_official"]
