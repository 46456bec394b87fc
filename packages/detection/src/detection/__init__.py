"""Attention detectors (Plain-DETR, DFA3D lifting, BVR/RelationNet++) that install with pip: COCO in, mAP out."""
