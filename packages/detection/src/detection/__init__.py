"""Attention detectors (Plain-DETR, DFA3D lifting, BVR/RelationNet++) that install with pip: COCO in, mAP out."""

from detection.models import card, create_model, list_models, load_official

__all__ = ["card", "create_model", "list_models", "load_official"]
